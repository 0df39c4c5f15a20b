"""GPT-2 (124M) from an empty file: the model, its data, its training.

    python train_gpt2.py
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# The model


@dataclass
class GPTConfig:
    """The shape of a GPT; the defaults are the smallest of OpenAI's four GPT-2s."""

    block_size: int = 1024  # the longest sequence it can read, in tokens
    vocab_size: int = 50257  # 256 bytes, 50,000 merges of frequent neighbours, and <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # the width: every token is a vector of so many numbers


class CausalSelfAttention(nn.Module):
    """Let every token read from itself and from the tokens before it ("Attention Is All You Need", section 3.2).

    (B, T, n_embd) -> (B, T, n_embd); inside, nh heads of size hs = n_embd / nh.
    Raises ValueError where the heads don't divide the width.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of every head
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        # True where row i may look at column j: at itself and to its left. It is no weight, so it isn't saved.
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # a head is a slice of the width; moved before T, it is one more batch dimension
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        # dividing by sqrt(hs) keeps the scores' variance near 1, where softmax still has a slope
        att = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))  # (B, nh, T, T)
        att = att.masked_fill(~self.mask[:T, :T], float("-inf"))  # exp(-inf) = 0: the future has no weight
        att = F.softmax(att, dim=-1)  # each row sums to 1
        y = att @ v  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


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
    """One layer: tokens talk (attn), then each thinks alone (mlp); (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019), under OpenAI's parameter names.

    Nothing in it is random (no dropout), so train() and eval() make no difference.
    """

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

    def forward(self, idx):
        """Score every possible next token at every position.

        idx: token ids, (B, T), int64. Returns (logits, loss): logits (B, T, vocab_size), and a loss that is None.
        Raises ValueError where T is over block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size, {self.config.block_size}")
        pos = torch.arange(T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, n_embd); every row gets the same positions
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, vocab_size)
        return logits, None


# -----------------------------------------------------------------------------
# The run


def main():
    model = GPT(GPTConfig())
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")

    idx = torch.randint(model.config.vocab_size, (2, 8))  # two made-up sequences of eight tokens
    logits, _ = model(idx)
    print(f"token ids {tuple(idx.shape)} in, logits {tuple(logits.shape)} out")


if __name__ == "__main__":
    main()
