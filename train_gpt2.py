"""Train GPT-2 (124M) from scratch: the model, its data, the recipe and the training loop.

    python train_gpt2.py                                     # one GPU, or else the CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   # eight GPUs
    python train_gpt2.py --resume                            # go on from the newest checkpoint
    python train_gpt2.py --sample "Once upon a time"         # let the newest checkpoint write
    python train_gpt2.py --export my-gpt2                    # save it for Hugging Face
    python train_gpt2.py --help                              # all settings

Read it from top to bottom: the model, text from the model, the data, the recipe, and the run
itself, main(). A first reader can stop there. Below stands what main() calls: the log, checkpoints,
the machine, the settings, and the command line.
"""
import argparse
import codecs
import contextlib
import ctypes
import functools
import hashlib
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
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import fineweb
import hellaswag
from fineweb import gpt2_encoding

# -----------------------------------------------------------------------------
# The model


@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are those of GPT-2 (124M)."""

    block_size: int = 1024  # the longest sequence it can read, in tokens
    vocab_size: int = 50257  # 256 bytes, 50,000 merged pairs, and <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # the width: each token is a vector of this many numbers


# The four models that OpenAI released.
OPENAI_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
# All the shapes that --model knows. GPT-3's are those of its paper's table 2.1.
MODEL_SIZES = {
    "laptop": dict(n_layer=4, n_head=6, n_embd=96),  # small enough for two CPU cores
    **OPENAI_SIZES,
    "gpt3-small": dict(block_size=2048, n_layer=12, n_head=12, n_embd=768),
    "gpt3-medium": dict(block_size=2048, n_layer=24, n_head=16, n_embd=1024),
    "gpt3-large": dict(block_size=2048, n_layer=24, n_head=16, n_embd=1536),
    # The table gives 24 heads of 128, which is wider than 2048. We take 16 heads of 128.
    "gpt3-xl": dict(block_size=2048, n_layer=24, n_head=16, n_embd=2048),
}


class CausalSelfAttention(nn.Module):
    """Let each token read from itself and from the tokens before it.

    Multi-head attention of "Attention Is All You Need" (2017), section 3.2, with the future masked.
    (B, T, C) -> (B, T, C); inside there are nh heads of size hs, and nh * hs = C.
    Raises ValueError when n_embd is not a multiple of n_head.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        hs = C // self.n_head
        qkv = self.c_attn(x)  # (B, T, 3 * C)
        q, k, v = qkv.split(C, dim=2)  # (B, T, C) each
        # A head is a slice of the width. It becomes one more batch dimension.
        q = q.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, S, hs), of all S tokens so far
        # softmax(q @ k^T / sqrt(hs)) @ v, computed in tiles (flash attention): the T x T matrix
        # of scores never reaches memory. is_causal hides later tokens. A single new token may
        # see all S tokens, so nothing is hidden from it.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """Transform each token by itself: linear, GELU, linear. (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        # The tanh approximation was the faster one in 2019. OpenAI's weights expect it.
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4 * C)
        x = self.gelu(x)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """One layer of the transformer: attention, then the MLP. (B, T, C) -> (B, T, C).

    Both read a normalised copy of the residual stream, the x that runs through all layers, and
    add their result to it.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


# OpenAI's files hold these four weights as (in, out), and nn.Linear as (out, in).
TRANSPOSED = (
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)


class GPT(nn.Module):
    """GPT-2 ("Language Models are Unsupervised Multitask Learners", 2019), without dropout.

    The parameters have OpenAI's names.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # what a token is
            wpe=nn.Embedding(config.block_size, config.n_embd),  # where it stands
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One matrix for both jobs: tokens that mean nearly the same should be close in both.
        self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    def init_weights(self):
        """Fill the parameters with random numbers.

        Their standard deviation is 0.02, and smaller in c_proj (GPT-2's paper, section 2.3).
        Biases are 0. LayerNorms keep PyTorch's start: weight 1, bias 0.
        """
        # Each block adds to the residual stream twice. These layers start smaller, so that the
        # sum doesn't grow with the number of layers.
        residual_std = 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=residual_std)
            elif p.dim() == 2:
                nn.init.normal_(p, mean=0.0, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, caches=None):
        """Return the vectors that lm_head turns into logits.

        idx: token ids, (B, T), int64.
        caches: a KVCache for each layer; idx then holds only the tokens that aren't in them yet.
        Empty caches take any number of tokens, filled ones take one at a time.
        Returns (B, T, C). Raises ValueError when the sequence is longer than block_size, and when
        several tokens come after filled caches.
        """
        B, T = idx.shape
        block_size = self.config.block_size
        past = 0 if caches is None else caches[0].length
        if past + T > block_size:
            raise ValueError(f"{past + T} tokens are longer than block_size, {block_size}")
        if past > 0 and T > 1:  # is_causal is right only if queries and keys begin together
            raise ValueError(f"after {past} cached tokens one token can follow, not {T}")

        pos = torch.arange(past, past + T, device=idx.device)  # (T,)
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        pos_emb = self.transformer.wpe(pos)  # (T, C), the same for each row
        x = tok_emb + pos_emb  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if caches is None else caches[i])
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Score each possible next token at each position.

        idx: token ids, (B, T), int64. targets: the ids that come next, (B, T), int64.
        Returns (logits, loss). logits: (B, T, vocab_size). loss: the mean cross-entropy in nats
        (natural-log units) per token, or None without targets.
        """
        x = self.hidden(idx)  # (B, T, C)
        logits = self.lm_head(x)  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))
        # Only the loss is trained on. torch.compile doesn't know that: without this line it makes
        # a gradient for the logits too, (B, T, vocab_size) zeros.
        logits = logits.detach()
        return logits, loss

    @classmethod
    def from_pretrained(cls, name):
        """Return a GPT with the weights of gpt2, gpt2-medium, ..., or of a folder.

        The folder is in Hugging Face's format. Raises OSError when there are no such weights, and
        ValueError when they are not those of a whole GPT-2.
        """
        if name not in OPENAI_SIZES and not os.path.isdir(name):
            names = ", ".join(OPENAI_SIZES)
            raise FileNotFoundError(f"{name!r} is neither a folder nor one of {names}")
        source = load_from_hugging_face(name)
        config = GPTConfig(
            block_size=source.config.n_positions,
            vocab_size=source.config.vocab_size,
            n_layer=source.config.n_layer,
            n_head=source.config.n_head,
            n_embd=source.config.n_embd,
        )
        model = cls(config)
        theirs = source.state_dict()
        with torch.no_grad():
            for key, p in model.named_parameters():
                weight = theirs[key]
                if key.endswith(TRANSPOSED):
                    weight = weight.t()
                p.copy_(weight)
        return model


# -----------------------------------------------------------------------------
# Text from the model


class KVCache:
    """The keys and values of all tokens that a layer has read.

    With it, each new token costs one token's work: what came before is not computed again.
    """

    def __init__(self):
        self.length = 0  # how many tokens it holds

    def append(self, k, v):
        """Add the k and v of new tokens, (B, nh, T, hs) each. Return all, (B, nh, S, hs) each."""
        if self.length > 0:
            k = torch.cat((self.k, k), dim=2)  # (B, nh, S, hs)
            v = torch.cat((self.v, v), dim=2)  # (B, nh, S, hs)
        self.k = k
        self.v = v
        self.length = k.size(2)
        return k, v


def draw_token(logits, temperature, top_k, generator):
    """Draw one of the top_k likeliest tokens for each row: (N, vocab_size) -> (N, 1).

    The logits are divided by the temperature first. A temperature of 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (N, 1)
    top_k = min(top_k, logits.size(-1))
    top_logits, top_ids = logits.topk(top_k)  # (N, top_k) each
    probs = F.softmax(top_logits / temperature, dim=-1)  # (N, top_k)
    choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (N, 1)
    return top_ids.gather(1, choice)  # (N, 1)


@torch.no_grad()
def generate(model, tokens, num_samples, max_new_tokens, top_k, temperature, seed):
    """Continue tokens, a list of ids, num_samples times, by max_new_tokens each.

    Yields the next id of every sample, (num_samples, 1), again and again.
    """
    device = next(model.parameters()).device
    # A generator of its own: sampling changes nothing for anyone else who draws numbers.
    generator = torch.Generator(device).manual_seed(seed)
    block_size = model.config.block_size
    idx = torch.tensor([tokens] * num_samples, device=device)  # (num_samples, T)
    caches = [KVCache() for _ in range(model.config.n_layer)]
    unread = idx[:, -block_size:]
    for _ in range(max_new_tokens):
        x = model.hidden(unread, caches)[:, -1]  # (num_samples, C)
        logits = model.lm_head(x)  # (num_samples, vocab_size)
        logits = logits[:, :50257]  # GPT-2's tokens, without the padding of our vocabulary
        drawn = draw_token(logits, temperature, top_k, generator)  # (num_samples, 1)
        yield drawn
        idx = torch.cat((idx, drawn), dim=1)  # (num_samples, T + 1)
        unread = drawn
        if idx.shape[1] > block_size:
            # The oldest token drops out, and all others move to a new position. So the cached
            # keys and values are wrong now.
            idx = idx[:, -block_size:]
            unread = idx
            caches = [KVCache() for _ in range(model.config.n_layer)]


def sample(model, prompt, num_samples=4, max_new_tokens=32, top_k=50, temperature=1.0, seed=42):
    """Return num_samples texts that begin with prompt and go on for max_new_tokens tokens."""
    encoding = gpt2_encoding()
    tokens = encoding.encode(prompt, allowed_special="all")
    steps = generate(model, tokens, num_samples, max_new_tokens, top_k, temperature, seed)
    drawn = torch.cat(list(steps), dim=1).tolist()  # num_samples lists of ids
    return [prompt + encoding.decode(row) for row in drawn]


# -----------------------------------------------------------------------------
# The data


class Shards:
    """The tokens of a data set: arrays, (n,) uint16 each. Those on disk are memory-mapped."""

    def __init__(self, arrays, checksums=None):
        self.arrays = arrays
        self.checksums = checksums or {}  # {file name: sha256}
        self.sizes = np.array([len(array) for array in arrays])
        self.checked = set()

    def __len__(self):
        return int(self.sizes.sum())

    def check(self, i):
        """Compare array i with its sha256, if it is a file. It is read whole, once.

        Raises ValueError, which names the file, when the two differ or when the array holds an id
        that GPT-2 doesn't have.
        """
        array = self.arrays[i]
        if i in self.checked or not isinstance(array, np.memmap):
            return
        name = os.path.basename(array.filename)
        expected = self.checksums.get(name)
        if expected is not None and fineweb.sha256(array.filename) != expected:
            raise ValueError(f"{name} is damaged: its sha256 isn't the one in SHA256SUMS; make it "
                             "again, by the same fineweb.py command with another --out")
        if array.max() > 50256:
            raise ValueError(f"{name} holds the token {array.max()}, and GPT-2's end at 50256")
        self.checked.add(i)

    def head(self, n):
        """Return the first n tokens, (n,) uint16, or fewer when there aren't that many."""
        parts = []
        for i, array in enumerate(self.arrays):
            if n > 0:
                self.check(i)
                parts.append(array[:n])
                n -= len(array)
        return np.concatenate(parts)

    def row_place(self, number, T, seed, epoch):
        """Return (i, start): row `number` of an epoch begins at arrays[i][start].

        A row is T tokens and the one after, all of one shard. seed and epoch decide the order of
        the shards and of each shard's rows. With seed None nothing is shuffled. Tokens left over
        at a shard's end are skipped.
        """
        rows_per_shard = ((self.sizes - 1) // T).tolist()  # a shard's last token has no successor
        for i in permutation(len(rows_per_shard), seed, epoch).tolist():
            if number < rows_per_shard[i]:
                break
            number -= rows_per_shard[i]  # the row is in a later shard
        row_order = permutation(rows_per_shard[i], seed, epoch, i)
        return i, int(row_order[number]) * T


@functools.lru_cache(maxsize=4)  # row_place asks for the same few again and again
def permutation(n, seed, *more_seeds):
    """Return the numbers from 0 to n - 1, shuffled by the seeds, unshuffled when seed is None."""
    if seed is None:
        return np.arange(n)
    return np.random.default_rng((seed, *more_seeds)).permutation(n)


def open_shards(folder):
    """Return (train, val), two Shards, of the files in folder. They stay on disk (memory-mapped).

    Raises ValueError, which names the shard, when one isn't a whole file of uint16 or is missing.
    """
    arrays = dict(val=[], train=[])
    for name in sorted(os.listdir(folder)):
        match = re.fullmatch(r"edufineweb_(val|train)_\d{6}\.npy", name)
        if match is None:
            continue
        try:
            array = np.lib.format.open_memmap(os.path.join(folder, name), mode="r")
        except OSError:
            raise
        except Exception as error:  # any: a wrong header can break NumPy's reader in any way
            raise ValueError(f"{name} is damaged ({first_line(error)}); make it again") from error
        if array.dtype != np.uint16 or array.ndim != 1 or len(array) == 0:
            raise ValueError(f"{name} holds {array.dtype} of shape {array.shape}, and a shard is "
                             "one row of uint16")
        arrays[match[1]].append(array)
    for kind in ("val", "train"):
        if not arrays[kind]:
            raise ValueError(f"it holds no edufineweb_{kind}_*.npy; python fineweb.py makes them")
    if not fineweb.is_finished(folder):
        print0(f"warning: fineweb.py has not finished in {folder}; run the same command again to "
               "finish. A run that begins now can't be resumed when there are more shards.",
               file=sys.stderr)
    checksums = fineweb.read_checksums(folder)
    return Shards(arrays["train"], checksums), Shards(arrays["val"], checksums)


def load_data(path):
    """Return (train, val), two Shards: a folder's, or the first 90% and last 10% of a text file.

    <|endoftext|> in a text separates documents. Raises OSError and ValueError.
    """
    if os.path.isdir(path):
        return open_shards(path)
    if not os.path.isfile(path):
        raise ValueError(f"there is no such file or folder in {os.getcwd()}")
    if path.endswith((".json", ".jsonl", ".parquet")):
        raise ValueError(f"it is no plain text; python fineweb.py --files {path} --out FOLDER "
                         "makes shards of it, and --data FOLDER trains on them")
    encoding = gpt2_encoding()
    parts = []
    for document in fineweb.read_text(path):
        parts.append(fineweb.encode(document, encoding))
        parts.append(np.array([encoding.eot_token], dtype=np.uint16))
    if not parts:
        raise ValueError("there is no text in it")
    tokens = np.concatenate(parts[:-1])  # no <|endoftext|> after the last document
    if len(tokens) < 20:
        raise ValueError(f"it has {len(tokens)} tokens, which is too few to train and validate on")
    split = len(tokens) * 9 // 10
    return Shards([tokens[:split]]), Shards([tokens[split:]])


def fingerprint(*data):
    """Return a short text that identifies the data, one or more Shards."""
    digest = hashlib.sha256()
    for shards in data:
        for array in shards.arrays:
            if isinstance(array, np.memmap):
                name = os.path.basename(array.filename)
                checksum = shards.checksums.get(name, "unknown")
                digest.update(f"{name} {len(array)} {checksum}\n".encode())
            else:
                digest.update(array.tobytes())
    return digest.hexdigest()[:16]


class DataLoaderLite:
    """Cut tokens, Shards, into micro-batches: B rows of T tokens for each of `world` processes.

    A micro-batch is what one process computes at once. Several make up an update. The processes
    take turns: the first B rows are process 0's, the next B process 1's, and so on. So together
    they read what one process would, in the same order.

    position: the tokens that all processes together have taken since the run began.
    seed: the order of each epoch comes from it. With None the data stay as they are.
    Raises ValueError when the data are too short for one sequence or one micro-batch.
    """

    def __init__(self, tokens, B, T, total_batch_size, rank=0, world=1, seed=None):
        self.tokens = tokens
        self.B = B
        self.T = T
        self.rank = rank
        self.world = world
        self.seed = seed
        self.position = 0
        if tokens.sizes.max() <= T:
            raise ValueError(f"its longest piece has {tokens.sizes.max()} tokens, and a sequence "
                             f"needs {T + 1}; lower --seq_len, or make larger shards")
        usable = int(((tokens.sizes - 1) // T).sum()) * T
        if usable < B * T * world:
            raise ValueError(f"it has {usable:,} tokens in whole sequences, and a micro-batch of "
                             f"{B} x {T} x {world} takes {B * T * world:,}; lower --batch_size or "
                             "--seq_len")
        # Rows that don't fill an update are dropped, so an epoch doesn't depend on B and world.
        self.epoch_tokens = usable // total_batch_size * total_batch_size
        if self.epoch_tokens == 0:  # a text shorter than an update is read again within it
            self.epoch_tokens = usable

    def read_row(self, number):
        """Return row `number` of the run, counted over all epochs: (T + 1,) uint16."""
        epoch, number = divmod(number, self.epoch_tokens // self.T)
        i, start = self.tokens.row_place(number, self.T, self.seed, epoch)
        self.tokens.check(i)
        return self.tokens.arrays[i][start : start + self.T + 1]

    def next_batch(self):
        """Return the next x and y, (B, T) int64 each; y is x moved on by one token.

        Raises ValueError, which names the shard, when the data are damaged.
        """
        first = self.position // self.T + self.rank * self.B
        rows = [self.read_row(first + i) for i in range(self.B)]
        buf = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        x = buf[:, :-1].contiguous()  # (B, T)
        y = buf[:, 1:].contiguous()  # (B, T)
        self.position += self.B * self.T * self.world
        return x, y


# -----------------------------------------------------------------------------
# The recipe


def setting(default, help):
    """Return a field of TrainConfig, with its default and the text that --help shows."""
    return field(default=default, metadata=dict(help=help))


@dataclass
class TrainConfig:
    """The settings of a run, each of them a flag. The defaults are GPT-2 (124M) on FineWeb-Edu."""

    model: str = setting("gpt2", "the shape of a new model, and its preset")
    init_from: str = setting("scratch", "scratch, or start from gpt2, ..., a .pt file, a folder")
    data: str = setting(fineweb.SHARDS, "a folder of shards, or a text file")
    log_dir: str = setting("log", "the folder for the log and the checkpoints")
    batch_size: int = setting(64, "B, sequences in a micro-batch; lower it when memory is short")
    seq_len: int = setting(1024, "T, tokens in a sequence")
    total_batch_size: int = setting(2**19, "tokens in an update")
    shuffle: bool = setting(True, "read the data in a new order in each epoch")
    max_steps: int = setting(19073, "updates of the weights; 19073 are 10B tokens")
    warmup_steps: int = setting(715, "updates in which the learning rate rises to max_lr")
    max_lr: float = setting(6e-4, "the learning rate's peak; it falls to a tenth of it")
    weight_decay: float = setting(0.1, "AdamW's decay of the matrices")
    grad_clip: float = setting(1.0, "a gradient with a larger norm is scaled down to this one")
    eval_interval: int = setting(250, "updates between validation losses; 0 turns them off")
    val_tokens: int = setting(20 * 2**19, "tokens that the validation loss is measured on")
    hellaswag_interval: int = setting(250, "updates between HellaSwag scores; 0 turns them off")
    sample_interval: int = setting(250, "updates between samples; 0 turns them off")
    checkpoint_interval: int = setting(5000, "updates between checkpoints; 0 turns them off")
    checkpoint_minutes: float = setting(30.0, "also save every so many minutes; 0 turns this off")
    keep_checkpoints: int = setting(3, "keep so many of the newest, and each 5000th update's")
    device: str = setting("cuda", "cuda, mps or cpu")
    dtype: str = setting("bfloat16", "bfloat16, float16 or float32, for matrix products")
    compile: bool = setting(True, "use torch.compile")
    timeout_minutes: float = setting(10.0, "how long processes wait for one that hangs")
    seed: int = setting(1337, "sets the first weights, the data's order, and --sample's draws")


def get_lr(step, cfg):
    """Return the learning rate of update `step`, 0 .. max_steps - 1 (GPT-3's paper, appendix B).

    cfg: a TrainConfig. The rate rises linearly to max_lr at the end of the warm-up. Then it falls
    along half a cosine to a tenth of max_lr at the last update.
    """
    min_lr = 0.1 * cfg.max_lr
    warmup_steps = max(cfg.warmup_steps, 1)
    if step < warmup_steps:
        return cfg.max_lr * (step + 1) / warmup_steps  # + 1: a rate of 0 would waste an update
    progress = (step + 1 - warmup_steps) / (cfg.max_steps - warmup_steps)  # in (0, 1]
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))  # from 1 down to 0
    return min_lr + cosine * (cfg.max_lr - min_lr)


def configure_optimizer(model, weight_decay, lr):
    """Return AdamW for model.

    Weight decay pulls on the matrices: linear layers and embeddings. It leaves biases and
    LayerNorms alone.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        dict(params=matrices, weight_decay=weight_decay),
        dict(params=vectors, weight_decay=0.0),
    ]
    # fused: one kernel updates all parameters, instead of several kernels for each of them
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


@torch.no_grad()
def evaluate(model, tokens, B, T, rank=0, world=1, should_stop=None):
    """Return the mean loss of tokens[1:], in nats per token, each token scored once.

    tokens: (n,) uint16. They are cut into rows of T, and batches of B rows. The processes take
    turns with the batches, so the result is the same, up to rounding, for any number of them.
    should_stop() is asked before each batch. If it says yes in any process, the result is None.
    """
    device = next(model.parameters()).device
    starts = range(rank * B * T, len(tokens) - 1, world * B * T)
    losses = []  # (mean loss, number of tokens) of each batch
    stopped = 0
    hide = None if rank == 0 else True  # None: a bar on a terminal, none in a file
    for start in tqdm(starts, desc="validation", leave=False, disable=hide):
        if should_stop is not None and should_stop():
            stopped = 1
            break
        part = torch.from_numpy(tokens[start : start + B * T + 1].astype(np.int64))
        count = len(part) - 1  # B * T, or less in the last batch
        padding = B * T - count
        x = F.pad(part[:-1], (0, padding)).view(B, T)
        y = F.pad(part[1:], (0, padding), value=-100).view(B, T)  # -100: it isn't scored
        loss = model(x.to(device), y.to(device))[1]
        losses.append((loss, count))  # not loss.item(): it would wait for the GPU

    total = sum(count * loss.item() for loss, count in losses)
    if world > 1:
        totals = torch.tensor([total, stopped], dtype=torch.float64, device=device)
        dist.all_reduce(totals)
        total, stopped = totals.tolist()
    if stopped > 0:
        return None
    return total / (len(tokens) - 1)


def mean_token_bytes(tokens):
    """Return the mean length of tokens, (n,) uint16, in bytes of text.

    <|endoftext|> stands for no text, so it counts as 0 bytes.
    """
    encoding = gpt2_encoding()
    lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(50257)]
    lengths[encoding.eot_token] = 0
    return np.array(lengths)[tokens].mean()


def flops_per_token(model, T):
    """Return the floating-point operations of training on one token of a sequence of T.

    6 for each weight of a matrix (2 forward, 4 backward), and 12 * layers * width * T for
    attention (PaLM's paper, appendix B). The embeddings are looked up, not multiplied.
    """
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    matrices -= model.transformer.wpe.weight.numel()  # wte counts: it is lm_head too
    return 6 * matrices + 12 * model.config.n_layer * model.config.n_embd * T


# -----------------------------------------------------------------------------
# The run


def main(given, resume=False):
    """Train a model and return it.

    given: the settings that the user asked for, {name: value}. The others come from a preset, or
    with resume from the newest checkpoint. Bad settings end the program with status 2.
    """
    # Who am I, and what was asked for? settings: what is given, and the preset's or checkpoint's.
    # The next checkpoint keeps them. cfg: the settings, and what this machine decides.
    rank = int(os.environ.get("RANK", 0))  # torchrun tells each of its processes
    world = int(os.environ.get("WORLD_SIZE", 1))
    checkpoint = checkpoint_to_continue(given.get("log_dir", TrainConfig.log_dir), resume)
    settings = choose_settings(given, checkpoint)
    device = pick_device(settings.get("device"))
    cfg = make_config(settings, device)
    check_config(cfg)
    prepare(device)
    if world > 1:
        start_processes(device, rank, world, cfg.timeout_minutes)

    # The model, its data, the recipe
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, checkpoint).to(device)
    if "batch_size" not in settings:
        cfg.batch_size = fitting_batch_size(cfg, model, device, world)
    B = cfg.batch_size
    T = cfg.seq_len
    check_batch(cfg, model, world)
    grad_accum_steps = cfg.total_batch_size // (B * T * world)
    optimizer = configure_optimizer(model, cfg.weight_decay, cfg.max_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    loader, val_tokens, data_id = prepare_data(cfg, rank, world)
    examples = prepare_hellaswag(cfg, model)

    # Where the run begins, or goes on
    first_step, tokens_seen, skipped = restore(checkpoint, cfg, data_id, optimizer, scaler)
    loader.position = tokens_seen
    check_agreement(world, checkpoint=first_step, data=data_id, batch_size=B)
    lock = open_folder(cfg, model, checkpoint, rank, world)
    saver = CheckpointSaver(cfg, settings, model, optimizer, scaler, data_id, checkpoint)
    cfg.compile = cfg.compile and can_compile(device)
    print_plan(cfg, model, device, world, loader, grad_accum_steps, checkpoint)
    checkpoint = None  # let go of the tensors that nobody uses any more

    # Only training is compiled. HellaSwag and samples have many shapes: each would be compiled.
    train_model = compile_model(model, device) if cfg.compile else model
    if world > 1:
        train_model = DDP(train_model, device_ids=[device] if device.type == "cuda" else None)

    log = RunLog(cfg, model, val_tokens, device, rank, world)
    stop = StopRequest()
    stopping = False
    x, y = fetch_batch(loader, device)
    for step in range(first_step, cfg.max_steps + 1):
        if stopping:  # step is the number of updates done; it is saved below
            break
        last_step = step == cfg.max_steps  # all updates are done: only save and evaluate

        # Save first. Then nothing is lost when something below fails.
        if rank == 0 and saver.wants(step, last_step):
            saver.save(step, tokens_seen, skipped, must_work=step == 0 or last_step)

        # Once in a while: the validation loss
        if is_due(cfg.eval_interval, step, last_step):
            with autocast(device, cfg.dtype):
                val_loss = evaluate(model, val_tokens, B, T, rank, world, stop.is_requested)
            if val_loss is None:
                stopping = True
                break
            log.validation(step, val_loss)

        # Once in a while: HellaSwag
        if is_due(cfg.hellaswag_interval, step, last_step):
            with autocast(device, cfg.dtype):
                right = hellaswag.count_right(model, examples, rank, world, stop.is_requested)
            if right is None:
                stopping = True
                break
            log.hellaswag(step, right, len(examples))

        # Once in a while: samples
        if is_due(cfg.sample_interval, step, last_step):
            for text in sample(model, "Hello, I'm a language model,"):
                print0(">", text)

        if last_step:
            break

        # One update: the gradient of the mean loss over grad_accum_steps micro-batches
        t0 = time.perf_counter()
        lr = get_lr(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss_accum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            if world > 1:  # exchange gradients once, after the last micro-batch
                train_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast(device, cfg.dtype):
                loss = train_model(x, y)[1]  # the logits are let go at once: they are large
            # backward() adds up gradients. A sum of means is not yet a mean: divide.
            loss = loss / grad_accum_steps
            loss_accum += loss.detach()
            scaler.scale(loss).backward()
            x, y = fetch_batch(loader, device)  # a GPU is still busy with the batch before
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)

        asked = torch.full_like(loss_accum, stop.is_requested())
        if world > 1:  # sum over all processes; the norm is the same in each of them already
            dist.all_reduce(loss_accum)
            dist.all_reduce(asked)
        mean_loss = loss_accum.item() / world  # until here work was only queued for the GPU
        norm = norm.item()
        stopping = asked.item() > 0  # at least one of the processes was asked to stop
        if math.isfinite(mean_loss) and math.isfinite(norm):
            scaler.step(optimizer)
            skipped = 0
        else:
            skipped += 1  # such an update would make every weight NaN, for good
        scaler.update()
        tokens_seen += cfg.total_batch_size  # not loader.position: it is one micro-batch further
        dt = time.perf_counter() - t0  # seconds

        log.update(step, mean_loss, lr, norm, dt, skipped)
        if skipped == 5:
            fail(f"step {step}: loss or gradient was not finite 5 times in a row; "
                 "a lower --max_lr may help, or another --seed")

    if stopping:
        if rank == 0 and saver.saved_step != step:
            saver.save(step, tokens_seen, skipped, must_work=True)
        print0(f"stopped after {step} of {cfg.max_steps} updates; --resume goes on")
    stop.restore_handlers()
    log.file.close()
    lock.release()
    if world > 1:
        del train_model  # DDP holds on to the process group, which then could not end
        dist.destroy_process_group()
    return model


# You have read the training. What follows keeps a long run alive, on any machine.


def is_due(interval, step, last_step):
    """Return whether it is time: every `interval` updates and after the last; with 0, never."""
    return interval > 0 and (step % interval == 0 or last_step)


def build_model(cfg, checkpoint):
    """Return the model of the checkpoint, of --init_from, or a new one of --model's shape."""
    if checkpoint is not None:
        return model_of(checkpoint)
    if cfg.init_from != "scratch":
        with or_fail(f"--init_from {cfg.init_from}"):
            return load_model(cfg.init_from)
    # GPT-2 has 50257 tokens, an odd number. 50304 = 128 * 393 divides evenly among a kernel's
    # threads. The 47 extra tokens never occur.
    return GPT(GPTConfig(vocab_size=50304, **MODEL_SIZES[cfg.model]))


def prepare_data(cfg, rank, world):
    """Return (the loader, the validation tokens, a fingerprint of the data)."""
    with or_fail(f"--data {cfg.data}"):
        train_data, val_data = load_data(cfg.data)
        seed = cfg.seed if cfg.shuffle else None
        loader = DataLoaderLite(train_data, cfg.batch_size, cfg.seq_len, cfg.total_batch_size,
                                rank, world, seed)
        val_tokens = val_data.head(cfg.val_tokens + 1)  # the first token isn't scored
    return loader, val_tokens, fingerprint(train_data, val_data)


def prepare_hellaswag(cfg, model):
    """Return HellaSwag's examples, or [] when the run doesn't want them."""
    if cfg.hellaswag_interval == 0:
        return []
    with or_fail(f"--hellaswag_interval {cfg.hellaswag_interval} (0 turns HellaSwag off)"):
        examples = hellaswag.load_examples(gpt2_encoding())
        longest = max(example.tokens.shape[1] for example in examples)
        if longest > model.config.block_size:
            raise ValueError(f"its longest example has {longest} tokens, and the model can read "
                             f"{model.config.block_size}")
    return examples


def fetch_batch(loader, device):
    """Return the loader's next x and y on device. A GPU copies them while it works."""
    with or_fail("--data"):
        x, y = loader.next_batch()
    if device.type == "cuda":  # from pinned memory the GPU fetches by itself, and we don't wait
        x = x.pin_memory()
        y = y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def print_plan(cfg, model, device, world, loader, grad_accum_steps, checkpoint):
    """Say in plain words what is about to happen, on what, and how to stop it."""
    start = "a new model" if cfg.init_from == "scratch" else f"the model {cfg.init_from}"
    source = f"the preset {preset_of(asdict(cfg))}"
    first_step = 0
    if checkpoint is not None:
        start = "the checkpoint's model"
        source = "the checkpoint"
        first_step = checkpoint["step"]
    parameters = sum(p.numel() for p in model.parameters())
    updates = cfg.max_steps - first_step
    tokens = updates * cfg.total_batch_size
    epochs = tokens / loader.epoch_tokens
    flops = tokens * flops_per_token(model, cfg.seq_len)
    compiled = "compiled, so the first update takes a minute" if cfg.compile else "not compiled"
    print0(f"Train {start} of {parameters:,} parameters on {len(loader.tokens):,} tokens of "
           f"{cfg.data}.")
    print0(f"Settings that you don't give are those of {source}.")
    print0(f"Device: {device.type}, {world} process(es), {cfg.dtype}, {compiled}.")
    print0(f"To do: {updates:,} updates of {cfg.total_batch_size:,} tokens = {epochs:.2f} epochs = "
           f"{flops:.2e} FLOPs. The third update's line says how long it takes.")
    print0(f"One update: {grad_accum_steps} micro-batches of {cfg.batch_size} x {cfg.seq_len} "
           f"tokens x {world} process(es).")
    print0("Ctrl-C saves and stops; the same command with --resume goes on. "
           f"Log and checkpoints: {cfg.log_dir}/")
    if checkpoint is not None:
        print0(f"Going on after {first_step} of {cfg.max_steps} updates.")


class RunLog:
    """Print what happens in a run, and write log.txt: lines of STEP KIND VALUE."""

    def __init__(self, cfg, model, val_tokens, device, rank, world):
        self.cfg = cfg
        self.bytes_per_token = mean_token_bytes(val_tokens[1:])
        self.flops_per_update = flops_per_token(model, cfg.seq_len) * cfg.total_batch_size
        self.peak_flops = peak_flops(device, world, cfg.dtype)
        self.updates = 0
        self.started = None  # when the first update was done
        path = os.path.join(cfg.log_dir, "log.txt") if rank == 0 else os.devnull
        self.file = open(path, "a", buffering=1, encoding="utf-8", newline="\n")

    def write(self, step, kind, value):
        """Add a line to log.txt."""
        with or_fail(f"--log_dir {self.cfg.log_dir}"):
            self.file.write(f"{step} {kind} {value:.6f}\n")

    def validation(self, step, loss):
        """Print the validation loss after `step` updates, in nats per token."""
        bits = loss / math.log(2) / self.bytes_per_token
        print0(f"step {step:5d} | val loss: {loss:.6f} | bits per byte: {bits:.4f}")
        self.write(step, "val", loss)

    def hellaswag(self, step, right, n):
        """Print how many of n answers are right, by the lowest mean loss per token.

        right: what hellaswag.count_right() returns.
        """
        _, by_token, _ = right
        print0(f"step {step:5d} | HellaSwag: {by_token} of {n} right = {by_token / n:.4f}")
        self.write(step, "hella", by_token / n)

    def update(self, step, loss, lr, norm, dt, skipped):
        """Print how update `step` went; it took dt seconds."""
        line = (
            f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
            f"dt: {dt * 1000:.2f}ms | tok/sec: {self.cfg.total_batch_size / dt:.2f}"
        )
        if self.peak_flops is not None:
            # model FLOPs utilisation: the share of what the GPUs could do at best
            line += f" | mfu: {self.flops_per_update / dt / self.peak_flops:.1%}"
        self.updates += 1
        if self.updates == 1:
            self.started = time.monotonic()  # the first update is slow: don't count it
        elif self.updates == 3 or self.updates % 20 == 0:
            seconds = (time.monotonic() - self.started) / (self.updates - 1)  # evaluations too
            minutes = seconds * (self.cfg.max_steps - step - 1) / 60
            line += f" | left: {minutes:.1f} min"
        if skipped > 0:
            line += f" | skipped, {skipped} in a row"
        print0(line)
        self.write(step, "train", loss)


# -----------------------------------------------------------------------------
# Checkpoints and log

KEPT_FOR_GOOD = 5000  # the checkpoint of each 5000th update is never removed


class CheckpointSaver:
    """Save the run every so many updates and minutes, and remove old checkpoints.

    A disk that fails now and then doesn't end the run: the next round tries again.
    """

    def __init__(self, cfg, settings, model, optimizer, scaler, data_id, checkpoint):
        self.cfg = cfg
        self.settings = settings
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.data_id = data_id
        # The number of updates in the newest checkpoint; what we resumed from counts.
        self.saved_step = None if checkpoint is None else checkpoint["step"]
        self.saved_at = time.monotonic()
        self.failures = 0  # in a row

    def wants(self, step, last_step):
        """Return whether a checkpoint of this step is due and isn't there yet."""
        if step == self.saved_step:
            return False
        if self.failures > 0:
            return True
        limit = self.cfg.checkpoint_minutes
        minutes = (time.monotonic() - self.saved_at) / 60
        if limit > 0 and minutes > limit:
            return True
        return is_due(self.cfg.checkpoint_interval, step, last_step)

    def save(self, step, tokens_seen, skipped, must_work):
        """Write log_dir/model_{step}.pt: a dict of tensors and plain values.

        When the disk fails: a warning, and the end of the run at the third time in a row or when
        must_work is true.
        """
        path = checkpoint_path(self.cfg.log_dir, step)
        checkpoint = dict(
            model=self.model.state_dict(),
            model_config=asdict(self.model.config),
            train_config=self.settings,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            step=step,
            tokens_seen=tokens_seen,
            skipped=skipped,
            data_id=self.data_id,
            run_id=os.environ.get("TORCHELASTIC_RUN_ID"),  # torchrun's name for this launch
        )
        try:
            with open(os.path.join(self.cfg.log_dir, "log.txt"), encoding="utf-8") as f:
                # A run that goes on repeats this step's evaluations, and logs them then.
                lines = [line for line in f if not line.startswith(f"{step} ")]
            checkpoint["log"] = "".join(lines)
            with fineweb.atomic_write(path) as f:
                torch.save(checkpoint, f)
        except (OSError, RuntimeError) as error:
            # PyTorch's writer turns the disk's error into a RuntimeError of its own.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            self.failures += 1
            message = f"{path} can't be saved: {cause.strerror}"
            if must_work or self.failures == 3:
                fail(f"--log_dir {self.cfg.log_dir}: {message}")
            print0(f"warning: {message}; trying again after the next update", file=sys.stderr)
            return
        self.failures = 0
        self.saved_step = step
        self.saved_at = time.monotonic()
        print0(f"step {step:5d} | saved {path}")
        self.remove_old(step)

    def remove_old(self, step):
        """Remove old checkpoints. The newest keep_checkpoints stay, and each 5000th update's."""
        saved = [number for number in find_checkpoints(self.cfg.log_dir) if number <= step]
        for number in saved[self.cfg.keep_checkpoints :]:
            if number == 0 or number % KEPT_FOR_GOOD != 0:
                with contextlib.suppress(OSError):  # an old file too many is no reason to end
                    os.remove(checkpoint_path(self.cfg.log_dir, number))


def checkpoint_path(folder, step):
    """Return the path of the checkpoint after `step` updates."""
    return os.path.join(folder, f"model_{step:05d}.pt")


def find_checkpoints(folder):
    """Return how many updates each checkpoint in folder has behind it, the newest first."""
    if not os.path.isdir(folder):
        return []
    matches = [re.fullmatch(r"model_(\d{5,})\.pt", name) for name in os.listdir(folder)]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def load_checkpoint(path):
    """Return the checkpoint at path, a dict, with its tensors on the CPU.

    Raises OSError when it can't be read, ValueError when it is damaged or not ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch's format
            # Compare checksums. torch.load would take a flipped bit for a weight.
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")  # caught below
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:  # it holds more than tensors and plain values
        checkpoint = None
    except Exception as error:  # any: wrong bytes can break these lines in any way
        raise ValueError(f"{path} is damaged, or is no checkpoint") from error
    needed = {"model", "model_config", "train_config", "optimizer", "scaler", "step",
              "tokens_seen", "skipped", "data_id", "run_id", "log"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise ValueError(f"{path} was saved by another program, or by another version of this one")
    return checkpoint


def model_of(checkpoint):
    """Return the GPT that a checkpoint holds."""
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model


def newest_checkpoint(folder):
    """Return the newest whole checkpoint in folder, or None. Warn of each that is passed over."""
    for number in find_checkpoints(folder):
        try:
            return load_checkpoint(checkpoint_path(folder, number))
        except (OSError, ValueError) as error:
            print0(f"warning: passed over a checkpoint: {error}", file=sys.stderr)
    return None


def checkpoint_to_continue(log_dir, resume):
    """Return the checkpoint from which the run goes on, or None for a fresh start."""
    if resume:
        checkpoint = newest_checkpoint(log_dir)
        if checkpoint is None:
            fail(f"--resume: {log_dir} holds no checkpoint that can be loaded; without --resume a "
                 "new run begins")
        return checkpoint
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return None
    # torchrun has started us again: go on with what this launch saved, and with nothing older
    checkpoint = newest_checkpoint(log_dir)
    if checkpoint is None or checkpoint["run_id"] != os.environ["TORCHELASTIC_RUN_ID"]:
        return None
    return checkpoint


def load_model(name):
    """Return the GPT that name means: gpt2, ..., a checkpoint (.pt), or a folder.

    A folder is a run's, whose newest checkpoint counts, or one in Hugging Face's format.
    Raises OSError and ValueError.
    """
    if name.endswith(".pt"):
        model = model_of(load_checkpoint(name))
    elif find_checkpoints(name):
        checkpoint = newest_checkpoint(name)
        if checkpoint is None:
            raise ValueError(f"{name} holds no checkpoint that can be loaded")
        model = model_of(checkpoint)
    else:
        model = GPT.from_pretrained(name)
    if model.config.vocab_size < 50257:
        raise ValueError(f"its vocabulary of {model.config.vocab_size} is not GPT-2's, of 50257")
    return model


def load_from_hugging_face(name):
    """Return transformers' GPT2LMHeadModel of that name or folder. Raises as from_pretrained."""
    # These are slow to import and needed only here.
    import huggingface_hub.utils.logging
    import transformers
    from safetensors import SafetensorError

    # Silence their warnings. What matters is checked below.
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        source, report = transformers.GPT2LMHeadModel.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise OSError(f"its model.safetensors is damaged ({error})") from error

    expected = dict(
        model_type="gpt2",
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    )
    for key, value in expected.items():
        found = getattr(source.config, key)
        if found != value:
            raise ValueError(f"its {key} is {found}, and GPT-2's is {value}")
    # transformers fills what is missing with random numbers.
    for fault in ("missing_keys", "mismatched_keys"):
        if report[fault]:
            example = sorted(report[fault])[0]
            raise ValueError(f"it has {fault}, such as {example}")
    return source


def restore(checkpoint, cfg, data_id, optimizer, scaler):
    """Put a checkpoint's state into the optimizer and the scaler.

    Returns (updates done, tokens seen, updates skipped in a row just before): three zeros for a
    run that begins, whose checkpoint is None.
    """
    if checkpoint is None:
        return 0, 0, 0
    if checkpoint["step"] > cfg.max_steps:
        fail(f"--max_steps {cfg.max_steps}: {checkpoint['step']} updates are done already")
    if checkpoint["data_id"] != data_id:
        fail(f"--data {cfg.data}: the run in {cfg.log_dir} was begun with other data; give those, "
             "or leave out --resume to begin anew")
    state = optimizer.state_dict()
    # AdamW's averages are the checkpoint's. The rate and the decay are cfg's, which may be new.
    state["state"] = checkpoint["optimizer"]["state"]
    optimizer.load_state_dict(state)
    if scaler.is_enabled() and checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"], checkpoint["tokens_seen"], checkpoint["skipped"]


def open_folder(cfg, model, checkpoint, rank, world):
    """Lock log_dir and make it ready for this run. Return the lock. Even kill -9 sets it free.

    A new run moves an earlier run's files into a numbered folder. A resumed run cuts the log back
    to its checkpoint. Only process 0 does anything.
    """
    log_dir = cfg.log_dir
    lock = FileLock(os.path.join(log_dir, ".lock"))
    if rank == 0:
        with or_fail(f"--log_dir {log_dir}"):
            os.makedirs(log_dir, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                fail(f"--log_dir {log_dir}: another run is at work there; give another --log_dir")
            for name in os.listdir(log_dir):
                if re.fullmatch(r"(model_\d+\.pt|log\.txt)\.tmp", name):  # what a kill left
                    os.remove(os.path.join(log_dir, name))
            check_disk(log_dir, model)
            if checkpoint is None:
                put_earlier_run_aside(log_dir)
            log = "" if checkpoint is None else checkpoint["log"]
            with fineweb.atomic_write(os.path.join(log_dir, "log.txt")) as f:
                f.write(log.encode())
    if world > 1:
        dist.barrier()
    return lock


def check_disk(log_dir, model):
    """End the program when the disk can't hold one checkpoint."""
    parameters = sum(p.numel() for p in model.parameters())
    needed = 12 * parameters  # bytes: the weights and AdamW's two averages
    free = shutil.disk_usage(log_dir).free
    if free < needed:
        fail(f"--log_dir {log_dir}: its disk has {free / 1e9:.2f} GB free, and a checkpoint takes "
             f"{needed / 1e9:.2f} GB")


def put_earlier_run_aside(log_dir):
    """Move an earlier run's log.txt and model_*.pt into a numbered folder within log_dir."""
    names = ["log.txt"] if os.path.exists(os.path.join(log_dir, "log.txt")) else []
    for number in find_checkpoints(log_dir):
        names.append(os.path.basename(checkpoint_path(log_dir, number)))
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


# -----------------------------------------------------------------------------
# The machine


def print0(*args, file=None, **kwargs):
    """Print, in the first of torchrun's processes only.

    A run goes on when nobody can read what it prints any more: the terminal was closed, or the
    program behind the pipe has ended.
    """
    if int(os.environ.get("RANK", 0)) != 0:
        return
    stream = sys.stdout if file is None else file
    try:
        print(*args, file=stream, flush=True, **kwargs)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())


def fail(message):
    """End the program because of bad input: one line on standard error, and status 2."""
    program = os.path.basename(sys.argv[0])
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    print(f"{program}: {rank}{message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(2)  # a usual exit waits for the other processes, and aborts when they are gone
    sys.exit(2)


@contextlib.contextmanager
def or_fail(what):
    """End the program with a line about `what` when its block raises OSError or ValueError."""
    try:
        yield
    except (OSError, ValueError) as error:
        fail(f"{what}: {first_line(error)}")


def first_line(error):
    """Return what an exception says, in one line."""
    reason = getattr(error, "strerror", None) or str(error) or repr(error)
    return reason.splitlines()[0]


def pick_device(name=None):
    """Return the torch.device of that name, or the best: a GPU (cuda), Apple's (mps), or the cpu.

    Under torchrun each process has a GPU of its own.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    usable = []
    if torch.cuda.is_available():
        usable.append("cuda")
    if torch.backends.mps.is_available() and local_world == 1:
        usable.append("mps")
    usable.append("cpu")
    if name is None:
        name = usable[0]
    if name not in usable:
        fail(f"--device {name} can't be used here; there is {', '.join(usable)}")
    if name != "cuda":
        return torch.device(name)
    if local_world > torch.cuda.device_count():
        fail(f"{local_world} processes need a GPU each, and there are {torch.cuda.device_count()}; "
             "start as many as there are GPUs, or give --device cpu")
    return torch.device("cuda", local_rank)


def has_bfloat16(device):
    """Return whether device has bfloat16 in hardware. Emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    features = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "bf16")  # Intel and AMD, Intel, Arm
    return any(features.get(name, False) for name in names)


def best_dtype(device):
    """Return the name of the type in which device multiplies matrices fastest."""
    if has_bfloat16(device):
        return "bfloat16"
    if device.type == "cuda":
        return "float16"  # GPUs before Ampere: T4, V100, RTX 20
    return "float32"


def autocast(device, dtype):
    """Return the context in which matrices are multiplied in dtype. Parameters stay float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def prepare(device):
    """Set up PyTorch for device, in every program that runs a model."""
    torch.set_float32_matmul_precision("high")  # TF32, where the hardware has it
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory():
    """Tell glibc to keep large freed blocks. A third of a step was spent on getting them anew."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never use mmap, whose memory goes back when it is freed
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never give back the end of the heap


def can_compile(device):
    """Return whether torch.compile works, by a trial. A CPU needs a C++ compiler, a GPU Triton."""
    if device.type not in ("cuda", "cpu"):
        return False
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as error:  # any: a missing compiler, header or Triton fails in its own way
        print0(f"torch.compile doesn't work here, so the model runs without it: "
               f"{first_line(error)}")
        return False
    return True


def compile_model(model, device):
    """Return model, compiled. On a CPU a run then still repeats bit for bit."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it only costs time
    return torch.compile(model)


# Dense bfloat16 or float16 operations a second, from NVIDIA's data sheets. We take the first of
# these names that is a part of the device's name.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device, world, dtype):
    """Return the operations a second that `world` such devices could do, None if not known."""
    if device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    for part, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{part}\b", name):
            return flops * world
    return None


def expected_memory(model, B, T, dtype):
    """Return about how many bytes training takes at its peak, without torch.compile.

    The numbers were counted on a CPU.
    """
    config = model.config
    # The weights, their gradients and AdamW's two averages, 4 bytes each
    parameter_bytes = 16 * sum(p.numel() for p in model.parameters())
    # What a layer keeps for the backward pass, in bytes per token, for each unit of its width
    layer_bytes = 65 if dtype == "float32" else 40
    # The logits, their softmax and its gradient, 4 bytes each
    token_bytes = layer_bytes * config.n_layer * config.n_embd + 12 * config.vocab_size
    return parameter_bytes + B * T * token_bytes


def fitting_batch_size(cfg, model, device, world):
    """Return the micro-batch for this machine: cfg's, halved as often as needed.

    It has to divide a process's rows of an update, and to fit into nine tenths of the memory.
    """
    rows = cfg.total_batch_size // (cfg.seq_len * world)
    memory = math.inf
    if device.type == "cuda":
        memory = 0.9 * torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):  # not on Windows
        memory = 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    B = cfg.batch_size
    while B > 1 and (rows % B != 0 or expected_memory(model, B, cfg.seq_len, cfg.dtype) > memory):
        B //= 2
    return B


def start_processes(device, rank, world, timeout_minutes):
    """Let torchrun's processes meet: NCCL connects GPUs, Gloo connects CPUs."""
    store, _, _ = next(dist.rendezvous("env://"))
    # After a restart, torchrun's store still holds what the dead processes wrote.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt {restarts}", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )


def check_agreement(world, **values):
    """End the program when the processes have different values, such as the checkpoint found."""
    if world == 1:
        return
    found = [None] * world
    dist.all_gather_object(found, values)
    for name in values:
        answers = [other[name] for other in found]
        if len(set(answers)) > 1:
            fail(f"the processes have different values of {name}: {answers}; all need the same "
                 "--data, --log_dir and --batch_size")


class StopRequest:
    """Remember that the run was asked to stop: by Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP.

    A second Ctrl-C, more than a second later, ends the program at once.
    """

    def __init__(self):
        self.requested_at = None
        self.old_handlers = {}
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows lacks the last two
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
                    # not print(), which may be the very thing that the signal interrupted
                    os.write(2, b"asked to stop: finishing this step and saving it first\n")
        elif number == signal.SIGINT and now - self.requested_at > 1:  # torchrun sends it twice
            os._exit(130)

    def is_requested(self):
        """Return whether the run was asked to stop."""
        return self.requested_at is not None

    def restore_handlers(self):
        """Let signals do again what they did before."""
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# Settings


# The machine decides these four, unless they are given. What it decides is in no checkpoint, since
# the run may continue on another machine.
FROM_THE_MACHINE = ("batch_size", "device", "dtype", "compile")

LAPTOP = dict(  # three epochs of input.txt; one is 283 updates
    batch_size=16, seq_len=64, total_batch_size=1024, max_steps=849, warmup_steps=300, max_lr=6e-3,
    weight_decay=0.8, eval_interval=283, val_tokens=2**17, hellaswag_interval=0,
    sample_interval=283, checkpoint_interval=283,
)
FINE_TUNE = dict(
    batch_size=8, total_batch_size=2**13, max_steps=100, warmup_steps=10, max_lr=3e-5,
    eval_interval=25, val_tokens=2**17, hellaswag_interval=0, sample_interval=25,
    checkpoint_interval=50,
)
# How the settings of each preset differ from TrainConfig's defaults. The GPTs have the learning
# rates and batch sizes of GPT-3's paper, table 2.1, for their size.
PRESETS = {
    "laptop": LAPTOP,
    "fine-tune": FINE_TUNE,  # for --init_from
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


def preset_of(settings):
    """Return the name of the preset that fits settings, {name: value}."""
    if settings.get("init_from", "scratch") != "scratch":
        return "fine-tune"
    return settings["model"]


def choose_settings(given, checkpoint):
    """Return the settings of a run, {name: value}, without those that the machine will decide.

    What is given wins. The others are the checkpoint's, or else a preset's.
    """
    if checkpoint is not None:
        return continued_settings(given, checkpoint)
    if "model" in given and given.get("init_from", "scratch") != "scratch":
        fail(f"--model {given['model']} and --init_from {given['init_from']} contradict each "
             "other: --model is for a new model; leave one of them out")
    data = given.get("data")
    if data is None:
        data = "input.txt"
        if os.path.exists(os.path.join(fineweb.SHARDS, fineweb.shard_name(1))):
            data = fineweb.SHARDS
    # With a GPU and shards: GPT-2 (124M). Otherwise the laptop's model.
    has_gpu = pick_device(given.get("device")).type == "cuda"
    model = "gpt2" if has_gpu and os.path.isdir(data) else "laptop"
    chosen = dict(model=model, data=data) | given
    if chosen["model"] not in MODEL_SIZES:
        fail(f"--model {chosen['model']} is none of {', '.join(MODEL_SIZES)}")
    defaults = asdict(TrainConfig()) | PRESETS[preset_of(chosen)]
    for name in FROM_THE_MACHINE:
        del defaults[name]
    return defaults | chosen


def continued_settings(given, checkpoint):
    """Return the settings of a run that goes on: the checkpoint's, and what is given now."""
    settings = dict(checkpoint["train_config"])
    known = {f.name for f in fields(TrainConfig)}
    for name in sorted(settings.keys() - known):
        print0(f"warning: the checkpoint's setting {name} isn't known here and is ignored",
               file=sys.stderr)
        del settings[name]
    for name in ("model", "init_from"):
        if given.get(name, settings[name]) != settings[name]:
            fail(f"--{name} {given[name]}: the run was begun with {settings[name]}; leave it out")
    # The folder may have been renamed. We take the name under which we found the checkpoint.
    log_dir = given.get("log_dir", TrainConfig.log_dir)
    return settings | given | dict(log_dir=log_dir)


def make_config(settings, device):
    """Return the TrainConfig of settings on device. Its batch_size may still be too large."""
    cfg = TrainConfig(**PRESETS[preset_of(settings)] | settings)
    cfg.device = device.type
    if "dtype" not in settings:
        cfg.dtype = best_dtype(device)
    if "compile" not in settings:
        # On a CPU in float32 the compiled step is slower than the plain one.
        cfg.compile = device.type == "cuda" or cfg.dtype == "bfloat16"
    return cfg


def check_config(cfg):
    """End the program when a setting can't work."""
    may_be_0 = {
        "warmup_steps", "weight_decay", "seed", "eval_interval", "hellaswag_interval",
        "sample_interval", "checkpoint_interval", "checkpoint_minutes",
    }
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.type not in (int, float):
            continue
        if value == 0 and f.name in may_be_0:
            continue
        if not 0 < value < 2**63:  # 2**63 is more than PyTorch takes; nan and inf fail too
            least = "0 or more" if f.name in may_be_0 else "more than 0"
            fail(f"--{f.name} {value} has to be a number, {least}")
    if cfg.dtype not in ("bfloat16", "float16", "float32"):
        fail(f"--dtype {cfg.dtype} is none of bfloat16, float16, float32")


def check_batch(cfg, model, world):
    """End the program when sequences are too long, or micro-batches don't make up an update."""
    block_size = model.config.block_size
    if cfg.seq_len > block_size:
        fail(f"--seq_len {cfg.seq_len} is longer than the model's block_size; "
             f"give --seq_len {block_size} or less")
    tokens = cfg.batch_size * cfg.seq_len * world
    if cfg.total_batch_size % tokens != 0:
        row = cfg.seq_len * world
        multiple = math.ceil(cfg.total_batch_size / row) * row
        fail(f"--total_batch_size {cfg.total_batch_size} is not a multiple of --batch_size x "
             f"--seq_len x processes = {cfg.batch_size} x {cfg.seq_len} x {world} = {tokens}; "
             f"--batch_size 1 --total_batch_size {multiple} would work")


# -----------------------------------------------------------------------------
# The command line


def parse_flags(argv=None):
    """Return (the settings that are given, a dict; all flags, a Namespace)."""
    rows = []
    for name, row in PRESETS.items():
        differences = ", ".join(f"{key} {value}" for key, value in row.items())
        rows.append(f"  {name:12s} {differences or 'nothing'}")
    parser = argparse.ArgumentParser(
        description="Train GPT-2. The values in brackets are those of GPT-2 (124M).",
        epilog="What the presets change:\n" + "\n".join(rows),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what isn't given is left out
        allow_abbrev=False,
    )
    parser.error = fail  # argparse's own error prints the usage first
    group = parser.add_argument_group("settings of a run")
    for f in fields(TrainConfig):
        default = "what suits the machine" if f.name in FROM_THE_MACHINE else f.default
        help = f"{f.metadata['help']} [{default}]"
        if f.type is bool:
            group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            group.add_argument(f"--{f.name}", type=f.type, metavar="X", help=help)
    other = parser.add_argument_group("what to do")
    other.add_argument("--resume", action="store_true", default=False,
                       help="go on from the newest checkpoint in log_dir, with its settings")
    instead = other.add_mutually_exclusive_group()
    instead.add_argument("--export", metavar="FOLDER", default=None,
                         help="write the newest checkpoint, or init_from, in Hugging Face's format")
    instead.add_argument("--sample", metavar="TEXT", default=None,
                         help="continue this text with the newest checkpoint, or init_from")
    other.add_argument("--num_samples", type=int, default=4, metavar="X",
                       help="how many texts --sample writes [4]")
    other.add_argument("--max_new_tokens", type=int, default=256, metavar="X",
                       help="tokens in each of them [256]")
    other.add_argument("--temperature", type=float, default=1.0, metavar="X",
                       help="below 1 likelier tokens are preferred; 0 takes the likeliest [1.0]")
    other.add_argument("--top_k", type=int, default=50, metavar="X",
                       help="draw each token from this many likeliest ones [50]")
    options = parser.parse_args(argv)
    names = {f.name for f in fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return given, options


def load_asked_model(given):
    """Return the model that --init_from names, or else that of the newest checkpoint."""
    if "init_from" in given:
        flag = "--init_from"
        name = given["init_from"]
    else:
        flag = "--log_dir"
        name = given.get("log_dir", TrainConfig.log_dir)
        if not find_checkpoints(name):
            fail(f"--log_dir {name}: it holds no checkpoint; give --init_from to name a model")
    with or_fail(f"{flag} {name}"):
        return load_model(name)


def write_samples(given, options):
    """Print continuations of --sample's text, the first one as it comes."""
    for name in ("num_samples", "max_new_tokens", "top_k"):
        if getattr(options, name) < 1:
            fail(f"--{name} {getattr(options, name)} has to be more than 0")
    if not 0 <= options.temperature < math.inf:
        fail(f"--temperature {options.temperature} has to be a number, 0 or more")
    device = pick_device(given.get("device"))
    prepare(device)
    model = load_asked_model(given).to(device)
    encoding = gpt2_encoding()
    tokens = encoding.encode(options.sample, allowed_special="all")
    if not 0 < len(tokens) <= model.config.block_size:
        fail(f"--sample: the text has {len(tokens)} tokens, and the model can read 1 to "
             f"{model.config.block_size}")

    print0(options.sample, end="")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may be several tokens
    rows = []
    for new in generate(model, tokens, options.num_samples, options.max_new_tokens, options.top_k,
                        options.temperature, given.get("seed", TrainConfig.seed)):
        rows.append(new)
        print0(decoder.decode(encoding.decode_single_token_bytes(int(new[0]))), end="")
    print0(decoder.decode(b"", final=True), end="")
    drawn = torch.cat(rows, dim=1).tolist()  # num_samples lists of ids
    for row in drawn[1:]:
        print0(f"\n---\n{options.sample}{encoding.decode(row)}", end="")
    print0()


def export(given, folder):
    """Write the model into folder in Hugging Face's format, with GPT-2's tokenizer.

    The vocabulary has 50257 tokens again, without our padding.
    """
    model = load_asked_model(given)
    import transformers  # slow to import, and needed only here

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
        weights[name] = weight.contiguous()
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.load_state_dict(weights)
    with or_fail(f"--export {folder}"):
        os.makedirs(folder, exist_ok=True)
        theirs.save_pretrained(folder)
        files = fineweb.tokenizer_folder()
        shutil.copy(files / "encoder.json", os.path.join(folder, "vocab.json"))
        shutil.copy(files / "vocab.bpe", os.path.join(folder, "merges.txt"))
        with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
            f.write('{"tokenizer_class": "GPT2Tokenizer", "model_max_length": %d}' % c.block_size)
    print0(f"saved {folder}: transformers.pipeline('text-generation', {folder!r}) loads it")


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # print ? for letters that can't be shown
    given, options = parse_flags()
    try:
        if options.sample is not None:
            write_samples(given, options)
        elif options.export is not None:
            export(given, options.export)
        else:
            main(given, options.resume)
    except KeyboardInterrupt:  # not in the training loop, which has a StopRequest
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        flag = "--batch_size" if options.sample is None else "--num_samples"
        fail(f"the GPU's memory is too small; lower {flag} ({str(error).splitlines()[0]})")
