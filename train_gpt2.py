"""Train GPT-2 (124M) from scratch: the model, its data, the recipe and the training loop.

    python train_gpt2.py                                     # on one GPU, or on the CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   # eight GPUs
    python train_gpt2.py --resume                            # go on from the newest checkpoint
    python train_gpt2.py --sample "Once upon a time"         # let the newest checkpoint write
    python train_gpt2.py --export my-gpt2                    # save it for Hugging Face
    python train_gpt2.py --help                              # all settings

Read it from top to bottom: the model, text from the model, the data, the recipe, and the run
itself: launch() and main(). A first reader can stop there. What follows is what they call.
"""
import argparse
import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import fineweb
import hellaswag
# A UserError ends the program with one line. blame() turns other errors into UserErrors.
from fineweb import UserError, blame, gpt2_encoding, one_line

# -----------------------------------------------------------------------------
# The model. Shapes: B sequences of T tokens, and C = n_embd numbers for each token.
# Attention has nh = n_head heads, each of them hs = C // nh numbers wide.


@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are those of GPT-2 (124M)."""

    block_size: int = 1024  # the longest sequence it can read, in tokens
    vocab_size: int = 50257  # how many tokens it knows
    n_layer: int = 12  # how many blocks
    n_head: int = 12  # attention heads in each of them
    n_embd: int = 768  # the width: each token is a vector of this many numbers


class CausalSelfAttention(nn.Module):
    """Let each token read from itself and from the tokens before it. (B, T, C) -> (B, T, C).

    Each token makes a query, a key and a value. The dot products of its query with its own key and
    with those of the tokens before it, divided by sqrt(hs), are scores. A softmax turns them into
    shares. The result is the average of the values, weighted by the shares. This is multi-head
    attention, as in "Attention Is All You Need" (2017), section 3.2. Raises ValueError when n_embd
    is not a multiple of n_head.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        hs = C // self.n_head
        qkv = self.c_attn(x)  # (B, T, 3 * C)
        q, k, v = qkv.split(C, dim=2)  # (B, T, C) each
        # Cut the width into heads. Beside B they are like a batch: each head is computed by itself.
        q = q.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        # softmax(q @ k^T / sqrt(hs)) @ v, where is_causal hides later tokens. GPUs and CPUs compute
        # it in tiles (flash attention), so the T x T scores are never stored whole.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """Transform each token by itself: linear, GELU, linear. (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)  # fc: fully connected
        # GELU by a formula with tanh, which was faster than the exact one when GPT-2 was trained
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)  # proj: projects back

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4 * C)
        x = self.gelu(x)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """One layer of the transformer: attention, then the MLP. (B, T, C) -> (B, T, C).

    Each of them reads a normalised copy of x, and adds its result to x. This x, which runs through
    all layers, is called the residual stream.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


# OpenAI stored these weights as (in, out). nn.Linear wants (out, in).
TRANSPOSED = (
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019).

    The parameters are named as in Hugging Face's GPT-2.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # A ModuleDict gives the names that Hugging Face uses: transformer.wte.weight and so on.
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # a row for each token
            wpe=nn.Embedding(config.block_size, config.n_embd),  # a row for each position
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),  # the layers
            ln_f=nn.LayerNorm(config.n_embd),  # the last normalisation
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One matrix for input and output. As input, a token's vector says what the token is. As
        # output, the token's score is the dot product of its vector and x.
        self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    def init_weights(self):
        """Fill the matrices with random numbers of standard deviation 0.02, less in c_proj.

        Biases start at 0. LayerNorms keep PyTorch's start: weight 1, bias 0.
        """
        # Each layer adds two outputs of c_proj to the residual stream, N = 2 * n_layer in all. A
        # sum of N independent numbers has sqrt(N) times the standard deviation of one. So c_proj
        # starts smaller, by the factor 1 / sqrt(N) (GPT-2's paper, section 2.3).
        residual_std = 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=residual_std)
            elif p.dim() == 2:
                nn.init.normal_(p, mean=0.0, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx):
        """Return the vectors that lm_head will score, one for each position: (B, T, C).

        idx: token ids, (B, T), int64.
        Raises ValueError when the sequence is longer than block_size.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are longer than block_size, {self.config.block_size}")
        pos = torch.arange(T, device=idx.device)  # (T,)
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        pos_emb = self.transformer.wpe(pos)  # (T, C), the same for each row
        x = tok_emb + pos_emb  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Score each possible next token at each position.

        idx: token ids, (B, T), int64.
        targets: the ids that come next, (B, T), int64. Each position is an example to learn from.
        Returns (logits, loss).
        logits: the scores, (B, T, vocab_size).
        loss: the mean cross-entropy in nats (natural-log units) per token; None without targets.
        With targets the logits carry no gradient: only the loss can be trained on.
        """
        x = self.hidden(idx)  # (B, T, C)
        logits = self.lm_head(x)  # (B, T, vocab_size)
        loss = None
        if targets is not None:
            # (B * T, vocab_size) and (B * T,): one example a row
            # In float32. A GPU would compute the losses of bfloat16 logits in bfloat16.
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            # No gradient comes back through the logits. Otherwise torch.compile would make one,
            # (B, T, vocab_size) zeros.
            logits = logits.detach()
        return logits, loss

    @classmethod
    def from_pretrained(cls, name):
        """Return a GPT with the weights of gpt2, gpt2-medium, gpt2-large, gpt2-xl, or of a folder.

        The folder is in Hugging Face's format. Raises OSError when there are no such weights.
        Raises ValueError when they are not those of a whole GPT-2.
        """
        import transformers  # slow to import, and needed only here

        transformers.logging.set_verbosity_error()  # no warnings
        transformers.logging.disable_progress_bar()
        # The report says what is missing or has a wrong shape. check_is_gpt2 looks at it.
        source, report = transformers.GPT2LMHeadModel.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True
        )
        check_is_gpt2(source.config, report, name)
        config = GPTConfig(
            block_size=source.config.n_positions,
            n_layer=source.config.n_layer,
            n_head=source.config.n_head,
            n_embd=source.config.n_embd,
        )
        weights = source.state_dict()
        for key in weights:
            if key.endswith(TRANSPOSED):  # it ends with one of the four names
                weights[key] = weights[key].t()
        model = cls(config)
        model.load_state_dict(weights)
        return model


# -----------------------------------------------------------------------------
# Text from the model


def draw_token(logits, temperature, top_k, generator):
    """Draw one of the top_k likeliest tokens for each row: (B, vocab_size) -> (B, 1).

    Their logits are divided by the temperature. A temperature of 0 takes the likeliest token.
    generator: the source of random numbers, a torch.Generator.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    top_k = min(top_k, logits.size(-1))
    top_logits, top_ids = logits.topk(top_k)  # (B, top_k) each
    probs = F.softmax(top_logits / temperature, dim=-1)  # (B, top_k)
    choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
    return top_ids.gather(1, choice)  # (B, 1): the id of what stands at place `choice`


@torch.no_grad()
def sample(model, prompt, num_samples=4, max_new_tokens=32, top_k=50, temperature=1.0, seed=42,
           cache=None):
    """Return num_samples texts that begin with prompt and go on for max_new_tokens tokens.

    The same seed draws the same texts.
    cache: a KVCache of model, which makes long texts faster.
    Raises UserError when prompt is empty.
    """
    encoding = gpt2_encoding()
    tokens = encoding.encode(prompt, allowed_special="all")  # let <|endoftext|> become one token
    if not tokens:
        raise UserError("--sample: the text is empty")
    device = next(model.parameters()).device
    # Its own source of random numbers, so that sampling changes no others
    generator = torch.Generator(device).manual_seed(seed)
    idx = torch.tensor([tokens] * num_samples, device=device)  # (B, T)
    # disable=None: a bar on a terminal only
    for _ in tqdm(range(max_new_tokens), desc="sample", leave=False, disable=None):
        if cache is None:
            window = idx[:, -model.config.block_size :]  # what the model can read
            x = model.hidden(window)[:, -1]  # (B, C), the last position
        else:
            x = cache.newest_vector(idx)  # the same, with less work
        logits = model.lm_head(x)  # (B, vocab_size)
        logits = logits[:, :50257]  # GPT-2's tokens, without the 47 that build_model adds
        next_token = draw_token(logits, temperature, top_k, generator)  # (B, 1)
        idx = torch.cat((idx, next_token), dim=1)  # (B, T + 1)
    drawn = idx[:, len(tokens):].tolist()  # B lists of ids
    return [prompt + encoding.decode(row) for row in drawn]


# -----------------------------------------------------------------------------
# The data


def load_data(path):
    """Return (train, val): a list of arrays to train on, and an array to validate on, (n,) uint16.

    path: a folder of shards, which stay on disk (memory-mapped), or a text file, of which the first
    90% and the last 10% are taken. Raises UserError.
    """
    if os.path.isdir(path):
        arrays, val = open_shards(path)
    else:
        arrays, val = load_text(path)
    if len(val) < 2:
        raise UserError(f"--data {path}: its text is too short to validate on")
    return arrays, val


def load_text(path):
    """Return (arrays, val) of a text: its tokens, uint16, (n,) each.

    path: a text file. arrays: a list with one array, the first 90%. val: the last 10%.
    <|endoftext|> in it separates documents. Raises UserError.
    """
    if not os.path.exists(path):
        raise UserError(f"--data {path}: not found in {os.getcwd()}")
    if path.endswith((".jsonl", ".parquet")):
        raise UserError(f"--data {path}: it is no plain text; python fineweb.py --files {path} "
                        "--out FOLDER makes shards of it, and --data FOLDER trains on them")
    end_of_text = np.array([gpt2_encoding().eot_token], dtype=np.uint16)
    parts = []
    with blame(f"--data {path}"):
        for origin, text in fineweb.read_txt(path):
            if text is None:
                raise UserError(f"--data {origin}: it isn't UTF-8 text")
            if parts:
                parts.append(end_of_text)
            parts.append(fineweb.encode(text))
    if not parts:
        raise UserError(f"--data {path}: there is no text in it")
    tokens = np.concatenate(parts)
    split = len(tokens) * 9 // 10
    return [tokens[:split]], tokens[split:]


def open_shards(folder):
    """Return what load_data does, for a folder of shards. Raises UserError when one is missing."""
    names = [name for name in os.listdir(folder)
             if re.fullmatch(r"edufineweb_(val|train)_\d{6}\.npy", name)]
    if len(names) < 2:
        raise UserError(f"--data {folder}: it holds {len(names)} shards, and a run needs one to "
                        "train on and one to validate on; python fineweb.py makes them")
    allow_open_files(len(names) + 1000)  # a memory-mapped file stays open; 1000 for all else
    arrays = []
    for number in range(len(names)):
        name = fineweb.shard_name(number)
        if name not in names:
            raise UserError(f"--data {folder}: {name} is missing, though there are later ones")
        arrays.append(open_shard(os.path.join(folder, name)))
    if not fineweb.is_finished(folder):
        print0(f"warning: fineweb.py has not finished in {folder}; give its command again to "
               "finish. A run that begins now can't be resumed when there are more shards.",
               file=sys.stderr)
    return arrays[1:], arrays[0]


def open_shard(path):
    """Return the tokens of a shard, (n,) uint16, memory-mapped. Raises UserError."""
    # NumPy may raise any error for a damaged header.
    with blame(f"--data {path}: the shard is damaged", Exception):
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype != np.uint16 or array.ndim != 1 or len(array) == 0:
        raise UserError(f"--data {path}: it holds {array.dtype} of shape {array.shape}, and a "
                        "shard is one row of uint16")
    return array


def check_ids(tokens):
    """Raise UserError when tokens, an array, has an id that GPT-2 doesn't know."""
    if tokens.max() > 50256:  # a GPU's own error wouldn't say why
        raise UserError(f"--data holds the token {tokens.max()}, and GPT-2's end at 50256")


@functools.lru_cache(maxsize=4)  # read_row asks for the same few again and again
def permutation(n, seed, *more_seeds):
    """Return the numbers from 0 to n - 1, (n,), in an order that comes from the seeds alone.

    With a seed of None they stay as they are.
    """
    if seed is None:
        return np.arange(n)
    return np.random.default_rng((seed, *more_seeds)).permutation(n)


class DataLoaderLite:
    """Cut arrays of tokens, (n,) uint16 each, into rows of T tokens, and hand out B rows at a time.

    Each row has one token more, T + 1 in all: the target of its last token.
    An epoch is one pass over all rows of all arrays. The tokens left over at an array's end, too
    few for a row, are never read.
    B rows are a micro-batch: what is computed at once.
    The processes take turns: the first B rows are process 0's, the next B process 1's, and so on.
    So together they read what one process would, in the same order.
    shuffle_seed: each epoch's order of rows comes from it. None: no shuffling.
    first_row: where to begin: the number of rows that the run has read before.
    Raises UserError when there is no row.
    """

    def __init__(self, arrays, B, T, rank=0, world=1, shuffle_seed=None, first_row=0):
        self.arrays = arrays
        self.B = B
        self.T = T
        self.rank = rank
        self.world = world
        self.shuffle_seed = shuffle_seed
        self.next_row = first_row
        # - 1: the last row needs one token more, the target of its last token
        self.rows_per_array = [(len(array) - 1) // T for array in arrays]
        self.rows_per_epoch = sum(self.rows_per_array)
        if self.rows_per_epoch == 0:
            raise UserError(f"--data has {max(map(len, arrays))} tokens in one piece, and a "
                            f"sequence needs {T + 1}; lower --seq_len, or make larger shards")

    def read_row(self, number):
        """Return row `number`, counted over all epochs: T tokens and one more, (T + 1,) uint16."""
        epoch, place = divmod(number, self.rows_per_epoch)
        # An epoch goes through one array after another. Which one has this place?
        for i in permutation(len(self.arrays), self.shuffle_seed, epoch).tolist():
            rows = self.rows_per_array[i]
            if place < rows:
                order = permutation(rows, self.shuffle_seed, epoch, i)
                start = int(order[place]) * self.T
                return self.arrays[i][start : start + self.T + 1]
            place -= rows  # not this one: count from the next one's start

    def next_batch(self):
        """Return the next x and y, (B, T) int64 each; y is x moved on by one token."""
        first = self.next_row + self.rank * self.B
        rows = [self.read_row(first + i) for i in range(self.B)]
        tokens = np.stack(rows)  # (B, T + 1)
        check_ids(tokens)
        tokens = torch.from_numpy(tokens.astype(np.int64))
        x = tokens[:, :-1].contiguous()  # (B, T), a copy in one piece
        y = tokens[:, 1:].contiguous()  # (B, T)
        self.next_row += self.B * self.world
        return x, y


# -----------------------------------------------------------------------------
# The recipe


# OpenAI released these four. MODEL_SIZES has more.
OPENAI_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
MODEL_SIZES = {
    "laptop": dict(n_layer=4, n_head=6, n_embd=96),  # small enough for two CPU cores
    **OPENAI_SIZES,
    # GPT-3's paper, table 2.1
    "gpt3-small": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt3-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt3-large": dict(n_layer=24, n_head=16, n_embd=1536),
    # The table says 24 heads of 128. That is 3072, not the width of 2048, so we take 16 heads.
    "gpt3-xl": dict(n_layer=24, n_head=16, n_embd=2048),
}


def setting(default, meaning, zero_ok=False, choices=None):
    """Return a field of a config, with notes: what it means, and which values are allowed.

    A number must be above 0. zero_ok allows 0, too. A default of None means that the program
    chooses.
    """
    return field(default=default, metadata=dict(meaning=meaning, zero_ok=zero_ok, choices=choices))


@dataclass
class TrainConfig:
    """The settings of a run. The defaults are those of GPT-2 (124M)."""

    model: str = setting("gpt2", "the shape of a new model, and its preset", choices=MODEL_SIZES)
    init_from: str = setting("scratch", "scratch, or start from gpt2, ..., a .pt file, a folder")
    data: str = setting(fineweb.SHARDS, "a folder of shards, or a text file")
    log_dir: str = setting("log", "the folder for the log and the checkpoints")
    seed: int = setting(1337, "where all random numbers come from", zero_ok=True)
    shuffle: bool = setting(True, "read the data in a new order in each epoch")

    total_batch_size: int = setting(2**19, "tokens in an update")
    seq_len: int = setting(1024, "T, tokens in a sequence")
    batch_size: int = setting(None, "B, sequences in a micro-batch; lower it when memory is short")
    max_steps: int = setting(19073, "updates of the weights")
    warmup_steps: int = setting(715, "updates until the rate is max_lr", zero_ok=True)
    max_lr: float = setting(6e-4, "the learning rate's peak; then it falls to a tenth")
    weight_decay: float = setting(0.1, "AdamW's decay of the matrices", zero_ok=True)
    grad_clip: float = setting(1.0, "a gradient with a larger norm is scaled down to this norm")

    eval_interval: int = setting(250, "updates between validation losses; 0: none", zero_ok=True)
    val_tokens: int = setting(20 * 2**19, "tokens that the validation loss is measured on")
    hellaswag_interval: int = setting(250, "updates between HellaSwags; 0: none", zero_ok=True)
    sample_interval: int = setting(250, "updates between samples; 0: none", zero_ok=True)
    checkpoint_interval: int = setting(5000, "save every so many updates; 0: don't", zero_ok=True)
    checkpoint_minutes: float = setting(30.0, "also every so many minutes; 0: don't", zero_ok=True)
    keep_checkpoints: int = setting(3, "keep so many of the newest, and each 5000th update's")

    device: str = setting(None, "where to compute; CUDA_VISIBLE_DEVICES chooses among GPUs",
                          choices=("cuda", "mps", "cpu"))
    dtype: str = setting(None, "the type for matrix products",
                         choices=("bfloat16", "float16", "float32"))
    compile: bool = setting(None, "use torch.compile")
    timeout_minutes: float = setting(10.0, "how long processes wait for one that doesn't come")


# How the settings of each preset differ from TrainConfig's defaults.
# The GPTs have the learning rates and batch sizes of GPT-3's paper, table 2.1, for their size.
PRESETS = {
    "laptop": dict(
        seq_len=64,
        total_batch_size=1024,  # so 850 updates are three epochs of input.txt
        max_steps=850,
        warmup_steps=300,
        max_lr=6e-3,
        weight_decay=0.8,  # this, the rate and the warm-up were found by trying
        eval_interval=170,
        val_tokens=2**17,
        hellaswag_interval=0,
        sample_interval=170,
        checkpoint_interval=170,
    ),
    "fine-tune": dict(  # for --init_from
        seq_len=None,  # the model's block_size, 1024 at most
        total_batch_size=2**13,
        max_steps=100,
        warmup_steps=10,
        max_lr=3e-5,
        eval_interval=25,
        val_tokens=2**17,
        hellaswag_interval=0,
        sample_interval=25,
        checkpoint_interval=50,
    ),
    "gpt2": dict(),
    "gpt2-medium": dict(max_lr=3e-4),
    "gpt2-large": dict(max_lr=2.5e-4),
    "gpt2-xl": dict(max_lr=2e-4, total_batch_size=2**20, max_steps=9537, warmup_steps=358),
    "gpt3-small": dict(seq_len=2048),
    "gpt3-medium": dict(seq_len=2048, max_lr=3e-4),
    "gpt3-large": dict(seq_len=2048, max_lr=2.5e-4),
    "gpt3-xl": dict(
        seq_len=2048, max_lr=2e-4, total_batch_size=2**20, max_steps=9537, warmup_steps=358
    ),
}


def get_lr(step, cfg):
    """Return the learning rate of update `step`, 0 .. max_steps - 1 (GPT-3's paper, appendix B).

    cfg: a TrainConfig. The rate rises linearly to max_lr at the end of the warm-up. Then it falls
    along half a cosine to a tenth of max_lr at the last update.
    """
    min_lr = 0.1 * cfg.max_lr
    warmup_steps = max(cfg.warmup_steps, 1)  # 0 would be a division by 0
    update = step + 1  # from 1: update number warmup_steps has max_lr, the last one min_lr
    if update <= warmup_steps:
        return cfg.max_lr * update / warmup_steps
    progress = (update - warmup_steps) / (cfg.max_steps - warmup_steps)  # in (0, 1]
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))  # from 1 down to 0
    return min_lr + cosine * (cfg.max_lr - min_lr)


def configure_optimizer(model, weight_decay, lr):
    """Return AdamW for model.

    AdamW averages each weight's gradients over the last updates. It divides the average by their
    usual size, so all weights move at about the same speed, which is lr.
    Weight decay pulls the matrices towards 0: linear layers and embeddings. It leaves biases and
    LayerNorms alone.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        dict(params=matrices, weight_decay=weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    # The betas are GPT-3's. fused: a few kernels do it all, in one pass over the numbers.
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


@torch.no_grad()
def evaluate(model, tokens, B, T, rank=0, world=1):
    """Return the mean loss of tokens[1:], in nats per token, each token scored once.

    tokens: (n,) uint16. They are cut into rows of T, and batches of B rows. The processes take
    turns with the batches, so the result is the same, up to rounding, for any number of them.
    GPT has no dropout (random zeros while it trains), so model.eval() would change nothing.
    """
    device = next(model.parameters()).device
    batch = B * T  # tokens
    starts = range(rank * batch, len(tokens) - 1, world * batch)
    total = 0.0
    hide = None if rank == 0 else True  # None: a bar, but on a terminal only
    for start in tqdm(starts, desc="validation", leave=False, disable=hide):
        part = torch.from_numpy(tokens[start : start + batch + 1].astype(np.int64))
        count = len(part) - 1  # fewer in the last batch
        padding = batch - count
        x = F.pad(part[:-1], (0, padding)).view(B, T)
        y = F.pad(part[1:], (0, padding), value=-100).view(B, T)  # -100: not scored
        loss = model(x.to(device), y.to(device))[1]  # only the loss
        total += loss.item() * count
    if world > 1:
        sums = torch.tensor(total, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        total = sums.item()
    return total / (len(tokens) - 1)


def mean_token_bytes(tokens):
    """Return the mean length of tokens, (n,) uint16, in bytes of text.

    <|endoftext|> stands for no text, so it counts as 0 bytes.
    """
    encoding = gpt2_encoding()
    lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(50257)]
    lengths[encoding.eot_token] = 0
    return np.array(lengths)[tokens].mean()


# -----------------------------------------------------------------------------
# The run


# So many bad updates in a row end the run.
# In float16 a bad update is usual at first: it halves the scaler's scale. There five in a row end
# the run only when the scale is down to 1. For other types the scale is always 1.
TOO_MANY_SKIPPED = 5


def launch(given, resume=False):
    """Train a model and return it: choose the device, meet the other processes, then call main().

    given: the settings that you choose, {name: value}. The others come from a preset.
    resume: go on from the newest checkpoint; where there is none, begin.
    Raises UserError when something can't work.
    """
    check_settings(given, TrainConfig)
    check_torchrun(resume)
    # torchrun tells each process which one it is (rank), and how many there are (world).
    # pick_device reads LOCAL_RANK, its number on this machine.
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(given.get("device"))
    prepare(device)
    if world > 1:
        meet_others(device, rank, world, given.get("timeout_minutes", TrainConfig.timeout_minutes))

    # The first process alone writes to log_dir, so it alone locks it.
    lock = contextlib.nullcontext()
    if rank == 0:
        lock = fineweb.lock_folder(given.get("log_dir", TrainConfig.log_dir), "--log_dir")
    with lock, contextlib.closing(StopRequest()) as stop:  # calls stop.close() at the end
        if world > 1:
            dist.barrier()  # the others wait here until the first has the lock
        model = main(given, resume, device, rank, world, stop)
    if world > 1:
        dist.destroy_process_group()
    return model


def main(given, resume, device, rank, world, stop):
    """Train a model and return it. given, resume: as in launch(). stop: a StopRequest."""
    # Where does the run begin, and with which settings?
    log_dir = given.get("log_dir", TrainConfig.log_dir)
    checkpoint = newest_checkpoint(log_dir) if resume else None
    first_step = 0 if checkpoint is None else checkpoint["step"]
    cfg = choose_config(given, checkpoint, device)
    check_agreement(world, first_step=first_step, **asdict(cfg))
    dtype = cfg.dtype or best_dtype(device)

    # The model, and the size of a micro-batch
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, checkpoint).to(device)
    T = cfg.seq_len or min(1024, model.config.block_size)
    B = cfg.batch_size or fitting_batch_size(model, T, cfg.total_batch_size, dtype, device, world)
    check_batch(model, B, T, cfg.total_batch_size, world)
    grad_accum_steps = cfg.total_batch_size // (B * T * world)

    # The data
    arrays, val = load_data(cfg.data)
    val_tokens = val[: cfg.val_tokens + 1]  # + 1: the first one is no target
    check_ids(val_tokens)
    token_bytes = mean_token_bytes(val_tokens[1:])
    data_id = fingerprint([*arrays, val])
    check_agreement(world, data=data_id, batch_size=B, dtype=dtype)
    first_row = first_step * cfg.total_batch_size // T
    shuffle_seed = cfg.seed if cfg.shuffle else None
    loader = DataLoaderLite(arrays, B, T, rank, world, shuffle_seed, first_row)
    examples = hellaswag.load_examples(model.config.block_size) if cfg.hellaswag_interval else []

    # The recipe
    optimizer = configure_optimizer(model, cfg.weight_decay, cfg.max_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=(dtype == "float16"))
    if checkpoint is not None:
        restore(checkpoint, cfg, data_id, optimizer, scaler)

    # All checks have passed. Only now an earlier run's files are moved, or its log is cut.
    if rank == 0:
        take_over_folder(cfg.log_dir, checkpoint)
    # It shares model's parameters. Only training is compiled: sampling would compile many times.
    train_model = compile_model(model, cfg.compile, device, dtype)
    # Each process has the whole model and reads micro-batches of its own. DDP averages their
    # gradients, so that all make the same update.
    if world > 1:
        train_model = DDP(train_model, device_ids=[device] if device.type == "cuda" else None)
    saver = CheckpointSaver(cfg, model, optimizer, scaler, data_id, checkpoint)
    log = Log(cfg.log_dir)
    speed = Speed(cfg, model, T, device, dtype, world)
    print_plan(cfg, model, loader, device, dtype, checkpoint)
    checkpoint = None  # frees the memory of its tensors

    stop.listen()
    skipped = 0  # how many updates in a row had a number that isn't finite
    x, y = fetch_batch(loader, device)
    for step in range(first_step, cfg.max_steps + 1):  # step: how many updates are done
        last_step = step == cfg.max_steps

        if rank == 0 and saver.is_due(step, last_step):
            saver.save(step, must_work=step == 0 or last_step)

        if is_due(cfg.eval_interval, step, last_step):
            with autocast(device, dtype):
                val_loss = evaluate(model, val_tokens, B, T, rank, world)
            print0(validation_line(step, val_loss, token_bytes))
            log.write(step, "val", val_loss)

        if is_due(cfg.hellaswag_interval, step, last_step):
            with autocast(device, dtype):
                right = hellaswag.count_right(model, examples, rank, world)
            accuracy = right / len(examples)
            print0(f"step {step:5d} | HellaSwag: {right} of {len(examples)} right = {accuracy:.4f}")
            log.write(step, "hella", accuracy)

        if rank == 0 and is_due(cfg.sample_interval, step, last_step):
            for text in sample(model, "Hello, I'm a language model,"):
                print0(">", text)

        if last_step:
            break

        # One update: the gradient of the mean loss over all micro-batches
        t0 = time.perf_counter()
        lr = get_lr(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss_accum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            # The gradients add up. DDP averages them over the processes only at the last one.
            if world > 1:
                train_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast(device, dtype):
                loss = train_model(x, y)[1]  # without a name the large logits don't stay in memory
            # backward() adds to the gradients that are there. That gives the gradient of the sum of
            # the micro-batches' losses. We want that of their mean: divide.
            loss = loss / grad_accum_steps
            loss_accum += loss.detach()  # the number without its gradient
            scaler.scale(loss).backward()  # larger, since float16 would make small ones 0
            # Fetch the next batch here, while a GPU still computes this one.
            x, y = fetch_batch(loader, device)
        scaler.unscale_(optimizer)  # divides the gradients by its scale again
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)

        # Sum over the processes: their losses, and a 1 from each that was asked to stop
        asked = torch.full_like(loss_accum, float(stop.is_requested()))
        sums = torch.stack((loss_accum, asked))
        if world > 1:
            dist.all_reduce(sums)
        loss_sum, num_asked = sums.tolist()  # waits for the GPU, so that dt is right
        mean_loss = loss_sum / world

        # A number that isn't finite would make every weight NaN, for good. So skip the update.
        if math.isfinite(mean_loss) and math.isfinite(norm):
            scaler.step(optimizer)  # optimizer.step(), unless a gradient is infinite
            skipped = 0
        else:
            skipped += 1
            print0(f"step {step:5d} | skipped: a number isn't finite, {skipped} in a row")
        gone_bad = skipped >= TOO_MANY_SKIPPED and scaler.get_scale() <= 1
        scaler.update()
        dt = time.perf_counter() - t0  # seconds

        line = f"step {step:5d} | loss: {mean_loss:.6f}"
        line += f" | lr {lr:.4e} | norm: {norm:.4f}"
        line += f" | dt: {dt * 1000:.2f}ms | tok/sec: {cfg.total_batch_size / dt:.2f}"
        line += speed.describe(step, dt)
        print0(line)
        log.write(step, "train", mean_loss)

        if num_asked > 0 or gone_bad:
            if rank == 0:
                saver.save(step + 1, must_work=True)
            if world > 1:
                dist.barrier()  # nobody leaves before it is saved
            if gone_bad:
                raise UserError(f"step {step}: loss or gradient was not finite {skipped} times in "
                                "a row; a lower --max_lr may help")
            print0(f"stopped after {step + 1} of {cfg.max_steps} updates; --resume goes on")
            break
    return model


# You have read the training. What follows is what it calls.


def is_due(interval, step, last_step):
    """Return whether it is time: after 0, interval, 2 * interval, ... updates, and at the end.

    An interval of 0 means never.
    """
    return interval > 0 and (step % interval == 0 or last_step)


def build_model(cfg, checkpoint):
    """Return the model of the checkpoint, of --init_from, or a new one of --model's shape."""
    if checkpoint is not None:
        return model_of(checkpoint)
    if cfg.init_from != "scratch":
        return load_model(cfg.init_from, "--init_from")
    # GPT-2 has 50257 tokens, an odd number. 50304 = 128 * 393 divides evenly into a kernel's
    # blocks. The 47 extra tokens never occur.
    config = GPTConfig(block_size=cfg.seq_len, vocab_size=50304, **MODEL_SIZES[cfg.model])
    return GPT(config)


def fetch_batch(loader, device):
    """Return the loader's next x and y on device."""
    x, y = loader.next_batch()
    if device.type == "cuda":
        # From pinned memory the GPU copies them by itself, and we don't wait. The last line then
        # has nothing to do.
        x = x.pin_memory().to(device, non_blocking=True)
        y = y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


class KVCache:
    """Keep the keys and values of the tokens that the model has read, to sample with less work.

    It serves one call of sample().
    """

    def __init__(self, model):
        self.model = model
        self.length = 0  # how many tokens it holds
        self.layers = {}  # {number of a layer: (k, v)}, (B, nh, length, hs) each

    def newest_vector(self, idx):
        """Return model.hidden(idx[:, -block_size:])[:, -1], (B, C).

        idx: (B, T) int64; from the second call on, one token longer than before.
        """
        config = self.model.config
        if idx.shape[1] > config.block_size:
            # The oldest token drops out. All others move by one, so their keys and values change.
            idx = idx[:, -config.block_size :]
            self.length = 0
        past = self.length
        new = idx[:, past:]  # (B, S): all tokens, or one
        B, S = new.shape
        C, nh = config.n_embd, config.n_head
        pos = torch.arange(past, past + S, device=idx.device)  # (S,)
        x = self.model.transformer.wte(new) + self.model.transformer.wpe(pos)  # (B, S, C)
        for i, block in enumerate(self.model.transformer.h):
            # What Block and CausalSelfAttention do, for the new tokens
            q, k, v = block.attn.c_attn(block.ln_1(x)).split(C, dim=2)  # (B, S, C) each
            q = q.view(B, S, nh, C // nh).transpose(1, 2)  # (B, nh, S, hs)
            k = k.view(B, S, nh, C // nh).transpose(1, 2)  # (B, nh, S, hs)
            v = v.view(B, S, nh, C // nh).transpose(1, 2)  # (B, nh, S, hs)
            if past > 0:
                old_k, old_v = self.layers[i]
                k = torch.cat((old_k, k), dim=2)  # (B, nh, T, hs)
                v = torch.cat((old_v, v), dim=2)  # (B, nh, T, hs)
            self.layers[i] = (k, v)
            # A single new token is the last one. It may read from all, so nothing is hidden.
            y = F.scaled_dot_product_attention(q, k, v, is_causal=(past == 0))  # (B, nh, S, hs)
            y = y.transpose(1, 2).reshape(B, S, C)
            x = x + block.attn.c_proj(y)
            x = x + block.mlp(block.ln_2(x))
        self.length = past + S
        return self.model.transformer.ln_f(x[:, -1])


def print_plan(cfg, model, loader, device, dtype, checkpoint):
    """Say in plain words what is about to happen, on what, and how to stop it."""
    source = f"the preset {cfg.model}"
    if cfg.init_from != "scratch":
        source = "the preset fine-tune"
    first_step = 0
    if checkpoint is not None:
        first_step = checkpoint["step"]
        source = "the checkpoint"
    parameters = sum(p.numel() for p in model.parameters())
    tokens_there = sum(len(array) for array in loader.arrays)
    micro_batches = cfg.total_batch_size // (loader.B * loader.T * loader.world)
    updates = cfg.max_steps - first_step
    tokens = updates * cfg.total_batch_size
    epochs = tokens / (loader.rows_per_epoch * loader.T)
    flops = tokens * flops_per_token(model, loader.T)
    print0(f"Model: {parameters:,} parameters.")
    print0(f"Device: {device.type}.")
    print0(f"Processes: {loader.world}.")
    print0(f"Precision: {dtype}.")
    print0(f"Data: {tokens_there:,} tokens of {cfg.data}.")
    print0(f"Settings that you don't give: those of {source}.")
    print0(f"One update: {micro_batches} micro-batches of {loader.B} x {loader.T} tokens in each "
           "process.")
    print0(f"To do: {updates:,} updates of {cfg.total_batch_size:,} tokens = {epochs:.2f} epochs.")
    print0(f"Work: {flops:.2e} FLOPs. The third update's line says how much time is left.")
    print0(f"Log and checkpoints: {cfg.log_dir}/")
    print0("Ctrl-C saves and stops after the next update. The same command with --resume goes on.")
    if checkpoint is not None:
        print0(f"Going on after {first_step} of {cfg.max_steps} updates.")


def validation_line(step, loss, token_bytes):
    """Return what to print of a validation loss, in nats per token."""
    line = f"step {step:5d} | val loss: {loss:.6f}"
    if token_bytes > 0:  # there is a text
        line += f" | bits per byte: {loss / math.log(2) / token_bytes:.4f}"
    return line


class Speed:
    """Measure a run's share of what the GPUs could do, and the time that is left."""

    def __init__(self, cfg, model, T, device, dtype, world):
        self.max_steps = cfg.max_steps
        self.flops_per_update = flops_per_token(model, T) * cfg.total_batch_size
        self.peak_flops = peak_flops(device, dtype, world)
        self.updates = 0
        self.started = None  # when the first update was done

    def describe(self, step, dt):
        """Return what to add to the line of update `step`, which took dt seconds. It may be ""."""
        text = ""
        if self.peak_flops is not None:
            # model FLOPs utilisation
            text += f" | mfu: {self.flops_per_update / dt / self.peak_flops:.1%}"
        self.updates += 1
        if self.updates == 1:
            self.started = time.monotonic()  # the first update is slow: don't count it
        elif self.updates == 3 or self.updates % 20 == 0:  # soon, then every 20th
            seconds = (time.monotonic() - self.started) / (self.updates - 1)  # evaluations too
            text += f" | left: {seconds * (self.max_steps - step - 1) / 60:.1f} min"
        return text


class Log:
    """log.txt: a line of STEP KIND VALUE for each number. The first process alone writes it."""

    def __init__(self, log_dir):
        self.path = os.path.join(log_dir, "log.txt")
        self.can_write = int(os.environ.get("RANK", 0)) == 0

    def write(self, step, kind, value):
        """Add a line. When that fails there is a warning, and no further try."""
        if not self.can_write:
            return
        try:
            with open(self.path, "a", encoding="utf-8", newline="\n") as f:
                f.write(f"{step} {kind} {value:.6f}\n")
        except OSError as error:
            print0(f"warning: {self.path} can't be written ({one_line(error)}); the run goes on "
                   "without it", file=sys.stderr)
            self.can_write = False


# -----------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path, step, cfg, model, optimizer, scaler, data_id):
    """Write all that a run needs to go on after `step` updates: tensors and plain values.

    The place in the data follows from the step, and an update draws no random numbers.
    Raises OSError or RuntimeError when the disk fails.
    """
    checkpoint = dict(
        model=model.state_dict(),
        model_config=asdict(model.config),
        train_config=asdict(cfg),
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        step=step,
        data_id=data_id,
    )
    # Always the same unfinished file: what a kill leaves of it is written over.
    unfinished = os.path.join(os.path.dirname(path), "model.pt.tmp")
    with fineweb.atomic_write(path, unfinished) as f:
        torch.save(checkpoint, f)


def restore(checkpoint, cfg, data_id, optimizer, scaler):
    """Put a checkpoint's state into the optimizer and the scaler. Raises UserError."""
    if checkpoint["step"] > cfg.max_steps:
        raise UserError(f"--max_steps {cfg.max_steps}: {checkpoint['step']} updates are done "
                        "already")
    if checkpoint["data_id"] != data_id:
        raise UserError(f"--data {cfg.data}: the run in {cfg.log_dir} was begun with other data; "
                        "give those, or leave out --resume to begin anew")
    # AdamW's averages (state) are the checkpoint's. The rate and the decay (param_groups) are this
    # run's.
    state = optimizer.state_dict()
    state["state"] = checkpoint["optimizer"]["state"]
    optimizer.load_state_dict(state)
    if scaler.is_enabled() and checkpoint["scaler"]:  # empty if the run wasn't in float16
        scaler.load_state_dict(checkpoint["scaler"])


def load_checkpoint(path):
    """Return the checkpoint at path, a dict, with its tensors on the CPU.

    Raises UserError when it can't be read, is damaged, or is not ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch's format
            # Compare checksums. torch.load would take a flipped bit for a weight.
            if archive.testzip() is not None:  # it names the first part that is damaged
                raise zipfile.BadZipFile  # caught below, where it becomes "is damaged"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    except pickle.UnpicklingError:  # it holds more than tensors and plain values
        checkpoint = None
    except Exception as error:  # any: PyTorch raises many kinds for wrong bytes
        raise UserError(f"{path} is damaged, or is no checkpoint") from error
    needed = {"model", "model_config", "train_config", "optimizer", "scaler", "step", "data_id"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():  # <=: all are there
        raise UserError(f"{path} was saved by another program, or by another version of this one")
    return checkpoint


def model_of(checkpoint):
    """Return the GPT that a checkpoint holds."""
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model


def checkpoint_path(folder, step):
    """Return the path of the checkpoint after `step` updates."""
    return os.path.join(folder, f"model_{step:05d}.pt")


def find_checkpoints(folder):
    """Return the steps of the checkpoints in folder, the newest first."""
    if not os.path.isdir(folder):
        return []
    matches = [re.fullmatch(r"model_(\d{5,})\.pt", name) for name in os.listdir(folder)]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def newest_checkpoint(folder):
    """Return the newest checkpoint in folder that is whole, or None where there is none at all.

    Warns of each that is passed over. Raises UserError when none of them can be loaded.
    """
    steps = find_checkpoints(folder)
    for step in steps:
        try:
            return load_checkpoint(checkpoint_path(folder, step))
        except UserError as error:
            print0(f"warning: passed over a checkpoint: {error}", file=sys.stderr)
    if steps:
        raise UserError(f"{folder}: none of its checkpoints can be loaded")
    return None


KEPT_FOR_GOOD = 5000  # the checkpoint of each 5000th update is never removed


class CheckpointSaver:
    """Know when a checkpoint is due, save it, and remove old ones."""

    def __init__(self, cfg, model, optimizer, scaler, data_id, checkpoint):
        self.cfg = cfg
        self.state = (cfg, model, optimizer, scaler, data_id)
        # The step of the newest checkpoint; what we resumed from counts.
        self.saved_step = None if checkpoint is None else checkpoint["step"]
        self.tried_at = time.monotonic()

    def is_due(self, step, last_step):
        """Return whether it is time: at the start and the end, by updates, and by minutes."""
        minutes = self.cfg.checkpoint_minutes
        if step == self.saved_step:
            return False
        if self.cfg.checkpoint_interval == 0 and minutes == 0:  # saving is turned off
            return False
        if step == 0 or last_step:
            return True
        if minutes > 0 and time.monotonic() - self.tried_at > 60 * minutes:
            return True
        return is_due(self.cfg.checkpoint_interval, step, last_step)

    def save(self, step, must_work):
        """Save log_dir/model_{step}.pt, and remove old ones.

        A disk that fails is a warning. What must work is tried three times, and then raises
        UserError.
        """
        path = checkpoint_path(self.cfg.log_dir, step)
        self.tried_at = time.monotonic()
        for _ in range(3 if must_work else 1):
            try:
                save_checkpoint(path, step, *self.state)
            except (OSError, RuntimeError) as error:
                # PyTorch's writer raises a RuntimeError while it handles the disk's error, which is
                # then the context.
                problem = f"{path} can't be saved: {one_line(error.__context__ or error)}"
                print0(f"warning: {problem}", file=sys.stderr)
                continue
            self.saved_step = step
            print0(f"step {step:5d} | saved {path}")
            self.remove_old(step)
            return
        if must_work:
            raise UserError(f"--log_dir {self.cfg.log_dir}: {problem}")

    def remove_old(self, step):
        """Remove old checkpoints. The newest keep_checkpoints stay, and each 5000th update's."""
        # One with a higher number is damaged, since --resume passed over it. It doesn't count.
        saved = [number for number in find_checkpoints(self.cfg.log_dir) if number <= step]
        for number in saved[self.cfg.keep_checkpoints :]:  # the newest come first
            if number == 0 or number % KEPT_FOR_GOOD != 0:
                with contextlib.suppress(OSError):  # an old file too many is no reason to end
                    os.remove(checkpoint_path(self.cfg.log_dir, number))


def take_over_folder(log_dir, checkpoint):
    """Put an earlier run's files aside, or cut its log to the checkpoint. Raises UserError."""
    with blame(f"--log_dir {log_dir}"):
        if checkpoint is None:
            put_earlier_run_aside(log_dir)
        else:
            cut_log(os.path.join(log_dir, "log.txt"), checkpoint["step"])


def put_earlier_run_aside(log_dir):
    """Move an earlier run's log.txt and model_*.pt into a numbered folder within log_dir."""
    names = [name for name in os.listdir(log_dir)
             if re.fullmatch(r"log\.txt|model_\d{5,}\.pt", name)]
    if not names:
        return
    number = 1
    while os.path.exists(os.path.join(log_dir, f"log.{number}")):
        number += 1
    folder = os.path.join(log_dir, f"log.{number}")
    os.mkdir(folder)
    for name in names:
        os.rename(os.path.join(log_dir, name), os.path.join(folder, name))
    print0(f"an earlier run was in {log_dir}; its log and checkpoints are in {folder} now")


def cut_log(path, step):
    """Remove from log.txt what a run that goes on after `step` updates will write again."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as f:
        lines = f.readlines()
    with fineweb.atomic_write(path) as f:
        for line in lines:
            match = re.fullmatch(rb"(\d+) \w+ \S+\n", line)
            if match and int(match[1]) < step:
                f.write(line)


def load_model(name, flag):
    """Return the GPT that name means: gpt2, ..., a checkpoint (.pt), or a folder.

    A folder is a run's, whose newest checkpoint counts, or one in Hugging Face's format.
    flag: the flag that name was given to. Raises UserError.
    """
    if name.endswith(".pt"):
        return model_of(load_checkpoint(name))
    if find_checkpoints(name):
        return model_of(newest_checkpoint(name))
    if name not in OPENAI_SIZES and not os.path.isdir(name):
        raise UserError(f"{flag} {name} is neither a folder nor one of {', '.join(OPENAI_SIZES)}")
    # transformers may raise any error for what isn't GPT-2's.
    with blame(f"{flag} {name}", Exception):
        return GPT.from_pretrained(name)


def check_is_gpt2(config, report, name):
    """Raise ValueError when what transformers loaded isn't a whole GPT-2 with GPT-2's tokens.

    config: its GPT2Config. report: what it says about loading. name: gpt2, ..., or a folder.
    """
    expected = dict(
        model_type="gpt2",
        vocab_size=50257,
        activation_function="gelu_new",  # the formula with tanh
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,  # a score is divided by the root of a head's width
        scale_attn_by_inverse_layer_idx=False,  # and by nothing else
        tie_word_embeddings=True,  # one matrix for wte and lm_head
    )
    for key, value in expected.items():
        found = getattr(config, key)
        if found != value:
            raise ValueError(f"its {key} is {found}, and GPT-2's is {value}")
    if config.n_inner not in (None, 4 * config.n_embd):  # the width inside the MLP
        raise ValueError(f"its n_inner is {config.n_inner}, and GPT-2's is 4 x {config.n_embd}")

    # transformers fills what is missing with random numbers.
    for fault in ("missing_keys", "mismatched_keys"):
        if report[fault]:
            raise ValueError(f"it has {fault}, such as {sorted(report[fault])[0]}")

    # A GPT-2 of another language has the same numbers for other words.
    vocabulary = os.path.join(name, "vocab.json")
    if os.path.exists(vocabulary):
        with open(vocabulary, encoding="utf-8") as f:
            theirs = json.load(f)
        if theirs != json.loads((fineweb.tokenizer_folder() / "encoder.json").read_bytes()):
            raise ValueError("its vocab.json isn't GPT-2's")


# -----------------------------------------------------------------------------
# The machine


def print0(*args, file=None):
    """Print, in the first of torchrun's processes only.

    A run goes on when nobody can read what it prints any more: the terminal was closed, or the
    program behind the pipe has ended.
    """
    if int(os.environ.get("RANK", 0)) != 0:
        return
    stream = file or sys.stdout
    try:
        print(*args, file=stream, flush=True)
    except OSError as error:  # an error such as a full disk may pass: the next line is tried
        if error.errno in (errno.EPIPE, errno.EIO):  # no reader, or no terminal
            # dup2: from now on the stream's file number means devnull, which forgets all.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_torchrun(resume):
    """Raise UserError when what torchrun tells its processes makes no sense."""
    rank = os.environ.get("RANK")
    world = os.environ.get("WORLD_SIZE")
    if rank is None and world is None:
        return
    numbers = rank is not None and world is not None and rank.isdecimal() and world.isdecimal()
    if not numbers or int(rank) >= int(world):
        raise UserError(f"the environment has RANK={rank} and WORLD_SIZE={world}, which don't fit "
                        "each other; torchrun sets both, and without it both have to be unset")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and not resume:
        raise UserError("torchrun has started this run again, and without --resume it would begin "
                        "anew; give --resume from the first start on")


def meet_others(device, rank, world, timeout_minutes):
    """Let torchrun's processes meet: NCCL connects GPUs, Gloo connects CPUs. Raises UserError."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    timeout = timedelta(minutes=timeout_minutes)
    print(f"process {rank} waits for all {world} processes", file=sys.stderr, flush=True)
    kinds = (dist.DistError, ValueError)  # ValueError: the environment has no MASTER_ADDR
    with blame(f"--timeout_minutes {timeout_minutes}: the processes didn't meet", kinds):
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)


def fingerprint(arrays):
    """Return a short text that identifies the data: by the length and beginning of each array."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{len(array)} ".encode())
        digest.update(array[:1000].tobytes())
    return digest.hexdigest()[:16]


def check_agreement(world, **values):
    """Raise UserError when the processes have different values, such as another learning rate."""
    if world == 1:
        return
    found = [None] * world
    dist.all_gather_object(found, values)  # every process gets the values of all
    for name in values:
        answers = [other[name] for other in found]
        if len(set(answers)) > 1:
            raise UserError(f"the processes have different values of {name}: {answers}; give all "
                            "the same flags, and the same files in --data and --log_dir")


def pick_device(name=None):
    """Return the torch.device of that name, or the best: a GPU (cuda), Apple's (mps), or the cpu.

    Under torchrun each process has a GPU of its own. Raises UserError when there is no such device.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    usable = []  # the best first
    if torch.cuda.is_available():
        usable.append("cuda")
    if torch.backends.mps.is_available() and local_world == 1:  # processes can't share it
        usable.append("mps")
    usable.append("cpu")
    if name is None:
        name = usable[0]
    if name not in usable:
        raise UserError(f"--device {name} can't be used here; there is {', '.join(usable)}")
    if name != "cuda":
        return torch.device(name)
    if local_world > torch.cuda.device_count():
        raise UserError(f"{local_world} processes need a GPU each, and there are "
                        f"{torch.cuda.device_count()}; start as many as there are GPUs, or give "
                        "--device cpu")
    return torch.device("cuda", local_rank)


def has_bfloat16(device):
    """Return whether device has bfloat16 in hardware. Emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    features = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "bf16")  # Intel and AMD; Intel; Arm
    return any(features.get(name, False) for name in names)


def best_dtype(device):
    """Return the name of the type in which device multiplies matrices fastest."""
    if has_bfloat16(device):
        return "bfloat16"
    if device.type == "cuda":
        return "float16"  # GPUs before 2020: T4, V100, RTX 20
    return "float32"


def autocast(device, dtype):
    """Return the context in which matrices are multiplied in dtype. Parameters stay float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def prepare(device):
    """Get PyTorch ready for device."""
    torch.set_float32_matmul_precision("high")  # TF32, where the hardware has it
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where new tensors and NCCL go
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory():
    """Tell glibc to keep large blocks that were freed, since getting new ones takes long."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)  # what this process has loaded already, glibc among it
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never use mmap, whose memory goes back when it is freed
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap


def allow_open_files(count):
    """Raise this process's limit of open files to count, as far as the system allows it."""
    if sys.platform == "win32":
        return
    import resource  # Windows lacks it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # now, and the most that is allowed
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


def compile_model(model, wanted, device, dtype):
    """Return model, compiled if that is wanted and works, for a faster step.

    wanted: True, False, or None: where it helps. On a CPU in float32 it helps little.
    A CPU needs a C++ compiler for it, a GPU Triton.
    """
    if wanted is None:
        wanted = device.type == "cuda" or (device.type == "cpu" and dtype == "bfloat16")
    if not wanted:
        return model
    if device.type == "cpu":  # so that a compiled run, too, repeats bit for bit
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # new tensors need no NaN
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as error:  # any: a missing compiler, header or Triton fails in its own way
        print0("warning: torch.compile doesn't work here, so a step takes longer, on a GPU much "
               f"longer: {one_line(error)[:200]}", file=sys.stderr)
        return model
    print0("The model is compiled, so the first update takes a minute.")
    return torch.compile(model)


# bfloat16 or float16 operations a second, from NVIDIA's data sheets, by the device's name. (They
# also name twice as much, for matrices of which half the numbers are 0.)
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak_flops(device, dtype, world):
    """Return the operations a second that `world` such devices could do, None if not known."""
    if device.type != "cuda" or dtype == "float32":
        return None
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(device))
    return None if peak is None else peak * world


def flops_per_token(model, T):
    """Return the floating-point operations of training on one token of a sequence of T.

    6 for each weight of a matrix (2 forward, 4 backward), and 12 * layers * width * T for
    attention (PaLM's paper, appendix B). The embeddings are looked up, not multiplied.
    """
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    matrices -= model.transformer.wpe.weight.numel()  # wte counts: it is lm_head too
    return 6 * matrices + 12 * model.config.n_layer * model.config.n_embd * T


def expected_memory(model, B, T, dtype, world):
    """Return about how many bytes training takes at its peak, not compiled.

    The numbers were counted on a CPU. torch.compile needs less.
    """
    config = model.config
    # The weights, their gradients and AdamW's two averages, 4 bytes each
    bytes_per_parameter = 16
    if world > 1:  # DDP has the gradients a second time
        bytes_per_parameter += 4
    if dtype != "float32":  # autocast keeps a copy of the weights in 16 bits
        bytes_per_parameter += 2
    parameter_bytes = bytes_per_parameter * sum(p.numel() for p in model.parameters())
    # What a layer keeps for the backward pass, in bytes per token, for each unit of its width
    layer_bytes = 65 if dtype == "float32" else 40
    # At the peak: the softmax's logarithms, their gradient and that of the logits, 4 bytes each
    token_bytes = layer_bytes * config.n_layer * config.n_embd + 12 * config.vocab_size
    return parameter_bytes + B * T * token_bytes


def fitting_batch_size(model, T, total_batch_size, dtype, device, world):
    """Return B for this machine: 64, or less on a CPU, halved until it fits.

    It has to divide a process's rows of an update.
    A CPU is busy enough with 512 tokens. More would only take more memory.
    On a GPU it has to fit into nine tenths of the memory, by an estimate.
    """
    rows = total_batch_size // (T * world)
    B = 64
    if device.type == "cpu":
        B = min(64, max(1, 512 // T))
    while rows % B != 0:
        B //= 2
    if device.type == "cuda":
        memory = 0.9 * torch.cuda.get_device_properties(device).total_memory
        while B > 1 and expected_memory(model, B, T, dtype, world) > memory:
            B //= 2
    return B


@contextlib.contextmanager
def enough_memory(advice):
    """Turn an error about memory into a UserError with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # PyTorch raises several kinds of RuntimeError. Only their texts show what they are.
        reason = (str(error) or repr(error)).splitlines()[0]
        texts = ("out of memory", "DefaultCPUAllocator")  # a GPU, a CPU
        if isinstance(error, MemoryError) or any(text in reason for text in texts):
            raise UserError(f"the memory is too small; {advice} ({reason})") from None
        raise


class StopRequest:
    """Remember that the run was asked to stop, by Ctrl-C or another signal.

    A second Ctrl-C, more than a second later, ends the program at once.
    """

    def __init__(self):
        self.requested_at = None
        self.old_handlers = {}

    def listen(self):
        """From now on notice the signals of terminals, of schedulers, and of limits."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
            number = getattr(signal, name, None)  # Windows lacks most of them
            if number is None or signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup, for one, wants SIGHUP to be ignored
            self.old_handlers[number] = signal.signal(number, self.handle)

    def handle(self, number, frame):
        """Python calls this when a signal arrives."""
        now = time.monotonic()
        if self.requested_at is None:
            self.requested_at = now
            if int(os.environ.get("RANK", 0)) == 0:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    # 2 is stderr. print() may be the very thing that the signal interrupted.
                    os.write(2, b"asked to stop: after the next update, and its save\n")
        elif number == signal.SIGINT and now - self.requested_at > 1:  # torchrun sends it twice
            raise KeyboardInterrupt

    def is_requested(self):
        """Return whether the run was asked to stop."""
        return self.requested_at is not None

    def close(self):
        """Let signals do again what they did before."""
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# Settings, chosen and checked


# What a run that goes on can't change: its model, and the order of its data
FIXED = ("model", "init_from", "seq_len", "total_batch_size", "seed", "shuffle")


def check_settings(given, config):
    """Raise UserError when a setting of given, {name: value}, can't work. config: their class."""
    known = {f.name: f for f in fields(config)}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"there is no setting {name}")
        rule = known[name].metadata
        if rule["choices"] is not None and value not in rule["choices"]:
            raise UserError(f"--{name} {value} is none of {', '.join(rule['choices'])} "
                            f"({rule['meaning']})")
        if known[name].type not in (int, float):
            continue
        if value == 0 and rule["zero_ok"]:
            continue
        if not 0 < value < 2**63:  # PyTorch's integers end at 2**63. nan is refused too.
            least = "0 or more" if rule["zero_ok"] else "more than 0"
            raise UserError(f"--{name} {value} has to be a number, {least}")


def choose_config(given, checkpoint, device):
    """Return the TrainConfig of a run. What isn't given is the checkpoint's, or else a preset's.

    given: {name: value}. device: where the run will be. Raises UserError when they contradict.
    """
    if checkpoint is not None:
        base = checkpoint["train_config"]
        if base.keys() != {f.name for f in fields(TrainConfig)}:
            raise UserError("--resume: the checkpoint is of another version of this program, with "
                            "other settings; --init_from takes its weights")
        for name in FIXED:
            if given.get(name, base[name]) != base[name]:
                raise UserError(f"--{name} {given[name]}: the run was begun with {base[name]}; "
                                "leave it out")
        # These belong to the machine and the place where a run is started.
        for name in ("log_dir", "device", "timeout_minutes"):
            base[name] = getattr(TrainConfig, name)
        return TrainConfig(**(base | given))

    base = dict(data=given.get("data", fineweb.SHARDS))
    first_shard = os.path.join(fineweb.SHARDS, fineweb.shard_name(1))
    no_shards = "data" not in given and not os.path.exists(first_shard)
    if no_shards:
        base["data"] = "input.txt"
    # With a GPU and shards: GPT-2 (124M). Otherwise the laptop's model.
    is_large = device.type == "cuda" and os.path.isdir(base["data"])
    base["model"] = "gpt2" if is_large else "laptop"
    settings = base | given
    preset = settings["model"]
    if given.get("init_from", "scratch") != "scratch":
        preset = "fine-tune"
        if "model" in given:
            raise UserError(f"--model {given['model']} and --init_from {given['init_from']} "
                            "contradict each other: --model is for a new model; leave one out")
    if no_shards:
        print0(f"no shards in {fineweb.SHARDS}, so: the preset {preset} on input.txt")
    return TrainConfig(**(PRESETS[preset] | settings))


def check_batch(model, B, T, total_batch_size, world):
    """Raise UserError when sequences are too long, or micro-batches don't make up an update."""
    block_size = model.config.block_size
    if T > block_size:
        raise UserError(f"--seq_len {T} is longer than the model's block_size; give --seq_len "
                        f"{block_size} or less")
    if total_batch_size % (B * T * world) != 0:
        smallest = T * world  # the tokens of an update with B = 1
        multiple = math.ceil(total_batch_size / smallest) * smallest
        raise UserError(f"--total_batch_size {total_batch_size} is not a multiple of --batch_size "
                        f"x --seq_len x processes = {B} x {T} x {world} = {B * T * world}; a new "
                        f"run works with --batch_size 1 --total_batch_size {multiple}")


# -----------------------------------------------------------------------------
# The command line


@dataclass
class SampleConfig:
    """The settings of --sample, each of them a flag."""

    num_samples: int = setting(4, "how many texts --sample writes")
    max_new_tokens: int = setting(256, "tokens in each of them")
    temperature: float = setting(1.0, "below 1 it prefers likelier tokens; 0 takes the likeliest",
                                 zero_ok=True)
    top_k: int = setting(50, "draw each token from this many likeliest ones")


def add_flags(group, config):
    """Add a flag to an argparse group for each field of config, a dataclass."""
    for f in fields(config):
        default = "what suits the machine" if f.default is None else f.default
        text = f"{f.metadata['meaning']} [{default}]"
        kind = f.type  # argparse calls it with the text of the flag
        if kind is str:  # the text; a shell leaves the ~ of --data=~/my.txt as it is
            kind = os.path.expanduser
        if f.metadata["choices"] is not None:
            text += f": {', '.join(f.metadata['choices'])}"
        if f.type is bool:
            group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(f"--{f.name}", type=kind, metavar="X", help=text)


def parse_flags(argv=None):
    """Return (given, options): {name: value} of the settings that are given, and what to do."""
    rows = []
    for name, row in PRESETS.items():
        differences = ", ".join(f"{key} {value}" for key, value in row.items())
        rows.append(f"  {name:12s} {differences or 'nothing'}")
    parser = fineweb.Parser(
        description="Train GPT-2. The values in brackets are those of GPT-2 (124M).",
        epilog="What the presets change:\n" + "\n".join(rows),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what isn't given is left out
        allow_abbrev=False,
    )
    add_flags(parser.add_argument_group("settings of a run"), TrainConfig)
    other = parser.add_argument_group("what to do")
    other.add_argument("--resume", action="store_true", default=False,
                       help="go on from the newest checkpoint in log_dir, or begin")
    instead = other.add_mutually_exclusive_group()  # at most one of these
    instead.add_argument("--export", metavar="FOLDER", default=None,
                         help="write the newest checkpoint, or init_from, in Hugging Face's format")
    instead.add_argument("--sample", metavar="TEXT", default=None,
                         help="continue this text with the newest checkpoint, or init_from")
    add_flags(other, SampleConfig)

    options = parser.parse_args(argv)
    flags = vars(options)
    given = {f.name: flags[f.name] for f in fields(TrainConfig) if f.name in flags}
    options.sampling = {f.name: flags[f.name] for f in fields(SampleConfig) if f.name in flags}
    return given, options


def load_asked_model(given):
    """Return the model that --init_from names, or else that of the newest checkpoint."""
    if "init_from" in given:
        return load_model(given["init_from"], "--init_from")
    log_dir = given.get("log_dir", TrainConfig.log_dir)
    if not find_checkpoints(log_dir):
        raise UserError(f"--log_dir {log_dir}: it holds no checkpoint; give --init_from to name a "
                        "model")
    return load_model(log_dir, "--log_dir")


def write_samples(given, text, sampling):
    """Print continuations of text. sampling: the settings of SampleConfig that are given."""
    check_settings(given, TrainConfig)
    check_settings(sampling, SampleConfig)
    device = pick_device(given.get("device"))
    prepare(device)
    model = load_asked_model(given).to(device)
    settings = asdict(SampleConfig(**sampling))
    seed = given.get("seed", TrainConfig.seed)
    texts = sample(model, text, seed=seed, cache=KVCache(model), **settings)
    print("\n---\n".join(texts))


def export(given, folder):
    """Write the model into folder in Hugging Face's format, with GPT-2's tokenizer.

    The vocabulary has 50257 tokens again, without our padding. Raises UserError.
    """
    model = load_asked_model(given)
    import transformers  # slow to import, and needed only here
    from safetensors import SafetensorError  # what safetensors makes of an error of the disk

    transformers.logging.disable_progress_bar()
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=50257, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head,
    )
    weights = {}
    for name, weight in model.state_dict().items():
        if name.endswith(TRANSPOSED):
            weight = weight.t()
        elif name in ("transformer.wte.weight", "lm_head.weight"):
            weight = weight[:50257]
        weights[name] = weight.contiguous()  # .t() is only another view of the numbers
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.load_state_dict(weights)
    with blame(f"--export {folder}", (OSError, SafetensorError)):
        os.makedirs(folder, exist_ok=True)
        theirs.save_pretrained(folder)
        files = fineweb.tokenizer_folder()
        shutil.copy(files / "encoder.json", os.path.join(folder, "vocab.json"))
        shutil.copy(files / "vocab.bpe", os.path.join(folder, "merges.txt"))
        with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
            f.write('{"tokenizer_class": "GPT2Tokenizer", "model_max_length": %d}' % c.block_size)
    print(f"saved {folder}: transformers.pipeline('text-generation', {folder!r}) loads it")


def command():
    """Do what the command line says."""
    given, options = parse_flags()
    if options.sample is not None:
        with enough_memory("lower --num_samples"):
            write_samples(given, options.sample, options.sampling)
        return
    if options.export is not None:
        export(given, os.path.expanduser(options.export))
        return
    with enough_memory("lower --batch_size"):
        launch(given, options.resume)


if __name__ == "__main__":
    fineweb.run_program(command)
