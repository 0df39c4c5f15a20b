"""How fast is it on an NVIDIA GPU, and how much memory does it take?

    python tests/gpu_bench.py                    # all of it
    python tests/gpu_bench.py ladder memory      # some of it
    python tests/gpu_bench.py ways=flash,b32     # some ways
    python tests/gpu_bench.py --quick            # tiny, on a CPU: does this file work?

    update    the whole recipe: tokens a second, memory, what the kernels do
    ladder    milliseconds an update of 16 x 1024 tokens, from plain float32 to all that we use
    between   validation, HellaSwag and samples: how much of a run they take
    memory    the peak for several micro-batches, beside the program's estimate
    ways      what might be faster, each against the program as it is

Each figure comes from one run on the card that is named in the first line.
"""
import contextlib
import gc
import io
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench import QUICK, profiled, shares_of_parts
from torch.nn.attention import SDPBackend, sdpa_kernel

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import CausalSelfAttention, GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
GIVEN = [os.path.abspath(arg) for arg in sys.argv if arg.endswith(".jsonl")]
DEVICE = train_gpt2.pick_device("cpu" if QUICK else "cuda")
SHAPE = dict(n_layer=2, n_head=2, n_embd=32) if QUICK else train_gpt2.MODEL_SIZES["gpt2"]
T = 32 if QUICK else 1024
UPDATE = 8 * 4 * T if QUICK else 2**19  # tokens
RECIPE = dict(
    device=DEVICE.type, data="shards", model="gpt2", batch_size=4 if QUICK else 64, seq_len=T,
    total_batch_size=UPDATE, val_tokens=1000, eval_interval=0, hellaswag_interval=0,
    sample_interval=0, checkpoint_interval=0, checkpoint_minutes=0, compile=not QUICK,
)


def synchronize():
    torch.get_device_module(DEVICE).synchronize()


def seconds(work):
    """Return how long work() takes."""
    synchronize()
    t0 = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - t0


def say(number, unit, what):
    print(f"{number:14,.3f} {unit:9s} {what}", flush=True)
    return number


def clean():
    """Forget what was compiled and give back the memory of what was measured before."""
    torch._dynamo.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def product_rate():
    """Return the FLOPs a second of an 8192 x 8192 x 8192 product: the median of seven bursts."""
    n = 64 if QUICK else 8192
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)

    def products():
        for _ in range(10):
            a @ b

    products()
    return 10 * 2 * n**3 / statistics.median(seconds(products) for _ in range(7))


def train(updates, after_update=None, **settings):
    """Run the program's main() for so many updates. Return the seconds of each.

    after_update: a function that is called after each of them.
    """
    clean()
    times = []
    usual = train_gpt2.Speed.describe

    def describe(self, step, dt):
        times.append(dt)
        if after_update is not None:
            after_update()
        return usual(self, step, dt)

    train_gpt2.Speed.describe = describe
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train_gpt2.launch(RECIPE | dict(max_steps=updates, warmup_steps=1) | settings)
    finally:
        train_gpt2.Speed.describe = usual
    return times


def update():
    """The whole recipe: tokens a second, memory, what the kernels do."""
    before = product_rate()
    times = train(4 if QUICK else 12)
    rate = (before + product_rate()) / 2
    say(times[0], "s", "the first update, with compiling")
    steady = statistics.median(times[3:])
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304, **SHAPE))
    flops = train_gpt2.flops_per_token(model, T) * UPDATE / steady
    if DEVICE.type == "cuda":
        say(torch.cuda.max_memory_allocated() / 1e9, "GB", "at its peak")
    say(1000 * steady, "ms", f"an update of {UPDATE:,} tokens, B={RECIPE['batch_size']}, T={T}")
    say(UPDATE / steady, "tokens/s", "the program as it is")
    say(flops / 1e12, "TFLOP/s", "of the model")
    say(rate / 1e12, "TFLOP/s", "an 8192^3 product in bfloat16, measured before and after")
    say(100 * flops / rate, "%", "of that product's rate")
    say(10e9 / UPDATE * steady / 3600, "hours", "for 10 billion tokens, without evaluations")

    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=1 if QUICK else 2))
    with profiler:
        train(4 if QUICK else 6, after_update=profiler.step)
    rows = profiled(profiler)
    for part, share in shares_of_parts(rows).items():
        say(100 * share, "%", f"of the kernels' time: {part}")
    for name, took, count in sorted(rows, key=lambda row: row[1], reverse=True)[:12]:
        say(took / 1000, "ms", f"{count} times {name[:80]}")


class PlainAttention(CausalSelfAttention):
    """Attention as the lecture first writes it: the whole T x T matrix of scores."""

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        scores = q @ k.transpose(2, 3) / k.size(-1) ** 0.5
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def ladder():
    """Milliseconds an update of 16 x 1024 tokens, from plain float32 to all that we use."""
    B = 2 if QUICK else 16
    flash = CausalSelfAttention
    rungs = [
        # what is new, precision of products, dtype, compiled, attention, vocabulary, fused AdamW
        ("float32", "highest", "float32", False, PlainAttention, 50257, False),
        ("TF32", "high", "float32", False, PlainAttention, 50257, False),
        ("bfloat16", "high", "bfloat16", False, PlainAttention, 50257, False),
        ("torch.compile", "high", "bfloat16", True, PlainAttention, 50257, False),
        ("flash attention", "high", "bfloat16", True, flash, 50257, False),
        ("a vocabulary of 50304", "high", "bfloat16", True, flash, 50304, False),
        ("fused AdamW", "high", "bfloat16", True, flash, 50304, True),
    ]
    for what, precision, dtype, compiled, attention, vocab_size, fused in rungs:
        clean()
        torch.set_float32_matmul_precision(precision)
        train_gpt2.CausalSelfAttention = attention
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=vocab_size, **SHAPE)).to(DEVICE)
        train_gpt2.CausalSelfAttention = flash
        train_model = torch.compile(model) if compiled and not QUICK else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=fused or None)
        x = torch.randint(50257, (B, T), device=DEVICE)
        y = torch.randint(50257, (B, T), device=DEVICE)

        def update():
            optimizer.zero_grad()
            with train_gpt2.autocast(DEVICE, dtype):
                loss = train_model(x, y)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        update()  # compiles
        update()
        took = statistics.median(seconds(update) for _ in range(3 if QUICK else 10))
        say(1000 * took, "ms", f"{what}: {B * T / took:,.0f} tokens/s")


def repeated_examples():
    """Return as many rendered examples as HellaSwag has: those of the given file, repeated."""
    path = GIVEN[0] if GIVEN else str(ROOT / "tests" / "hellaswag.jsonl")
    examples = [hellaswag.render(example) for example in hellaswag.read_examples(path)]
    number = 12 if QUICK else 10_042
    return (examples * (1 + number // len(examples)))[:number]


def between():
    """Validation, HellaSwag and samples: how much of a run they take."""
    clean()
    train_gpt2.prepare(DEVICE)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50304, **SHAPE)).to(DEVICE)
    compiled = model if QUICK else torch.compile(model)
    B = RECIPE["batch_size"]
    batches = 2 if QUICK else 16
    tokens = np.random.default_rng(0).integers(50257, size=batches * B * T + 1, dtype=np.uint16)
    examples = repeated_examples()
    dtype = train_gpt2.best_dtype(DEVICE)
    losses = {}

    def validation(name, model):
        with train_gpt2.autocast(DEVICE, dtype):
            losses[name] = train_gpt2.evaluate(model, tokens, B, T)

    def score():
        with train_gpt2.autocast(DEVICE, dtype):
            hellaswag.count_right(model, examples)

    whole = train_gpt2.TrainConfig.val_tokens / (batches * B * T)  # how many times as much it is
    validation("eager", model)
    took = {}
    took["validation"] = whole * seconds(lambda: validation("eager", model))
    say(took["validation"], "s", "validation, not compiled, 10,485,760 tokens")
    validation("compiled", compiled)
    say(whole * seconds(lambda: validation("compiled", compiled)), "s", "validation, compiled")
    say(abs(losses["compiled"] - losses["eager"]), "nats", "between the two losses")
    say(seconds(score), "s", "HellaSwag, the first time")
    took["HellaSwag"] = say(seconds(score), "s", "HellaSwag, once more")
    if DEVICE.type == "cuda":
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            score()
            say(seconds(score), "s", "HellaSwag without cuDNN's attention")

    def samples():
        train_gpt2.sample(model, "Hello, I'm a language model,")

    samples()
    took["samples"] = say(seconds(samples), "s", "four samples of 32 tokens")
    updates = sum(train(4 if QUICK else 8)[3:]) / (1 if QUICK else 5) * 250
    share = sum(took.values()) / (sum(took.values()) + updates)
    say(100 * share, "%", "of a run: all three, once every 250 updates")


def memory():
    """The peak for several micro-batches, beside the program's estimate."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304, **SHAPE))
    dtype = train_gpt2.best_dtype(DEVICE)
    for B in (4, 2) if QUICK else (64, 32, 16, 8):
        train(2, batch_size=B, compile=False)  # the estimate is for a model that isn't compiled
        estimate = train_gpt2.expected_memory(model, B, T, dtype, 1)
        say(estimate / 1e9, "GB", f"B={B}: the program's estimate")
        if DEVICE.type == "cuda":
            peak = say(torch.cuda.max_memory_allocated() / 1e9, "GB", f"B={B}: at its peak")
            say(torch.cuda.max_memory_reserved() / 1e9, "GB", f"B={B}: taken from the card")
            say(100 * (estimate / peak - 1), "%", f"B={B}: the estimate is off by")


def loss_alone(self, idx, targets):
    """GPT.forward that keeps the logits to itself."""
    logits = self.lm_head(self.hidden(idx))
    return None, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


WAYS = {
    "base": "the program as it is",
    "loss": "the forward returns no logits",
    "flash": "FlashAttention 2",
    "cudnn": "attention by cuDNN",
    "coord": "the compiler tunes each fused kernel's tiles by trial",
    "pointwise": "the compiler tries several shapes for each fused kernel",
    "lt": "products by cuBLASLt",
    "mix0": "without the compiler's fused LayerNorm gradient",
    "b32": "micro-batches of 32",
    "autotune": "the compiler tries Triton's products too",
}


@contextlib.contextmanager
def way(name):
    """Let the program go this way within the block."""
    from torch._inductor import config

    options = dict(
        coord=dict(coordinate_descent_tuning=True),
        pointwise=dict(max_autotune_pointwise=True),
        mix0={"triton.mix_order_reduction": False},
        autotune=dict(max_autotune_gemm=True),
    ).get(name, {})
    backend = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION).get(name)
    forward = GPT.forward
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch(options))
        if backend is not None:
            stack.enter_context(sdpa_kernel(backend))
            # What was compiled for another backend must not be taken from the disk.
            stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        if name == "loss":
            GPT.forward = loss_alone
            stack.callback(setattr, GPT, "forward", forward)
        if name == "lt":
            stack.callback(torch.backends.cuda.preferred_blas_library,
                           torch.backends.cuda.preferred_blas_library())
            torch.backends.cuda.preferred_blas_library("cublaslt")
        yield


def ways(names="base,loss,flash,cudnn,coord,pointwise,lt,mix0,b32,base"):
    """What might be faster, each against the program as it is."""
    base = None
    for name in names.split(","):
        changes = dict(batch_size=RECIPE["batch_size"] // 2) if name == "b32" else {}
        try:
            with way(name):
                times = train(4 if QUICK else 8, **changes)
        except Exception as error:
            print(f"{name} can't be measured: {error!r}", flush=True)
            continue
        speed = UPDATE / statistics.median(times[3:])
        base = base or speed
        say(speed, "tokens/s", f"{speed / base:.3f} of base; {times[0]:.0f} s to compile; "
            f"{name}: {WAYS[name]}")


ROWS = dict(update=update, ladder=ladder, between=between, memory=memory, ways=ways)

if __name__ == "__main__":
    wanted = [arg for arg in sys.argv[1:] if arg.split("=")[0] in ROWS] or list(ROWS)
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "a CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        train_gpt2.StopRequest.listen = lambda self: None  # SIGTERM and Ctrl-C end all of it
        if QUICK:
            train_gpt2.MODEL_SIZES["gpt2"] = SHAPE
        os.mkdir("shards")
        random = np.random.default_rng(0)
        for number in range(2):
            tokens = random.integers(50257, size=100_000 if QUICK else 20_000_000, dtype=np.uint16)
            fineweb.write_shard("shards", number, tokens)
        for words in wanted:
            row, _, argument = words.partition("=")
            print(f"\n{row}: {ROWS[row].__doc__}", flush=True)
            t0 = time.monotonic()
            try:
                ROWS[row](*[argument] if argument else [])
            except Exception:  # the other rows can still be measured
                traceback.print_exc()
            print(f"{row} took {time.monotonic() - t0:.0f} s", flush=True)
