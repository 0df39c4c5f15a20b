"""The tokenizer and sampling."""
import socket

import numpy as np
import pytest
import torch

from train_gpt2 import GPT, GPTConfig, gpt2_encoding, sample


@pytest.fixture(scope="module")
def enc():
    return gpt2_encoding()


def test_tokenizer_is_gpt2s_and_needs_no_network(enc, monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # nothing from an earlier download
    assert gpt2_encoding().encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert enc.n_vocab == 50257 and enc.eot_token == 50256
    text = "naïve café 東京 \t\n  x=1; don't 12345"
    assert enc.decode(enc.encode(text)) == text
    ids = [enc.encode_single_token(enc.decode_single_token_bytes(n)) for n in range(50257)]
    assert ids == list(range(50257))


class Rigged(torch.nn.Module):
    """Scores token t + 1 highest after token t, then t + 2, and so on downwards."""

    config = GPTConfig(block_size=8)

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(()))
        self.longest = 0

    def forward(self, idx, cache, at):
        self.longest = max(self.longest, idx.shape[1])
        gap = (torch.arange(50304) - idx[:, :, None] - 1) % 50257  # (B, T, 50304)
        logits = -gap.float() * 0.1
        logits[:, :, 50257:] = 1000.0  # the padding screams
        return logits[at], None


def test_greedy_takes_the_likeliest_and_old_tokens_drop_out(enc):
    model = Rigged()
    text, = sample(model, enc, " a", num_samples=1, max_new_tokens=20, top_k=1)
    start = enc.encode(" a")[0]
    assert text == enc.decode([start + n for n in range(21)])
    assert model.longest == 8  # never more than block_size, though 21 tokens were made


def test_what_is_shown_is_what_is_returned(enc, capsys):
    for number in range(30, 40):  # after "~", token 93, come the single bytes, and some of them begin a letter
        text, = sample(Rigged(), enc, "~", num_samples=1, max_new_tokens=number, top_k=1, show=True)
        assert capsys.readouterr().out == text


def test_only_the_top_k_are_drawn_and_all_of_them(enc):
    start = enc.encode(" a")[0]
    texts = sample(Rigged(), enc, " a", num_samples=400, max_new_tokens=1, top_k=5)
    assert set(texts) == {enc.decode([start, start + n]) for n in range(1, 6)}


def test_samples_repeat_and_leave_the_random_numbers_alone(enc):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=32))
    state = torch.get_rng_state()
    texts = sample(model, enc, "Hello", num_samples=3, max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(texts)) == 3 and all(text.startswith("Hello") for text in texts)
    assert sample(model, enc, "Hello", num_samples=3, max_new_tokens=8) == texts
    assert sample(model, enc, "Hello", num_samples=3, max_new_tokens=8, seed=43) != texts


def test_the_padding_is_never_sampled(enc):
    texts = sample(Rigged(), enc, " a", num_samples=50, max_new_tokens=10)  # an id over 50256 can't be decoded
    assert len(texts) == 50


def test_a_cache_changes_no_logit():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32)), torch.randint(50257, (3, 16))
    whole, cache = model(idx)[0], {}
    parts = [model(part, cache=cache)[0] for part in idx.split([5, 1, 1, 7, 2], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
    assert torch.allclose(model(idx, at=np.s_[:, -1])[0], whole[:, -1], atol=1e-5)
    with pytest.raises(ValueError, match="17 tokens is longer than block_size, 16"):
        model(idx[:, :1], cache=cache)


def test_the_same_tokens_as_without_a_cache(enc):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32))
    texts = sample(model, enc, "Once upon a time", max_new_tokens=30)  # and on, where the oldest drop out
    generator, idx = torch.Generator().manual_seed(42), torch.tensor([enc.encode("Once upon a time")] * 4)
    for _ in range(30):
        logits, ids = model(idx[:, -16:])[0][:, -1, :50257].topk(50)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        idx = torch.cat((idx, ids.gather(1, drawn)), dim=1)
    assert texts == [enc.decode(row) for row in idx.tolist()]
