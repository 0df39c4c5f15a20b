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
    n_embd: int = 768  # the width: each token is a vector of this many numbers


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
            ln_f=nn.LayerNorm(config.n_embd),  # the last normalisation
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)


if __name__ == "__main__":
    model = GPT(GPTConfig())
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
