"""The model: its shape, and what a forward pass may and may not do."""

import torch

from train_gpt2 import GPT, MLP, Block, GPTConfig

TINY = GPTConfig(block_size=16, vocab_size=50257, n_layer=2, n_embd=32)


def count(config):
    with torch.device("meta"):  # shapes without numbers: no memory, no time
        return sum(p.numel() for p in GPT(config).parameters())


def test_number_of_parameters():
    assert count(GPTConfig()) == 134_670_336


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
