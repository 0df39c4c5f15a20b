"""The data: a text, and how it is cut into batches."""
import os
import tracemalloc

import numpy as np
import pytest
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


def first_tokens(loader, batches):
    """Return the first token of each row of the next batches."""
    return torch.cat([loader.next_batch()[0][:, 0] for _ in range(batches)]).tolist()


def test_y_is_x_moved_on_by_one():
    loader = DataLoaderLite(numbered(100), B=2, T=8)
    x, y = loader.next_batch()
    for batch in (x, y):
        assert batch.shape == (2, 8)
        assert batch.dtype == torch.int64
        assert batch.is_contiguous()
    assert x.flatten().tolist() == list(range(16))
    assert torch.equal(y, x + 1)


def test_batches_tile_the_text_and_the_epoch_wraps():
    loader = DataLoaderLite(numbered(100), B=2, T=8)  # 12 rows, and 3 tokens
    batches = [loader.next_batch() for _ in range(6)]
    for x, y in batches:
        assert torch.equal(y, x + 1)
    assert torch.cat([x.flatten() for x, _ in batches]).tolist() == list(range(96))
    assert loader.next_row == loader.rows_per_epoch == 12
    assert torch.equal(loader.next_batch()[0], batches[0][0])


def test_an_epoch_uses_the_last_token():
    loader = DataLoaderLite(numbered(33), B=2, T=8)
    loader.next_batch()
    assert loader.next_batch()[1][-1, -1] == 32
    assert loader.next_row == loader.rows_per_epoch
    assert DataLoaderLite(numbered(32), B=2, T=8).rows_per_epoch == 3  # the last target is missing


@pytest.mark.parametrize("B", [1, 2, 4, 16])
def test_rows_wrap_one_by_one_whatever_the_batch(B):
    loader = DataLoaderLite(numbered(60), B, T=8)  # 7 rows, and 3 tokens
    assert first_tokens(loader, 16 // B) == [0, 8, 16, 24, 32, 40, 48] * 2 + [0, 8]
