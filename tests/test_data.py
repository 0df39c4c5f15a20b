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
    loader = DataLoaderLite(tokens, B=2, T=8, total_batch_size=32)  # 99 predictions: 3 updates, and 3 left over
    batches = [loader.next_batch() for _ in range(6)]
    for x, y in batches:
        assert x.shape == y.shape == (2, 8) and x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1)
    assert torch.cat([x.flatten() for x, _ in batches]).tolist() == list(range(96))
    assert torch.equal(loader.next_batch()[0], batches[0][0])


def test_an_epoch_uses_the_last_token():
    loader = DataLoaderLite(np.arange(33, dtype=np.uint16), B=2, T=8, total_batch_size=32)
    ys = [loader.next_batch()[1] for _ in range(2)]
    assert ys[1][-1, -1] == 32 and loader.position == 0


def test_an_epoch_ends_at_the_same_token_for_every_batch_size():
    tokens = np.arange(120, dtype=np.uint16)  # 119 predictions are 3 updates of 32, and 23 left over: no use to B = 2
    for B, per_epoch in ((1, 12), (2, 6), (4, 3)):
        loader = DataLoaderLite(tokens, B, T=8, total_batch_size=32)
        seen = [loader.next_batch()[0] for _ in range(per_epoch)]
        assert torch.cat(seen).flatten().tolist() == list(range(96)) and loader.position == 0


@pytest.mark.parametrize("B", [1, 2, 4])
def test_a_text_shorter_than_an_update_is_read_again_within_it(B):
    loader = DataLoaderLite(np.arange(60, dtype=np.uint16), B, T=8, total_batch_size=128)  # 7 rows, and 3 tokens left
    starts = torch.cat([loader.next_batch()[0][:, 0] for _ in range(16 // B)]).tolist()
    assert starts == [0, 8, 16, 24, 32, 40, 48] * 2 + [0, 8]


def test_a_text_shorter_than_a_batch(capsys):
    with pytest.raises(SystemExit) as end:
        DataLoaderLite(np.arange(32, dtype=np.uint16), B=2, T=8, total_batch_size=32, rank=0, world=2)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "train_gpt2.py: the text has 32 tokens, and one micro-batch of 2 x 8 for each of 2 process(es) needs 33; "
        "lower --batch_size or --seq_len\n")


def test_processes_read_what_one_would_in_the_same_order():
    tokens = np.arange(120, dtype=np.uint16)
    for world in (2, 4):
        for total_batch_size in (32, 128):  # an update in the text, and one longer than it
            one = DataLoaderLite(tokens, 1, 8, total_batch_size)
            ranks = [DataLoaderLite(tokens, 1, 8, total_batch_size, rank, world) for rank in range(world)]
            for _ in range(40 // world):  # several epochs
                for rank in ranks:
                    assert torch.equal(rank.next_batch()[0], one.next_batch()[0])
                assert len({rank.position for rank in ranks}) == 1
