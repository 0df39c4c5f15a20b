"""The recipe and the training step, with a model that is small enough for a test."""
import math

from conftest import losses

import train_gpt2


def numbers(out):
    return [float(loss) for loss in losses(out)]


def test_one_batch_is_learnt_by_heart(train, monkeypatch):
    monkeypatch.setitem(train_gpt2.MODEL_SIZES, "laptop", dict(n_layer=2, n_head=2, n_embd=64))
    with open("text.txt", "w", encoding="utf-8") as f:
        f.write("Speak, I charge thee, speak. " * 11)  # 77 tokens: 4 rows of 16
    _, out = train(max_steps=50, max_lr=5e-3, batch_size=4)
    found = numbers(out)
    assert len(found) == 50
    assert abs(found[0] - math.log(50257)) < 0.3
    assert found[-1] < 1


def test_a_run_repeats(train):
    _, out = train(max_steps=3)
    assert losses(train(max_steps=3)[1]) == losses(out)
    assert losses(train(max_steps=3, seed=1)[1]) != losses(out)
