"""The tokenizer and sampling."""
import inspect
import socket

import pytest
import torch

import train_gpt2
from fineweb import gpt2_encoding
from train_gpt2 import (
    GPT,
    GPTConfig,
    draw_token,
    sample,
)

TINY = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32)
VOCAB_SIZE = 50304  # 50257, and padding


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(TINY)


def decode(tokens):
    return gpt2_encoding().decode(tokens)


def test_tokenizer_is_gpt2s_and_needs_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # nothing from an earlier download
    encoding = inspect.unwrap(gpt2_encoding)()  # not the one that was kept
    hello = encoding.encode("Hello, I'm a language model,")
    assert hello == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.n_vocab == 50257
    assert encoding.eot_token == 50256
    text = "naïve café 東京 \t\n  x=1; don't 12345"
    assert encoding.decode(encoding.encode(text)) == text
    for number in range(50257):
        assert encoding.encode_single_token(encoding.decode_single_token_bytes(number)) == number


class Score(torch.nn.Module):
    """In place of lm_head: it reads a token's id, and scores the id after it highest."""

    def forward(self, x):
        gap = (torch.arange(VOCAB_SIZE) - x - 1) % 50257  # (N, VOCAB_SIZE)
        logits = -0.1 * gap
        logits[..., 50257:] = 1000.0  # the padding screams
        return logits


class Rigged(GPT):
    """Scores token t + 1 highest after token t, then t + 2, and so on downwards."""

    def __init__(self):
        super().__init__(
            GPTConfig(block_size=8, vocab_size=VOCAB_SIZE, n_layer=1, n_head=1, n_embd=1))
        for p in self.parameters():
            torch.nn.init.zeros_(p)  # now the block adds nothing, nor do the positions
        self.lm_head = Score()
        # A token's vector, of one number, is its id.
        self.transformer.wte.weight.data = torch.arange(float(VOCAB_SIZE))[:, None]
        self.transformer.ln_f = torch.nn.Identity()


def test_greedy_takes_the_likeliest_and_old_tokens_drop_out():
    # At a position beyond block_size, 8, the model would fail.
    text, = sample(Rigged(), " a", num_samples=1, max_new_tokens=20, top_k=1)
    start = gpt2_encoding().encode(" a")[0]
    assert text == decode([start + n for n in range(21)])


def test_end_of_text_in_a_prompt_is_the_token():
    text, = sample(Rigged(), "a<|endoftext|>", num_samples=1, max_new_tokens=2, temperature=0)
    assert text == "a<|endoftext|>" + decode([0, 1])  # they follow the last token, 50256


def test_an_empty_prompt_is_refused(fails):
    assert "--sample" in fails(sample, Rigged(), "")


def test_only_the_top_k_are_drawn_and_all_of_them():
    start = gpt2_encoding().encode(" a")[0]
    texts = sample(Rigged(), " a", num_samples=400, max_new_tokens=1, top_k=5)
    assert set(texts) == {decode([start, start + n]) for n in range(1, 6)}


def test_the_padding_is_never_sampled():
    texts = sample(Rigged(), " a", num_samples=50, max_new_tokens=10)  # decode fails above 50256
    assert len(texts) == 50


def test_temperature():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 3.0]]).expand(1000, 3)
    shares = []
    for temperature in (0, 0.5, 1.0, 100.0):
        drawn = draw_token(logits, temperature, top_k=50, generator=generator)
        assert drawn.shape == (1000, 1)
        shares.append((drawn == 2).float().mean().item())
    assert shares[0] == 1
    assert shares[1] == pytest.approx(0.98, abs=0.02)
    assert shares[2] == pytest.approx(0.84, abs=0.04)
    assert shares[3] == pytest.approx(0.34, abs=0.05)


def test_samples_repeat_and_leave_the_random_numbers_alone(model):
    state = torch.get_rng_state()
    texts = sample(model, "Hello", num_samples=3, max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(texts)) == 3
    for text in texts:
        assert text.startswith("Hello")
    assert sample(model, "Hello", num_samples=3, max_new_tokens=8) == texts
    assert sample(model, "Hello", num_samples=3, max_new_tokens=8, seed=43) != texts


def test_the_same_texts_as_drawn_by_hand(model):
    prompt = "Once upon a time"
    texts = sample(model, prompt, max_new_tokens=30)  # and on, where the oldest drop out
    generator = torch.Generator().manual_seed(42)
    idx = torch.tensor([gpt2_encoding().encode(prompt)] * 4)
    for _ in range(30):
        logits, _ = model(idx[:, -16:])
        top_logits, ids = logits[:, -1, :50257].topk(50)
        drawn = torch.multinomial(top_logits.softmax(-1), 1, generator=generator)
        idx = torch.cat((idx, ids.gather(1, drawn)), dim=1)
    assert texts == [decode(row) for row in idx.tolist()]


def test_a_prompt_longer_than_block_size(model):
    words = " so" * 20
    text, = sample(model, words, num_samples=1, max_new_tokens=3)
    short, = sample(model, " so" * 16, num_samples=1, max_new_tokens=3)  # what the model can read
    assert text.startswith(words)
    assert text[len(words):] == short[len(" so" * 16):]


@pytest.mark.parametrize("prompt", ["Once upon a time", " so" * 20])
def test_a_cache_changes_no_text(model, prompt):
    texts = sample(model, prompt, max_new_tokens=30)
    assert sample(model, prompt, max_new_tokens=30, cache=train_gpt2.KVCache(model)) == texts
