"""The data: shards, texts, and how they are cut into batches."""
import os
import re
import subprocess
import sys
import tracemalloc

import hub
import numpy as np
import pytest
import torch
from conftest import INPUT, ROOT, damaged, losses

import fineweb
import train_gpt2
from fineweb import gpt2_encoding
from train_gpt2 import (
    DataLoaderLite,
    fingerprint,
    load_data,
    load_text,
)


def write_shards(folder, documents=300, shard_size=3000):
    """Write documents as shards into folder. Return the tokens to train on, as one array."""
    os.mkdir(folder)
    tokens = np.concatenate([fineweb.tokenize(text) for text in hub.make_documents(documents)])
    for number, start in enumerate(range(0, len(tokens), shard_size)):
        fineweb.write_shard(folder, number, tokens[start : start + shard_size])
    return tokens[shard_size:]


@pytest.fixture
def arrays(tmp_path):
    """Write shards of 3,000 tokens. Return those to train on."""
    write_shards(tmp_path / "shards")
    arrays, _ = load_data(tmp_path / "shards")
    return arrays


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


def tokens_of(tmp_path, data):
    """Return the tokens that data, bytes, become as a text file, and what they stand for."""
    path = tmp_path / "my.txt"
    path.write_bytes(data)
    arrays, val = load_text(str(path))
    tokens = np.concatenate((*arrays, val))
    return tokens, gpt2_encoding().decode(tokens.tolist())


def test_end_of_text_separates_documents(tmp_path):
    first = "The quality of mercy is not strained."
    second = "It droppeth as the gentle rain from heaven."
    end = "<|endoftext|>"
    tokens, text = tokens_of(tmp_path, f"{first}\n{end}\n{second}\n{end}\n".encode())
    assert text == f"{first}{end}{second}"  # between them, without line breaks, and not at the end
    assert (tokens == 50256).sum() == 1


def test_a_text_without_end_of_text_stays_as_it_is(tmp_path):
    text = "\r\n\n  One line.\r\n\tAnother one, naïve 東京.\n\n" * 3
    assert tokens_of(tmp_path, text.encode())[1] == text


def test_a_byte_order_mark_is_no_text(tmp_path):
    text = "To be, or not to be, that is the question:\n" * 3
    assert tokens_of(tmp_path, b"\xef\xbb\xbf" + text.encode())[1] == text


@pytest.mark.parametrize("name, content, words", [
    ("my.txt", None, ["{folder}"]),
    ("my.txt", b"", ["no text"]),
    ("my.txt", b"\n<|endoftext|>\n", ["no text"]),
    ("my.txt", b"Words.", ["too short"]),
    ("my.txt", b"good<|endoftext|>caf\xe9", ["document 2", "UTF-8"]),
    ("my.jsonl", b'{"text": "a"}\n' * 100, ["fineweb.py --files my.jsonl"]),
    ("my.parquet", b"PAR1" * 100, ["fineweb.py --files my.parquet"]),
])
def test_a_text_that_cannot_be_read(tmp_path, monkeypatch, fails, name, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = fails(load_data, name)
    for word in (f"--data {name}", *words):
        assert word.format(folder=tmp_path) in message


# -------------------------------------------------------------------------------------------------
# Shards


def test_the_first_shard_is_for_validation(tmp_path):
    for number, n in enumerate((5, 7, 1, 10)):
        fineweb.write_shard(tmp_path, number, 100 * number + np.arange(n, dtype=np.uint16))
    (tmp_path / "my_val_notes_000001.npy").write_bytes(b"not a shard")
    arrays, val = load_data(tmp_path)
    assert val.tolist() == [0, 1, 2, 3, 4]
    expected = [[*range(100, 107)], [200], [*range(300, 310)]]
    assert [array.tolist() for array in arrays] == expected
    assert {array.dtype for array in (*arrays, val)} == {np.dtype(np.uint16)}


@pytest.mark.parametrize("numbers, missing", [
    ([], "0 shards"), ([0], "1 shards"), ([1, 2], "edufineweb_val_000000.npy"),
    ([0, 1, 2, 4], "edufineweb_train_000003.npy"),
])
def test_a_shard_is_missing(tmp_path, fails, numbers, missing):
    for number in numbers:
        fineweb.write_shard(tmp_path, number, np.arange(5, dtype=np.uint16))
    message = fails(load_data, tmp_path)
    assert f"--data {tmp_path}" in message and missing in message


def damage(path, way):
    data = path.read_bytes()
    if way == "cut":
        path.write_bytes(data[:-100])
    elif way == "header":
        path.write_bytes(data[:50])
    elif way == "empty":
        path.write_bytes(b"")
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
    ("cut", "damaged"), ("header", "damaged"), ("empty", "damaged"), ("int32", "int32"),
    ("2-d", "(10, 100)"), ("objects", "damaged"), ("zip", "damaged"),
])
def test_a_damaged_shard_is_named(tmp_path, fails, way, word):
    for number in range(3):
        fineweb.write_shard(tmp_path, number, np.arange(1000, dtype=np.uint16))
    path = tmp_path / "edufineweb_train_000002.npy"
    damage(path, way)
    message = fails(load_data, tmp_path)
    assert f"--data {path}" in message and word in message


def test_a_damaged_shard_is_refused_or_can_be_read(tmp_path):
    for number in range(2):
        fineweb.write_shard(tmp_path, number, np.arange(1000, dtype=np.uint16))
    path = tmp_path / "edufineweb_train_000001.npy"
    refused = 0
    for spoilt in damaged(path.read_bytes()[:128], 10, 100):  # the header
        path.write_bytes(spoilt + bytes(2000))
        try:
            (array,), _ = load_data(tmp_path)
            array.sum()
        except fineweb.UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 50


def test_a_shard_without_tokens(tmp_path, fails):
    for number, n in enumerate((5, 0, 7)):
        fineweb.write_shard(tmp_path, number, np.arange(n, dtype=np.uint16))
    assert "edufineweb_train_000001.npy" in fails(load_data, tmp_path)


def test_unfinished_shards_are_warned_about(tmp_path, capsys):
    write_shards(tmp_path / "shards")
    load_data(tmp_path / "shards")
    assert capsys.readouterr().err == ""  # another program's shards
    progress = dict(settings={}, shards=2, tokens=0, document=0, place=0, skipped=0,
                    first_skipped=None, done=False)
    fineweb.write_progress(tmp_path / "shards", progress)
    load_data(tmp_path / "shards")
    warning = capsys.readouterr().err
    assert "warning" in warning and str(tmp_path / "shards") in warning
    fineweb.write_progress(tmp_path / "shards", progress | dict(done=True))
    load_data(tmp_path / "shards")
    assert capsys.readouterr().err == ""


PROBE = """
import re, resource, sys
import train_gpt2

def resident():
    with open("/proc/self/status") as f:
        return int(re.search(r"RssAnon:\\s+(\\d+)", f.read())[1])

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
before = resident()
arrays, val = train_gpt2.load_data(sys.argv[1])
train_gpt2.fingerprint([*arrays, val])
loader = train_gpt2.DataLoaderLite(arrays, 64, 1024, shuffle_seed=1)
loader.next_row = 10**9
x, y = loader.next_batch()
print(*x.shape, loader.rows_per_epoch, resident() - before)  # it opens one more file
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it asks /proc")
def test_many_shards_need_little_memory_and_more_open_files_than_usual(tmp_path):
    header = dict(descr="<u2", fortran_order=False, shape=(100_000_000,))
    for number in range(1153):
        with open(tmp_path / fineweb.shard_name(number), "wb") as f:
            np.lib.format.write_array_header_1_0(f, header)
            f.truncate(f.tell() + 200_000_000)  # sparse: it takes no room on the disk
    done = subprocess.run([sys.executable, "-c", PROBE, str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    B, T, rows, kilobytes = map(int, done.stdout.split())
    assert (B, T) == (64, 1024)
    assert rows == 1152 * 97_656
    assert kilobytes < 100_000


# -------------------------------------------------------------------------------------------------
# A fingerprint


def test_other_data_have_another_fingerprint(tmp_path):
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "same")
    write_shards(tmp_path / "other size", shard_size=2900)
    write_shards(tmp_path / "more", documents=310)
    tokens = write_shards(tmp_path / "made anew")
    fineweb.write_shard(tmp_path / "made anew", 3, tokens[:3000])
    prints = {}
    for folder in ("a", "same", "other size", "more", "made anew"):
        arrays, val = load_data(tmp_path / folder)
        prints[folder] = fingerprint([*arrays, val])
    assert prints["a"] == prints["same"]
    assert len(set(prints.values())) == 4


def test_another_text_has_another_fingerprint(tmp_path):
    path = tmp_path / "my.txt"
    prints = []
    for text in ("one and two " * 20, "one and two " * 20, "one and six " * 20, "one and " * 20):
        path.write_text(text)
        arrays, val = load_data(str(path))
        prints.append(fingerprint([*arrays, val]))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


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


def test_shards_shorter_than_a_sequence_are_named_as_such(arrays, fails):
    message = fails(DataLoaderLite, arrays, B=1, T=3000)
    for word in ("3000", "3001", "--data", "--seq_len", "shards"):
        assert word in message
    assert DataLoaderLite(arrays, B=1, T=2999).rows_per_epoch == len(arrays) - 1


def test_a_token_that_is_none_of_gpt2s(fails):
    assert DataLoaderLite([np.array([1, 50256], dtype=np.uint16)], B=1, T=1).next_batch()
    loader = DataLoaderLite([np.array([1, 50257], dtype=np.uint16)], B=1, T=1)
    message = fails(loader.next_batch)
    assert "--data" in message and "50257" in message


@pytest.mark.parametrize("B, world", [(1, 2), (1, 4), (3, 2)])
@pytest.mark.parametrize("seed", [None, 7])
def test_processes_read_what_one_would_in_the_same_order(B, world, seed):
    one = DataLoaderLite(numbered(120), B, 8, shuffle_seed=seed)
    loaders = [DataLoaderLite(numbered(120), B, 8, rank, world, seed) for rank in range(world)]
    for _ in range(40 // world):  # several epochs
        for loader in loaders:
            x, y = loader.next_batch()
            expected_x, expected_y = one.next_batch()
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)
        assert {loader.next_row for loader in loaders} == {one.next_row}


def test_a_process_reads_no_row_of_another(arrays, monkeypatch):
    rows = {}
    read_row = DataLoaderLite.read_row

    def watched(loader, number):
        rows[loader.rank].append(number)
        return read_row(loader, number)

    monkeypatch.setattr(DataLoaderLite, "read_row", watched)
    for rank in range(4):
        rows[rank] = []
        loader = DataLoaderLite(arrays, 2, 15, rank, world=4, shuffle_seed=7)
        loader.next_batch()
        loader.next_batch()
    assert rows == {rank: [2 * rank, 2 * rank + 1, 2 * rank + 8, 2 * rank + 9] for rank in range(4)}


def read_epochs(loaders, epochs):
    """Read with all loaders in turn, one row each. Return a list of rows of each epoch, tuples."""
    rows_per_epoch = loaders[0].rows_per_epoch
    rows = []
    while len(rows) < epochs * rows_per_epoch:
        for loader in loaders:
            x, y = loader.next_batch()
            assert torch.equal(x[:, 1:], y[:, :-1])
            rows += map(tuple, torch.cat((x, y[:, -1:]), dim=1).tolist())
        assert len({loader.next_row for loader in loaders}) == 1  # nobody drifts
    return [rows[i * rows_per_epoch : (i + 1) * rows_per_epoch] for i in range(epochs)]


def all_rows(arrays, T):
    """Return all rows of T + 1 tokens that lie within a shard, in their order, as tuples."""
    rows = []
    for array in arrays:
        for start in range(0, len(array) - T, T):
            rows.append(tuple(array[start : start + T + 1].tolist()))
    return rows


@pytest.mark.parametrize("world", [1, 4])
def test_without_a_seed_shards_are_read_as_they_stand(arrays, world):
    assert len(arrays) > 5
    T = 15  # a shard is 200 T: its last row would lack a target
    loaders = [DataLoaderLite(arrays, 2, T, rank, world) for rank in range(world)]
    expected = all_rows(arrays, T)  # no row lies across two shards
    assert read_epochs(loaders, 2) == [expected, expected]


@pytest.mark.parametrize("world", [1, 4])
def test_shuffled_epochs(arrays, world):
    T = 15
    loaders = [DataLoaderLite(arrays, 2, T, rank, world, shuffle_seed=7) for rank in range(world)]
    expected = all_rows(arrays, T)
    first, second = read_epochs(loaders, 2)
    assert sorted(first) == sorted(second) == sorted(expected)  # each row once in an epoch
    assert first != second and expected not in (first, second)
    (other,) = read_epochs([DataLoaderLite(arrays, 2, T, shuffle_seed=8)], 1)
    assert other != first


def test_one_shard_is_read_after_another():
    # the tokens of shard i are 1000 i .. 1000 i + 100
    arrays = [np.arange(1000 * i, 1000 * i + 101, dtype=np.uint16) for i in range(6)]
    loader = DataLoaderLite(arrays, B=60, T=10, shuffle_seed=7)
    orders = []
    places_of_shard_0 = set()
    for _ in range(3):
        starts = np.array(first_tokens(loader, 1))
        shards = (starts // 1000).tolist()
        order = list(dict.fromkeys(shards))
        assert shards == [shard for shard in order for _ in range(10)]
        within = [starts[10 * i : 10 * i + 10] % 1000 for i in range(6)]
        assert len({tuple(places) for places in within}) == 6  # each in an order of its own
        places_of_shard_0.add(tuple(starts[starts < 1000]))
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    assert len(places_of_shard_0) == 3


@pytest.mark.parametrize("seed", [None, 7])
def test_from_any_row_it_goes_on_there(arrays, seed):
    loader = DataLoaderLite(arrays, 2, 15, shuffle_seed=seed)
    batches = [loader.next_batch() for _ in range(loader.rows_per_epoch)]  # two epochs
    for place in (1, 77, loader.rows_per_epoch // 2, len(batches) - 1):
        again = DataLoaderLite(arrays, 2, 15, shuffle_seed=seed)
        again.next_row = place * 2
        x, y = again.next_batch()
        assert torch.equal(x, batches[place][0])
        assert torch.equal(y, batches[place][1])


# -------------------------------------------------------------------------------------------------
# Runs


def test_the_laptops_run_is_three_epochs():
    cfg = train_gpt2.TrainConfig(**train_gpt2.PRESETS["laptop"])
    arrays, val = load_data(INPUT)
    loader = DataLoaderLite(arrays, 1, cfg.seq_len)
    rows = cfg.max_steps * cfg.total_batch_size // cfg.seq_len
    assert abs(rows - 3 * loader.rows_per_epoch) <= cfg.total_batch_size // cfg.seq_len
    assert cfg.val_tokens >= len(val) - 1
    assert cfg.max_steps % cfg.eval_interval == 0


def test_shards_are_trained_on_where_they_are(train, tmp_path):
    tokens = write_shards(tmp_path / "edu_fineweb10B")
    cfg = train_gpt2.choose_config({}, None, torch.device("cpu"))
    assert cfg.data == "edu_fineweb10B"
    _, out = train(data=cfg.data, max_steps=2)
    assert len(losses(out)) == 2
    assert f"{len(tokens):,} tokens of edu_fineweb10B" in out


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_ends_where_a_token_is_none_of_gpt2s(train, fails, tmp_path, number):
    write_shards(tmp_path / "shards", documents=60)
    fineweb.write_shard(tmp_path / "shards", number, np.full(3000, 50257, dtype=np.uint16))
    message = fails(train, data="shards", max_steps=1000)
    assert "--data" in message and "50257" in message


def test_shards_that_are_short_or_hold_no_text(train, fails, tmp_path):
    write_shards(tmp_path / "shards")
    fineweb.write_shard(tmp_path / "shards", 0, np.array([50256], dtype=np.uint16))
    assert "--data shards" in fails(train, data="shards")
    fineweb.write_shard(tmp_path / "shards", 0, np.array([50256, 50256], dtype=np.uint16))
    _, out = train(data="shards", eval_interval=1, max_steps=1)
    line = re.search(r"val loss: \d.*", out)[0]
    assert "inf" not in line and "nan" not in line and "per byte" not in line
