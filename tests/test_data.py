"""The data: shards, texts, and how they are cut into batches."""
import os
import re
import subprocess
import sys
import time
import tracemalloc

import hub
import numpy as np
import pytest
import torch
from conftest import INPUT, ROOT, damaged, losses

import fineweb
import train_gpt2
from train_gpt2 import DataLoaderLite, Shards, fingerprint, gpt2_encoding, load_data, open_shards


def whole(shards):
    """Return all tokens of shards as one array."""
    return shards.head(len(shards))


def write_shards(folder, documents=300, shard_size=3000):
    """Write documents as shards into folder. Return the tokens to train on, as one array."""
    os.mkdir(folder)
    texts = [fineweb.tokenize(text) for text in hub.make_documents(documents)]
    for number, (shard, _, _) in enumerate(fineweb.cut(texts, shard_size)):
        fineweb.write_shard(folder, number, shard)
    return np.concatenate(texts)[shard_size:]


@pytest.fixture
def shards(tmp_path):
    """Write shards of 3,000 tokens into tmp_path / "shards". Return those to train on."""
    write_shards(tmp_path / "shards")
    train, _ = open_shards(tmp_path / "shards")
    return train


# -------------------------------------------------------------------------------------------------
# A text


def test_input_txt():
    train, val = load_data(INPUT)
    assert len(val) == 32_262  # the last tenth
    tokens = np.concatenate((whole(train), whole(val)))
    assert tokens.dtype == np.uint16
    assert len(tokens) == 322_612
    with open(INPUT, encoding="utf-8", newline="") as f:
        text = f.read()
    assert gpt2_encoding().decode(tokens.tolist()) == text
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:")


def test_a_text_becomes_tokens_in_little_memory():
    gpt2_encoding()
    tracemalloc.start()
    load_data(INPUT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * os.path.getsize(INPUT)  # a list of numbers would be more than twice that


def load_text(tmp_path, data):
    """Return the tokens that data, bytes, become as a text file, and what they stand for."""
    path = tmp_path / "my.txt"
    path.write_bytes(data)
    train, val = load_data(str(path))
    tokens = np.concatenate((whole(train), whole(val)))
    return tokens, gpt2_encoding().decode(tokens.tolist())


def test_end_of_text_separates_documents(tmp_path):
    first = "The quality of mercy is not strained."
    second = "It droppeth as the gentle rain from heaven."
    end = "<|endoftext|>"
    tokens, text = load_text(tmp_path, f"{first}\n{end}\n{second}\n{end}\n".encode())
    assert text == f"{first}{end}{second}"  # between them, without line breaks, and not at the end
    assert (tokens == 50256).sum() == 1


def test_a_text_without_end_of_text_stays_as_it_is(tmp_path):
    text = "\r\n\n  One line.\r\n\tAnother one, naïve 東京.\n\n" * 3
    assert load_text(tmp_path, text.encode())[1] == text


def test_a_byte_order_mark_is_no_text(tmp_path):
    text = "To be, or not to be, that is the question:\n" * 3
    assert load_text(tmp_path, b"\xef\xbb\xbf" + text.encode())[1] == text


@pytest.mark.parametrize("name, content, words", [
    ("my.txt", None, ["no such file", "{folder}"]),
    ("my.txt", b"", ["0 tokens"]),
    ("my.txt", b"\n<|endoftext|>\n", ["no text"]),
    ("my.txt", b"caf\xe9" * 100, ["UTF-8"]),
    ("my.jsonl", b'{"text": "a"}\n' * 100, ["fineweb.py --files my.jsonl", "--data"]),
    ("my.parquet", b"PAR1" * 100, ["fineweb.py --files my.parquet", "--data"]),
])
def test_a_text_that_cannot_be_read(tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_data(name)
    for word in words:
        assert word.format(folder=tmp_path) in str(error.value)


# -------------------------------------------------------------------------------------------------
# Shards


def test_the_first_tokens_of_shards(tmp_path):
    for number, n in enumerate((5, 7, 1, 10)):
        fineweb.write_shard(tmp_path, number, 100 * number + np.arange(n, dtype=np.uint16))
    (tmp_path / "my_val_notes_000001.npy").write_bytes(b"not a shard")
    train, val = open_shards(tmp_path)
    tokens = [*range(100, 107), 200, *range(300, 310)]
    assert len(train) == 18
    assert whole(val).tolist() == [0, 1, 2, 3, 4]
    for n in range(1, 21):  # there may be fewer
        assert train.head(n).tolist() == tokens[:n]
    assert train.head(18).dtype == np.uint16


@pytest.mark.parametrize("kind", ["val", "train"])
def test_no_shard_of_a_kind(tmp_path, kind):
    fineweb.write_shard(tmp_path, 1 if kind == "val" else 0, np.arange(5, dtype=np.uint16))
    with pytest.raises(ValueError, match=f"no edufineweb_{kind}_"):
        open_shards(tmp_path)


def damage(path, way):
    data = bytearray(path.read_bytes())
    if way == "flipped":
        data[-100] ^= 1
        path.write_bytes(data)
    elif way == "cut":
        path.write_bytes(data[:-100])
    elif way == "header":
        path.write_bytes(data[:50])
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "no tokens":
        np.save(path, np.zeros(0, dtype=np.uint16))
    elif way == "int32":
        np.save(path, np.arange(1000, dtype=np.int32))
    elif way == "2-d":
        np.save(path, np.zeros((10, 100), dtype=np.uint16))
    elif way == "objects":
        np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    elif way == "zip":
        with open(path, "wb") as f:
            np.savez(f, tokens=np.arange(1000, dtype=np.uint16))


@pytest.mark.parametrize("way, word", [
    ("flipped", "SHA256SUMS"), ("cut", "damaged"), ("header", "damaged"), ("empty", "damaged"),
    ("no tokens", "(0,)"), ("int32", "int32"), ("2-d", "(10, 100)"), ("objects", "damaged"),
    ("zip", "damaged"),
])
def test_a_damaged_shard_is_named(tmp_path, way, word):
    for number in range(3):
        fineweb.write_shard(tmp_path, number, np.arange(1000, dtype=np.uint16) + 1000 * number)
    damage(tmp_path / "edufineweb_train_000002.npy", way)
    with pytest.raises(ValueError) as error:
        train, _ = open_shards(tmp_path)
        train.head(1001)  # only its checksum says that the last token is wrong
    assert "edufineweb_train_000002.npy" in str(error.value)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_shard_is_checked_when_it_is_first_read(tmp_path, monkeypatch):
    for number in range(3):
        fineweb.write_shard(tmp_path, number, np.arange(1000, dtype=np.uint16))
    checked = []
    sha256 = fineweb.sha256

    def watched(path):
        checked.append(os.path.basename(path))
        return sha256(path)

    monkeypatch.setattr(fineweb, "sha256", watched)
    train, _ = open_shards(tmp_path)
    train.head(10)
    train.head(1000)
    assert checked == ["edufineweb_train_000001.npy"]
    train.head(1001)
    assert checked == ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy"]


def test_without_a_checksum_a_shard_is_taken_as_it_is(tmp_path):
    for number in range(2):
        fineweb.write_shard(tmp_path, number, np.arange(1000, dtype=np.uint16))
    (tmp_path / "SHA256SUMS").unlink()
    damage(tmp_path / "edufineweb_train_000001.npy", "flipped")
    train, _ = open_shards(tmp_path)
    assert len(whole(train)) == 1000


def test_a_token_that_is_none_of_gpt2s(tmp_path):
    for number in range(2):
        fineweb.write_shard(tmp_path, number, np.array([1, 50256 + number], dtype=np.uint16))
    train, val = open_shards(tmp_path)
    assert whole(val).tolist() == [1, 50256]
    with pytest.raises(ValueError, match="edufineweb_train_000001.npy .*50257"):
        train.head(1)


def test_no_damage_of_a_shard_goes_unseen(tmp_path):
    tokens = np.random.default_rng(0).integers(50257, size=(3, 1000)).astype(np.uint16)
    for number in range(3):
        fineweb.write_shard(tmp_path, number, tokens[number])
    for name in ("edufineweb_train_000002.npy", "SHA256SUMS"):
        data = (tmp_path / name).read_bytes()
        for spoilt in damaged(data, 10, 50):
            (tmp_path / name).write_bytes(spoilt)
            try:
                train, _ = open_shards(tmp_path)
                seen = train.head(2000).tolist()
            except ValueError as error:
                assert re.search("edufineweb_train_00000|SHA256SUMS", str(error))
                assert "\n" not in str(error)
            else:  # a line of the list is gone
                assert name == "SHA256SUMS"
                assert seen == tokens[1:].flatten().tolist()
        (tmp_path / name).write_bytes(data)


def test_unfinished_shards_are_warned_about(tmp_path, capsys):
    write_shards(tmp_path / "shards")
    progress = dict(shards=2, done=False)
    fineweb.write_progress(tmp_path / "shards", progress)
    open_shards(tmp_path / "shards")
    warning = capsys.readouterr().err
    assert "warning" in warning
    assert "shards" in warning
    assert "fineweb.py" in warning
    fineweb.write_progress(tmp_path / "shards", progress | dict(done=True))
    open_shards(tmp_path / "shards")
    assert capsys.readouterr().err == ""


PROBE = """
import re, sys, time, train_gpt2
def resident():
    with open("/proc/self/status") as f:
        return int(re.search(r"RssAnon:\\s+(\\d+)", f.read())[1])
before = resident()
start = time.perf_counter()
train, val = train_gpt2.open_shards(sys.argv[1])
train.check = lambda shard: None  # it reads the shard, which has nothing to do with their number
train_gpt2.fingerprint(train, val)
loader = train_gpt2.DataLoaderLite(train, 64, 1024, 2**19, seed=1)
loader.position = 10**12 // 2**19 * 2**19
x, y = loader.next_batch()
print(*x.shape, loader.epoch_tokens, resident() - before, time.perf_counter() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it asks /proc")
def test_many_shards_are_opened_quickly_and_in_little_memory(tmp_path):
    header = dict(descr="<u2", fortran_order=False, shape=(100_000_000,))
    with open(tmp_path / "SHA256SUMS", "w") as checksums:
        for number in range(10_001):
            name = fineweb.shard_name(number)
            checksums.write(f"{number:064x}  {name}\n")
            with open(tmp_path / name, "wb") as f:  # sparse: it takes no room on the disk
                np.lib.format.write_array_header_1_0(f, header)
                f.truncate(f.tell() + 200_000_000)
    done = subprocess.run([sys.executable, "-c", PROBE, str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    B, T, tokens, kilobytes, seconds = done.stdout.split()
    assert (B, T) == ("64", "1024")
    assert int(tokens) == 10_000 * 97_656 * 1024 // 2**19 * 2**19
    assert int(kilobytes) < 100_000
    assert float(seconds) < 20


# -------------------------------------------------------------------------------------------------
# A fingerprint


def test_other_data_have_another_fingerprint(tmp_path):
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "same")
    write_shards(tmp_path / "other size", shard_size=2900)
    write_shards(tmp_path / "more", documents=310)
    write_shards(tmp_path / "made anew")
    train, _ = open_shards(tmp_path / "a")
    fineweb.write_shard(tmp_path / "made anew", 3, train.head(3000))
    prints = {}
    for folder in ("a", "same", "other size", "more", "made anew"):
        prints[folder] = fingerprint(*open_shards(tmp_path / folder))
    assert prints["a"] == prints["same"]
    assert len(set(prints.values())) == 4


def test_another_text_has_another_fingerprint(tmp_path):
    path = tmp_path / "my.txt"
    prints = []
    for text in ("one and two " * 20, "one and two " * 20, "one and six " * 20, "one and " * 20):
        path.write_text(text)
        prints.append(fingerprint(*load_data(str(path))))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# -------------------------------------------------------------------------------------------------
# Batches


def numbered(n):
    """Return 0 .. n - 1 as tokens in one piece."""
    return Shards([np.arange(n, dtype=np.uint16)])


def first_tokens(loader, batches):
    """Return the first token of each row of the next batches."""
    return torch.cat([loader.next_batch()[0][:, 0] for _ in range(batches)]).tolist()


def test_batches_tile_the_text_and_the_epoch_wraps():
    loader = DataLoaderLite(numbered(100), B=2, T=8, total_batch_size=32)  # 3 updates, and 3 tokens
    batches = [loader.next_batch() for _ in range(6)]
    for x, y in batches:
        assert x.shape == y.shape == (2, 8)
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert torch.equal(y, x + 1)
    assert torch.cat([x.flatten() for x, _ in batches]).tolist() == list(range(96))
    assert loader.position == loader.epoch_tokens == 96
    assert torch.equal(loader.next_batch()[0], batches[0][0])


def test_an_epoch_uses_the_last_token():
    loader = DataLoaderLite(numbered(33), B=2, T=8, total_batch_size=32)
    loader.next_batch()
    assert loader.next_batch()[1][-1, -1] == 32
    assert loader.position == loader.epoch_tokens


@pytest.mark.parametrize("B", [1, 2, 4])
def test_an_epoch_ends_at_the_same_token_for_every_batch_size(B):
    loader = DataLoaderLite(numbered(120), B, T=8, total_batch_size=32)  # 3 updates, 23 tokens more
    assert first_tokens(loader, 12 // B) == list(range(0, 96, 8))
    assert loader.position == loader.epoch_tokens


@pytest.mark.parametrize("B", [1, 2, 4])
def test_a_text_shorter_than_an_update_is_read_again_within_it(B):
    loader = DataLoaderLite(numbered(60), B, T=8, total_batch_size=128)  # 7 rows, and 3 tokens
    assert first_tokens(loader, 16 // B) == [0, 8, 16, 24, 32, 40, 48] * 2 + [0, 8]


def test_a_text_shorter_than_a_batch():
    with pytest.raises(ValueError) as error:
        DataLoaderLite(numbered(32), B=2, T=8, total_batch_size=32, rank=0, world=2)
    for word in ("24", "2 x 8 x 2", "32", "--batch_size", "--seq_len"):
        assert word in str(error.value)


def test_shards_shorter_than_a_sequence_are_named_as_such(tmp_path):
    write_shards(tmp_path / "shards", shard_size=1000)
    train, _ = open_shards(tmp_path / "shards")
    with pytest.raises(ValueError) as error:
        DataLoaderLite(train, B=1, T=1000, total_batch_size=1000)
    for word in ("1000", "1001", "--seq_len", "shards"):
        assert word in str(error.value)
    DataLoaderLite(train, B=1, T=999, total_batch_size=999)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("total_batch_size", [32, 128])  # the second is longer than the text
@pytest.mark.parametrize("seed", [None, 7])
def test_processes_read_what_one_would_in_the_same_order(world, total_batch_size, seed):
    one = DataLoaderLite(numbered(120), 1, 8, total_batch_size, seed=seed)
    loaders = []
    for rank in range(world):
        loader = DataLoaderLite(numbered(120), 1, 8, total_batch_size, rank, world, seed)
        loaders.append(loader)
    for _ in range(40 // world):  # several epochs
        for loader in loaders:
            x, y = loader.next_batch()
            expected_x, expected_y = one.next_batch()
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)
        assert {loader.position for loader in loaders} == {one.position}


def test_a_process_reads_no_row_of_another(shards, monkeypatch):
    rows = {}
    read_row = DataLoaderLite.read_row

    def watched(loader, number):
        rows[loader.rank].append(number)
        return read_row(loader, number)

    monkeypatch.setattr(DataLoaderLite, "read_row", watched)
    for rank in range(4):
        rows[rank] = []
        loader = DataLoaderLite(shards, 2, 15, 480, rank, world=4, seed=7)
        loader.next_batch()
        loader.next_batch()
    assert rows == {rank: [2 * rank, 2 * rank + 1, 2 * rank + 8, 2 * rank + 9] for rank in range(4)}


def epoch_of(loaders):
    """Read an epoch with all loaders in turn. Return its rows of T + 1 tokens, (rows, T + 1)."""
    rows = []
    for _ in range(loaders[0].epoch_tokens // (loaders[0].B * loaders[0].T * len(loaders))):
        for loader in loaders:
            x, y = loader.next_batch()
            assert torch.equal(x[:, 1:], y[:, :-1])
            rows.append(torch.cat((x, y[:, -1:]), dim=1))
        positions = {loader.position for loader in loaders}
        assert len(positions) == 1  # nobody drifts, at a shard's end or elsewhere
    return torch.cat(rows)


def all_rows(shards, T):
    """Return all rows of T + 1 tokens that lie within a shard, in their order: (rows, T + 1)."""
    rows = []
    for array in shards.arrays:
        for start in range(0, len(array) - T, T):
            rows.append(array[start : start + T + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_without_a_seed_shards_are_read_as_they_stand(shards, world):
    assert len(shards.arrays) > 5
    B, T, total_batch_size = 2, 15, 480  # a shard is 200 T: its last row would lack a target
    loaders = [DataLoaderLite(shards, B, T, total_batch_size, rank, world) for rank in range(world)]
    expected = all_rows(shards, T)  # no row lies across two shards
    assert DataLoaderLite(shards, 1, T, T).epoch_tokens == len(expected) * T
    expected = expected[: len(expected) // 32 * 32]  # less than an update is left out
    for _ in range(2):
        assert torch.equal(epoch_of(loaders), expected)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shuffled_epochs(shards, world):
    B, T, total_batch_size = 2, 15, 480
    loaders = []
    for rank in range(world):
        loaders.append(DataLoaderLite(shards, B, T, total_batch_size, rank, world, seed=7))
    allowed = [tuple(row) for row in all_rows(shards, T).tolist()]
    epochs = []
    for _ in range(2):
        rows = [tuple(row) for row in epoch_of(loaders).tolist()]
        assert len(rows) == len(allowed) // 32 * 32
        assert not set(rows) - set(allowed)  # none lies across two shards
        for row in set(rows):
            assert rows.count(row) <= allowed.count(row)  # and none is read twice
        epochs.append(rows)
    assert epochs[0] != epochs[1]


def starts_of(loader, rows):
    """Return where the first rows of the run begin: (shard, place in it) each."""
    per_epoch = loader.epoch_tokens // loader.T
    starts = []
    for number in range(rows):
        epoch, within = divmod(number, per_epoch)
        starts.append(loader.tokens.row_place(within, loader.T, loader.seed, epoch))
    return starts


def test_one_shard_is_read_after_another(shards):
    loader = DataLoaderLite(shards, 2, 15, 480, seed=7)
    per_epoch = loader.epoch_tokens // 15
    starts = starts_of(loader, 2 * per_epoch)
    orders = []
    for part in (starts[:per_epoch], starts[per_epoch:]):
        shard_of_row = [shard for shard, _ in part]
        order = list(dict.fromkeys(shard_of_row))
        changes = sum(a != b for a, b in zip(shard_of_row, shard_of_row[1:]))
        assert changes == len(order) - 1
        orders.append(order)
    assert orders[0] != orders[1]
    assert starts[:20] != sorted(starts[:20])
    other_seed = DataLoaderLite(shards, 2, 15, 480, seed=8)
    assert starts_of(other_seed, 20) != starts[:20]


@pytest.mark.parametrize("seed", [None, 7])
def test_from_any_position_it_goes_on_there(shards, seed):
    loader = DataLoaderLite(shards, 2, 15, 480, seed=seed)
    batches = [loader.next_batch() for _ in range(2 * loader.epoch_tokens // 30)]
    for place in (1, 77, loader.epoch_tokens // 30, len(batches) - 1):
        again = DataLoaderLite(shards, 2, 15, 480, seed=seed)
        again.position = place * 30
        x, y = again.next_batch()
        assert torch.equal(x, batches[place][0])
        assert torch.equal(y, batches[place][1])


# -------------------------------------------------------------------------------------------------
# Runs


def test_the_laptops_run_ends_with_an_epoch(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = train_gpt2.TrainConfig(**train_gpt2.PRESETS["laptop"])
    train, val = load_data(INPUT)
    loader = DataLoaderLite(train, cfg.batch_size, cfg.seq_len, cfg.total_batch_size)
    tokens = cfg.max_steps * cfg.total_batch_size
    assert tokens == 3 * loader.epoch_tokens  # all was read as often
    assert cfg.val_tokens >= len(val) - 1
    assert cfg.max_steps % cfg.eval_interval == 0


def test_shards_are_trained_on_where_they_are(train, tmp_path):
    tokens = write_shards(tmp_path / "edu_fineweb10B")
    chosen = train_gpt2.choose_settings(dict(device="cpu"), None)
    assert chosen["data"] == "edu_fineweb10B"
    _, out = train(data=chosen["data"], max_steps=2)
    assert len(losses(out)) == 2
    assert f"{len(tokens):,} tokens" in out
    assert "edu_fineweb10B" in out


def test_a_run_ends_where_its_data_are_damaged(train, fails, tmp_path):
    write_shards(tmp_path / "shards")
    for path in (tmp_path / "shards").glob("*train*"):
        damage(path, "flipped")
    message = fails(train, data="shards")
    assert "--data" in message
    assert "edufineweb_train_" in message
