"""FineWeb-Edu as tokens: text from Hugging Face, in shards that train_gpt2.py reads.

    python fineweb.py                                    # its sample of 10B tokens, as 100 shards in edu_fineweb10B/

A shard is a NumPy file, uint16 and one-dimensional, of 100M tokens, the last one of what is left. Shard 0 is for
validation. Every document begins with <|endoftext|>.
"""
import argparse
import multiprocessing as mp
import os
import signal
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

SHARDS = "edu_fineweb10B"  # the folder to write to, and the one where train_gpt2.py looks


def start_worker(encoding):
    """Get a worker process ready: it keeps the tokenizer, and leaves Ctrl-C to the main process."""
    global enc
    enc = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def tokenize(text):
    """Return the tokens of one document, (n,) uint16: <|endoftext|>, as something new begins, then the text's."""
    return np.array([enc.eot_token, *enc.encode_ordinary(text)], dtype=np.uint16)


def cut(documents, shard_size):
    """Lay documents, (n,) uint16 each, end to end; yield shard_size tokens at a time, in one array, and then the rest."""
    shard, filled = np.empty(shard_size, dtype=np.uint16), 0
    for tokens in documents:
        while len(tokens):  # a document may end in the next shard, or in one after that
            part = tokens[: shard_size - filled]
            shard[filled : filled + len(part)] = part
            filled += len(part)
            tokens = tokens[len(part) :]
            if filled == shard_size:
                yield shard
                filled = 0
    if filled:
        yield shard[:filled]


@contextmanager
def replacing(path):
    """Open path for writing, under a temporary name until all of it is on the disk: who finds path finds it whole."""
    unfinished = f"{path}.tmp"
    try:
        with open(unfinished, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, path)
    except BaseException:  # Ctrl-C too
        if os.path.exists(unfinished):
            os.remove(unfinished)
        raise


def write_shard(folder, number, tokens):
    """Write tokens, (n,) uint16, as shard number of folder."""
    name = f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"
    with replacing(os.path.join(folder, name)) as f:
        np.save(f, tokens)


def main(argv=None):
    """Write the shards. Ends the program, status 2, where that can't be done."""
    from train_gpt2 import fail, gpt2_encoding  # it imports torch, for which the workers needn't wait

    parser = argparse.ArgumentParser(description="Write FineWeb-Edu, or other text, as shards of GPT-2's tokens.")
    parser.error = fail  # argparse's own prints a usage block first
    parser.add_argument("--out", default=SHARDS, help="the folder to write to")
    parser.add_argument("--shard_size", type=int, default=100_000_000, help="tokens in a shard")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="tokenising processes")
    args = parser.parse_args(argv)
    source = "HuggingFaceFW/fineweb-edu"
    for name in ("shard_size", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not a number above 0")
    try:
        os.makedirs(args.out, exist_ok=True)
        if any(name.endswith(".npy") for name in os.listdir(args.out)):
            parser.error(f"{args.out} holds shards already; remove it, or write somewhere else with --out")
    except OSError as e:
        parser.error(f"--out {args.out}: {e.strerror}")

    written = count = 0
    try:
        with mp.Pool(args.workers, start_worker, [gpt2_encoding()]) as pool:
            from datasets import load_dataset  # slow to import, and needed only here

            dataset = load_dataset(source, name="sample-10BT", split="train")
            with tqdm(unit=" tokens", unit_scale=True) as bar:

                def documents():
                    nonlocal count
                    for tokens in pool.imap(tokenize, (row["text"] for row in dataset), chunksize=16):  # in this order
                        count += len(tokens)
                        bar.update(len(tokens))
                        yield tokens

                for shard in cut(documents(), args.shard_size):
                    write_shard(args.out, written, shard)
                    written += 1
    except (OSError, ValueError) as e:
        parser.error(f"{source}: {(str(e) or repr(e)).splitlines()[0]}")
    print(f"{count:,} tokens in {written} shards in {args.out}, the first for validation")


if __name__ == "__main__":
    main()
