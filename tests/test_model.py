"""The model: its shape, and what a forward pass may and may not do."""
import torch

from train_gpt2 import (
    GPT,
    GPTConfig,
)

TINY = GPTConfig(
    block_size=16,
    vocab_size=50257,
    n_embd=32,
)


def test_the_names_are_those_of_openais_checkpoint():
    with torch.device("meta"):
        names = GPT(GPTConfig()).state_dict().keys()
    assert {
        "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight",
        "transformer.ln_f.bias", "lm_head.weight",
    } <= names
