"""fineweb.py: what it writes, what it refuses."""
import os
from pathlib import Path

import numpy as np

import fineweb
from fineweb import gpt2_encoding

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


# The tokenizer


def test_documents_are_tokenised_as_tiktoken_does():
    for text in TEXTS + ["<|endoftext|>", "naïve 東京"]:
        tokens = fineweb.tokenize(text)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == [50256, *gpt2_encoding().encode_ordinary(text)]


# Shards


def write_documents(folder, documents, progress):
    """Write documents, a list of arrays, as shards of 10 tokens; return them all."""
    folder.mkdir()
    writer = fineweb.ShardWriter(folder, 10, progress)
    for tokens in documents:
        writer.add(tokens)
    if writer.filled > 0:
        writer.write()
    return [np.load(folder / fineweb.shard_name(i)) for i in range(progress["shards"])]


def test_a_document_may_be_longer_than_a_shard(tmp_path):
    documents = [np.arange(n, dtype=np.uint16) for n in (3, 25, 1, 0, 7)]
    progress = dict(shards=0, tokens=0)
    shards = write_documents(tmp_path / "whole", documents, progress)
    assert [len(shard) for shard in shards] == [10, 10, 10, 6]
    assert np.array_equal(np.concatenate(shards), np.concatenate(documents))
    assert np.array_equal(read(tmp_path / "whole", 10), np.concatenate(documents))
    assert progress == dict(shards=4, tokens=36)


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
