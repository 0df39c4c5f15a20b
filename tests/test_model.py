"""The model: its shape, and what a forward pass may and may not do."""
import math

import pytest
import torch
from torch.nn import functional as F

from train_gpt2 import GPT, MLP, OPENAI_SIZES, Block, CausalSelfAttention, GPTConfig

TINY = GPTConfig(block_size=16, vocab_size=50257, n_layer=2, n_head=2, n_embd=32)


def count(config):
    with torch.device("meta"):  # shapes without numbers: no memory, no time
        return sum(p.numel() for p in GPT(config).parameters())


def test_number_of_parameters():
    assert count(GPTConfig()) == 124_439_808


def test_the_names_are_those_of_openais_checkpoint():
    with torch.device("meta"):
        names = GPT(GPTConfig()).state_dict().keys()
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias",
            "lm_head.weight"} <= names


def test_block_adds_to_the_residual_stream():
    torch.manual_seed(0)
    block, x = Block(TINY), torch.randn(2, 5, 32)
    x_in = x.clone()
    assert not torch.allclose(block(x), x)
    assert torch.equal(x, x_in)
    for name, p in block.named_parameters():
        if "c_proj" in name:  # what a branch writes is silenced: the stream must pass unchanged
            torch.nn.init.zeros_(p)
    assert torch.equal(block(x), x)


def test_mlp_sees_each_token_alone():
    torch.manual_seed(0)
    mlp, x = MLP(TINY), torch.randn(1, 5, 32)
    assert torch.allclose(mlp(x)[:, 3:4], mlp(x[:, 3:4]), atol=1e-6)


def test_a_later_token_never_changes_an_earlier_logit():
    torch.manual_seed(0)
    model, idx = GPT(TINY), torch.randint(50257, (1, 16))
    before, _ = model(idx)
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % 50257
        after, _ = model(changed)
        assert torch.allclose(after[:, :t], before[:, :t], atol=1e-6)
        assert (after[:, t:] - before[:, t:]).abs().amax(dim=(0, 2)).min() > 1e-6  # and it does change all later ones


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_embd 32 is not a multiple of n_head 3"):
        GPT(GPTConfig(n_embd=32, n_head=3))


def test_forward_returns_logits_and_no_loss():
    logits, loss = GPT(TINY)(torch.randint(50257, (3, 7)))
    assert logits.shape == (3, 7, 50257) and loss is None


def test_a_sequence_longer_than_block_size_is_refused():
    with pytest.raises(ValueError, match="17 tokens is longer than block_size, 16"):
        GPT(TINY)(torch.zeros(1, 17, dtype=torch.int64))


def test_order_matters():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=32))  # one layer: only wpe can tell
    there, _ = model(torch.tensor([[5, 6, 7]]))
    back, _ = model(torch.tensor([[6, 5, 7]]))
    assert not torch.allclose(there[:, -1], back[:, -1], atol=1e-4)


@pytest.mark.parametrize("name, parameters", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                              ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_names_and_shapes_are_those_of_hugging_face(name, parameters):
    from transformers import GPT2Config, GPT2LMHeadModel

    size = OPENAI_SIZES[name]
    with torch.device("meta"):
        ours = {name: p.shape for name, p in GPT(GPTConfig(**size)).named_parameters()}
        theirs = {name: p.shape for name, p in GPT2LMHeadModel(GPT2Config(**size)).named_parameters()}
    assert sum(shape.numel() for shape in ours.values()) == parameters
    assert ours.keys() == theirs.keys()
    assert all(sorted(ours[name]) == sorted(theirs[name]) for name in ours)  # some are stored transposed


def test_the_first_loss_is_that_of_a_guess():
    torch.manual_seed(0)
    idx = torch.randint(50257, (4, 33))
    for model in (GPT(TINY), GPT(GPTConfig(block_size=32, n_layer=1))):  # narrow; as wide as GPT-2
        _, loss = model(idx[:, :16], idx[:, 1:17])
        assert abs(loss.item() - math.log(50257)) < 0.3


def test_the_loss_is_the_mean_of_minus_log_probability():
    torch.manual_seed(0)
    model, idx = GPT(TINY), torch.randint(50257, (2, 6))
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    probabilities = logits.double().softmax(dim=-1)
    by_hand = [-math.log(probabilities[b, t, idx[b, t + 1]].item()) for b in range(2) for t in range(5)]
    assert math.isclose(loss.item(), sum(by_hand) / 10, rel_tol=1e-5)


def test_one_matrix_goes_in_and_out():
    model = GPT(TINY)
    assert model.lm_head.weight is model.transformer.wte.weight
    model(torch.tensor([[1, 2]]))[0].sum().backward()
    assert model.transformer.wte.weight.grad[40_000].abs().sum() > 0  # a token that wasn't read is still scored


def test_initialisation():
    torch.manual_seed(0)
    for name, p in GPT(GPTConfig(block_size=256, vocab_size=1000, n_layer=8, n_head=2, n_embd=128)).named_parameters():
        if name.endswith("c_proj.weight"):
            assert abs(p.std().item() / (0.02 / 4) - 1) < 0.03  # sqrt(2 * 8 layers) = 4
        elif p.dim() == 2:
            assert abs(p.std().item() / 0.02 - 1) < 0.03
        else:
            assert (p == (1 if name.endswith("weight") else 0)).all()


def test_flash_attention_is_attention():
    torch.manual_seed(0)
    layer, x = CausalSelfAttention(TINY), torch.randn(2, 16, 32)
    q, k, v = (z.view(2, 16, 2, 16).transpose(1, 2) for z in layer.c_attn(x).split(32, dim=2))  # (B, nh, T, hs)
    scores = q @ k.transpose(-2, -1) / 16 ** 0.5
    future = torch.ones(16, 16, dtype=torch.bool).triu(1)
    y = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1) @ v
    y = layer.c_proj(y.transpose(1, 2).reshape(2, 16, 32))
    assert torch.allclose(layer(x), y, atol=1e-6)


def test_attention_on_a_cpu_is_float32s():
    torch.manual_seed(0)
    attn, x = CausalSelfAttention(GPTConfig(n_head=2, n_embd=16)), torch.randn(3, 8, 16)
    attn.c_proj = torch.nn.Identity()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, qkv = attn(x), attn.c_attn(x)  # (3, 8, 16), (3, 8, 48)
    q, k, v = qkv.float().view(3, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)  # (3, 2, 8, 8) each
    assert torch.equal(y, F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(3, 8, 16))
