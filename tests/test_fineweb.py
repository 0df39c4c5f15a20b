"""fineweb.py, with the real `datasets` and a hub on loopback: what it writes, from what, and what it refuses."""
import os
import subprocess
import sys

import hub
import numpy as np
import pytest

import fineweb
from train_gpt2 import gpt2_encoding

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
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


@pytest.mark.parametrize("start, flags", [("fork", "--workers 1"), ("spawn", "--workers 2"), ("fork", "--workers 4")])
def test_the_shards_hold_every_document_in_its_order(hub_environment, tmp_path, start, flags):
    (tmp_path / "probe.py").write_text(PROBE.format(start))
    done = subprocess.run([sys.executable, "probe.py", "--shard_size", "100000", *flags.split()], cwd=tmp_path,
                          env=hub_environment | dict(PYTHONPATH=ROOT), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    tokens = expected(hub.make_documents())
    assert np.array_equal(read(tmp_path / "edu_fineweb10B", 100_000), tokens)
    assert f"{len(tokens):,} tokens in 3 shards in edu_fineweb10B, the first for validation" in done.stdout
    assert "tokens/s" in done.stderr  # the bar


def test_a_document_may_be_longer_than_a_shard():
    documents = [np.arange(n, dtype=np.uint16) for n in (3, 25, 1, 0, 7)]
    shards = [shard.copy() for shard in fineweb.cut(documents, 10)]
    assert [len(shard) for shard in shards] == [10, 10, 10, 6]
    assert np.array_equal(np.concatenate(shards), np.concatenate(documents))
    assert [len(shard) for shard in fineweb.cut(documents, 36)] == [36]  # no empty one at the end


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with fineweb.replacing(tmp_path / "a"):
            assert not (tmp_path / "a").exists()
            1 / 0
    assert not list(tmp_path.iterdir())


def test_shards_that_are_there_are_left_alone(tmp_path, capsys):
    fineweb.write_shard(tmp_path, 0, np.arange(5, dtype=np.uint16))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as end:
        fineweb.main(["--out", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"fineweb.py: {tmp_path} holds shards already; remove it, or write somewhere else with --out\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
