"""The text, and how it is cut into batches."""
import os

import numpy as np
import pytest

from train_gpt2 import gpt2_encoding, load_tokens

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
