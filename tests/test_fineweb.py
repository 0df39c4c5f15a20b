"""fineweb.py, with the real `datasets` and a hub on loopback: what it writes, from what, and what it refuses."""
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hub
import numpy as np
import pytest
from conftest import damaged

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import fineweb  # noqa: E402
from fineweb import gpt2_encoding  # noqa: E402

PROBE = "if __name__ == '__main__': import fineweb, multiprocessing as m; m.set_start_method({!r}); fineweb.main()"


def expected(documents):
    """Return documents' tokens, one after another, by tiktoken alone: (n,) uint16."""
    enc = gpt2_encoding()
    return np.array([token for text in documents for token in [50256, *enc.encode_ordinary(text)]], dtype=np.uint16)


def read(folder, shard_size):
    """Return the tokens of all of folder's shards, after a look at their names, types and sizes."""
    names = sorted((name for name in os.listdir(folder) if name.endswith(".npy")), key=lambda name: name[-10:])
    assert names == [f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy" for i in range(len(names))]
    shards = [np.load(os.path.join(folder, name)) for name in names]
    assert all(shard.dtype == np.uint16 and shard.ndim == 1 for shard in shards)
    assert {len(shard) for shard in shards[:-1]} == {shard_size} and 0 < len(shards[-1]) <= shard_size
    return np.concatenate(shards)


@pytest.fixture(autouse=True)
def fineweb_py(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fineweb.py"])


@pytest.fixture(scope="module")
def hub_environment(tmp_path_factory):
    return hub.environment(tmp_path_factory.mktemp("hub"))


def test_documents_are_tokenised_as_tiktoken_does():
    fineweb.start_worker(gpt2_encoding())
    texts = hub.make_documents(50) + ["", "<|endoftext|>", "naïve 東京"]
    tokens, ends = fineweb.tokenize(texts)
    assert tokens.dtype == np.uint16 and ends[-1] == len(tokens)
    for text, document in zip(texts, np.split(tokens, ends[:-1]), strict=True):
        assert document.tolist() == [50256, *gpt2_encoding().encode_ordinary(text)]


@pytest.mark.parametrize("flags, status", [("'--help'", 0), ("'--workers', '0'", 2)])
def test_help_and_a_wrong_flag_wait_for_no_torch(flags, status):
    script = f"import sys; sys.modules['torch'] = None; import fineweb; fineweb.main([{flags}])"  # to import it would fail
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stderr == "" if status == 0 else done.stderr == "-c: --workers 0 is not a number above 0\n"


@pytest.mark.parametrize("start, flags", [("fork", "--workers 1"), ("spawn", "--workers 2"),
                                          ("fork", "--workers 4 --stream"), ("spawn", "--workers 1 --stream")])
def test_the_shards_hold_every_document_in_its_order(hub_environment, tmp_path, start, flags):
    (tmp_path / "probe.py").write_text(PROBE.format(start))
    done = subprocess.run([sys.executable, "probe.py", "--shard_size", "100000", *flags.split()], cwd=tmp_path,
                          env=hub_environment | dict(PYTHONPATH=ROOT), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    tokens = expected(hub.make_documents())
    assert np.array_equal(read(tmp_path / "edu_fineweb10B", 100_000), tokens)
    assert f"{len(tokens):,} tokens in 3 shards in edu_fineweb10B, the first for validation" in done.stdout
    assert "tokens/s" in done.stderr  # the bar
    for line in (tmp_path / "edu_fineweb10B" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((tmp_path / "edu_fineweb10B" / name).read_bytes()).hexdigest()


def test_a_document_may_be_longer_than_a_shard():
    documents = [np.arange(n, dtype=np.uint16) for n in (3, 25, 1, 0, 7)]
    shards = [(shard.copy(), *begin) for shard, *begin in fineweb.cut(documents, 10)]
    assert [len(shard) for shard, _, _ in shards] == [10, 10, 10, 6]
    assert np.array_equal(np.concatenate([shard for shard, _, _ in shards]), np.concatenate(documents))
    for i, (_, document, place) in enumerate(shards):  # it can be begun again after each of them
        rest = [shard.copy() for shard, _, _ in fineweb.cut(documents[document:], 10, document, place)]
        assert len(rest) == 3 - i and all(np.array_equal(a, b) for a, (b, _, _) in zip(rest, shards[i + 1 :]))
    assert [len(shard) for shard, _, _ in fineweb.cut(documents, 36)] == [36]  # no empty one at the end


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with fineweb.replacing(tmp_path / "a"):
            assert not (tmp_path / "a").exists()
            1 / 0
    assert not list(tmp_path.iterdir())


def test_small_pieces_are_gathered(tmp_path):
    with fineweb.replacing(tmp_path / "a") as f:
        for _ in range(1000):
            f.write(bytes(1000))
        assert (tmp_path / "a.tmp").stat().st_size == 0  # all of it is still in the buffer
    assert (tmp_path / "a").stat().st_size == 1_000_000


def test_shards_that_are_there_are_left_alone(tmp_path, capsys):
    fineweb.write_shard(tmp_path, 0, np.arange(5, dtype=np.uint16))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as end:
        fineweb.main(["--out", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"fineweb.py: --out {tmp_path}: it holds shards already; remove it, or write somewhere else\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


TEXTS = ["The first document.\nIt has two lines.\n", "", "The third: 中文, and emoji 🙂."]


def write(tmp_path):
    """Write TEXTS into tmp_path in each format, and some that can't be used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"words": TEXTS}), tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=text, n=1)) + "\n" for text in TEXTS))
    (tmp_path / "null.jsonl").write_text('{"text": "good"}\n{"text": null}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": bad\n')
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("paths", [["a.parquet"], ["a.jsonl"], ["0.txt", "2.txt"]])
def test_local_files(tmp_path, monkeypatch, capsys, paths):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    fineweb.main(["--files", *paths, "--stream", "--shard_size", "6", "--workers", "1"])
    texts = TEXTS if len(paths) == 1 else [TEXTS[0], TEXTS[2]]
    assert np.array_equal(read("edu_fineweb10B", 6), expected(texts))


def test_max_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    fineweb.main(["--files", "a.parquet", "--stream", "--shard_size", "6", "--workers", "1", "--max_tokens", "13"])
    assert np.array_equal(read("edu_fineweb10B", 6), expected(TEXTS)[:13])


def test_a_damaged_shard_is_made_again_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    flags = ["--files", "a.parquet", "--stream", "--shard_size", "6", "--workers", "1", "--out"]
    name = "edufineweb_train_000001.npy"
    fineweb.main([*flags, "shards"])
    damage(tmp_path / "shards" / name, "flipped")
    with pytest.raises(ValueError, match=f"{name} is damaged.*; the command that made it makes it again, with another --out$"):
        fineweb.open_shards("shards", 50257)[0][0:1]
    fineweb.main([*flags, "others"])
    os.replace(f"others/{name}", f"shards/{name}")
    train, val = fineweb.open_shards("shards", 50257)
    assert np.array_equal(np.concatenate((val[0:6], train[0 : len(train)])), expected(TEXTS))


@pytest.mark.parametrize("flags, line", [
    ("--shard_size 0", "--shard_size 0 is not a number above 0"),
    ("--workers many", "argument --workers: invalid int value: 'many'"),
    ("--files no.txt", "--files no.txt: there is no such file"),
    ("--files 0.txt a.jsonl", "--files 0.txt a.jsonl: they have to be of one kind, .txt, .jsonl, .parquet"),
    ("--files a.docx", "--files a.docx: they have to be of one kind, .txt, .jsonl, .parquet"),
    ("--files b.parquet --stream", "b.parquet: it has no column 'text' but words"),
    ("--files bad.jsonl --stream", "bad.jsonl: "),
    ("--files bad.jsonl", "bad.jsonl: "),
    ("--files null.jsonl --stream", "null.jsonl: the text of a document is None"),
    ("--files a.jsonl --max_tokens 100", "--max_tokens 100 would fill no more than the validation shard"),
    ("--files a.jsonl --out 0.txt/x", "--out 0.txt/x: Not a directory"),
    ("--files a.jsonl --stream", "26 tokens fill no more than the validation shard; remove edu_fineweb10B, "),
])
def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys, flags, line):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    with pytest.raises(SystemExit) as end:
        fineweb.main(["--workers", "1", *flags.split()])
    assert end.value.code == 2
    err = capsys.readouterr().err.split("\n")
    assert err[-2].startswith(f"fineweb.py: {line}") and err[-1] == ""


def test_without_a_network_nothing_is_written(tmp_path):
    env = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, os.path.join(ROOT, "fineweb.py")], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("fineweb.py: HuggingFaceFW/fineweb-edu: ") and done.stderr.count("\n") == 1
    assert not list((tmp_path / "edu_fineweb10B").iterdir())


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


@pytest.mark.parametrize("way, line", [
    ("flipped", "edufineweb_train_000002.npy is damaged: its sha256 isn't the one in SHA256SUMS"),
    ("cut", "edufineweb_train_000002.npy is damaged (mmap length is greater than file size)"),
    ("header", "edufineweb_train_000002.npy is damaged ("),
    ("empty", "edufineweb_train_000002.npy is damaged ("),
    ("no tokens", "edufineweb_train_000002.npy holds uint16 of shape (0,)"),
    ("int32", "edufineweb_train_000002.npy holds int32 of shape (1000,)"),
    ("2-d", "edufineweb_train_000002.npy holds uint16 of shape (10, 100)"),
    ("objects", "edufineweb_train_000002.npy is damaged ("),
])
def test_a_damaged_shard_is_named(tmp_path, way, line):
    for i in range(3):
        fineweb.write_shard(tmp_path, i, np.arange(1000, dtype=np.uint16) + 1000 * i)
    damage(tmp_path / "edufineweb_train_000002.npy", way)
    with pytest.raises(ValueError) as e:
        train, _ = fineweb.open_shards(tmp_path, 50257)
        assert train[0:1001][-1] == 2000  # without its sum nothing would be wrong
    assert str(e.value).startswith(line)


def test_shards_are_one_row_of_tokens(tmp_path):
    for i, n in enumerate((5, 7, 1, 10)):
        fineweb.write_shard(tmp_path, i, 100 * i + np.arange(n, dtype=np.uint16))
    (tmp_path / "my_val_notes_000001.npy").write_bytes(b"not a shard")
    train, val = fineweb.open_shards(tmp_path, 50257)
    whole = [*range(100, 107), 200, *range(300, 310)]
    assert len(train) == 18 and val[:9].tolist() == [0, 1, 2, 3, 4]
    assert all(train[a:b].tolist() == whole[a:b] for a in range(18) for b in range(a + 1, 19))
    assert train[3:4].base is not None  # a view of the file, no copy


def test_without_a_sum_a_shard_is_taken_as_it_is(tmp_path):
    for i in range(2):
        fineweb.write_shard(tmp_path, i, np.arange(1000, dtype=np.uint16))
    (tmp_path / "SHA256SUMS").unlink()
    damage(tmp_path / "edufineweb_train_000001.npy", "flipped")
    assert len(fineweb.open_shards(tmp_path, 50257)[0][:1000]) == 1000


def test_a_token_that_is_none_of_gpt2s(tmp_path):
    for i in range(2):
        fineweb.write_shard(tmp_path, i, np.array([1, 50256 + i], dtype=np.uint16))
    train, val = fineweb.open_shards(tmp_path, 50257)
    assert val[:2].tolist() == [1, 50256]
    with pytest.raises(ValueError, match="train_000001.npy holds the token 50257, where GPT-2's end at 50256"):
        train[0:1]


def test_no_damage_of_a_shard_goes_unseen(tmp_path):
    tokens = np.random.default_rng(0).integers(50257, size=(3, 1000)).astype(np.uint16)
    for i in range(3):
        fineweb.write_shard(tmp_path, i, tokens[i])
    for name in ("edufineweb_train_000002.npy", "SHA256SUMS"):
        data = (tmp_path / name).read_bytes()
        for spoilt in damaged(data, 10, 50):
            (tmp_path / name).write_bytes(spoilt)
            try:
                train, _ = fineweb.open_shards(tmp_path, 50257)
                seen = train[0:2000].tolist()
            except ValueError as e:
                assert str(e).startswith(("edufineweb_train_00000", "SHA256SUMS is damaged")) and "\n" not in str(e)
            else:  # a line of the list is gone
                assert name == "SHA256SUMS" and seen == tokens[1:].flatten().tolist()
        (tmp_path / name).write_bytes(data)


@pytest.mark.parametrize("kind", ["val", "train"])
def test_no_shard_of_a_kind(tmp_path, kind):
    fineweb.write_shard(tmp_path, 1 if kind == "val" else 0, np.arange(5, dtype=np.uint16))
    with pytest.raises(ValueError, match=f"it holds no edufineweb_{kind}_"):
        fineweb.open_shards(tmp_path, 50257)


def test_workers_do_not_outlive_the_main_process(tmp_path):
    (tmp_path / "long.txt").write_text("Who's there? " * 100_000)
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "fineweb.py"), "--files", *["long.txt"] * 100, "--stream",
                                "--workers", "2"], cwd=tmp_path, start_new_session=True)

    def alive():
        return len(subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split())

    for count in (3, 0):
        for _ in range(200):
            if alive() == count:
                break
            time.sleep(0.1)
        assert alive() == count
        process.kill()
        process.wait()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_and_go_on(hub_environment, folder, seconds, flags):
    """Start fineweb.py, kill it after so many seconds, and start it until it ends; return (shards then, in the end)."""
    command = [sys.executable, os.path.join(ROOT, "fineweb.py"), "--shard_size", "5000", "--workers", "2",
               "--out", str(folder), *flags]
    process = subprocess.Popen(command, env=hub_environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.kill()
    process.wait()
    there = len(list(folder.glob("*.npy"))) if folder.exists() else 0
    done = subprocess.run(command, env=hub_environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    if there > 1:
        assert "whole shards: going on after them" in done.stderr
    return there, contents(folder)


def try_kills(hub_environment, folder, kills):
    """Kill fineweb.py so many times at random moments; return after how many shards."""
    begin = time.monotonic()
    _, whole = kill_and_go_on(hub_environment, folder / "whole", 0, [])
    seconds = time.monotonic() - begin
    assert len(whole) == 55 + 2  # SHA256SUMS and progress.json
    found = []
    for i in range(kills):
        there, after = kill_and_go_on(hub_environment, folder / str(i), random.uniform(0.6, 1) * seconds,
                                      ["--stream"] * (i % 2))
        assert after == whole
        found.append(there)
    return found


def test_kill_it_and_start_it_again(hub_environment, tmp_path):
    random.seed(0)
    try_kills(hub_environment, tmp_path, 3)


def test_the_moments_before_each_file(tmp_path, monkeypatch):
    """Where a kill falls between a shard, its sum and the note of both, what is missing is written again."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    fineweb.main(["--files", "a.parquet", "--shard_size", "6", "--workers", "1", "--out", "whole"])
    for n in range(17):  # the whole run writes 17 files
        command = ["--files", "a.parquet", *["--stream"] * (n % 2), "--shard_size", "6", "--workers", "1", "--out", str(n)]
        calls, replacing = iter(range(n + 1)), fineweb.replacing

        def power_cut(path):
            if next(calls) == n:
                raise EOFError  # which nothing catches
            return replacing(path)

        with monkeypatch.context() as m, pytest.raises(EOFError):
            m.setattr(fineweb, "replacing", power_cut)
            fineweb.main(command)
        fineweb.main(command)
        assert contents(tmp_path / str(n)) == contents(tmp_path / "whole")


@pytest.mark.parametrize("flags, line", [
    ("--shard_size 7", "its shards were begun with shard_size 6, not 7"),
    ("--max_tokens 20", "its shards were begun with max_tokens None, not 20"),
    ("--files a.jsonl", "its shards were begun with files [['a.parquet', "),
    ("flip", "its progress.json is damaged"),
    ("remove", "its edufineweb_train_000002.npy is gone"),
])
def test_other_settings_do_not_go_on(tmp_path, monkeypatch, capsys, flags, line):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    command = ["--files", "a.parquet", "--stream", "--shard_size", "6", "--workers", "1"]
    fineweb.main(command)
    fineweb.main(command)  # there is nothing left to do
    assert len(set(capsys.readouterr().out.splitlines())) == 1
    if flags == "remove":
        os.remove("edu_fineweb10B/edufineweb_train_000002.npy")
    if flags == "flip":
        path = tmp_path / "edu_fineweb10B" / "progress.json"
        path.write_bytes(path.read_bytes().replace(b'"shards": 5', b'"shards": 3'))
    before = contents(tmp_path / "edu_fineweb10B")
    with pytest.raises(SystemExit) as end:
        fineweb.main([*command, *flags.split()] if "--" in flags else command)
    assert end.value.code == 2 and contents(tmp_path / "edu_fineweb10B") == before
    assert capsys.readouterr().err.startswith(f"fineweb.py: --out edu_fineweb10B: {line}")


def test_a_network_that_fails_for_a_while(tmp_path):
    faults = ["503", "none", *["gone"] * 99]  # all before the first shard
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "fineweb.py"), "--shard_size", "100000"], cwd=tmp_path,
                               env=hub.environment(tmp_path, faults), stderr=subprocess.PIPE, text=True)
    waits = []
    for line in process.stderr:
        if wait := re.search(r"^HuggingFaceFW/fineweb-edu: .*; trying again in (\d) s$", line):
            waits.append(wait[1])
            if len(waits) == 2:  # huggingface_hub's own tries were in vain: the network comes back
                faults[:] = ["cut"]
    assert process.wait(100) == 0 and waits == ["1", "2"]
    assert np.array_equal(read(tmp_path / "edu_fineweb10B", 100_000), expected(hub.make_documents()))


@pytest.mark.parametrize("fault, line", [
    ("builder.has_sufficient_disk_space = lambda *args, **kwargs: False", "Not enough disk space. "),
    ("def full(*args, **kwargs): raise OSError(28, 'No space left on device')\n"
     "datasets.arrow_writer.ArrowWriter.write_table = full", "[Errno 28] No space left on device")])
def test_a_disk_too_small_for_the_download(tmp_path, fault, line):
    (tmp_path / "probe.py").write_text(f"import datasets, fineweb\nfrom datasets import builder\n{fault}\n"
                                       "if __name__ == '__main__': fineweb.main()")
    done = subprocess.run([sys.executable, "probe.py"], cwd=tmp_path, env=dict(hub.environment(tmp_path), PYTHONPATH=ROOT),
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"probe.py: HuggingFaceFW/fineweb-edu: {line}")
    assert "trying again" not in done.stderr


def test_it_goes_on_with_the_revision_it_began_with(tmp_path, monkeypatch):
    environment, out = hub.environment(tmp_path), tmp_path / "edu_fineweb10B"
    command = [sys.executable, os.path.join(ROOT, "fineweb.py"), "--shard_size", "2000", "--stream"]
    monkeypatch.setattr(hub.Handler, "down", "001_00000.parquet")  # there it waits to be killed
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    while not (out / "edufineweb_train_000002.npy").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    progress = json.loads((out / "progress.json").read_text().splitlines()[0])
    assert progress["revision"] == hub.SHA and not progress["done"]
    monkeypatch.setattr(hub.Handler, "down", "nothing")
    monkeypatch.setattr(hub.Handler, "newest", "f" * 40)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "going on after them" in done.stderr
    assert np.array_equal(read(out, 2000), expected(hub.make_documents()))
    # a hub that can't be reached, and another version that was downloaded before: wait for the hub
    monkeypatch.setattr(hub.Handler, "newest", hub.SHA)
    subprocess.run([*command[:2], "--shard_size", "100000", "--out", "downloaded"], cwd=tmp_path, env=environment, check=True,
                   stderr=subprocess.DEVNULL)
    fineweb.write_progress(out, progress | dict(revision="e" * 40))
    process = subprocess.Popen(command, cwd=tmp_path, env=environment | dict(HF_HUB_OFFLINE="1"),
                               stderr=subprocess.PIPE, text=True)
    line = next((line for line in process.stderr if "trying again" in line), None)
    process.kill()
    process.communicate()
    assert line == (f"HuggingFaceFW/fineweb-edu: its version {'e' * 40} can't be had now, only {hub.SHA}, which was downloaded "
                    "before; trying again in 1 s\n")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    (tmp_path / "long.txt").write_text(" ".join(TEXTS) * 90_000)
    (tmp_path / "small").mkdir()
    command = (f"mount -t tmpfs -o size=3m none small && {sys.executable} {ROOT}/fineweb.py --files long.txt --out small "
               "--shard_size 500000 --workers 1 --stream; echo $?; ls small; cd small; sha256sum -c SHA256SUMS")
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, timeout=100)
    assert "fineweb.py: --out small: No space left on device" in done.stderr.splitlines()
    shards = ["edufineweb_val_000000.npy", "edufineweb_train_000001.npy", "edufineweb_train_000002.npy"]
    assert sorted(done.stdout.split()) == sorted(["2", "SHA256SUMS", "progress.json", *shards,
                                                  *(f"{name}:" for name in shards), *["OK"] * 3])


if __name__ == "__main__":  # python tests/test_fineweb.py 20: so many kills
    with tempfile.TemporaryDirectory() as folder:
        environment = hub.environment(Path(folder, "hub-and-cache"))
        found = try_kills(environment, Path(folder), int(sys.argv[1]))
        print(f"{len(found)} kills, after {', '.join(map(str, sorted(found)))} shards of 55: all ended with the same bytes")
