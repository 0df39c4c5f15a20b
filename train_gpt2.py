"""GPT-2 (124M) from an empty file: the model, its data, its training. `--help` lists the flags.

    python train_gpt2.py                                     # one process: a GPU where there is one, else the CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   # eight processes, each with a GPU of its own
    torchrun --standalone --nproc_per_node=2 train_gpt2.py --device cpu
    python train_gpt2.py --resume                            # go on from the newest checkpoint in log/
    python train_gpt2.py --sample "Once upon a time"         # let it write
"""
import argparse
import codecs
import inspect
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from fineweb import SHARDS, fail, gpt2_encoding, load_data, or_fail, print0, replacing
from hellaswag import can_compile, count_right, has_bfloat16, load_examples, pick_device, prepare

# -----------------------------------------------------------------------------
# The model


@dataclass
class GPTConfig:
    """The shape of a GPT; the defaults are the smallest of OpenAI's four GPT-2s."""

    block_size: int = 1024  # the longest sequence it can read, in tokens
    vocab_size: int = 50257  # 256 bytes, 50,000 merges of frequent neighbours, and <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # the width: every token is a vector of so many numbers


OPENAI_SIZES = {  # the four that were released; in all of them a head is 64 wide
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}
SIZES = {**OPENAI_SIZES, "laptop": dict(n_layer=4, n_head=12, n_embd=96)}  # and one that two cores can train


class CausalSelfAttention(nn.Module):
    """Let every token read from itself and from the tokens before it ("Attention Is All You Need", section 3.2).

    (B, T, n_embd) -> (B, T, n_embd), inside nh heads of size hs; ValueError where n_embd is no multiple of nh.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of every head
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, mask=None):
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3 * C)
        if torch.is_autocast_enabled("cpu"):  # PyTorch's kernel for CPUs is slow in bfloat16, above all on the way back
            qkv = qkv.float()
        # a head is a slice of the width; moved before T, it is one more batch dimension
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in qkv.split(C, dim=2))  # (B, nh, T, hs) each
        if cache is not None:  # keys and values of the S - T tokens before these don't change any more
            if self in cache:
                k, v = (torch.cat((old, new), dim=2) for old, new in zip(cache[self], (k, v)))  # (B, nh, S, hs) each
            cache[self] = k, v
        # softmax(q k^T / sqrt(hs)) v with the future masked, in tiles: the (T, T) scores never reach memory
        with torch.autocast(x.device.type, enabled=False):  # in the type that q, k and v have
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # the heads side by side again


class MLP(nn.Module):
    """Two linear maps with a GELU between them, applied to every token alone; (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # the exact one was slow in 2019; OpenAI's weights expect this one
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))  # (B, T, n_embd) -> (B, T, 4 * n_embd) -> (B, T, n_embd)


class Block(nn.Module):
    """One layer: tokens talk (attn), then each thinks alone (mlp); (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019), under OpenAI's parameter names; no dropout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # what a token is
            wpe=nn.Embedding(config.block_size, config.n_embd),  # where it stands
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # one matrix for both jobs
        # GPT-2's initialisation (section 2.3 of the paper, and model.py of OpenAI's code). LayerNorms stay at 1 and 0.
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 n_layer of these add to the residual stream: keep the sum's size
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None, at=..., pos=None, mask=None):
        """Score every possible next token at every position.

        idx: token ids, (B, T), int64; targets: the ids that do come next, (B, T), int64.
        cache: a dict, empty at first; with it idx is what follows the idx of the calls before, which isn't computed again.
        at: an index into (B, T), by which only some positions are scored.
        pos, mask: where each token stands, (B, T), and which others it sees, (B, 1, T, T), where idx isn't a plain text.
        Returns (logits, loss): logits (B, T, vocab_size), detached where there are targets; loss, in nats a token, or None.
        Raises ValueError where a sequence is over block_size.
        """
        B, T = idx.shape
        past = next(iter(cache.values()))[0].shape[2] if cache else 0
        if (longest := past + T if pos is None else int(pos.max()) + 1) > self.config.block_size:
            raise ValueError(f"a sequence of {longest} tokens is longer than block_size, {self.config.block_size}")
        if pos is None:
            pos = torch.arange(past, past + T, device=idx.device)  # (T,)
        if past:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=idx.device).tril(past)  # (T, S)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, n_embd)
        for block in self.transformer.h:
            x = block(x, cache, mask)
        logits = self.lm_head(self.transformer.ln_f(x)[at])  # (B, T, vocab_size), or what `at` leaves of (B, T)
        if targets is None:
            return logits, None
        # detached: if not, torch.compile would make them a gradient too, of nothing but zeros, and as large as they are
        return logits.detach(), F.cross_entropy(logits.view(B * T, -1), targets.reshape(B * T))  # mean of B * T losses

    @classmethod
    def from_pretrained(cls, name):
        """Return a GPT with weights in Hugging Face's format: OpenAI's (gpt2, gpt2-medium, ...), or those of a folder.

        Raises OSError where there are no such weights, ValueError where they aren't a whole GPT-2's.
        """
        if name not in OPENAI_SIZES and not os.path.isdir(name):
            raise FileNotFoundError(f"{name!r} is neither a folder nor one of {', '.join(OPENAI_SIZES)}")
        from huggingface_hub.utils import logging as hub_logging  # slow to import, and needed only here
        from safetensors import SafetensorError
        from transformers import GPT2LMHeadModel, logging

        logging.set_verbosity_error()  # what matters of its warnings is raised below
        logging.disable_progress_bar()
        hub_logging.set_verbosity_error()
        try:
            source, report = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True)
        except SafetensorError as e:
            raise OSError(f"its model.safetensors is damaged ({e})") from e
        c = source.config
        for key, value in dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
                               scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True).items():
            if getattr(c, key) != value:
                raise ValueError(f"its {key} is {getattr(c, key)}, and GPT-2's is {value}")
        for fault in ("missing_keys", "mismatched_keys"):  # what transformers then fills with random numbers
            if report[fault]:
                raise ValueError(f"its weights have {fault}, such as {sorted(report[fault])[0]}")
        model = cls(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd))
        # OpenAI computed these four as x @ W with W of shape (in, out); nn.Linear keeps (out, in)
        transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
        weights = {key: w.t() if key.endswith(transposed) else w for key, w in source.state_dict().items()}
        model.load_state_dict({key: weights[key] for key in model.state_dict()})
        return model


# -----------------------------------------------------------------------------
# Text from the model


@torch.no_grad()
def sample(model, enc, prompt, num_samples=4, max_new_tokens=32, top_k=50, seed=42, temperature=1.0, show=False):
    """Continue prompt num_samples times, each by max_new_tokens tokens; return the texts, prompt included.

    Each token is one of the top_k likeliest, drawn by a generator of its own: sampling leaves no trace elsewhere. The
    logits are divided by temperature first; 0 takes the likeliest token. show: print the first text as it comes.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    idx = torch.tensor([enc.encode(prompt, allowed_special="all")] * num_samples, device=device)  # (num_samples, T)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may be more than one token
    if show:
        print(prompt, end="", flush=True)
    cache, new = {}, idx[:, -model.config.block_size :]
    for n in range(1, max_new_tokens + 1):
        logits, _ = model(new, cache=cache, at=np.s_[:, -1])
        logits = logits[:, : enc.n_vocab]  # (num_samples, 50257): without the padding
        logits, ids = logits.topk(min(top_k, enc.n_vocab) if temperature else 1)  # (num_samples, top_k)
        drawn = torch.multinomial(F.softmax(logits / (temperature or 1), dim=-1), 1, generator=generator)  # (num_samples, 1)
        idx = torch.cat((idx, ids.gather(1, drawn)), dim=1)  # (num_samples, T + 1)
        new = idx[:, -1:]  # (num_samples, 1)
        if show:
            print(decoder.decode(enc.decode_single_token_bytes(int(new[0])), n == max_new_tokens), end="", flush=True)
        if idx.shape[1] > model.config.block_size:  # the oldest token drops out: the others move up, to other positions
            cache, new = {}, idx[:, -model.config.block_size :]
    return [enc.decode(row) for row in idx.tolist()]


# -----------------------------------------------------------------------------
# The data


class DataLoaderLite:
    """Walk through tokens, Shards, B windows of T at a time for each of world processes, side by side.

    position, in tokens from the run's start on and the same in all processes, is where process 0's next micro-batch
    starts; the others add their own offset. So together they read what one would. An epoch ends with the last whole total
    batch, of total_batch_size tokens, whatever B and world are; of a text too short for one, with its last window. With a
    seed each epoch has an order of its own; what is less than a window at a shard's end is left out.
    """

    def __init__(self, tokens, B, T, total_batch_size, rank=0, world=1, seed=None):
        self.tokens, self.B, self.T, self.rank, self.world, self.seed, self.position = tokens, B, T, rank, world, seed, 0
        sizes = tokens.sizes if seed is not None else np.array([len(tokens)])  # in order, a window may cross two shards
        usable = int(((sizes - 1) // T).sum()) * T  # in whole windows; a shard's last token has no successor
        self.epoch_tokens = usable // total_batch_size * total_batch_size or usable
        if usable < B * T * world:
            fail(f"{len(tokens)} tokens are there to train on, and one micro-batch of {B} x {T} for each of {world} "
                 f"process(es) needs {B * T * world + 1}; lower --batch_size or --seq_len")

    def start(self, number):
        """Return where the run's window `number` begins in tokens."""
        epoch, number = divmod(number, self.epoch_tokens // self.T)
        return number * self.T if self.seed is None else self.tokens.start(number, self.T, self.seed, epoch)

    def next_batch(self):
        """Return the next x and y, (B, T) int64 each; y is x moved on by one token."""
        starts = [self.start(self.position // self.T + row) for row in range(self.B * self.world)]
        with or_fail("--data"):  # every process opens, and checks, what any of them needs: all find a damaged shard at once
            rows = [self.tokens[start : start + self.T + 1] for start in starts]
        buf = np.stack(rows[self.rank * self.B : (self.rank + 1) * self.B]).astype(np.int64)  # (B, T + 1)
        self.position += self.B * self.T * self.world
        return torch.from_numpy(buf[:, :-1]), torch.from_numpy(buf[:, 1:])


# -----------------------------------------------------------------------------
# The run's settings


@dataclass
class TrainConfig:
    """One training run: a field is a flag, its comment the flag's help. None: not given; fill_defaults fills most of these."""

    data: str = None  # a folder of shards or a text file; edu_fineweb10B if shards are there, else input.txt
    model: str = None  # the shape of a model from scratch: gpt2, gpt2-medium, gpt2-large, gpt2-xl or laptop
    init_from: str = None  # scratch; gpt2, ...; a folder in Hugging Face's format; or a checkpoint, PATH.pt
    batch_size: int = None  # B, sequences in a micro-batch; lower when memory is short, the result stays; not given: these or fewer
    seq_len: int = None  # T, tokens in a sequence
    shuffle: bool = None  # read the data in an order that is another one in each epoch; else as they stand
    total_batch_size: int = None  # tokens in an update, over all micro-batches and processes
    max_steps: int = None  # updates of the weights
    warmup_steps: int = None  # updates over which the learning rate rises to max_lr
    max_lr: float = None  # the learning rate's peak; it falls to a tenth of it
    weight_decay: float = None  # AdamW's, on the matrices alone
    grad_clip: float = None  # the gradient's largest norm; a longer one is shortened to it
    eval_interval: int = None  # updates between two measurements of the validation loss; 0: never
    val_tokens: int = None  # how many tokens the validation loss is measured on, at most
    hellaswag_interval: int = None  # updates between two HellaSwag scores; 0: never
    sample_interval: int = None  # updates between two rounds of samples; 0: never
    checkpoint_interval: int = None  # updates between two checkpoints; 0: none
    checkpoint_minutes: float = None  # and minutes after which one more is written; 0: none
    keep_checkpoints: int = None  # how many of the newest are kept, beside those of every 5000th update
    log_dir: str = "log"  # the folder for log.txt and checkpoints
    resume: bool = False  # go on from log_dir's newest checkpoint, with its settings but for those given
    device: str = None  # cuda, mps or cpu; the best there is if not given
    dtype: str = None  # bfloat16 (autocast) or float32; bfloat16 where the hardware has it if not given
    compile: bool = None  # run the model through torch.compile; the default on cuda, and on a cpu with bfloat16
    timeout_minutes: float = None  # how long processes wait for one that died or hangs
    seed: int = None  # of the weights at the start, of the data's order, and of --sample
    sample: str = None  # don't train but continue this text, by log_dir's newest checkpoint or what init_from names
    num_samples: int = 4  # how many continuations --sample writes
    max_new_tokens: int = 256  # the tokens of each
    temperature: float = 1.0  # below 1 --sample prefers likelier tokens, above 1 unlikelier ones; 0: always the likeliest
    top_k: int = 50  # each token of --sample is one of so many of the likeliest


BOTH = dict(init_from="scratch", shuffle=True, checkpoint_minutes=30.0, keep_checkpoints=3, timeout_minutes=10.0, seed=1337)
LAPTOP = dict(model="laptop", batch_size=16, seq_len=64, total_batch_size=1024, max_steps=849, warmup_steps=100,
              max_lr=7e-3, weight_decay=0.8, grad_clip=1.0, eval_interval=283, val_tokens=2**17, sample_interval=283,
              hellaswag_interval=0, checkpoint_interval=283)  # by measurement; 283 updates are an epoch of input.txt
LECTURE = dict(model="gpt2", batch_size=64, seq_len=1024, total_batch_size=2**19, max_steps=19073, warmup_steps=715,
               max_lr=6e-4, weight_decay=0.1, grad_clip=1.0, eval_interval=250, val_tokens=20 * 2**19,
               sample_interval=250, hellaswag_interval=250, checkpoint_interval=5000)  # GPT-3's paper, appendix B


def fill_defaults(cfg, device, world=1):
    """Return cfg, what is None filled by the lecture's row (a CUDA GPU and shards) or the laptop's; B fits world processes."""
    if cfg.data is None:
        cfg = replace(cfg, data=SHARDS if os.path.exists(f"{SHARDS}/edufineweb_train_000001.npy") else "input.txt")
        print0(f"data: {cfg.data}" + (f" ({SHARDS} isn't there; python fineweb.py makes it)" * (cfg.data != SHARDS)))
    row = BOTH | (LECTURE if device.type == "cuda" and os.path.isdir(cfg.data) else LAPTOP)
    rows = max(1, (cfg.total_batch_size or row["total_batch_size"]) // (cfg.seq_len or row["seq_len"]) // world)  # for each
    row = dict(row, batch_size=max(B for B in range(1, row["batch_size"] + 1) if rows % B == 0),
               dtype="bfloat16" if has_bfloat16(device) else "float32", compile=device.type == "cuda" or has_bfloat16(device))
    return replace(cfg, **{name: value for name, value in row.items() if getattr(cfg, name) is None})


def parse_flags(argv=None):
    """Return the TrainConfig that the command line asks for; argv defaults to the program's arguments."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(TrainConfig), re.M))
    parser = argparse.ArgumentParser(description="Train GPT-2. Defaults are in brackets; of two, the second is for a GPU "
                                     "with shards.", allow_abbrev=False)
    parser.error = fail  # argparse's own prints a usage block first
    for f in fields(TrainConfig):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar="X")
        values = dict.fromkeys(str((BOTH | row).get(f.name, f.default)) for row in (LAPTOP, LECTURE))
        shown = f" [{' or '.join(values)}]" * ("None" not in values)
        parser.add_argument(f"--{f.name}", default=f.default, help=comments[f.name] + shown, **kind)
    return TrainConfig(**vars(parser.parse_args(argv)))


def check(cfg, world):
    """End the program where a setting of cfg, a filled one, can't work with world processes."""
    may_be_0 = ("warmup_steps", "weight_decay", "seed", "eval_interval", "hellaswag_interval", "sample_interval",
                "checkpoint_interval", "checkpoint_minutes", "temperature")
    for f in fields(cfg):
        value, zero = getattr(cfg, f.name), f.name in may_be_0
        if f.type in (int, float) and not (0 < value < 2**63 or zero and value == 0):  # so that nan and inf fail too
            fail(f"--{f.name} {value} is not {'0 or ' * zero}a number above {'it' if zero else '0'}")
    for name, choices in (("model", list(SIZES)), ("dtype", ["bfloat16", "float32"])):
        if getattr(cfg, name) not in choices:
            fail(f"--{name} {getattr(cfg, name)} is none of {', '.join(choices)}")
    total, unit = cfg.total_batch_size, cfg.seq_len * world
    if total % (cfg.batch_size * unit):
        fail(f"--total_batch_size {total} is not a multiple of batch_size x seq_len x processes = {cfg.batch_size} x {cfg.seq_len} "
             f"x {world}; {f'make it {-(-total // unit) * unit}, and ' * (total % unit > 0)}give another --batch_size, or none")


# -----------------------------------------------------------------------------
# The run


def get_lr(step, cfg):
    """Return the learning rate of update `step`, 0 .. max_steps - 1 (GPT-3's paper, appendix B).

    It rises in a line to max_lr, at the warm-up's last step, and falls by half a cosine to max_lr / 10, at the last of all.
    """
    min_lr, warmup_steps = 0.1 * cfg.max_lr, max(cfg.warmup_steps, 1)
    if step < warmup_steps:
        return cfg.max_lr * (step + 1) / warmup_steps  # + 1: a rate of 0 would waste the first step
    progress = (step + 1 - warmup_steps) / (cfg.max_steps - warmup_steps)  # in (0, 1]
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.max_lr - min_lr)


def configure_optimizer(model, weight_decay, lr):
    """Return AdamW for model; only what has two dimensions is decayed: matrices that multiply, and embeddings.

    Biases and LayerNorms are left alone, as is the custom: few numbers, and for a gain 0 is no place to rest.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    print0(f"weight decay {weight_decay} on {len(matrices)} tensors, {sum(p.numel() for p in matrices):,} parameters; "
           f"none on {len(vectors)} tensors, {sum(p.numel() for p in vectors):,} parameters")
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def accumulate_gradients(model, loader, micro_steps, dtype):
    """Add to .grad the gradient of the mean loss over micro_steps batches of loader; return that loss, (), detached.

    dtype: bfloat16 for autocast, float32 for none. Under DDP the gradient is then all processes' mean; the loss isn't.
    """
    device = next(model.parameters()).device
    mean_loss = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        x, y = loader.next_batch()  # a GPU is still busy with the one before
        if device.type == "cuda":  # from pinned memory it fetches them by itself, while we go on
            x, y = (t.pin_memory().to(device, non_blocking=True) for t in (x, y))
        if isinstance(model, DDP):  # exchange gradients once, after the last one; forward already reads this
            model.require_backward_grad_sync = micro_step == micro_steps - 1
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = model(x.to(device), y.to(device))
        loss = loss / micro_steps  # cross_entropy's mean is over one micro-batch; backward adds, so this makes a mean
        mean_loss += loss.detach()
        loss.backward()
    return mean_loss


@torch.no_grad()
def evaluate(model, tokens, B, T, dtype, rank=0, world=1):
    """Return the mean loss, in nats a token, of tokens[1:], in rows of T; the processes share the batches of B rows."""
    device = next(model.parameters()).device
    total = 0.0
    for start in range(rank * B * T, len(tokens) - 1, world * B * T):
        part = torch.from_numpy(tokens[start : start + B * T + 1].astype(np.int64)).to(device)
        n = len(part) - 1  # B * T, but less in the last batch, which is filled up; where y is -100, nothing is scored
        x, y = F.pad(part[:-1], (0, B * T - n)), F.pad(part[1:], (0, B * T - n), value=-100)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = model(x.view(B, T), y.view(B, T))
        total += n * loss.item()
    if world > 1:
        total = torch.tensor(total, dtype=torch.float64, device=device)
        dist.all_reduce(total)
    return float(total) / (len(tokens) - 1)


def load_checkpoint(path):
    """Return (the GPT, all that was saved with it) of the checkpoint at path: a dict of tensors and plain values.

    Its train_config is a TrainConfig again. Raises OSError where it can't be read, ValueError where it isn't what was saved.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch's format
            if record := archive.testzip():  # compares checksums; torch.load would take a flipped bit for a weight
                raise zipfile.BadZipFile(f"{record} isn't what was saved")
        checkpoint = torch.load(path, map_location="cpu")
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        checkpoint["train_config"] = TrainConfig(**checkpoint["train_config"])
    except OSError:
        raise
    except Exception as e:  # whatever: wrong bytes can break any of these lines in any way
        raise ValueError(f"{path} is damaged, or no checkpoint of train_gpt2.py: {(str(e) or repr(e)).splitlines()[0]}") from e
    return model, checkpoint


def checkpoints(folder):
    """Return {number of updates: path} of the checkpoints in folder, the newest first."""
    found = [(re.fullmatch(r"model_(\d{5,})\.pt", name), os.path.join(folder, name)) for name in os.listdir(folder)]
    return dict(sorted(((int(match[1]), path) for match, path in found if match), reverse=True))


def newest_checkpoint(folder):
    """Return load_checkpoint's pair for the newest whole checkpoint in folder, or (None, None); name what is damaged."""
    for path in checkpoints(folder).values() if os.path.isdir(folder) else ():
        try:
            model, checkpoint = load_checkpoint(path)
            if "log" not in checkpoint:
                raise ValueError(f"{path} was saved by an older version")
            return model, checkpoint
        except (OSError, ValueError) as e:
            print0(f"warning: passed over: {e}", file=sys.stderr)
    return None, None


def load_model(name):
    """Return the GPT that --init_from names. Ends the program, status 2, where there is no such thing."""
    with or_fail(f"--init_from {name}"):
        model = load_checkpoint(name)[0] if name.endswith(".pt") else GPT.from_pretrained(name)
        if model.config.vocab_size < 50257:
            raise ValueError(f"its vocabulary of {model.config.vocab_size} is not GPT-2's, of 50257")
        return model


def complete(cfg):
    """Print continuations of cfg.sample, the first one as it comes. Ends the program, status 2, where cfg can't work."""
    device, enc = pick_device(cfg.device), gpt2_encoding()
    check(cfg := fill_defaults(replace(cfg, data="input.txt"), device), 1)
    prepare(device)
    model = newest_checkpoint(cfg.log_dir)[0] if cfg.init_from == "scratch" else load_model(cfg.init_from)
    if model is None:
        fail(f"--sample: {cfg.log_dir} holds no checkpoint; name one, or one of OpenAI's models, by --init_from")
    T, longest = len(enc.encode(cfg.sample, allowed_special="all")), model.config.block_size
    if not 0 < T <= longest:
        fail(f"--sample: the text has {T} tokens, and the model takes 1 to {longest}")
    texts = sample(model.to(device), enc, cfg.sample, cfg.num_samples, cfg.max_new_tokens, cfg.top_k, cfg.seed,
                   cfg.temperature, show=True)
    print("", *texts[1:], sep="\n---\n")


def main(cfg):
    """Train as cfg, a TrainConfig, says; return the trained model. Ends the program, status 2, where cfg can't work."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
    log_path = os.path.join(cfg.log_dir, "log.txt")
    run_id, restarts = os.environ.get("TORCHELASTIC_RUN_ID"), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    model, checkpoint = newest_checkpoint(cfg.log_dir) if cfg.resume or restarts else (None, None)
    if checkpoint and not cfg.resume and checkpoint["run_id"] != run_id:  # the folder's checkpoint is another run's
        model, checkpoint = None, None
    if checkpoint:
        begun = checkpoint["train_config"]
        for name in ("model", "init_from"):
            if getattr(cfg, name) not in (None, was := getattr(begun, name)):
                fail(f"--{name} {getattr(cfg, name)}: the run in {cfg.log_dir} was begun with {was}; leave the flag out")
        cfg = replace(begun, **{name: value for name, value in asdict(cfg).items() if value is not None})  # what was given
    elif cfg.resume and not os.path.exists(log_path):
        fail(f"--resume: no run began in {cfg.log_dir}; leave the flag out to begin one")
    done = checkpoint["step"] if checkpoint else -1
    auto = {name: getattr(cfg, name) for name in ("batch_size", "dtype", "compile")}  # if None, None again after --resume
    cfg = fill_defaults(cfg, device := pick_device(cfg.device), world)
    check(cfg, world)
    prepare(device)
    if world > 1:
        # under a prefix: after a restart, what the dead ones told each other still stands in torchrun's store
        store = dist.PrefixStore(f"attempt {restarts}", next(dist.rendezvous("env://"))[0])
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(minutes=cfg.timeout_minutes))
        dist.all_gather_object(found := [None] * world, done)
        if len(set(found)) > 1:
            fail(f"--resume: the processes find different checkpoints, after {found} updates; share {cfg.log_dir} among them")
    torch.manual_seed(cfg.seed)
    if not checkpoint:  # 50304 = 2**7 * 393, where 50257 is odd: kernels can cut it evenly. The 47 extra tokens never occur.
        model = GPT(GPTConfig(vocab_size=50304, **SIZES[cfg.model])) if cfg.init_from == "scratch" else load_model(cfg.init_from)
    if cfg.seq_len > model.config.block_size:
        fail(f"--seq_len {cfg.seq_len} is over the model's block size, {model.config.block_size}")
    model.to(device)
    print0(f"parameters: {(parameters := sum(p.numel() for p in model.parameters())):,}")
    enc = gpt2_encoding()
    with or_fail(f"--data {cfg.data}"):
        tokens, val = load_data(cfg.data, enc)
        val = val[: cfg.val_tokens + 1]
    B, T, seed = cfg.batch_size, cfg.seq_len, cfg.seed if cfg.shuffle else None
    loader = DataLoaderLite(tokens, B, T, cfg.total_batch_size, rank, world, seed)
    grad_accum_steps = cfg.total_batch_size // (B * T * world)
    print0(f"{len(tokens):,} tokens to train on, {len(val) - 1:,} to validate; 1 update = {cfg.total_batch_size:,} tokens = "
           f"{grad_accum_steps} micro-batches of {B} x {T} x {world}; 1 epoch = {loader.epoch_tokens / cfg.total_batch_size:,.1f} "
           f"updates, and leaves out {len(tokens) - loader.epoch_tokens:,} tokens")
    c = model.config
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.transformer.wpe.weight.numel()
    flops = 6 * matrices + 12 * c.n_layer * c.n_embd * T  # a token, there and back (PaLM's paper, appendix B)
    state = 16 * parameters  # bytes: weights, gradients (in DDP's buckets), AdamW's two averages
    # what a layer keeps for backward, counted on a CPU; and logits, their softmax and its gradient, 4 bytes each
    activations = B * T * ((40 if cfg.dtype == "bfloat16" else 65) * c.n_layer * c.n_embd + 12 * c.vocab_size)
    total = cfg.max_steps * cfg.total_batch_size
    disk = 12 * parameters * (cfg.keep_checkpoints + 1 + cfg.max_steps // 5000)  # one more while it is written
    print0(f"plan: {cfg.max_steps:,} updates = {total:,} tokens = {total / loader.epoch_tokens:.2f} epochs = "
           f"{total * flops:.2e} FLOPs; memory: about {(state + activations) / 1e9:.1f} GB for each process, "
           f"{activations / 1e9:.1f} of them for the micro-batch; disk: up to {disk / 1e9:.1f} GB of checkpoints")
    token_bytes = np.array([len(enc.decode_single_token_bytes(i)) for i in range(enc.eot_token)] + [0])
    bytes_per_token = token_bytes[val[1:]].mean()  # of what is predicted; <|endoftext|> has none
    optimizer = configure_optimizer(model, cfg.weight_decay, cfg.max_lr)
    if checkpoint:
        # AdamW's averages are the checkpoint's, what it does with them (its groups) is what cfg says
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=checkpoint["optimizer"]["state"]))
        loader.position = checkpoint["position"]
        print0(f"going on from {os.path.join(cfg.log_dir, f'model_{done:05d}.pt')}: {done} of {cfg.max_steps} updates are done")
    elif cfg.resume:
        print0(f"the run in {cfg.log_dir} has no whole checkpoint: starting at step 0")
    if cfg.hellaswag_interval:
        with or_fail(f"--hellaswag_interval {cfg.hellaswag_interval} (0 does without HellaSwag)"):
            examples = load_examples()
    with or_fail(f"--log_dir {cfg.log_dir}"):
        os.makedirs(cfg.log_dir, exist_ok=True)
        TemporaryFile(dir=cfg.log_dir).close()  # by all processes: where it can't be done, all of them end
        disk -= sum(os.path.getsize(path) for path in checkpoints(cfg.log_dir).values()) if checkpoint else 0
        if (free := shutil.disk_usage(cfg.log_dir).free) < disk:
            fail(f"--log_dir {cfg.log_dir}: its disk has {free / 1e9:.2f} GB free, and the checkpoints will take "
                 f"{disk / 1e9:.2f} GB; make room, or lower --keep_checkpoints")
        if world > 1:
            dist.barrier()
        if rank == 0 and checkpoint:
            for number, path in checkpoints(cfg.log_dir).items():
                if number > done:  # it is damaged; its name is for a good one
                    os.replace(path, path + ".damaged")
            for path in Path(cfg.log_dir).glob("*.tmp"):  # what a kill left of one
                path.unlink()
            Path(log_path).touch()
            if not Path(log_path).read_bytes().startswith(checkpoint["log"].encode()):
                os.replace(log_path, log_path + ".damaged")
                print(f"warning: {log_path} isn't what was logged; the checkpoint has that", file=sys.stderr)
            with replacing(log_path) as f:  # what was logged after the checkpoint will be logged again
                f.write(checkpoint["log"].encode())
        elif rank == 0 and os.path.exists(log_path):
            folder = os.path.normpath(cfg.log_dir)
            older = next(name for n in range(1, 10**6) if not os.path.exists(name := f"{folder}.{n}"))
            os.rename(folder, older)
            os.makedirs(folder)
            print(f"{cfg.log_dir} held an earlier run, which is in {older} now")
        log = open(log_path if rank == 0 else os.devnull, "a", buffering=1, encoding="utf-8", newline="\n")
    cfg = replace(cfg, compile=cfg.compile and can_compile(device))  # so late, as the trial takes seconds
    print0(f"device: {device.type}, processes: {world}, float32 products: {torch.get_float32_matmul_precision()}, "
           f"autocast: {cfg.dtype}, compile: {cfg.compile}")
    train_model = torch.compile(model) if cfg.compile else model  # model itself stays bare, for all else
    if world > 1:  # from here on backward leaves the mean of all processes' gradients in .grad
        train_model = DDP(train_model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    skipped = checkpoint["skipped"] if checkpoint else 0  # updates in a row, just before this one
    evaluated = done if checkpoint and checkpoint["evaluated"] else -1  # the step at which all that was due is done
    saved_at, asked, stopping, times = time.monotonic(), [], False, []

    def ask(number, frame):  # to stop, when the step is done
        if number == signal.SIGINT and asked and time.monotonic() - asked[0] > 1:  # torchrun sends the first one twice
            os._exit(130)
        asked.append(time.monotonic())

    # Windows lacks the last two; what is ignored, as SIGHUP under nohup and SIGINT behind a script's &, remains so
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.signal(number, ask) for number in signals if signal.getsignal(number) != signal.SIG_IGN}
    for step in range(max(done, 0), cfg.max_steps + 1):
        last = step == cfg.max_steps  # nothing is left to train: look at what the last update made, and end

        def due(interval):
            return interval and (step % interval == 0 or last) and step != evaluated and not stopping

        def note(kind, value):
            with or_fail(f"--log_dir {cfg.log_dir}"):
                log.write(f"{step} {kind} {value:.6f}\n")

        if due(cfg.eval_interval):
            val_loss = evaluate(model, val, B, T, cfg.dtype, rank, world)
            print0(f"step {step:5d} | val loss: {val_loss:.6f} | bits per byte: {val_loss / math.log(2) / bytes_per_token:.4f}")
            note("val", val_loss)
        if due(cfg.hellaswag_interval):
            right = count_right(model, enc, examples, cfg.dtype, rank, world)[1]
            print0(f"step {step:5d} | HellaSwag: {right} of {len(examples)} right = {right / len(examples):.4f}")
            note("hella", right / len(examples))
        if due(cfg.sample_interval):
            for text in sample(model, enc, "Hello, I'm a language model,"):  # by all, to stay in step
                print0(">", text)
        late = cfg.checkpoint_minutes and time.monotonic() - saved_at > 60 * cfg.checkpoint_minutes
        if rank == 0 and (due(cfg.checkpoint_interval) or late or stopping):
            path, saved_at = os.path.join(cfg.log_dir, f"model_{step:05d}.pt"), time.monotonic()
            with or_fail(f"--log_dir {cfg.log_dir}"):
                with replacing(path) as f, open(log_path, encoding="utf-8") as logged:
                    torch.save(dict(model=model.state_dict(), model_config=asdict(model.config), train_config=asdict(cfg) | auto,
                                    optimizer=optimizer.state_dict(), step=step, position=loader.position, skipped=skipped,
                                    evaluated=not stopping, run_id=run_id, log=logged.read()), f)
                step or load_checkpoint(path)  # find out before the first update, not in an hour, if it can't be read
            print0(f"step {step:5d} | saved {path}")
            for old, path in list(checkpoints(cfg.log_dir).items())[cfg.keep_checkpoints :]:
                if old % 5000 or old == 0:
                    os.remove(path)
        if last or stopping:
            break
        t0 = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr = get_lr(step, cfg)
        optimizer.zero_grad(set_to_none=world == 1)  # backward adds to what is there; DDP keeps its buckets
        loss = accumulate_gradients(train_model, loader, grad_accum_steps, cfg.dtype)
        means = torch.stack((loss, torch.full_like(loss, bool(asked))))  # (2,)
        if world > 1:  # each process has the mean of its own losses, and was asked to stop or wasn't
            dist.all_reduce(means)
            means /= world
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)  # returns the norm before the cut
        loss, stopping, norm = torch.cat((means, norm[None])).tolist()  # a GPU only queues work: here we wait for it
        good = math.isfinite(loss) and math.isfinite(norm)  # the same in all processes: both are of the mean
        if good:  # what isn't a number would make every weight one that isn't, for good
            optimizer.step()
        skipped = 0 if good else skipped + 1
        dt = time.perf_counter() - t0  # seconds
        print0(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | dt: {1000 * dt:.2f}ms | "
               f"tok/sec: {cfg.total_batch_size / dt:.2f}" + (not good) * f" | skipped, {skipped} in a row")
        note("train", loss)
        times.append(dt)
        if len(times) == 10:  # the first one is slower, and longer still where the model is compiled
            print0(f"at this pace the updates end in {sorted(times)[5] * (cfg.max_steps - step - 1) / 60:,.0f} minutes")
        if skipped == 5:  # what is wrong then goes on being wrong
            fail(f"step {step}: loss or gradient was no finite number 5 times in a row, last in "
                 f"{tokens.where(loader.start(loader.position // loader.T - 1))}; the weights are those of step {step - 4}. "
                 "A lower --max_lr may help, or another --seed")
    log.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stopping:
        print0(f"stopped after {step} of {cfg.max_steps} updates; --resume goes on")
    if world > 1:
        del train_model  # else DDP, the last to let go of the group, would hold Python's lock, for which Gloo may wait
        dist.destroy_process_group()
    return model


if __name__ == "__main__":
    try:
        cfg = parse_flags()
        (main if cfg.sample is None else complete)(cfg)
    except KeyboardInterrupt:  # nothing is trained yet, or it samples: nothing is lost
        sys.exit(130)
    except RuntimeError as e:
        if re.search("out of memory|can't allocate memory|not enough memory", str(e)):  # a GPU, a CPU, Windows
            fail(f"a lower --{'num_samples' if cfg.sample else 'batch_size'} may help: {str(e).splitlines()[0]}")
        if not re.search("gloo|nccl", str(e), re.I):  # both libraries name themselves in their errors
            raise
        sys.exit(f"train_gpt2.py: a process died or hangs, and process {os.environ['RANK']} waited for it in vain; --resume "
                 f"goes on from the newest checkpoint ({str(e).splitlines()[0]})")
