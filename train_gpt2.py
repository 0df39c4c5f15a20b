"""Train GPT-2 (124M) from scratch: the model, its data, the recipe and the training loop.

    python train_gpt2.py                                     # one GPU, or else none
"""
import contextlib
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import fineweb
from fineweb import gpt2_encoding

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
    with those of the tokens before it are scores. A softmax turns them into shares. The result is
    the sum of the values, each times its share. This is multi-head attention, as in "Attention Is
    All You Need" (2017), section 3.2. Raises ValueError when n_embd is not a multiple of n_head.
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
        # Cut the width into heads and move them beside B: each head works alone.
        q = q.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, hs).transpose(1, 2)  # (B, nh, T, hs)
        # softmax(q @ k^T / sqrt(hs)) @ v, where is_causal hides later tokens. GPUs and CPUs compute
        # it in tiles (flash attention), so that the T x T scores never stand in memory.
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
        # A ModuleDict, since the names are transformer.wte.weight and so on
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
        # starts 1 / sqrt(N) as large (GPT-2's paper, section 2.3).
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
        """
        x = self.hidden(idx)  # (B, T, C)
        logits = self.lm_head(x)  # (B, T, vocab_size)
        loss = None
        if targets is not None:
            # (B * T, vocab_size) and (B * T,): one example a row
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @classmethod
    def from_pretrained(cls, name):
        """Return a GPT with the weights of gpt2, gpt2-medium, gpt2-large, gpt2-xl, or of a folder.

        The folder is in Hugging Face's format. Raises OSError when there are no such weights.
        """
        import transformers  # slow to import, and needed only here

        transformers.logging.set_verbosity_error()  # what matters is checked below
        transformers.logging.disable_progress_bar()
        source = transformers.GPT2LMHeadModel.from_pretrained(name)
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
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    top_k = min(top_k, logits.size(-1))
    top_logits, top_ids = logits.topk(top_k)  # (B, top_k) each
    probs = F.softmax(top_logits / temperature, dim=-1)  # (B, top_k)
    choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
    return top_ids.gather(1, choice)  # (B, 1), the ids of what was chosen


@torch.no_grad()
def sample(model, prompt, num_samples=4, max_new_tokens=32, top_k=50, temperature=1.0, seed=42):
    """Return num_samples texts that begin with prompt and go on for max_new_tokens tokens.

    The same seed draws the same texts.
    """
    encoding = gpt2_encoding()
    tokens = encoding.encode(prompt, allowed_special="all")  # <|endoftext|> is one token
    device = next(model.parameters()).device
    # Its own source of random numbers, so that sampling changes no others
    generator = torch.Generator(device).manual_seed(seed)
    idx = torch.tensor([tokens] * num_samples, device=device)  # (B, T)
    for _ in range(max_new_tokens):
        window = idx[:, -model.config.block_size :]  # what the model can read
        x = model.hidden(window)[:, -1]  # (B, C), the last position
        logits = model.lm_head(x)  # (B, vocab_size)
        logits = logits[:, :50257]  # GPT-2's tokens, without the padding of our vocabulary
        next_token = draw_token(logits, temperature, top_k, generator)  # (B, 1)
        idx = torch.cat((idx, next_token), dim=1)  # (B, T + 1)
    drawn = idx[:, len(tokens):].tolist()  # B lists of ids
    return [prompt + encoding.decode(row) for row in drawn]


# -----------------------------------------------------------------------------
# The data


def load_text(path):
    """Return (arrays, val) of a text: its tokens, uint16, (n,) each.

    path: a text file. arrays: a list with one array, the first 90%. val: the last 10%.
    """
    with open(path, encoding="utf-8") as f:
        text = f.read()
    tokens = fineweb.encode(text)
    split = len(tokens) * 9 // 10
    return [tokens[:split]], tokens[split:]


class DataLoaderLite:
    """Cut arrays of tokens, (n,) uint16 each, into rows of T tokens, and hand out B rows at a time.

    Each row comes with the token behind it, the last one's target.
    An epoch is one pass over all rows of all arrays. The tokens left over at an array's end, too
    few for a row, are never read.
    """

    def __init__(self, arrays, B, T):
        self.arrays = arrays
        self.B = B
        self.T = T
        self.next_row = 0
        self.rows_per_array = [(len(array) - 1) // T for array in arrays]
        self.rows_per_epoch = sum(self.rows_per_array)

    def read_row(self, number):
        """Return row `number`, counted over all epochs: T tokens and one more, (T + 1,) uint16."""
        place = number % self.rows_per_epoch  # its place in the epoch
        # An epoch goes through one array after another. Which one has this place?
        for i in range(len(self.arrays)):
            rows = self.rows_per_array[i]
            if place < rows:
                start = place * self.T
                return self.arrays[i][start : start + self.T + 1]
            place -= rows  # not this one: count from the next one's start

    def next_batch(self):
        """Return the next x and y, (B, T) int64 each; y is x moved on by one token."""
        first = self.next_row
        rows = [self.read_row(first + i) for i in range(self.B)]
        tokens = np.stack(rows)  # (B, T + 1)
        tokens = torch.from_numpy(tokens.astype(np.int64))
        x = tokens[:, :-1].contiguous()  # (B, T)
        y = tokens[:, 1:].contiguous()  # (B, T)
        self.next_row += self.B
        return x, y


# -----------------------------------------------------------------------------
# The recipe


# OpenAI released these four. MODEL_SIZES has all.
OPENAI_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
MODEL_SIZES = {
    "laptop": dict(n_layer=4, n_head=6, n_embd=96),  # small enough for two CPU cores
    **OPENAI_SIZES,
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
    data: str = setting("input.txt", "a text file")
    seed: int = setting(1337, "where all random numbers come from", zero_ok=True)

    seq_len: int = setting(1024, "T, tokens in a sequence")
    batch_size: int = setting(8, "B, sequences in a batch")
    max_steps: int = setting(19073, "updates of the weights")
    max_lr: float = setting(6e-4, "the learning rate")

    device: str = setting(None, "where to compute; CUDA_VISIBLE_DEVICES chooses among GPUs",
                          choices=("cuda", "mps", "cpu"))
    dtype: str = setting(None, "the type for matrix products", choices=("bfloat16", "float32"))
    compile: bool = setting(None, "use torch.compile")


# How the settings of each preset differ from TrainConfig's defaults.
PRESETS = {
    "laptop": dict(
        seq_len=64,
        max_steps=850,
    ),
}


def configure_optimizer(model, lr):
    """Return AdamW for model.

    AdamW averages each weight's gradients over the last updates. It divides the average by their
    usual size, so all weights move at about the same speed, which is lr.
    """
    # fused: the whole update takes very few kernels.
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


# -----------------------------------------------------------------------------
# The run


def launch(given):
    """Train a model and return it: choose the device, then call main().

    given: the settings that you choose, {name: value}. The others have TrainConfig's defaults.
    """
    device = pick_device(given.get("device"))
    prepare(device)
    model = main(given, device)
    return model


def main(given, device):
    """Train a model and return it. given: as in launch()."""
    cfg = TrainConfig(**given)
    dtype = cfg.dtype or best_dtype(device)

    # The model, and the size of a batch
    torch.manual_seed(cfg.seed)
    model = build_model(cfg).to(device)
    T = cfg.seq_len
    B = cfg.batch_size

    # The data
    arrays, val = load_text(cfg.data)
    loader = DataLoaderLite(arrays, B, T)

    # The recipe
    optimizer = configure_optimizer(model, cfg.max_lr)

    # Both have the same parameters. Only training is compiled: sampling would compile many times.
    train_model = compile_model(model, cfg.compile, device, dtype)
    print_plan(cfg, model, loader, device, dtype)

    x, y = fetch_batch(loader, device)
    for step in range(cfg.max_steps):
        t0 = time.perf_counter()
        optimizer.zero_grad()
        with autocast(device, dtype):
            loss = train_model(x, y)[1]  # only the loss: the logits take much memory
        loss.backward()
        # Fetch the next batch here, while a GPU still computes this one.
        x, y = fetch_batch(loader, device)
        mean_loss = loss.item()  # waits until the GPU is done: dt is right
        optimizer.step()
        dt = time.perf_counter() - t0  # seconds

        line = f"step {step:5d} | loss: {mean_loss:.6f}"
        line += f" | dt: {dt * 1000:.2f}ms | tok/sec: {B * T / dt:.2f}"
        print(line)
    for text in sample(model, "Hello, I'm a language model,"):
        print(">", text)
    return model


def build_model(cfg):
    """Return a new model of the shape cfg.model."""
    # GPT-2 has 50257 tokens, an odd number. 50304 = 128 * 393 divides evenly among a kernel's
    # threads. The 47 extra tokens never occur.
    config = GPTConfig(block_size=cfg.seq_len, vocab_size=50304, **MODEL_SIZES[cfg.model])
    return GPT(config)


def fetch_batch(loader, device):
    """Return the loader's next x and y on device."""
    x, y = loader.next_batch()
    return x.to(device), y.to(device)


def print_plan(cfg, model, loader, device, dtype):
    """Print what is about to happen."""
    parameters = sum(p.numel() for p in model.parameters())
    tokens_there = sum(len(array) for array in loader.arrays)
    print(f"Model: {parameters:,} parameters.")
    print(f"Device: {device.type}.")
    print(f"Precision: {dtype}.")
    print(f"Data: {tokens_there:,} tokens of {cfg.data}.")


# -----------------------------------------------------------------------------
# The machine


def pick_device(name=None):
    """Return the torch.device of that name, or the best: a GPU (cuda), Apple's (mps), the cpu."""
    usable = []
    if torch.cuda.is_available():
        usable.append("cuda")
    if torch.backends.mps.is_available():
        usable.append("mps")
    usable.append("cpu")
    if name is None:
        name = usable[0]
    return torch.device(name)


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
    return "float32"


def autocast(device, dtype):
    """Return the context in which matrices are multiplied in dtype. Parameters stay float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def prepare(device):
    """Get PyTorch ready for device."""
    torch.set_float32_matmul_precision("high")  # TF32, where the hardware has it


def compile_model(model, wanted, device, dtype):
    """Return model, compiled if that is wanted and works, for a faster step.

    wanted: True, False, or None: where it helps. On a CPU in float32 it helps little.
    A CPU needs a C++ compiler for it, a GPU Triton.
    """
    if wanted is None:
        wanted = device.type == "cuda" or (device.type == "cpu" and dtype == "bfloat16")
    if not wanted:
        return model
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as error:  # any: a missing compiler, header or Triton fails in its own way
        print("warning: torch.compile doesn't work here, so a step takes longer, on a GPU much "
              f"longer: {error}", file=sys.stderr)
        return model
    print("The model is compiled, so the first update takes a minute.")
    return torch.compile(model)


if __name__ == "__main__":
    launch(dict(model="laptop") | PRESETS["laptop"])
