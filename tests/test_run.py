"""What a run does beside training: evaluations."""
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPE, val_losses

from fineweb import gpt2_encoding
from train_gpt2 import GPT, GPTConfig, evaluate


def text_tokens():
    """Return the tokens of text.txt: (those to train on, those to validate on)."""
    tokens = gpt2_encoding().encode_ordinary(Path("text.txt").read_text(encoding="utf-8"))
    split = len(tokens) * 9 // 10
    return np.array(tokens[:split]), np.array(tokens[split:])


# -----------------------------------------------------------------------------
# Evaluations


@pytest.mark.parametrize("B, T", [(1, 16), (3, 16), (4, 8)])
def test_validation_loss_is_that_of_every_token_once(B, T):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, block_size=16, vocab_size=100))
    tokens = np.random.default_rng(0).integers(100, size=103).astype(np.uint16)
    total = 0.0
    for start in range(0, 102, T):  # 102 to predict: no multiple of T
        row = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))
        with torch.no_grad():
            logits, _ = model(row[None, :-1])
        logprobs = logits[0].log_softmax(-1)
        total -= logprobs.gather(1, row[1:, None]).sum().item()
    assert evaluate(model, tokens, B, T) == pytest.approx(total / 102, abs=1e-5)


def test_validation_on_less_than_a_row():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, block_size=16))
    tokens = np.array([464, 3290, 318], dtype=np.uint16)
    _, loss = model(torch.tensor([[464, 3290]]), torch.tensor([[3290, 318]]))
    assert evaluate(model, tokens, 2, 16) == pytest.approx(loss.item(), abs=1e-6)


def test_val_tokens_limits_the_measurement(train):
    model, out = train(eval_interval=6, val_tokens=50)
    _, val = text_tokens()
    assert val_losses(out)[-1] == f"{evaluate(model, val[:51], 2, 16):.6f}"
