"""The model: its shape, and what a forward pass may and may not do."""

import torch

from train_gpt2 import GPT, GPTConfig


def count(config):
    with torch.device("meta"):  # shapes without numbers: no memory, no time
        return sum(p.numel() for p in GPT(config).parameters())


def test_number_of_parameters():
    assert count(GPTConfig()) == 77_982_720


def test_the_names_are_those_of_openais_checkpoint():
    with torch.device("meta"):
        names = GPT(GPTConfig()).state_dict().keys()
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias",
            "lm_head.weight"} <= names
