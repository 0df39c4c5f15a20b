"""The recipe and the training step, with a model that is small enough for a test."""

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


def test_the_settings_that_are_given_count(small, capsys):
    given = dict(batch_size=2, seq_len=16, max_steps=3, device="cpu")
    out = []
    for more in (dict(), dict(), dict(seed=1), dict(max_lr=1e-2), dict(batch_size=3)):
        train_gpt2.launch(given | more)
        out.append(numbers(capsys.readouterr().out))
    assert [len(found) for found in out] == [3] * 5
    assert out[0] == pytest.approx(out[1], abs=1e-4)
    assert out[2][0] != out[0][0]  # other weights
    assert out[3][0] == pytest.approx(out[0][0], abs=1e-4)  # the same weights
    assert abs(out[3][1] - out[0][1]) > 0.01  # and larger steps
    assert out[4][0] != out[0][0]  # another batch
