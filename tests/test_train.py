"""The recipe and the training step, with a model that is small enough for a test."""
import math
import re

import pytest
import torch
from conftest import SMALL, losses

import train_gpt2
from train_gpt2 import (
    GPT,
    GPTConfig,
    configure_optimizer,
)


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


def test_fused_adamw_is_adamw():
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16)
    model = GPT(config).double()
    other = GPT(config).double()
    other.load_state_dict(model.state_dict())
    fused = configure_optimizer(model, lr=1e-2)
    assert fused.param_groups[0]["fused"]
    plain = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=False, foreach=False)
    x = torch.randint(64, (4, 8))
    y = torch.randint(64, (4, 8))
    for trained, optimizer in ((model, fused), (other, plain)):
        for _ in range(5):
            optimizer.zero_grad()
            trained(x, y)[1].backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.allclose(a, b, atol=1e-9)


def test_the_steps_line(small, capsys):
    train_gpt2.launch(SMALL | dict(max_steps=4))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    for number, line in enumerate(lines):
        match = re.fullmatch(r"step +(\d+) \| loss: \d+\.\d{6} \| "
                             r"dt: (\d+\.\d\d)ms \| tok/sec: (\d+\.\d\d)", line)
        assert int(match[1]) == number
        seconds = float(match[2]) / 1000
        assert float(match[3]) * seconds == pytest.approx(32, rel=0.01)


def test_16_bits_train_like_float32(train):
    _, exact = train(max_steps=4)
    model, rounded = train(max_steps=4, dtype="bfloat16")
    assert losses(exact) != losses(rounded)
    assert numbers(rounded) == pytest.approx(numbers(exact), abs=0.05)
    for p in model.parameters():
        assert p.dtype == torch.float32  # only products are rounded


def test_compiled_losses_equal_eager_ones(train, compiler):
    model, out = train(compile=False)
    compiled_model, compiled_out = train(compile=True)
    assert numbers(compiled_out) == pytest.approx(numbers(out), abs=1e-3)
    assert list(compiled_model.state_dict()) == list(model.state_dict())  # no _orig_mod. in front


def test_a_run_repeats(train):
    _, out = train(max_steps=3)
    assert losses(train(max_steps=3)[1]) == losses(out)
    assert losses(train(max_steps=3, seed=1)[1]) != losses(out)


def test_the_vocabulary_is_padded_and_the_first_loss_stays(train):
    model, out = train(max_steps=1)
    assert model.lm_head.weight.shape == (50304, 16)
    assert abs(numbers(out)[0] - math.log(50304)) < 0.3
