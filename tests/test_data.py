"""The text, and how it is cut into batches."""
import os
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

import fineweb
import hub
from train_gpt2 import DataLoaderLite, TrainConfig, fill_defaults, gpt2_encoding, main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INPUT = os.path.join(ROOT, "input.txt")


def test_input_txt():
    enc = gpt2_encoding()
    train, val = fineweb.load_data(INPUT, enc)
    assert len(val) == 32_262  # the last tenth
    tokens = np.concatenate((train[: len(train)], val[: len(val)]))
    assert tokens.dtype == np.uint16 and len(tokens) == 322_612
    with open(INPUT, encoding="utf-8") as f:
        text = f.read()
    assert enc.decode(tokens.tolist()) == text
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n")


def test_a_text_becomes_tokens_in_little_memory(tmp_path):
    enc, path = gpt2_encoding(), tmp_path / "my.txt"
    text = open(INPUT, encoding="utf-8").read() + "<|endoftext|>"  # which is text, here
    path.write_text(text, encoding="utf-8")
    tracemalloc.start()
    train, val = fineweb.load_data(str(path), enc)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * path.stat().st_size  # a Python list of numbers would be more than twice that
    assert [*train[: len(train)], *val[: len(val)]] == enc.encode_ordinary(text)


@pytest.mark.parametrize("content, line", [
    (None, "there is no such file or folder in {}; start in the folder that holds it"),
    (b"", "it has 0 tokens, too few to train on nine tenths and validate on the last"),
    (b"caf\xe9", "it is not UTF-8 text"),
])
def test_a_text_that_cannot_be_read(tmp_path, monkeypatch, content, line):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(line.format(tmp_path))):
        fineweb.load_data("my.txt", gpt2_encoding())


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
    assert ys[1][-1, -1] == 32 and loader.position == loader.epoch_tokens


def test_an_epoch_ends_at_the_same_token_for_every_batch_size():
    tokens = np.arange(120, dtype=np.uint16)  # 119 predictions are 3 updates of 32, and 23 left over: no use to B = 2
    for B, per_epoch in ((1, 12), (2, 6), (4, 3)):
        loader = DataLoaderLite(tokens, B, T=8, total_batch_size=32)
        seen = [loader.next_batch()[0] for _ in range(per_epoch)]
        assert torch.cat(seen).flatten().tolist() == list(range(96)) and loader.position == loader.epoch_tokens


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
        "train_gpt2.py: 32 tokens are there to train on, and one micro-batch of 2 x 8 for each of 2 process(es) needs 33; "
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


def write_shards(folder, documents=300, shard_size=3000):
    """Write documents as shards of shard_size tokens into folder; return the tokens to train on, one after another."""
    fineweb.start_worker(gpt2_encoding())
    texts = [fineweb.tokenize([text])[0] for text in hub.make_documents(documents)]
    folder.mkdir()
    for i, (shard, _, _) in enumerate(fineweb.cut(texts, shard_size)):
        fineweb.write_shard(folder, i, shard)
    return np.concatenate(texts)[shard_size:]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_two_epochs_of_shards(tmp_path, world):
    tokens = write_shards(tmp_path / "shards")  # a shard is no multiple of T
    train, _ = fineweb.open_shards(tmp_path / "shards", 50257)
    assert len(train.arrays) > 5 and len(train) == len(tokens)
    B, T, total_batch_size = 2, 16, 512
    epoch = (len(tokens) - 1) // total_batch_size * total_batch_size  # the rest, less than an update, is left out
    ranks = [DataLoaderLite(train, B, T, total_batch_size, rank, world) for rank in range(world)]
    for _ in range(2):
        seen, targets = [], []
        while not seen or ranks[0].position % epoch:
            for rank in ranks:
                x, y = rank.next_batch()
                seen.append(x.flatten())
                targets.append(y.flatten())
            assert len({rank.position for rank in ranks}) == 1  # nobody drifts, at a shard's end or elsewhere
        assert torch.cat(seen).tolist() == tokens[:epoch].tolist()
        assert torch.cat(targets).tolist() == tokens[1 : epoch + 1].tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shuffled_epochs(tmp_path, world):
    write_shards(tmp_path / "shards")
    train, _ = fineweb.open_shards(tmp_path / "shards", 50257)
    B, T, total_batch_size = 2, 16, 512
    counts = [(size - 1) // T for size in train.sizes]
    allowed = {train.ends[i] - train.sizes[i] + T * k for i in range(len(counts)) for k in range(counts[i])}
    ranks = [DataLoaderLite(train, B, T, total_batch_size, rank, world, seed=7) for rank in range(world)]
    tokens = train[: len(train)].tolist()
    orders = []
    for epoch in range(2):
        starts, seen = [], []
        while not seen or ranks[0].position % ranks[0].epoch_tokens:
            first = ranks[0].position // T
            starts += [ranks[0].start(number) for number in range(first, first + B * world)]
            for rank in ranks:
                x, y = rank.next_batch()
                seen += [row.tolist() + [end] for row, end in zip(x, y[:, -1].tolist())]
        assert seen == [tokens[start : start + T + 1] for start in starts]
        assert len(starts) == len(set(starts)) and allowed.issuperset(starts)  # no window twice, none over two shards
        assert len(allowed) - len(starts) < total_batch_size // T  # and all of them, but for the last, partial, update
        orders.append(starts)
    if world == 1:
        shards = [[int(train.ends.searchsorted(start, side="right")) for start in starts] for starts in orders]
        changes = [sum(a != b for a, b in zip(order, order[1:])) for order in shards]
        assert changes == [len(counts) - 1] * 2  # one shard after another
        assert list(dict.fromkeys(shards[0])) != list(dict.fromkeys(shards[1]))
        assert orders[0][:20] != sorted(orders[0][:20])
    again = DataLoaderLite(train, B, T, total_batch_size, seed=7)  # to begin anywhere is to go on there
    again.position = ranks[0].position // 2 // (B * T) * (B * T)
    assert again.start(again.position // T) == (orders[0] + orders[1])[again.position // T]
    other = DataLoaderLite(train, B, T, total_batch_size, seed=8)
    assert [other.start(number) for number in range(20)] != orders[0][:20]


def test_many_shards_are_opened_at_once_and_in_little_memory(tmp_path):
    for i in range(10_001):  # sparse files: they take no room on the disk
        with open(tmp_path / f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(f, dict(descr="<u2", fortran_order=False, shape=(100_000_000,)))
            f.truncate(f.tell() + 200_000_000)
    probe = (
        "import fineweb, re, sys, train_gpt2\n"
        "resident = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = resident()\n"
        "train, _ = fineweb.open_shards(sys.argv[1], 50257)\n"
        "train.check = lambda shard: None  # it reads the shard, which has nothing to do with their number\n"
        "loader = train_gpt2.DataLoaderLite(train, 64, 1024, 2**19, seed=1)\n"
        "loader.position = 10**12 // 2**19 * 2**19\n"
        "print(loader.next_batch()[0].shape, loader.epoch_tokens, resident() - before)\n")
    done = subprocess.run([sys.executable, "-c", probe, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    *shape, tokens, kilobytes = done.stdout.replace("torch.Size", "").split()
    assert int(tokens) == 10_000 * 97_656 * 1024 // 2**19 * 2**19, done.stderr
    assert int(kilobytes) < 100_000


def test_all_processes_find_a_damaged_shard_at_the_same_batch(tmp_path, capsys):
    write_shards(tmp_path / "shards")
    path = tmp_path / "shards" / "edufineweb_train_000002.npy"  # its first token is read after 46.9 rows of 64
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")
    for rank in range(4):
        train, _ = fineweb.open_shards(tmp_path / "shards", 50257)
        loader = DataLoaderLite(train, B=2, T=64, total_batch_size=512, rank=rank, world=4)
        for _ in range(5):
            loader.next_batch()
        with pytest.raises(SystemExit) as end:
            loader.next_batch()
        assert end.value.code == 2
        assert capsys.readouterr().err == (
            "train_gpt2.py: --data: edufineweb_train_000002.npy is damaged: its sha256 isn't the one in SHA256SUMS; "
            "the command that made it makes it again, with another --out\n")


def test_the_data_decide_on_the_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fill_defaults(TrainConfig(), torch.device("cpu")).data == "input.txt"
    assert capsys.readouterr().out == "data: input.txt (edu_fineweb10B isn't there; python fineweb.py makes it)\n"
    write_shards(tmp_path / "edu_fineweb10B")
    cfg = fill_defaults(TrainConfig(), torch.device("cpu"))
    assert (cfg.data, cfg.total_batch_size) == ("edu_fineweb10B", 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    cfg = fill_defaults(TrainConfig(), torch.device("cuda"))
    assert (cfg.total_batch_size, cfg.batch_size, cfg.max_steps, cfg.warmup_steps) == (2**19, 64, 19073, 715)
    assert fill_defaults(TrainConfig(data=INPUT), torch.device("cuda")).total_batch_size == 1024


def test_the_laptops_run_ends_with_an_epoch():
    cfg = fill_defaults(TrainConfig(data=INPUT), torch.device("cpu"))
    train, val = fineweb.load_data(INPUT, gpt2_encoding())
    loader = DataLoaderLite(train, cfg.batch_size, cfg.seq_len, cfg.total_batch_size)
    assert cfg.max_steps * cfg.total_batch_size == 3 * loader.epoch_tokens  # all was read as often
    assert cfg.val_tokens >= len(val) - 1 and cfg.max_steps % cfg.eval_interval == 0


def test_a_run_from_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokens = write_shards(tmp_path / "edu_fineweb10B")
    main(TrainConfig(model="laptop", batch_size=2, seq_len=32, total_batch_size=128, max_steps=2, dtype="float32"))
    out = capsys.readouterr().out
    epoch = sum((size - 1) // 32 for size in [3000] * (len(tokens) // 3000) + [len(tokens) % 3000]) // 4 * 128
    assert "data: edu_fineweb10B\n" in out and out.count("| loss: ") == 2
    assert (f"{len(tokens):,} tokens to train on, 2,999 to validate; 1 update = 128 tokens = 2 micro-batches of 2 x 32 "
            f"x 1; 1 epoch = {epoch // 128}.0 updates, and leaves out {len(tokens) - epoch} tokens\n") in out
