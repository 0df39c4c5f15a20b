"""HellaSwag (Zellers et al. 2019, "Can a Machine Really Finish Your Sentence?"): which of four endings fits a text?

    python hellaswag.py -m gpt2                 # scores OpenAI's model
    python hellaswag.py -m log/model_19073.pt   # or a checkpoint of train_gpt2.py's

An example is a dict: ctx, the text; endings, four of them; label, the number of the right one. A language model answers
by the ending that it finds likeliest after ctx.
"""
import argparse
import ctypes
import hashlib
import http.client
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fineweb import fail, gpt2_encoding, print0, replacing

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
PATH = "hellaswag_val.jsonl"
EXAMPLES = 10_042  # as many lines the file has


def pick_device(name=None):
    """Return the torch.device called name, or the best there is: an NVIDIA GPU (cuda), Apple's (mps), or the cpu.

    Under torchrun each process gets a GPU of its own, and mps, of which there is one, is left out.
    """
    rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available() and world == 1, cpu=True)
    name = name or next(kind for kind in here if here[kind])
    if not here.get(name):
        fail(f"--device {name} is none of {', '.join(kind for kind in here if here[kind])}, which can be used here")
    if name == "cuda" and world > torch.cuda.device_count():
        fail(f"{world} processes want a GPU each, and here are {torch.cuda.device_count()}: start as many processes as "
             "there are GPUs, or say --device cpu")
    return torch.device("cuda", rank) if name == "cuda" else torch.device(name)


def has_bfloat16(device):
    """Tell whether device multiplies bfloat16 matrices itself; where it has to emulate them, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # x86, x86, Arm


def can_compile(device):
    """Tell whether torch.compile works on device, by a trial: a CPU needs a C++ compiler, a GPU Triton.

    On a CPU it also asks PyTorch for algorithms with which what is compiled repeats, as what isn't does by itself.
    """
    if device.type not in ("cuda", "cpu"):
        return False
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which would only take time
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as e:  # whatever: each thing that can be missing shows in a way of its own
        print0(f"torch.compile doesn't work here, so the model runs without it: {(str(e) or repr(e)).splitlines()[0]}")
        return False
    return True


def prepare(device):
    """Set PyTorch, and the C library, for the work on device that follows."""
    torch.set_float32_matmul_precision("high")  # TF32, where the hardware has it
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: glibc would give a large block back at once, and get it anew, page by page,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: at every step; now it keeps what is freed


def download(path=PATH, url=URL):
    """Fetch the validation set to path, unless it is there. Where a try breaks off, the next one goes on.

    Raises OSError, which says how to do it by hand, where the set can't be had.
    """
    if os.path.exists(path):
        return
    part = path + ".part"
    for wait in (1, 2, 4, 8, None):  # seconds until the next try
        have = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                have *= answer.status == 206  # 200: a server that doesn't know ranges sends all of it again
                total = None if answer.length is None else have + answer.length
                with open(part, "ab" if have else "wb") as f, tqdm(total=total, initial=have, unit="B", unit_scale=True,
                                                                   desc=path) as bar:
                    while block := answer.read(2**16):
                        f.write(block)
                        bar.update(len(block))
                    f.flush()
                    os.fsync(f.fileno())
            if total in (None, os.path.getsize(part)):
                break
            problem = f"the connection was cut after {os.path.getsize(part):,} of {total:,} bytes"
        except urllib.error.HTTPError as e:  # the server's answer is a refusal
            problem = f"HTTP status {e.code}"
            if e.code == 416:  # there is nothing after what is here
                break
            if e.code < 500 and e.code != 429:  # it will say so again
                wait = None
        except (OSError, http.client.HTTPException) as e:  # no answer, half of one, or no room for it
            problem = str(getattr(e, "reason", e))
        if wait is None:
            raise OSError(f"{url}: {problem}; download it by hand, by whatever way there is, and save it as {path}")
        print(f"{url}: {problem}; trying again in {wait} s", file=sys.stderr)
        time.sleep(wait)
    with open(part, "rb") as f:
        lines = sum(1 for _ in f)
    if lines != EXAMPLES:
        os.remove(part)
        raise OSError(f"{url} sent {lines:,} lines, where HellaSwag has {EXAMPLES:,}: something else answered")
    with replacing(path + ".sha256") as f:
        f.write(f"{sha256(part)}  {os.path.basename(path)}\n".encode())
    os.replace(part, path)


def sha256(path):
    """Return the sha256 of the file at path, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_examples(path=PATH):
    """Return the examples in the file at path, a JSON object a line.

    Raises OSError where it can't be read, ValueError where it isn't what was downloaded (if the sum of that is there)
    or, with the line's number, where a line isn't an example.
    """
    if os.path.exists(path + ".sha256"):
        with open(path + ".sha256", "rb") as f:
            if f.read(64) != sha256(path).encode():
                raise ValueError(f"{path} is damaged: its sha256 isn't the one in {path}.sha256; remove both")
    examples = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                example = json.loads(line)
                texts = [example["ctx"], *example["endings"]]
                if len(texts) != 5 or not all(isinstance(text, str) and text for text in texts):
                    raise ValueError("ctx or one of four endings is missing")
                if example["label"] not in range(4):
                    raise ValueError("its label isn't 0, 1, 2 or 3")
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{path}, line {number}: not an example of HellaSwag ({e})") from e
            examples.append(example)
    if not examples:
        raise ValueError(f"{path} is empty")
    return examples


def load_examples():
    """Return HellaSwag's examples. Where the file isn't there, the first process of each machine downloads it.

    They do so one after another, as some may share the folder: who finds it there has nothing to do. Raises OSError, in all
    processes alike, where a download fails, and what read_examples raises.
    """
    for rank in range(dist.get_world_size() if dist.is_initialized() else 1):
        problems = [None]
        if rank == int(os.environ.get("RANK", 0)) and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            try:
                download()
            except OSError as e:
                problems = [str(e)]
        if dist.is_initialized():
            problem, problems = problems[0], [None] * dist.get_world_size()
            dist.all_gather_object(problems, problem)
        if any(problems):
            raise OSError(next(filter(None, problems)))
    return read_examples()


def render(example, enc):
    """Return (tokens, mask) of example: (4, T) int64, a row for each ending after the context; mask is 1 at the ending.

    Shorter rows are filled up with 0 on the right, where nothing that counts can see it.
    """
    context = enc.encode_ordinary(example["ctx"])
    endings = [enc.encode_ordinary(" " + ending) for ending in example["endings"]]  # a word's token has its space
    T = len(context) + max(len(ending) for ending in endings)
    tokens, mask = torch.zeros(4, T, dtype=torch.int64), torch.zeros(4, T, dtype=torch.int64)
    for row, ending in enumerate(endings):
        end = len(context) + len(ending)
        tokens[row, :end] = torch.tensor(context + ending)
        mask[row, len(context) : end] = 1
    return tokens, mask


def pack(tokens, mask):
    """Return an example that render rendered as one row: its context, and all four endings after it.

    Three (T,) int64: token ids, positions, and which part each token belongs to, 0 the context, 1 to 4 the endings.
    """
    start, lengths = int(mask[0].argmax()), mask.sum(1)  # of the endings
    pos = torch.cat([torch.arange(start)] + [torch.arange(start, start + n) for n in lengths.tolist()])
    part = torch.cat((torch.zeros(start, dtype=torch.int64), torch.arange(1, 5).repeat_interleave(lengths)))
    return torch.cat((tokens[0, :start], tokens[mask.bool()])), pos, part


@torch.no_grad()
def score(model, packed):
    """Return what each ending of N packed examples costs model, in nats: (N, 4) float32 on the CPU, summed over its tokens.

    And, as (N, 4) too, how many tokens it has. An ending sees its context and itself, the other three aren't there for it.
    """
    device = next(model.parameters()).device
    tokens, pos, part = (pad_sequence(rows, batch_first=True, padding_value=fill).to(device)  # (N, T) each
                         for rows, fill in zip(zip(*packed), (0, 0, 5)))
    mask = ((part[:, None] == 0) | (part[:, None] == part[:, :, None])).tril()  # (N, T, T)
    row, t = ((part > 0) & (part < 5)).nonzero(as_tuple=True)  # (n,) each: the tokens of the endings
    # the one before predicts it; before the first one of an ending that is the last one of the context
    before = torch.where(part[row, t] == part[row, t - 1], t - 1, (part == 0).sum(1)[row] - 1)  # (n,)
    logits, _ = model(tokens, at=(row, before), pos=pos, mask=mask[:, None])  # (n, vocab_size)
    # in float32, whatever the model ran in: bfloat16 would round each loss and their sum to three digits
    losses = F.cross_entropy(logits.float(), tokens[row, t], reduction="none")  # (n,)
    ending = 4 * row + part[row, t] - 1  # (n,)
    sums = torch.zeros(4 * len(packed), device=device).index_add(0, ending, losses)
    return sums.view(-1, 4).cpu(), ending.bincount(minlength=4 * len(packed)).view(-1, 4).cpu()


def costs(model, enc, examples, dtype="float32", progress=False):
    """Return (N, 3, 4) float32: what each of an example's endings costs, as a whole, a token of it, and a character of it.

    The cheapest is the model's answer. A long ending costs more as a whole and may still be right: a token's mean is
    what the curves of GPT-2 and GPT-3 show, a character's mean is what EleutherAI's harness calls acc_norm.
    dtype: bfloat16 for autocast, float32 for none.
    """
    device = next(model.parameters()).device
    packed = [pack(*render(example, enc)) for example in examples]
    by_length = sorted(range(len(packed)), key=lambda i: -len(packed[i][0]))  # so that little is filled up
    result = torch.empty(len(examples), 3, 4)
    # one context around all: autocast keeps the weights that it has cast until its end
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"), \
            tqdm(total=len(examples), unit=" examples", disable=not progress) as bar:
        while by_length:
            # tokens at once: few enough for a CPU's cache, enough to keep a GPU busy
            n = max(1, (2**11 if device.type == "cpu" else 2**12) // len(packed[by_length[0]][0]))
            batch, by_length = by_length[:n], by_length[n:]
            sums, counts = score(model, [packed[i] for i in batch])  # (n, 4) each
            characters = torch.tensor([[len(ending) for ending in examples[i]["endings"]] for i in batch])
            result[batch] = torch.stack((sums, sums / counts, sums / characters), dim=1)
            bar.update(len(batch))
    return result


def count_right(model, enc, examples, dtype="float32", rank=0, world=1, show=0):
    """Return how many of examples model gets right: [by the whole ending's cost, by a token's, by a character's].

    The first `show` of them are printed with their costs a token.
    The examples are dealt out to the processes; the counts are of them all.
    """
    mine = examples[rank::world]
    cost = costs(model, enc, mine, dtype, progress=show)  # (N, 3, 4)
    for example, prices in zip(mine[:show], cost[:, 1].tolist()):
        print(f"\n{example['ctx']}")
        for row, ending in enumerate(example["endings"]):
            marks = ("*" if prices[row] == min(prices) else " ") + ("+" if row == example["label"] else " ")
            print(f"  {marks} {prices[row]:.4f}  {ending}")
    labels = torch.tensor([example["label"] for example in mine])
    right = (cost.argmin(2) == labels[:, None]).sum(0).to(next(model.parameters()).device)  # (3,)
    if world > 1:
        dist.all_reduce(right)
    return right.tolist()


def main(argv=None):
    """Score a model and print its accuracies. Ends the program, status 2, where that can't be done."""
    # not above: it imports this file
    from train_gpt2 import OPENAI_SIZES, GPT, load_checkpoint

    parser = argparse.ArgumentParser(description="Score a GPT-2 on HellaSwag's validation set.")
    parser.error = fail  # argparse's own prints a usage block first
    parser.add_argument("-m", "--model", default="gpt2", help=f"{', '.join(OPENAI_SIZES)}, a folder in Hugging Face's "
                        "format, or a checkpoint, PATH.pt")
    parser.add_argument("-d", "--device", help="cuda, mps or cpu; the best there is if not given")
    parser.add_argument("--data", help=f"the examples, a JSON object a line; {PATH} (downloaded) if not given")
    parser.add_argument("--limit", type=int, help="no more than so many of them")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit} is not a number above 0")
    device = pick_device(args.device)
    prepare(device)
    try:
        if args.data is None:
            download()
        examples = read_examples(args.data or PATH)[: args.limit]
        from_file = args.model.endswith(".pt")
        model = load_checkpoint(args.model)[0] if from_file else GPT.from_pretrained(args.model)
        right = count_right(model.to(device), gpt2_encoding(), examples, show=5)
    except (OSError, ValueError) as e:
        parser.error(str(e).splitlines()[0])
    n = len(examples)
    print(f"{args.model}, {n:,} examples, accuracy by")
    for way, count in zip(("the whole ending's loss", "its mean loss a token", "its mean loss a character"), right):
        p = count / n
        print(f"  {way:25s} {p:.4f} +- {math.sqrt(p * (1 - p) / max(1, n - 1)):.4f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
