"""fineweb.py, with the real `datasets` and a hub on loopback: what it writes, what it refuses."""
import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for python tests/test_fineweb.py

import fineweb  # noqa: E402
import hub  # noqa: E402
from fineweb import gpt2_encoding  # noqa: E402

PROGRAM = [sys.executable, str(ROOT / "fineweb.py")]
TEXTS = ["The first document.\nIt has two lines.\n", "", "The third: 中文, and emoji 🙂."]


def expected(documents):
    """Return the tokens of documents by tiktoken alone, one document after another: (n,) uint16."""
    tokens = []
    for text in documents:
        tokens += [50256, *gpt2_encoding().encode_ordinary(text)]
    return np.array(tokens, dtype=np.uint16)


def read(folder, shard_size):
    """Return the tokens of folder's shards, after a look at their names, types and sizes."""
    names = [path.name for path in Path(folder).glob("*.npy")]
    names.sort(key=lambda name: name[-10:])
    assert names[0] == "edufineweb_val_000000.npy"
    assert names[1:] == [f"edufineweb_train_{i:06d}.npy" for i in range(1, len(names))]
    shards = [np.load(os.path.join(folder, name)) for name in names]
    assert all(shard.dtype == np.uint16 and shard.ndim == 1 for shard in shards)
    assert all(len(shard) == shard_size for shard in shards[:-1])
    assert 0 < len(shards[-1]) <= shard_size
    return np.concatenate(shards)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps(dict(text=text, n=1)) + "\n" for text in texts))


def write_parquet(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def make(folder, *flags, shard_size=6):
    """Run fineweb.py in this process, for the files in flags."""
    fineweb.main(["--out", str(folder), "--shard_size", str(shard_size), "--workers", "1", *flags])


def refused(capsys, *flags):
    """Run fineweb.py in this process; return the line with which it gave up."""
    with pytest.raises(SystemExit) as end:
        fineweb.main(["--workers", "1", *flags])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.endswith("\n")
    line = err.splitlines()[-1]
    assert line.startswith("fineweb.py: ")
    return line


def workers_of(process):
    """Return the process ids of the workers of a fineweb.py that leads its own process group."""
    found = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "spawn_main"],
                           capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for(condition):
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    assert condition()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, and threads in place of processes: they start at once."""
    @contextmanager
    def threads(count):
        with ThreadPoolExecutor(count) as pool:
            yield pool

    monkeypatch.setattr(fineweb, "start_workers", threads)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def long_text(tmp_path):
    """A folder with long.txt, and a command that needs many seconds for it."""
    (tmp_path / "long.txt").write_text("Who's there? " * 100_000)
    return [*PROGRAM, "--files", *["long.txt"] * 100, "--shard_size", "500000", "--workers", "2"]


@pytest.fixture(scope="module")
def hub_environment(tmp_path_factory):
    return hub.environment(tmp_path_factory.mktemp("hub"))


# The tokenizer


def test_it_loads_neither_torch_nor_datasets():
    script = ("import sys, fineweb; print({'torch', 'datasets', 'transformers', 'train_gpt2',"
              " 'hellaswag', 'pyarrow'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_documents_are_tokenised_as_tiktoken_does():
    for text in hub.make_documents(50) + ["", "<|endoftext|>", "naïve 東京"]:
        tokens = fineweb.tokenize(text)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == [50256, *gpt2_encoding().encode_ordinary(text)]
    for bad in (None, 5, "a \ud83d b"):
        assert fineweb.tokenize(bad) is None
    with pytest.raises(UnicodeEncodeError):
        fineweb.encode("a \ud83d b", gpt2_encoding())


def test_a_run_of_spaces_that_tiktoken_cannot_encode():
    text = "a" + " " * 1_200_000 + "b"
    tokens = fineweb.encode(text, gpt2_encoding())
    assert tokens.dtype == np.uint16 and gpt2_encoding().decode(tokens.tolist()) == text


def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(monkeypatch):
    monkeypatch.setattr(fineweb, "PIECE", 30)
    choose = random.Random(0).choices
    characters = ["ab", "'s", "1", "!", " ", "  ", "\n", "\r\n", "\t", "\x1c", "\xa0", "\u3000",
                  "中", "🙂"]
    whole = 0
    for _ in range(2000):
        text = "".join(choose(characters, k=80))
        pieces = list(fineweb.split_long_text(text))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 30
        if all(b[0] in " \n" and not a[-1].isspace() for a, b in zip(pieces, pieces[1:])):
            whole += 1
            tokens = fineweb.encode(text, gpt2_encoding())
            assert tokens.tolist() == gpt2_encoding().encode_ordinary(text)
    assert whole > 100


# Shards


def test_a_document_may_be_longer_than_a_shard():
    documents = [np.arange(n, dtype=np.uint16) for n in (3, 25, 1, 0, 7)]
    shards = [(shard.copy(), *begin) for shard, *begin in fineweb.cut(documents, 10)]
    assert [len(shard) for shard, _, _ in shards] == [10, 10, 10, 6]
    row = np.concatenate([shard for shard, _, _ in shards])
    assert np.array_equal(row, np.concatenate(documents))
    for i, (_, document, place) in enumerate(shards):  # it can be begun again after each of them
        rest = fineweb.cut(documents[document:], 10, document, place)
        rest = [shard.copy() for shard, _, _ in rest]
        assert len(rest) == 3 - i
        assert all(np.array_equal(a, b) for a, (b, _, _) in zip(rest, shards[i + 1 :]))
    lengths = [len(shard) for shard, _, _ in fineweb.cut(documents, 36)]
    assert lengths == [36]  # no empty one at the end


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with fineweb.atomic_write(tmp_path / "a"):
            assert not (tmp_path / "a").exists()
            1 / 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code, is_ignored", [("EINVAL", True), ("ENOTSUP", True), ("EIO", False)])
def test_a_file_system_without_fsync(tmp_path, monkeypatch, code, is_ignored):
    def fsync(descriptor):
        raise OSError(getattr(errno, code), code)

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        with fineweb.atomic_write(tmp_path / "a") as f:
            f.write(b"all of it")
    except OSError:
        assert not is_ignored and not list(tmp_path.iterdir())
    else:
        assert is_ignored and contents(tmp_path) == {"a": b"all of it"}


def test_small_pieces_are_gathered(tmp_path):
    with fineweb.atomic_write(tmp_path / "a") as f:
        for _ in range(1000):
            f.write(bytes(1000))
        assert (tmp_path / "a.tmp").stat().st_size == 0  # all of it is still in the buffer
    assert (tmp_path / "a").stat().st_size == 1_000_000


def test_checksums(tmp_path):
    assert fineweb.read_checksums(tmp_path) == {}
    for number in range(3):
        fineweb.write_shard(tmp_path, number, np.arange(5, dtype=np.uint16) + number)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b": OK") == 3
    checksums = fineweb.read_checksums(tmp_path)
    assert sorted(checksums) == sorted(fineweb.shard_name(number) for number in range(3))
    for name, digest in checksums.items():
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert digest == fineweb.sha256(tmp_path / name)
    for spoilt in (b"one-word\n", b"\xff\xfe \n", b"three words here\n"):
        (tmp_path / "SHA256SUMS").write_bytes(spoilt)
        with pytest.raises(ValueError, match="SHA256SUMS"):
            fineweb.read_checksums(tmp_path)


def test_shards_that_are_there_are_left_alone(tmp_path, capsys):
    fineweb.write_shard(tmp_path, 0, np.arange(5, dtype=np.uint16))
    before = contents(tmp_path)
    assert f"--out {tmp_path}" in refused(capsys, "--out", str(tmp_path))
    assert contents(tmp_path) == before


# Local files


@pytest.mark.parametrize("content, documents", [
    (b"", [""]),
    (b"\n\nno separator\r\n", ["\n\nno separator\r\n"]),
    (b"\xef\xbb\xbfa", ["a"]),
    (b"a<|endoftext|>b<|endoftext|>", ["a", "b"]),
    (b"one\ntwo\n<|endoftext|>\n three\r\n<|endoftext|>\n \n<|endoftext|>", ["one\ntwo", " three"]),
])
def test_the_documents_of_a_text_file(tmp_path, content, documents):
    (tmp_path / "a.txt").write_bytes(content)
    assert fineweb.read_text(tmp_path / "a.txt") == documents


def test_local_files_of_all_kinds(folder, capsys):
    write_parquet(folder / "a.parquet", dict(text=TEXTS))
    write_jsonl(folder / "a.jsonl", TEXTS)
    (folder / "a.txt").write_text(TEXTS[2], encoding="utf-8-sig")
    (folder / "b.txt").write_text("One.\n<|endoftext|>\nTwo.\n", encoding="utf-8")
    for flags, texts in [
        (["a.parquet"], TEXTS),
        (["a.jsonl"], TEXTS),
        (["a.jsonl", "b.txt", "a.parquet", "a.txt"], [*TEXTS, "One.", "Two.", *TEXTS, TEXTS[2]]),
    ]:
        out = f"shards of {len(flags)} files, first {flags[0]}"
        make(out, "--files", *flags)
        assert np.array_equal(read(out, 6), expected(texts))
        assert f"{len(expected(texts)):,} tokens" in capsys.readouterr().out


def test_a_file_name_is_not_a_pattern(folder):
    (folder / "a[1].txt").write_text("the file that is named")
    (folder / "a1.txt").write_text("another one")
    make("s", "--files", "a[1].txt", shard_size=3)
    assert np.array_equal(read("s", 3), expected(["the file that is named"]))


def test_what_cannot_be_used_is_skipped_and_counted(folder, capsys):
    lines = [b'{"text": "good"}', b"", b'{"text": "a \\ud83d b"}', b'{"text": null}',
             b'{"text": 5}', b'{"text": "bad byte \xff"}', b'{"text": bad', b'{"words": 1}',
             b"[" * 100_000, b"[1]", b'{"text": "also good", "x": 1}',
             b'{"text": "and this", "y": [2]}']
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    (folder / "b.txt").write_bytes(b"caf\xe9")
    make("s", "--files", "a.jsonl", "b.txt", shard_size=3)
    assert np.array_equal(read("s", 3), expected(["good", "also good", "and this"]))
    told = capsys.readouterr().err.splitlines()[-1]
    assert ": 9." in told and "a.jsonl, line 3" in told


def test_rows_of_parquet_that_cannot_be_used(folder, capsys):
    import pyarrow as pa

    bad = pa.array([b"good", b"bad byte \xff", b"also good"]).view(pa.string())
    write_parquet(folder / "a.parquet", dict(x=[1, 2, 3], text=bad))
    write_parquet(folder / "b.parquet", dict(text=[None, "last"], y=[[1], None]))
    make("s", "--files", "a.parquet", "b.parquet", shard_size=3)
    assert np.array_equal(read("s", 3), expected(["good", "also good", "last"]))
    told = capsys.readouterr().err.splitlines()[-1]
    assert ": 2." in told and "a.parquet, row 2" in told


def test_only_text_is_read(folder):
    rows = [dict(text=f"Document {i}.", x=None if i < 900 else "something") for i in range(1000)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.jsonl").write_text(json.dumps(dict(y={}, text="The last one.")))
    make("s", "--files", "a.jsonl", "b.jsonl", shard_size=1000)
    texts = [row["text"] for row in rows]
    assert np.array_equal(read("s", 1000), expected([*texts, "The last one."]))


def test_max_tokens(folder):
    write_parquet(folder / "a.parquet", dict(text=TEXTS))
    make("s", "--files", "a.parquet", "--max_tokens", "13")
    assert np.array_equal(read("s", 6), expected(TEXTS)[:13])


@pytest.mark.parametrize("flags, names", [
    ("--shard_size 0", ["--shard_size 0"]),
    ("--workers many", ["--workers", "many"]),
    ("--files no.txt", ["--files no.txt"]),
    ("--files a.docx", ["--files a.docx", ".txt", ".jsonl", ".parquet"]),
    ("--files b.parquet", ["--files b.parquet", "text", "words", "n"]),
    ("--files b.jsonl", ["--files b.jsonl", "text", "words", "n"]),
    ("--files broken.parquet", ["--files broken.parquet"]),
    ("--files empty.jsonl", ["no text"]),
    ("--files a.jsonl --max_tokens 100", ["--max_tokens 100", "--shard_size"]),
    ("--files a.jsonl --out a.jsonl/x", ["--out a.jsonl/x"]),
    ("--files a.jsonl", ["26 tokens", "edu_fineweb10B", "--shard_size"]),
])
def test_what_cannot_be_done_is_one_line(folder, capsys, flags, names):
    write_jsonl(folder / "a.jsonl", TEXTS)
    (folder / "b.jsonl").write_text('{"words": "a"}\n{"n": 1}\n')
    write_parquet(folder / "b.parquet", dict(words=TEXTS, n=[1, 2, 3]))
    (folder / "broken.parquet").write_bytes(b"PAR1 is how it should begin")
    (folder / "empty.jsonl").write_bytes(b"")
    line = refused(capsys, *flags.split())
    assert all(name in line for name in names), line


# Going on


def test_the_moments_before_each_file(folder, monkeypatch):
    """Wherever a kill falls between two files, the same command writes what is missing."""
    write_parquet(folder / "a.parquet", dict(text=[TEXTS[0], None, *TEXTS[1:]]))
    make("whole", "--files", "a.parquet")
    atomic_write = fineweb.atomic_write
    for n in range(17):  # the whole run writes 17 files
        calls = iter(range(n + 1))

        def power_cut(path):
            if next(calls) == n:
                raise EOFError  # nothing catches this one
            return atomic_write(path)

        with monkeypatch.context() as patch, pytest.raises(EOFError):
            patch.setattr(fineweb, "atomic_write", power_cut)
            make(str(n), "--files", "a.parquet")
        assert fineweb.is_finished(str(n)) == (n == 0)  # nothing is there at first
        make(str(n), "--files", "a.parquet")
        assert fineweb.is_finished(str(n))
        assert contents(folder / str(n)) == contents(folder / "whole")


@pytest.mark.parametrize("change, names", [
    ("--shard_size 7", ["shard_size 6", "7"]),
    ("--max_tokens 20", ["max_tokens", "20"]),
    ("--files a.jsonl", ["a.parquet", "a.jsonl"]),
    ("flip", ["progress.json"]),
    ("remove", ["edufineweb_train_000002.npy"]),
])
def test_other_settings_do_not_go_on(folder, capsys, change, names):
    write_jsonl(folder / "a.jsonl", TEXTS)
    write_parquet(folder / "a.parquet", dict(text=TEXTS))
    flags = ["--files", "a.parquet", "--shard_size", "6", "--out", "s"]
    fineweb.main(flags)
    fineweb.main(flags)  # there is nothing left to do
    assert len(set(capsys.readouterr().out.splitlines())) == 1
    if change == "remove":
        os.remove("s/edufineweb_train_000002.npy")
    if change == "flip":
        path = folder / "s" / "progress.json"
        path.write_bytes(path.read_bytes().replace(b'"shards": 5', b'"shards": 3'))
    if change.startswith("--"):
        flags += change.split()
    before = contents(folder / "s")
    line = refused(capsys, *flags)
    assert all(name in line for name in ["--out s", *names]), line
    assert contents(folder / "s") == before


# The real processes


@pytest.mark.parametrize("flags", ["--workers 2", "--workers 1 --stream"])
def test_the_shards_hold_every_document_in_its_order(hub_environment, tmp_path, flags):
    done = subprocess.run([*PROGRAM, "--shard_size", "100000", *flags.split()], cwd=tmp_path,
                          env=hub_environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    tokens = expected(hub.make_documents())
    assert np.array_equal(read(tmp_path / "edu_fineweb10B", 100_000), tokens)
    assert f"{len(tokens):,} tokens in 3 shards in edu_fineweb10B" in done.stdout
    assert "tokens/s" in done.stderr  # the bar
    assert fineweb.is_finished(tmp_path / "edu_fineweb10B")


def test_workers_do_not_outlive_the_main_process(tmp_path, long_text):
    process = subprocess.Popen(long_text, cwd=tmp_path, start_new_session=True)
    wait_for(lambda: len(workers_of(process)) == 2)
    process.kill()
    process.wait()
    wait_for(lambda: workers_of(process) == [])


def test_a_worker_that_is_killed(tmp_path, long_text):
    process = subprocess.Popen(long_text, cwd=tmp_path, start_new_session=True,
                               stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(workers_of(process)) == 2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("fineweb.py: ") and "--workers" in err.splitlines()[-1]
    assert workers_of(process) == []


def test_ctrl_c(tmp_path, long_text):
    out = tmp_path / "edu_fineweb10B"
    process = subprocess.Popen(long_text, cwd=tmp_path, start_new_session=True,
                               stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (out / "edufineweb_train_000002.npy").exists())
    os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    told = re.search(r"(\d+) whole shards.*same command", err.splitlines()[-1])
    shards = len(list(out.glob("*.npy")))
    assert shards - 1 <= int(told[1]) <= shards  # the last one may not be noted yet
    assert workers_of(process) == [] and not list(out.glob("*.tmp"))
    assert not fineweb.is_finished(out)
    text = "Who's there? " * 100_000
    tokens = np.tile(expected([text]), 2 * shards)  # more than enough
    assert np.array_equal(read(out, 500_000), tokens[: shards * 500_000])


def test_a_terminal_that_cannot_show_a_name(tmp_path):
    environment = os.environ | dict(PYTHONIOENCODING="cp1252")
    done = subprocess.run([*PROGRAM, "--files", "東京.txt"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "??.txt" in done.stderr


def test_a_full_disk_is_one_line(tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    (tmp_path / "long.txt").write_text(" ".join(TEXTS) * 90_000)
    (tmp_path / "small").mkdir()
    program = " ".join(PROGRAM)
    command = (f"mount -t tmpfs -o size=3m none small && {program} --files long.txt --out small "
               "--shard_size 500000 --workers 1; echo $?; "
               "ls small; cd small; sha256sum -c SHA256SUMS")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    assert "fineweb.py: --out small: No space left on device" in done.stderr.splitlines()
    shards = [fineweb.shard_name(number) for number in range(3)]
    expected_words = ["2", "SHA256SUMS", "progress.json", *shards]
    expected_words += [f"{name}:" for name in shards] + ["OK"] * 3
    assert sorted(done.stdout.split()) == sorted(expected_words)


# The hub, and a network that fails


def test_without_a_network_nothing_is_written(tmp_path):
    environment = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    done = subprocess.run(PROGRAM, cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 2 and "trying again" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("fineweb.py: HuggingFaceFW/fineweb-edu: ")
    assert not list((tmp_path / "edu_fineweb10B").iterdir())


def test_a_stale_token_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.Handler, "refuses_token", True)
    environment = hub.environment(tmp_path) | dict(HF_TOKEN="hf_stale")
    done = subprocess.run(PROGRAM, cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 2 and "trying again" not in done.stderr
    assert "HF_TOKEN" in done.stderr.splitlines()[-1]


def test_a_cache_folder_that_cannot_be_written(hub_environment, tmp_path):
    (tmp_path / "file").touch()
    environment = hub_environment | dict(HF_HOME=str(tmp_path / "file" / "cache"))
    done = subprocess.run(PROGRAM, cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=100)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "HF_HOME" in line and str(tmp_path / "file" / "cache") in line


def test_a_network_that_fails_for_a_while(tmp_path):
    faults = ["503", "none", *["gone"] * 99]  # all before the first shard
    environment = hub.environment(tmp_path, faults)
    process = subprocess.Popen([*PROGRAM, "--shard_size", "100000"], cwd=tmp_path,
                               env=environment, stderr=subprocess.PIPE, text=True)
    waits = []
    for line in process.stderr:
        wait = re.search(r"^HuggingFaceFW/fineweb-edu: .*; trying again in (\d) s$", line)
        if wait:
            waits.append(wait[1])
            if len(waits) == 2:  # huggingface_hub's own tries were in vain: the network comes back
                faults[:] = ["cut"]
    assert process.wait(100) == 0 and waits == ["1", "2"]
    tokens = read(tmp_path / "edu_fineweb10B", 100_000)
    assert np.array_equal(tokens, expected(hub.make_documents()))


@pytest.mark.parametrize("fault, name", [
    ("builder.has_sufficient_disk_space = lambda *args, **kwargs: False", "Not enough disk space"),
    ("def full(*args, **kwargs): raise OSError(28, 'No space left on device')\n"
     "datasets.arrow_writer.ArrowWriter.write_table = full", "No space left on device"),
])
def test_a_disk_too_small_for_the_download(tmp_path, fault, name):
    probe = f"import datasets, runpy\nfrom datasets import builder\n{fault}\n"
    program = str(ROOT / "fineweb.py")
    (tmp_path / "probe.py").write_text(f"{probe}runpy.run_path({program!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "probe.py"], cwd=tmp_path, capture_output=True,
                          env=hub.environment(tmp_path), text=True, timeout=100)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "trying again" not in done.stderr
    assert line.startswith("fineweb.py: ") and name in line and "HF_HOME" in line


def test_it_goes_on_with_the_revision_it_began_with(tmp_path, monkeypatch):
    environment = hub.environment(tmp_path)
    out = tmp_path / "edu_fineweb10B"
    command = [*PROGRAM, "--shard_size", "2000", "--stream"]
    monkeypatch.setattr(hub.Handler, "down", "001_00000.parquet")  # there it waits to be killed
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    wait_for((out / "edufineweb_train_000002.npy").exists)
    process.kill()
    process.wait()
    progress = fineweb.read_progress(out)
    assert progress["revision"] == hub.SHA and not fineweb.is_finished(out)

    monkeypatch.setattr(hub.Handler, "down", "nothing")
    monkeypatch.setattr(hub.Handler, "newest", "f" * 40)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 0 and "whole shards already" in done.stderr
    assert np.array_equal(read(out, 2000), expected(hub.make_documents()))

    # The hub can't be reached, and another version is in the cache: it waits for the hub.
    monkeypatch.setattr(hub.Handler, "newest", hub.SHA)
    subprocess.run([*PROGRAM, "--shard_size", "100000", "--out", "downloaded"], cwd=tmp_path,
                   env=environment, check=True, stderr=subprocess.DEVNULL)
    fineweb.write_progress(out, progress | dict(revision="e" * 40))
    process = subprocess.Popen(command, cwd=tmp_path, env=environment | dict(HF_HUB_OFFLINE="1"),
                               stderr=subprocess.PIPE, text=True)
    line = next((line for line in process.stderr if "trying again" in line), None)
    process.kill()
    process.communicate()
    assert "e" * 40 in line and hub.SHA in line and "trying again in 1 s" in line


def kill_and_go_on(hub_environment, folder, seconds, flags):
    """Start fineweb.py, kill it after so many seconds, and start it again.

    Returns (the number of shards after the kill, the files in the end).
    """
    command = [*PROGRAM, "--shard_size", "5000", "--workers", "2", "--out", str(folder), *flags]
    process = subprocess.Popen(command, env=hub_environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.kill()
    process.wait()
    shards = len(list(folder.glob("*.npy")))
    done = subprocess.run(command, env=hub_environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    if shards > 1:
        assert "whole shards already" in done.stderr
    return shards, contents(folder)


def try_kills(hub_environment, folder, kills):
    """Kill fineweb.py so many times at random moments; return the number of shards after each."""
    begin = time.monotonic()
    _, whole = kill_and_go_on(hub_environment, folder / "whole", 0, [])
    seconds = time.monotonic() - begin
    assert len(whole) == 55 + 2  # SHA256SUMS and progress.json
    found = []
    for i in range(kills):
        moment = random.uniform(0.6, 1) * seconds
        flags = ["--stream"] if i % 2 else []
        shards, after = kill_and_go_on(hub_environment, folder / str(i), moment, flags)
        assert after == whole
        found.append(shards)
    return found


def test_kill_it_and_start_it_again(hub_environment, tmp_path):
    random.seed(0)
    try_kills(hub_environment, tmp_path, 2)


if __name__ == "__main__":  # python tests/test_fineweb.py 20: so many kills
    with tempfile.TemporaryDirectory() as folder:
        environment = hub.environment(Path(folder, "hub-and-cache"))
        found = sorted(try_kills(environment, Path(folder), int(sys.argv[1])))
        print(f"{len(found)} kills, after {', '.join(map(str, found))} shards of 55: "
              "all ended with the same bytes")
