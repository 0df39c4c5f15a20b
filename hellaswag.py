"""HellaSwag: which of four endings fits a text?

    python hellaswag.py -m gpt2                 # score OpenAI's model
    python hellaswag.py -m log                  # or a run's newest checkpoint (not the laptop's)
    python hellaswag.py -m log/model_19073.pt   # or a checkpoint that you name

Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?". The validation set has
10,042 examples. Each is a line of JSON. This is one of them, folded, without four other fields:

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
context four times, each time with another ending. Its answer is the ending whose tokens it finds
likeliest on average.
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
import hashlib
import http.client
import json
import math
import os
import socket
import urllib.request
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from fineweb import Parser, UserError, atomic_write, blame, gpt2_encoding, one_line, run_program

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
PATH = "hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # of that file

# -------------------------------------------------------------------------------------------------
# The file


def download(path=PATH, url=URL, sha256=SHA256):
    """Get the validation set and save it as path, unless that file exists.

    Raises UserError if that fails. The message says how to do it by hand.
    """
    if os.path.exists(path):
        return
    by_hand = f"save it as {path} by hand"
    by_hand += " (a run can do without: --hellaswag_interval 0)"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            data = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {one_line(error)}; {by_hand}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{url} sent something else than HellaSwag's validation set; {by_hand}")
    # Machines that share the folder may download at the same time.
    unfinished = f"{path}.{socket.gethostname()}.{os.getpid()}"
    with blame(path), atomic_write(path, unfinished) as f:
        f.write(data)


def is_example(example):
    """Return whether example, read from JSON, has a context, four endings and a label."""
    if not isinstance(example, dict):
        return False
    endings = example.get("endings")
    if not isinstance(endings, list) or len(endings) != 4:
        return False
    for text in (example.get("ctx"), *endings):
        if not isinstance(text, str) or text == "":
            return False
    return example.get("label") in (0, 1, 2, 3)


def read_examples(path):
    """Return the examples in the file at path, a list of dicts.

    Raises UserError if it can't be read, if it is empty, or if a line isn't an example.
    """
    examples = []
    with blame(path), open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            try:
                example = json.loads(line)
            except (ValueError, RecursionError):  # RecursionError: lists in lists in lists ...
                example = None
            if not is_example(example):
                raise UserError(f"{path}, line {number}: an example of HellaSwag has ctx, four "
                                "endings, and a label from 0 to 3")
            examples.append(example)
    if not examples:
        raise UserError(f"{path} is empty")
    return examples


# -------------------------------------------------------------------------------------------------
# From text to tokens


@dataclass
class Rendered:
    """An example in the form in which a model reads it: row i is the context and ending i."""

    tokens: torch.Tensor  # (4, T) int64
    mask: torch.Tensor  # (4, T) int64, 1 at the tokens of the ending
    label: int  # the number of the right ending


def render(example):
    """Return an example, a dict, as a Rendered. The top of this file shows its rows."""
    encoding = gpt2_encoding()
    context = encoding.encode_ordinary(example["ctx"])
    endings = [encoding.encode_ordinary(" " + ending) for ending in example["endings"]]
    T = len(context) + max(len(ending) for ending in endings)
    tokens = torch.zeros(4, T, dtype=torch.int64)
    mask = torch.zeros(4, T, dtype=torch.int64)
    start = len(context)
    for i, ending in enumerate(endings):
        end = start + len(ending)
        tokens[i, :end] = torch.tensor(context + ending)
        mask[i, start:end] = 1
    return Rendered(tokens, mask, example["label"])


def render_all(examples, block_size):
    """Return a Rendered for each of the examples, a list.

    Raises UserError when one of them is longer than block_size, what the model can read.
    """
    rendered = [render(example) for example in examples]
    longest = max(example.tokens.shape[1] for example in rendered)
    if longest > block_size:
        message = f"HellaSwag's longest example has {longest} tokens, the model reads {block_size}"
        message += " (a run can do without: --hellaswag_interval 0)"
        raise UserError(message)
    return rendered


def load_examples(block_size):
    """Return the whole validation set, as render_all does. Download it if it isn't there.

    Of several processes, the first one on each machine downloads it, and the others wait.
    Raises UserError if it can't be had.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        download()
    if dist.is_initialized():
        dist.barrier()
    return render_all(read_examples(PATH), block_size)


# -------------------------------------------------------------------------------------------------
# From tokens to answers


def score(model, tokens, mask):
    """Return the loss of each row's ending, in nats: (B,). A lower loss is a likelier ending.

    The loss of an ending is the sum of its tokens' losses: minus the log of its probability.
    tokens, mask: (B, T) int64 each.
    """
    # The vector at position t predicts the token at t + 1. So we leave out the last vector, and the
    # first token.
    x = model.hidden(tokens)[:, :-1]  # (B, T - 1, C)
    targets = tokens[:, 1:]  # (B, T - 1)
    is_ending = mask[:, 1:] == 1  # (B, T - 1)
    # lm_head is a large part of the work, so it gets only the n vectors that predict a token of an
    # ending. x[is_ending] puts them in a row.
    logits = model.lm_head(x[is_ending])  # (n, vocab_size)
    # .float(), as in GPT.forward: a GPU would compute the losses of bfloat16 logits in bfloat16.
    token_losses = F.cross_entropy(logits.float(), targets[is_ending], reduction="none")  # (n,)
    losses = torch.zeros(targets.shape, device=tokens.device)  # (B, T - 1)
    losses[is_ending] = token_losses
    return losses.sum(dim=1)  # (B,)


def make_batches(examples, tokens_at_once):
    """Return which examples share a batch: lists of indices. The longest examples come first.

    Those in a batch have about the same length, so there is little padding.
    """
    lengths = [example.tokens.shape[1] for example in examples]
    indices = sorted(range(len(examples)), key=lambda i: lengths[i], reverse=True)
    batches = []
    while indices:
        longest = lengths[indices[0]]
        size = max(1, tokens_at_once // (4 * longest))  # an example has four rows
        batches.append(indices[:size])
        indices = indices[size:]
    return batches


def stack(examples):
    """Return (tokens, mask) of n examples, their rows below each other: (4n, T) int64 each."""
    T = max(example.tokens.shape[1] for example in examples)
    tokens = torch.zeros(len(examples), 4, T, dtype=torch.int64)
    mask = torch.zeros(len(examples), 4, T, dtype=torch.int64)
    for i, example in enumerate(examples):
        length = example.tokens.shape[1]
        tokens[i, :, :length] = example.tokens
        mask[i, :, :length] = example.mask
    return tokens.view(-1, T), mask.view(-1, T)


@torch.no_grad()
def ending_losses(model, examples, show_bar=False):
    """Return the mean loss per token of the four endings of each example, in nats: (N, 4).

    examples: N of them, Rendered. show_bar: show a bar, if standard error is a terminal.
    """
    device = next(model.parameters()).device
    # A GPU needs more to be busy, but a small card must hold the logits: here about 1 GB at most.
    tokens_at_once = 2**11 if device.type == "cpu" else 2**12
    losses = torch.empty(len(examples), 4)
    hide = None if show_bar else True  # tqdm: None shows a bar on a terminal only
    with tqdm(total=len(examples), desc="HellaSwag", leave=False, disable=hide) as bar:
        for indices in make_batches(examples, tokens_at_once):
            tokens, mask = stack([examples[i] for i in indices])
            row_losses = score(model, tokens.to(device), mask.to(device)).cpu()  # (4n,)
            row_losses = row_losses / mask.sum(dim=1)
            losses[indices] = row_losses.view(-1, 4)
            bar.update(len(indices))
    return losses


def count_lowest(losses, examples):
    """Return for how many examples the right ending has the lowest of the losses, (N, 4)."""
    labels = torch.tensor([example.label for example in examples])  # (N,)
    answers = losses.argmin(dim=1)  # (N,)
    return int((answers == labels).sum())


def count_right(model, examples, rank=0, world=1):
    """Return how many of the examples model gets right, by the mean loss per token.

    The examples are dealt out to the processes. Each returns the count over all examples.
    """
    mine = examples[rank::world]
    losses = ending_losses(model, mine, show_bar=rank == 0)
    right = count_lowest(losses, mine)
    if world > 1:
        total = torch.tensor(right, device=next(model.parameters()).device)
        dist.all_reduce(total)
        right = int(total)
    return right


# -------------------------------------------------------------------------------------------------
# The program


def format_example(example, losses):
    """Return an example, a dict, as text, with a line for each ending.

    losses: (4,), the mean loss per token of each ending.
    """
    lines = ["", example["ctx"]]
    answer = losses.argmin()
    for i, ending in enumerate(example["endings"]):
        answer_mark = "*" if i == answer else " "
        label_mark = "+" if i == example["label"] else " "
        lines.append(f"  {answer_mark}{label_mark} {losses[i]:.4f}  {ending}")
    return "\n".join(lines)


def format_accuracy(name, right, n):
    """Return a line of text: the share of n answers that is right, +- its standard error."""
    p = right / n
    standard_error = math.sqrt(p * (1 - p) / max(1, n - 1))  # n - 1: p comes from the same answers
    return f"  {name:25s} {p:.4f} +- {standard_error:.4f}"


def main(argv=None):
    """Score a model and print its accuracies. Raises UserError when that can't be done."""
    import train_gpt2  # not at the top, so that train_gpt2 may import this file

    models = ", ".join(train_gpt2.OPENAI_SIZES)
    expanded = os.path.expanduser  # a shell leaves the ~ of --data=~/x as it is
    parser = Parser(description="Score a GPT-2 on HellaSwag's validation set.")
    parser.add_argument("-m", "--model", type=expanded, default="gpt2",
                        help=f"{models}, "
                        "a run's folder, a checkpoint (.pt), "
                        "or a folder in Hugging Face's format")
    parser.add_argument("-d", "--device", choices=("cuda", "mps", "cpu"),
                        help="by default the best that is there")
    parser.add_argument("--data", type=expanded,
                        help=f"a file of examples; by default {PATH}, which is downloaded if need "
                        "be")
    parser.add_argument("--limit", type=int, help="score only so many examples")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} is not a number above 0")
    device = train_gpt2.pick_device(args.device)
    train_gpt2.prepare(device)

    if args.data is None:
        download()
    examples = read_examples(args.data or PATH)[: args.limit]
    with train_gpt2.enough_memory("choose a smaller --model, or --device cpu"):
        model = train_gpt2.load_model(args.model, "--model").to(device)
        rendered = render_all(examples, model.config.block_size)
        by_token = ending_losses(model, rendered, show_bar=True)  # (N, 4)

    print("* is the model's answer, + the right one; the numbers are nats per token")
    for i, example in enumerate(examples[:5]):
        print(format_example(example, by_token[i]))
    # The total favours short endings, so runs are compared by the mean per token. EleutherAI's
    # harness divides by characters (acc_norm), and changes the texts before it does.
    num_tokens = torch.stack([example.mask.sum(dim=1) for example in rendered])  # (N, 4)
    num_characters = torch.tensor(
        [[len(ending) for ending in example["endings"]] for example in examples])  # (N, 4)
    total = by_token * num_tokens  # (N, 4)
    ways = {
        "total loss": total,
        "mean loss per token": by_token,
        "mean loss per character": total / num_characters,
    }
    print(f"\n{args.model}, {len(examples):,} examples, accuracy by")
    for name, losses in ways.items():
        print(format_accuracy(name, count_lowest(losses, rendered), len(examples)))


if __name__ == "__main__":
    run_program(main)
