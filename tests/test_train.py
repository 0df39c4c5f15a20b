"""The recipe and the training step, with a model that is small enough for a test."""
import math

import pytest
from conftest import losses

import train_gpt2
from train_gpt2 import GPTConfig


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Be in a folder with a short input.txt, and have GPT-2 be small."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("Speak, I charge thee, speak. " * 22)  # 154 tokens
    config = GPTConfig(block_size=64, n_layer=2, n_head=4, n_embd=256)
    monkeypatch.setattr(train_gpt2, "GPTConfig", lambda: config)


def numbers(out):
    return [float(loss) for loss in losses(out)]


def test_one_batch_is_learnt_by_heart(small, capsys):
    train_gpt2.launch()
    found = numbers(capsys.readouterr().out)
    assert len(found) == 50
    assert abs(found[0] - math.log(50257)) < 0.5
    assert found[-1] < 1
