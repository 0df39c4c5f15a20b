"""HellaSwag: which of four endings fits a text?

    python hellaswag.py -m gpt2                 # score OpenAI's model
    python hellaswag.py -m log                  # or the newest checkpoint of your run
    python hellaswag.py -m log/model_19073.pt   # or a checkpoint that you name

Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?". The validation set has
10,042 examples. Each is a line of JSON. This is one of them, folded:

    {"ind": 143, "activity_label": "Playing guitarra", "split": "val",
     "ctx": "A young man sits on a bed. the man",
     "endings": ["then wipes his face.",
                 "gets up and walks towards the camera.",
                 "lifts a shoe to his mouth.",
                 "starts playing an acoustic guitar."],
     "label": 3}

ctx is the context, and label the number of the right ending, counted from 0. The other three were
written by a program.

A language model can't be asked to choose, but it gives a probability to every text. So it reads the
context four times, each time with another ending. Its answer is the ending that it finds likeliest.
The four texts are the rows of a tensor. Here are rows 0 and 1, with their words above them:

            A young man  sits  on   a  bed  . the man then wipes his  face       .
    tokens 32  1862 582 10718 319 257 3996 13 262 582  788 46142 465  1986      13   0      0  0
    mask    0     0   0     0   0   0    0  0   0   0    1     1   1     1       1   0      0  0

            A young man  sits  on   a  bed  . the man gets    up and walks towards the camera  .
    tokens 32  1862 582 10718 319 257 3996 13 262 582 3011   510 290 11114    3371 262   4676 13
    mask    0     0   0     0   0   0    0  0   0   0    1     1   1     1       1   1      1  1

- The mask is 1 at the tokens of the ending. Only they count.
- 788 is " then". A word's token includes the space in front of the word.
- Row 0 is shorter than row 1, so three zeros fill it up. They change nothing: they stand on the
  right, and a GPT never looks to the right.
- What a GPT computes at one position predicts the token at the next. The ending of row 0 stands at
  positions 10 to 14, so the positions 9 to 13 predict it.
"""
import argparse
import hashlib
import http.client
import json
import math
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from fineweb import gpt2_encoding, sha256

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
PATH = "hellaswag_val.jsonl"
EXAMPLES = 10_042  # the number of lines in that file

# -------------------------------------------------------------------------------------------------
# The file


def save(path, data):
    """Write data to the file at path, whole or not at all, while others may do the same."""
    # Machines that share a folder may have equal process ids, so the machine's name is needed too.
    private = f"{path}.{socket.gethostname()}.{os.getpid()}"
    try:
        with open(private, "wb") as f:
            f.write(data)
        os.replace(private, path)
    finally:
        if os.path.exists(private):  # there was an error
            os.remove(private)


def download(path=PATH, url=URL):
    """Get the validation set and save it as path, unless that file exists. Its sha256 is saved too.

    Raises OSError if that fails. The message says how to do it by hand.
    """
    if os.path.exists(path):
        return

    by_hand = f"download it by hand and save it as {path}"
    waits = [1, 2, 4, 8]  # seconds before each further try
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                data = answer.read()
            break
        except urllib.error.HTTPError as error:
            problem = f"HTTP status {error.code}"
            worth_retrying = error.code == 429 or error.code >= 500  # too busy, or out of order
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or repr(error)
            worth_retrying = True
        if not waits or not worth_retrying:
            raise OSError(f"{url}: {problem}; {by_hand}")
        wait = waits.pop(0)
        print(f"{url}: {problem}; next try in {wait} s", file=sys.stderr)
        time.sleep(wait)

    # the login page of a network also comes with status 200
    lines = len(data.splitlines())
    if lines != EXAMPLES:
        raise OSError(f"{url} sent {lines:,} lines, and HellaSwag has {EXAMPLES:,}; {by_hand}")

    checksum = hashlib.sha256(data).hexdigest()
    save(path + ".sha256", f"{checksum}  {os.path.basename(path)}\n".encode())
    save(path, data)


def is_example(example):
    """Tell whether example, read from JSON, has what an example of HellaSwag has."""
    if not isinstance(example, dict):
        return False
    endings = example.get("endings")
    if not isinstance(endings, list) or len(endings) != 4:
        return False
    for text in (example.get("ctx"), *endings):
        if not isinstance(text, str) or text == "":
            return False
    return example.get("label") in (0, 1, 2, 3)


def read_examples(path=PATH):
    """Return the examples in the file at path, a list of dicts.

    Raises OSError if the file can't be read. Raises ValueError if it isn't the file that was
    downloaded, if it is empty, or if a line isn't an example; the message has the line's number.
    """
    checksum_path = path + ".sha256"
    if os.path.exists(checksum_path):
        with open(checksum_path, "rb") as f:
            expected = f.read(64)  # the name of the file follows
        if sha256(path).encode() != expected:
            raise ValueError(f"{path} is damaged, as {checksum_path} shows; remove both files")

    examples = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            try:
                example = json.loads(line)
            except ValueError:
                example = None
            if not is_example(example):
                raise ValueError(
                    f"{path}, line {number}: an example of HellaSwag has ctx, four endings, and a "
                    "label from 0 to 3"
                )
            examples.append(example)
    if not examples:
        raise ValueError(f"{path} is empty")
    return examples


def load_examples(encoding):
    """Return the whole validation set, a list of Rendered. Download it if it isn't there.

    Of several processes, the first one on each machine downloads it, and the others wait.
    Raises OSError if it can't be had, and ValueError if the file is damaged.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        download()
    if dist.is_initialized():
        dist.barrier()
    return render_all(read_examples(), encoding)


# -------------------------------------------------------------------------------------------------
# From text to tokens


@dataclass
class Rendered:
    """An example in the form in which a model reads it."""

    tokens: torch.Tensor  # (4, T) int64, a row for each ending
    mask: torch.Tensor  # (4, T) int64, 1 at the tokens of the ending
    label: int  # the number of the right ending
    characters: list  # the lengths of the four endings


def render(example, encoding):
    """Return (tokens, mask) of an example, both (4, T) int64, as the top of this file shows them.

    Row i is the context, followed by ending i. mask is 1 at the tokens of the ending.
    """
    context = encoding.encode_ordinary(example["ctx"])
    endings = []
    for ending in example["endings"]:
        endings.append(encoding.encode_ordinary(" " + ending))

    T = len(context) + max(len(ending) for ending in endings)
    tokens = torch.zeros(4, T, dtype=torch.int64)
    mask = torch.zeros(4, T, dtype=torch.int64)
    for i, ending in enumerate(endings):
        start = len(context)
        end = start + len(ending)
        tokens[i, :end] = torch.tensor(context + ending)
        mask[i, start:end] = 1
    return tokens, mask


def render_all(examples, encoding):
    """Return a Rendered for each of the examples, a list."""
    rendered = []
    for example in examples:
        tokens, mask = render(example, encoding)
        characters = [len(ending) for ending in example["endings"]]
        rendered.append(Rendered(tokens, mask, example["label"], characters))
    return rendered


# -------------------------------------------------------------------------------------------------
# From tokens to answers


def make_batches(examples, model, device):
    """Return batches of examples, a list of (numbers, T).

    numbers says which examples are in the batch. Their rows are padded to the length T. Examples of
    about the same length share a batch, so there is little padding. The longest come first: if the
    memory is too small for them, that shows at once.
    """
    lengths = [example.tokens.shape[1] for example in examples]
    order = sorted(range(len(examples)), key=lambda number: lengths[number], reverse=True)
    tokens_at_once = 2**11 if device.type == "cpu" else 2**14  # a GPU needs more to be busy

    batches = []
    start = 0
    while start < len(order):
        T = lengths[order[start]]  # the longest of those that are left
        if device.type != "cpu":
            # A new shape costs a GPU extra time. With multiples of 64 there are only a few.
            rounded = math.ceil(T / 64) * 64
            if rounded <= model.config.block_size:
                T = rounded
        size = max(1, tokens_at_once // (4 * T))  # an example has four rows
        batches.append((order[start : start + size], T))
        start += size
    return batches


def score(model, examples, T, device):
    """Return the losses of the endings of N examples, in nats, in three ways: (N, 3, 4) float32.

    The loss of an ending is minus the logarithm of its probability. It is the sum of its tokens'
    losses. The three ways are this sum, its mean per token, and its mean per character.
    """
    N = len(examples)
    tokens = torch.zeros(N, 4, T, dtype=torch.int64)
    mask = torch.zeros(N, 4, T, dtype=torch.int64)
    for i, example in enumerate(examples):
        length = example.tokens.shape[1]
        tokens[i, :, :length] = example.tokens
        mask[i, :, :length] = example.mask
    tokens = tokens.view(4 * N, T).to(device)  # (4N, T)
    mask = mask.view(4 * N, T).to(device)  # (4N, T)

    # The vector at position t predicts the token at t + 1. So we leave out the last vector, and the
    # first token.
    vectors = model.hidden(tokens)[:, :-1]  # (4N, T - 1, C)
    next_tokens = tokens[:, 1:]  # (4N, T - 1)
    is_ending = mask[:, 1:] == 1  # (4N, T - 1)

    # lm_head is a large part of the work, so it gets only the n vectors that predict an ending
    logits = model.lm_head(vectors[is_ending])  # (n, vocab_size)
    logits = logits.float()  # whatever the model runs in: bfloat16 has only three digits
    losses = F.cross_entropy(logits, next_tokens[is_ending], reduction="none")  # (n,)
    losses_by_row = torch.zeros(4 * N, T - 1, device=device)
    losses_by_row[is_ending] = losses

    total = losses_by_row.sum(dim=1).view(N, 4).cpu()
    num_tokens = is_ending.sum(dim=1).view(N, 4).cpu()
    num_characters = torch.tensor([example.characters for example in examples])  # (N, 4)
    return torch.stack((total, total / num_tokens, total / num_characters), dim=1)  # (N, 3, 4)


@torch.no_grad()
def ending_losses(model, examples, should_stop=None, progress=False):
    """Return the losses of the endings of N rendered examples: (N, 3, 4) float32 on the CPU.

    They are in nats, and the three are those of score(): in total, per token, and per character.
    should_stop: a function, asked before each batch. If it returns True the result is None.
    progress: show a bar, if standard error is a terminal.
    Raises ValueError if an example is longer than the model's block_size.
    """
    device = next(model.parameters()).device
    losses = torch.empty(len(examples), 3, 4)
    hide = not (progress and sys.stderr.isatty())
    with tqdm(total=len(examples), desc="HellaSwag", leave=False, disable=hide) as bar:
        for numbers, T in make_batches(examples, model, device):
            if should_stop is not None and should_stop():
                return None
            batch = [examples[number] for number in numbers]
            losses[numbers] = score(model, batch, T, device)
            bar.update(len(batch))
    return losses


def right_answers(losses, examples):
    """Return how many answers are right in each of the three ways, (3,) int64.

    The total favours short endings. GPT-2's and GPT-3's usual figures are by the mean per token.
    What EleutherAI's harness calls acc_norm is the mean per character.
    """
    labels = torch.tensor([example.label for example in examples], dtype=torch.int64)  # (N,)
    answers = losses.argmin(dim=2)  # (N, 3): the cheapest ending is the likeliest
    return (answers == labels[:, None]).sum(dim=0)  # (3,)


def count_right(model, examples, rank=0, world=1, should_stop=None):
    """Return how many examples the model gets right: [in total, per token, per character].

    The examples are dealt out to the processes. Each returns the counts of all processes, or None
    if should_stop, which is asked before each batch, returned True in any of them.
    """
    my_examples = examples[rank::world]
    losses = ending_losses(model, my_examples, should_stop, progress=rank == 0)

    # right in each of the three ways, and how many processes broke off
    counts = torch.zeros(4, dtype=torch.int64)
    if losses is None:
        counts[3] = 1
    else:
        counts[:3] = right_answers(losses, my_examples)
    counts = counts.to(next(model.parameters()).device)
    if world > 1:
        dist.all_reduce(counts)

    *right, broke_off = counts.tolist()
    if broke_off > 0:
        return None
    return right


# -------------------------------------------------------------------------------------------------
# The program


def show_example(example, losses):
    """Return an example as text, with a line for each ending.

    losses: (4,), the mean loss per token of each ending.
    """
    lines = ["", example["ctx"]]
    answer = losses.argmin()
    for i, ending in enumerate(example["endings"]):
        answer_mark = "*" if i == answer else " "
        label_mark = "+" if i == example["label"] else " "
        lines.append(f"  {answer_mark}{label_mark} {losses[i]:.4f}  {ending}")
    return "\n".join(lines)


def show_accuracies(right, n):
    """Return text with a line for each way: what share of n answers is right, +- standard error."""
    names = ("total loss", "mean loss per token", "mean loss per character")
    lines = []
    for name, count in zip(names, right):
        p = count / n
        standard_error = math.sqrt(p * (1 - p) / max(1, n - 1))
        lines.append(f"  {name:25s} {p:.4f} +- {standard_error:.4f}")
    return "\n".join(lines)


def main(argv=None):
    """Score a model and print its accuracies. Bad input ends the program with status 2."""
    import train_gpt2  # here and not at the top, since train_gpt2 imports this file

    models = ", ".join(train_gpt2.OPENAI_SIZES)
    parser = argparse.ArgumentParser(description="Score a GPT-2 on HellaSwag's validation set.")
    parser.error = train_gpt2.fail  # argparse's own prints several lines
    add = parser.add_argument
    add("-m", "--model", default="gpt2",
        help=f"{models}, a run's folder, a checkpoint (.pt), or a folder in Hugging Face's format")
    add("-d", "--device", help="cuda, mps or cpu; by default the best that is there")
    add("--data", help=f"a file of examples; by default {PATH}, which is downloaded if need be")
    add("--limit", type=int, help="score only so many examples")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit} is not a number above 0")
    device = train_gpt2.pick_device(args.device)
    train_gpt2.prepare(device)

    path = args.data or PATH
    with train_gpt2.or_fail(f"--data {path}"):
        if args.data is None:
            download()
        examples = read_examples(path)[: args.limit]
    rendered = render_all(examples, gpt2_encoding())
    with train_gpt2.or_fail(f"--model {args.model}"):
        model = train_gpt2.load_model(args.model).to(device)
        losses = ending_losses(model, rendered, progress=True)  # (N, 3, 4)

    train_gpt2.print0("* is the model's answer, + the right one; the numbers are nats per token")
    for example, by_token in zip(examples[:5], losses[:, 1]):
        train_gpt2.print0(show_example(example, by_token))
    right = right_answers(losses, rendered).tolist()
    train_gpt2.print0(f"\n{args.model}, {len(examples):,} examples, accuracy by")
    train_gpt2.print0(show_accuracies(right, len(examples)))


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a letter that can't be shown is no reason to end
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
