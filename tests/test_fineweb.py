"""fineweb.py, with the real `datasets` and a hub on loopback: what it writes, what it refuses."""
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for python tests/test_fineweb.py

import fineweb  # noqa: E402
import hub  # noqa: E402
from conftest import heed_signals  # noqa: E402
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


def make(out, *flags, shard_size=6):
    """Run fineweb.py in this process, for the files in flags."""
    fineweb.main(["--out", str(out), "--shard_size", str(shard_size), "--workers", "1", *flags])


def is_finished(folder):
    return fineweb.read_progress(folder)["done"]


def run_fineweb(folder, *flags, environment=None):
    """Run fineweb.py in folder; return the finished process."""
    return subprocess.run([*PROGRAM, *flags], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=100)


def workers_of(process):
    """Return the process ids of the workers of a fineweb.py that leads its own process group."""
    found = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "spawn_main"],
                           capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
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
def endless(tmp_path):
    """Start fineweb.py on more text than a test waits for; return the process."""
    (tmp_path / "long.txt").write_text("Who's there? " * 100_000)
    command = [*PROGRAM, "--files", *["long.txt"] * 2000, "--shard_size", "500000",
               "--workers", "1", "--out", "s"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True,
                               preexec_fn=heed_signals, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(workers_of(process)) == 1)
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def hub_environment(tmp_path_factory):
    return hub.environment(tmp_path_factory.mktemp("hub"))


# The tokenizer


def test_it_loads_neither_torch_nor_datasets():
    script = ("import sys, fineweb; print({'torch', 'datasets', 'transformers', 'train_gpt2',"
              " 'hellaswag', 'pyarrow'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_the_tokenizer_keeps_no_copy_of_its_files(tmp_path, monkeypatch):
    cache = tmp_path / "file"
    cache.touch()
    for folder in (str(cache), str(tmp_path / "new"), None):  # the first can't be a folder
        if folder is None:
            monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
        else:
            monkeypatch.setenv("TIKTOKEN_CACHE_DIR", folder)
        gpt2_encoding.cache_clear()
        assert gpt2_encoding().decode([15496, 995]) == "Hello world"
        assert os.environ.get("TIKTOKEN_CACHE_DIR") == folder
    assert os.listdir(tmp_path) == ["file"]


def test_a_damaged_file_of_the_tokenizer(tmp_path, monkeypatch, fails):
    shutil.copytree(fineweb.tokenizer_folder(), tmp_path / "data")
    monkeypatch.setattr(fineweb, "tokenizer_folder", lambda: tmp_path / "data")
    for name in ("vocab.bpe", "encoder.json"):
        data = (tmp_path / "data" / name).read_bytes()
        (tmp_path / "data" / name).write_bytes(data[:-1] + b"x")
        assert name in fails(gpt2_encoding.__wrapped__)
        (tmp_path / "data" / name).write_bytes(data)
    assert gpt2_encoding.__wrapped__().n_vocab == 50257


def test_documents_are_tokenised_as_tiktoken_does():
    for text in hub.make_documents(50) + ["", "<|endoftext|>", "naïve 東京"]:
        tokens = fineweb.tokenize(text)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == [50256, *gpt2_encoding().encode_ordinary(text)]
    for bad in (None, 5, "a \ud83d b"):
        assert fineweb.tokenize(bad) is None
    with pytest.raises(UnicodeEncodeError):
        fineweb.encode("a \ud83d b")


def test_a_run_of_spaces_that_tiktoken_cannot_encode():
    text = "a" + " " * 1_200_000 + "b"
    tokens = fineweb.encode(text)
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
            assert fineweb.encode(text).tolist() == gpt2_encoding().encode_ordinary(text)
    assert whole > 100


# Shards


def write_documents(folder, documents, progress):
    """Write documents, a list of arrays, as shards of 10 tokens; return them all."""
    folder.mkdir()
    writer = fineweb.ShardWriter(folder, 10, progress)
    for tokens in documents[progress["document"] :]:
        writer.add(tokens)
    if writer.filled > 0:
        writer.write()
    return [np.load(folder / fineweb.shard_name(i)) for i in range(progress["shards"])
            if (folder / fineweb.shard_name(i)).exists()]


def test_a_document_may_be_longer_than_a_shard(tmp_path, monkeypatch):
    documents = [np.arange(n, dtype=np.uint16) for n in (3, 25, 1, 0, 7)]
    noted = [dict(shards=0, tokens=0, document=0, place=0)]

    def note(folder, progress):
        noted.append(progress.copy())

    monkeypatch.setattr(fineweb, "write_progress", note)
    shards = write_documents(tmp_path / "whole", documents, noted[0].copy())
    assert [len(shard) for shard in shards] == [10, 10, 10, 6]
    assert np.array_equal(np.concatenate(shards), np.concatenate(documents))
    assert [progress["tokens"] for progress in noted] == [0, 10, 20, 30, 36]
    for i, progress in enumerate(noted[:5]):  # it can be begun again after each of them
        rest = write_documents(tmp_path / str(i), documents, progress.copy())
        assert len(rest) == 4 - i
        assert all(np.array_equal(a, b) for a, b in zip(rest, shards[i:]))


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with fineweb.atomic_write(tmp_path / "a"):
            assert not (tmp_path / "a").exists()
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(ZeroDivisionError):
        with fineweb.atomic_write(tmp_path / "a") as f:
            f.write(b"after" * 10**6)
            1 / 0
    assert contents(tmp_path) == {"a": b"before"}


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


def test_shards_that_are_there_are_left_alone(folder, fails):
    (folder / "a.txt").write_text(TEXTS[0])
    os.mkdir("s")
    fineweb.write_shard("s", 0, np.arange(5, dtype=np.uint16))
    assert "--out s" in fails(make, "s", "--files", "a.txt")
    assert [path.name for path in (folder / "s").glob("*.*")] == ["edufineweb_val_000000.npy",
                                                                  ".lock"]
    assert np.load("s/edufineweb_val_000000.npy").tolist() == list(range(5))


# Local files


@pytest.mark.parametrize("content, documents", [
    (b"", []),
    (b" \r\n", []),
    (b"\n\nno separator\r\n", ["\n\nno separator\r\n"]),
    (b"\xef\xbb\xbfa", ["a"]),
    (b"a<|endoftext|>b<|endoftext|>", ["a", "b"]),
    (b"a<|endoftext|>caf\xe9<|endoftext|>b", ["a", None, "b"]),
    (b"one\ntwo\n<|endoftext|>\n three\r\n<|endoftext|>\n \n<|endoftext|>", ["one\ntwo", " three"]),
])
def test_the_documents_of_a_text_file(tmp_path, content, documents):
    (tmp_path / "a.txt").write_bytes(content)
    assert [text for _, text in fineweb.read_txt(tmp_path / "a.txt")] == documents


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


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home").mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / "home" / name).write_text(name)
    make("~/s", "--files", "~/a.txt", "~/b.txt", shard_size=3)
    assert np.array_equal(read(folder / "home" / "s", 3), expected(["a.txt", "b.txt"]))
    assert os.listdir(folder) == ["home"]


def test_what_cannot_be_used_is_skipped_and_counted(folder, capsys):
    lines = [b'{"text": "good"}', b"", b'{"text": "a \\ud83d b"}', b'{"text": null}',
             b'{"text": 5}', b'{"text": "bad byte \xff"}', b'{"text": bad', b'{"words": 1}',
             b"[" * 100_000, b"[1]", b'{"text": "also good", "x": 1}',
             b'{"text": "and this", "y": [2]}']
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    (folder / "b.txt").write_bytes(b"one<|endoftext|>caf\xe9<|endoftext|>three")
    make("s", "--files", "a.jsonl", "b.txt", shard_size=3)
    texts = ["good", "also good", "and this", "one", "three"]
    assert np.array_equal(read("s", 3), expected(texts))
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


@pytest.mark.parametrize("flags, names", [
    ("--shard_size 0", ["--shard_size 0"]),
    ("--workers many", ["--workers", "many"]),
    ("--files no.txt", ["--files no.txt"]),
    ("--files folder.txt", ["--files folder.txt"]),
    ("--files a.docx", ["--files a.docx", ".txt", ".jsonl", ".parquet"]),
    ("--files b.parquet", ["--files b.parquet", "text", "words", "n"]),
    ("--files broken.parquet", ["--files broken.parquet"]),
    ("--files b.jsonl", ["--files b.jsonl", "no text"]),
    ("--files empty.jsonl", ["--files empty.jsonl", "no text"]),
    ("--files empty.txt", ["--files empty.txt", "no text"]),
    ("--files a.jsonl --max_tokens 100", ["--max_tokens 100", "--shard_size"]),
    ("--files a.jsonl --out a.jsonl/x", ["--out a.jsonl/x"]),
])
def test_what_cannot_be_done_is_one_line(folder, fails, flags, names):
    write_jsonl(folder / "a.jsonl", TEXTS)
    (folder / "b.jsonl").write_text('{"words": "a"}\n{"n": 1}\n')
    write_parquet(folder / "b.parquet", dict(words=TEXTS, n=[1, 2, 3]))
    (folder / "broken.parquet").write_bytes(b"PAR1 is how it should begin")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "folder.txt").mkdir()
    message = fails(fineweb.main, ["--workers", "1", "--shard_size", "1000", *flags.split()])
    assert all(name in message for name in names), message


def test_too_few_tokens_for_two_shards(folder, fails):
    """What the message advises works, and touches none of the user's own files."""
    os.mkdir("s")
    (folder / "s" / "a.txt").write_text(TEXTS[0])
    message = fails(make, "s", "--files", "s/a.txt", shard_size=1000)
    assert "--out" in message and "--shard_size" in message and "remove" not in message
    make("t", "--files", "s/a.txt", shard_size=6)
    assert np.array_equal(read("t", 6), expected(TEXTS[:1]))


def test_the_memory_is_full(folder, monkeypatch, fails):
    def tokenize_batch(documents):
        raise MemoryError

    monkeypatch.setattr(fineweb, "tokenize_batch", tokenize_batch)
    (folder / "a.txt").write_text(TEXTS[0])
    assert "--workers 1" in fails(make, "s", "--files", "a.txt")


def test_one_line_for_an_error_and_its_cause(fails):
    def load():
        with fineweb.blame("--dataset a", Exception, "; advice"):
            try:
                raise OSError(28, "No space left on device")
            except OSError as error:
                raise RuntimeError("this is\nwhat happened") from error

    message = fails(load)
    for part in ("--dataset a", "this is what happened", "No space left on device", "; advice"):
        assert part in message


# Going on


@pytest.mark.parametrize("max_tokens", [18, 20])
def test_the_moments_before_each_file(folder, monkeypatch, max_tokens):
    """Wherever a kill falls between two files, the same command writes what is missing."""
    write_parquet(folder / "a.parquet", dict(text=[TEXTS[0], None, *TEXTS[1:], "not read"]))
    flags = ["--files", "a.parquet", "--max_tokens", str(max_tokens)]
    atomic_write = fineweb.atomic_write
    written = []

    def note(path):
        written.append(path)
        return atomic_write(path)

    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "atomic_write", note)
        make("whole", *flags)
    assert np.array_equal(read("whole", 6), expected(TEXTS)[:max_tokens])
    assert len(written) >= 2 * 3 + 2
    for n in range(len(written)):
        calls = iter(range(n + 1))

        def power_cut(path):
            if next(calls) == n:
                raise EOFError  # nothing catches this one
            return atomic_write(path)

        with monkeypatch.context() as patch, pytest.raises(EOFError):
            patch.setattr(fineweb, "atomic_write", power_cut)
            make(str(n), *flags)
        assert n == 0 or not is_finished(str(n))
        make(str(n), *flags)
        assert contents(folder / str(n)) == contents(folder / "whole")


@pytest.mark.parametrize("change, names", [
    ("--shard_size 7", ["shard_size 6", "7"]),
    ("--max_tokens 20", ["max_tokens", "20"]),
    ("--files a.jsonl", ["a.parquet", "a.jsonl"]),
    ("edit", ["a.parquet"]),
    (b"", ["progress.json"]),
    (b"\xff{}", ["progress.json"]),
    (b"[]", ["progress.json"]),
])
def test_other_settings_do_not_go_on(folder, capsys, fails, change, names):
    write_jsonl(folder / "a.jsonl", TEXTS)
    write_parquet(folder / "a.parquet", dict(text=TEXTS))
    flags = ["--files", "a.parquet"]
    make("s", *flags)
    make("s", *flags)  # there is nothing left to do
    assert len(set(capsys.readouterr().out.splitlines())) == 1
    if change == "edit":
        data = (folder / "a.parquet").read_bytes()
        (folder / "a.parquet").write_bytes(data.replace(b"first", b"other"))  # of the same size
        os.utime("a.parquet", (0, 0))
    elif isinstance(change, bytes):
        (folder / "s" / "progress.json").write_bytes(change)
    else:
        flags += change.split()
    before = contents(folder / "s")
    message = fails(make, "s", *flags)
    assert all(name in message for name in ["s", *names]), message
    assert contents(folder / "s") == before


# The real processes


def test_workers_do_not_outlive_the_main_process(endless):
    endless.kill()
    endless.wait()
    wait_for(lambda: workers_of(endless) == [])


def test_two_in_one_folder(folder, fails):
    (folder / "a.txt").write_text(TEXTS[0])
    script = "import fineweb\nwith fineweb.lock_folder('s', '--out'):\n print('ready')\n input()"
    environment = os.environ | dict(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    other = subprocess.Popen([sys.executable, "-c", script], env=environment,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "ready\n"
    assert "--out s" in fails(make, "s", "--files", "a.txt")
    other.kill()
    other.communicate()
    make("s", "--files", "a.txt")
    assert np.array_equal(read("s", 6), expected(TEXTS[:1]))


def test_a_worker_that_is_killed(endless):
    os.kill(workers_of(endless)[0], signal.SIGKILL)
    _, err = endless.communicate(timeout=60)
    assert endless.returncode == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("fineweb.py: ") and "--workers" in err.splitlines()[-1]
    assert workers_of(endless) == []


def test_ctrl_c(tmp_path, endless):
    out = tmp_path / "s"
    wait_for((out / "edufineweb_val_000000.npy").exists)
    (worker,) = workers_of(endless)
    os.kill(worker, signal.SIGINT)  # a terminal's goes to it as well, and it leaves it alone
    shards = len(list(out.glob("*.npy")))
    wait_for((out / fineweb.shard_name(shards + 3)).exists)
    os.killpg(endless.pid, signal.SIGINT)  # the whole group, as a terminal does
    _, err = endless.communicate(timeout=60)
    assert endless.returncode == 130 and "Traceback" not in err
    told = re.search(r"(\d+) whole shards.*same command", err.splitlines()[-1])
    shards = len(list(out.glob("*.npy")))
    assert shards - 1 <= int(told[1]) <= shards  # the last one may not be noted yet
    assert workers_of(endless) == [] and not list(out.glob("*.tmp"))
    assert not is_finished(out)
    tokens = np.tile(expected(["Who's there? " * 100_000]), 2 * shards)  # more than enough
    assert np.array_equal(read(out, 500_000), tokens[: shards * 500_000])


def test_a_terminal_that_cannot_show_a_name(tmp_path):
    environment = os.environ | dict(PYTHONIOENCODING="cp1252")
    done = run_fineweb(tmp_path, "--files", "東京.txt", environment=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "??.txt" in done.stderr


def test_nobody_reads_what_it_prints(folder):
    (folder / "a.txt").write_text(TEXTS[0])
    make("s", "--files", "a.txt")
    command = [*PROGRAM, "--out", "s", "--shard_size", "6", "--files", "a.txt"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    shell = ["sh", "-c", '"$0" "$@" >&- 2>&-', *command]  # both are closed from the start
    assert subprocess.run(shell).returncode == 0
    assert subprocess.run([*shell, "--max_tokens", "12"]).returncode == 2


def test_a_full_disk_is_one_line(tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    (tmp_path / "long.txt").write_text(" ".join(TEXTS) * 18_000)
    (tmp_path / "small").mkdir()
    program = " ".join(PROGRAM)
    command = (f"mount -t tmpfs -o size=640k none small && {program} --files long.txt --out small "
               "--shard_size 100000 --workers 1; echo $?; ls small")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    assert "fineweb.py: --out small: No space left on device" in done.stderr.splitlines()
    shards = [fineweb.shard_name(number) for number in range(3)]
    assert sorted(done.stdout.split()) == sorted(["2", "progress.json", *shards])


# The hub


def check_hub_error(done):
    """Look at the line with which fineweb.py gave up; return it."""
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert line.startswith("fineweb.py: ") and "--dataset" in line
    return line


def test_without_a_network_nothing_is_written(tmp_path):
    environment = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    line = check_hub_error(run_fineweb(tmp_path, environment=environment))
    assert "HuggingFaceFW/fineweb-edu" in line and "HF_TOKEN" in line
    assert not list((tmp_path / "edu_fineweb10B").glob("*.npy"))


def test_a_cache_folder_that_cannot_be_written(hub_environment, tmp_path):
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    done = run_fineweb(tmp_path, environment=hub_environment | dict(HF_HOME=cache))
    line = check_hub_error(done)
    assert "HF_HOME" in line and cache in line


def test_a_dataset_with_a_loading_script(tmp_path):
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("import datasets\n")
    environment = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    done = run_fineweb(tmp_path, "--dataset", "./script", environment=environment)
    assert "--dataset ./script" in check_hub_error(done)


def kill_and_go_on(environment, folder, kills, flags):
    """Kill fineweb.py as often as kills says, and then let it end, with flags.

    kills: (a number of shards, flags) each: it is killed when so many are there. Checks what it
    wrote in the end, and returns the numbers of shards after each kill.
    """
    command = [*PROGRAM, "--shard_size", "5000", "--workers", "2", "--out", str(folder)]
    found = []
    for shards, its_flags in kills:
        process = subprocess.Popen([*command, *its_flags], env=environment,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: len(list(folder.glob("*.npy"))) >= shards)
        time.sleep(random.uniform(0, 0.02))  # at any moment of what it does for a shard
        process.kill()
        process.wait()
        found.append(len(list(folder.glob("*.npy"))))
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 0, done.stderr
    tokens = expected(hub.make_documents())
    assert np.array_equal(read(folder, 5000), tokens)
    assert f"{len(tokens):,} tokens in 55 shards in {folder}" in done.stdout
    assert is_finished(folder) and not list(folder.glob("*.tmp"))
    return found


def test_kill_it_and_start_it_again(tmp_path):
    random.seed(0)
    (tmp_path / "hub").mkdir()
    faults = ["cut"]  # the hub's client goes on after it
    environment = hub.environment(tmp_path / "hub", faults)
    kills = [(5, []), (25, ["--stream"])]  # a stream skips rows in another way
    found = kill_and_go_on(environment, tmp_path / "s", kills, [])
    assert 5 <= found[0] <= found[1] and 25 <= found[1]
    assert faults == []


if __name__ == "__main__":  # python tests/test_fineweb.py 20: so many kills
    with tempfile.TemporaryDirectory() as place:
        environment = hub.environment(Path(place, "hub-and-cache"))
        found = []
        for i in range(int(sys.argv[1])):
            flags = ["--stream"] if i % 2 else []
            kills = [(random.randrange(1, 55), flags)]
            found += kill_and_go_on(environment, Path(place, str(i)), kills, flags)
        print(f"{len(found)} kills, after {', '.join(map(str, sorted(found)))} shards of 55: "
              "all ended with the right tokens")
