"""The data: a text, and how it is cut into batches."""
import os
import tracemalloc

import numpy as np
import torch
from conftest import INPUT

from fineweb import gpt2_encoding
from train_gpt2 import (
    DataLoaderLite,
    load_text,
)


# -------------------------------------------------------------------------------------------------
# A text


def test_input_txt():
    arrays, val = load_text(INPUT)
    assert len(val) == 32_262  # the last tenth
    tokens = np.concatenate((*arrays, val))
    assert tokens.dtype == np.uint16
    assert len(tokens) == 322_612
    with open(INPUT, encoding="utf-8", newline="") as f:
        text = f.read()
    assert gpt2_encoding().decode(tokens.tolist()) == text
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:")


def test_a_text_becomes_tokens_in_little_memory():
    gpt2_encoding()
    tracemalloc.start()
    load_text(INPUT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * os.path.getsize(INPUT)  # a list of numbers would be more than twice that


# -------------------------------------------------------------------------------------------------
# Batches


def numbered(n):
    """Return 0 .. n - 1 as tokens in one piece."""
    return [np.arange(n, dtype=np.uint16)]


def test_y_is_x_moved_on_by_one():
    loader = DataLoaderLite(numbered(100), B=2, T=8)
    x, y = loader.next_batch()
    for batch in (x, y):
        assert batch.shape == (2, 8)
        assert batch.dtype == torch.int64
        assert batch.is_contiguous()
    assert x.flatten().tolist() == list(range(16))
    assert torch.equal(y, x + 1)
