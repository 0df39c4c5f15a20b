"""The tokenizer and sampling."""
import inspect
import socket

import pytest
import torch

from fineweb import gpt2_encoding
from train_gpt2 import (
    draw_token,
)


def test_tokenizer_is_gpt2s_and_needs_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # nothing from an earlier download
    encoding = inspect.unwrap(gpt2_encoding)()  # not the one that was kept
    hello = encoding.encode("Hello, I'm a language model,")
    assert hello == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.n_vocab == 50257
    assert encoding.eot_token == 50256
    text = "naïve café 東京 \t\n  x=1; don't 12345"
    assert encoding.decode(encoding.encode(text)) == text
    for number in range(50257):
        assert encoding.encode_single_token(encoding.decode_single_token_bytes(number)) == number


def test_temperature():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 3.0]]).expand(1000, 3)
    shares = []
    for temperature in (0, 0.5, 1.0, 100.0):
        drawn = draw_token(logits, temperature, top_k=50, generator=generator)
        assert drawn.shape == (1000, 1)
        shares.append((drawn == 2).float().mean().item())
    assert shares[0] == 1
    assert shares[1] == pytest.approx(0.98, abs=0.02)
    assert shares[2] == pytest.approx(0.84, abs=0.04)
    assert shares[3] == pytest.approx(0.34, abs=0.05)
