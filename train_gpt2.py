"""GPT-2 (124M) from an empty file: the model, its data, its training.

    python train_gpt2.py
"""
from dataclasses import dataclass

import torch.nn as nn

# -----------------------------------------------------------------------------
# The model


@dataclass
class GPTConfig:
    """The shape of a GPT; the defaults are the smallest of OpenAI's four GPT-2s."""

    block_size: int = 1024  # the longest sequence it can read, in tokens
    vocab_size: int = 50257  # 256 bytes, 50,000 merges of frequent neighbours, and <|endoftext|>
    n_layer: int = 12
    n_embd: int = 768  # the width: every token is a vector of so many numbers


class MLP(nn.Module):
    """Two linear maps with a GELU between them, applied to every token alone.

    (B, T, n_embd) -> (B, T, n_embd): B sequences of T tokens, each token a vector.
    """

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # the exact one was slow in 2019; OpenAI's weights expect this one
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))  # (B, T, 4 * n_embd)
        return self.c_proj(x)  # (B, T, n_embd)


class Block(nn.Module):
    """One layer: what the MLP finds is added to the residual stream x, (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config):
        super().__init__()
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2's layers under the names that OpenAI's checkpoint gives them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # what a token is
            wpe=nn.Embedding(config.block_size, config.n_embd),  # where it stands
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)


# -----------------------------------------------------------------------------
# The run


def main():
    model = GPT(GPTConfig())
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")


if __name__ == "__main__":
    main()
