"""Train GPT-2 (124M) from scratch: the model, its data, the recipe and the training loop.

    python train_gpt2.py                                     # one GPU, or else none
"""
from dataclasses import dataclass

import torch.nn as nn

# -----------------------------------------------------------------------------
# The model. Shapes: B sequences of T tokens, and C = n_embd numbers for each token.


@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are those of GPT-2 (124M)."""

    block_size: int = 1024  # the longest sequence it can read, in tokens
    vocab_size: int = 50257  # how many tokens it knows
    n_layer: int = 12  # how many blocks
    n_embd: int = 768  # the width: each token is a vector of this many numbers


class MLP(nn.Module):
    """Transform each token by itself: linear, GELU, linear. (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)  # fc: fully connected
        # GELU by a formula with tanh, which was faster than the exact one when GPT-2 was trained
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)  # proj: projects back

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4 * C)
        x = self.gelu(x)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """One layer of the transformer: so far the MLP alone. (B, T, C) -> (B, T, C).

    It reads a normalised copy of x, and adds its result to x. This x, which runs through
    all layers, is called the residual stream.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019).

    The parameters are named as in Hugging Face's GPT-2.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # A ModuleDict, since the names are transformer.wte.weight and so on
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # a row for each token
            wpe=nn.Embedding(config.block_size, config.n_embd),  # a row for each position
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),  # the layers
            ln_f=nn.LayerNorm(config.n_embd),  # the last normalisation
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)


if __name__ == "__main__":
    model = GPT(GPTConfig())
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
