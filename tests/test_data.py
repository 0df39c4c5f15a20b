"""The text, and how it is cut into batches."""
import os

import numpy as np
import pytest
import torch

from train_gpt2 import DataLoaderLite, gpt2_encoding, load_tokens

INPUT = os.path.join(os.path.dirname(__file__), "..", "input.txt")


def test_input_txt():
    enc = gpt2_encoding()
    tokens = load_tokens(INPUT, enc)
    assert tokens.dtype == np.uint16 and len(tokens) == 322_612
    with open(INPUT, encoding="utf-8") as f:
        text = f.read()
    assert enc.decode(tokens.tolist()) == text
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n")


@pytest.mark.parametrize("content, line", [
    (None, "there is no text file 'my.txt' in {}; start in the folder that holds it"),
    (b"", "'my.txt' is empty"),
    (b"caf\xe9", "'my.txt' is not UTF-8 text"),
])
def test_a_text_that_cannot_be_read(tmp_path, monkeypatch, capsys, content, line):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        load_tokens("my.txt", gpt2_encoding())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"train_gpt2.py: {line.format(tmp_path)}\n"


def test_batches_tile_the_text_and_the_epoch_wraps():
    tokens = np.arange(100, dtype=np.uint16)
    loader = DataLoaderLite(tokens, B=2, T=8)  # 99 predictions are 6 batches of 16, and 3 left over
    batches = [loader.next_batch() for _ in range(6)]
    for x, y in batches:
        assert x.shape == y.shape == (2, 8) and x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1)
    assert torch.cat([x.flatten() for x, _ in batches]).tolist() == list(range(96))
    assert torch.equal(loader.next_batch()[0], batches[0][0])


def test_an_epoch_uses_the_last_token():
    loader = DataLoaderLite(np.arange(33, dtype=np.uint16), B=2, T=8)
    ys = [loader.next_batch()[1] for _ in range(2)]
    assert ys[1][-1, -1] == 32 and loader.position == 0


def test_a_text_shorter_than_a_batch(capsys):
    with pytest.raises(SystemExit) as end:
        DataLoaderLite(np.arange(16, dtype=np.uint16), B=2, T=8)
    assert end.value.code == 2
    assert capsys.readouterr().err == "train_gpt2.py: the text has 16 tokens, and one batch of 2 x 8 needs 17\n"
