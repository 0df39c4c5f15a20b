"""How fast is it? One run, one table. Most rows are ratios of two things, measured by turns.

    python tests/bench.py                        # GPT-2 (124M); a few minutes on two cores
    python tests/bench.py --quick                # a tiny model, once each: does it run at all?
    python tests/bench.py hellaswag other.jsonl  # one row, of your own examples
    python tests/bench.py step       # step, hellaswag, sample, tokens, start, memory, peak or save

A ratio is the median of three, start's of five, save's of nine; memory and peak are looked at once.
While step is measured, it prints its ratio after each improvement, and what the time is spent on.
"""
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fineweb  # noqa: E402
import hellaswag  # noqa: E402
import train_gpt2  # noqa: E402

QUICK = "--quick" in sys.argv
DEVICE = train_gpt2.pick_device()
DTYPE = train_gpt2.best_dtype(DEVICE)
SHAPE = dict(n_layer=2, n_head=2, n_embd=32) if QUICK else train_gpt2.MODEL_SIZES["gpt2"]
# The parts of a step, by what PyTorch calls its operations and NVIDIA its kernels. The first
# pattern that fits counts.
PARTS = {
    "attention": "scaled_dot_product|flash|fmha|sdpa",  # first: its kernels say cutlass too
    "matrix products": r"^aten::(mm|addmm)$|gemm|nvjet|cutlass",
    "AdamW": "(?i:adam)",
    "logits' losses and their gradient": "(?i:softmax)|nll_loss",
    "GELU": "gelu",
    "LayerNorm, residual stream": "layer_norm",
    "casts, copies, sums, the gradient's norm": "",  # fits all the rest
}


def seconds(work):
    """Return how long work() takes."""
    t0 = time.perf_counter()
    work()
    torch.get_device_module(DEVICE).synchronize()
    return time.perf_counter() - t0


def ratio(a, b, times=1 if QUICK else 3):
    """Return a()'s time divided by b()'s: the median of so many tries, in which they take turns."""
    return statistics.median(seconds(a) / seconds(b) for _ in range(times))


def make_model():
    torch.manual_seed(0)
    return train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=50304, **SHAPE)).to(DEVICE)


def profiled(profile):
    """Return [(name, microseconds, how often)] of what ran: operations on a CPU, kernels on a GPU."""
    rows = []
    for event in profile.key_averages():
        if event.is_user_annotation or event.key.startswith("ProfilerStep"):
            continue
        took = event.self_cpu_time_total
        if DEVICE.type == "cuda":
            # A kernel's time also stands with the operation that started it. Keep the kernel.
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            took = event.self_device_time_total
        rows.append((event.key, took, event.count))
    return rows


def shares_of_parts(rows):
    """Return {part of PARTS: its share of the time} of what profiled() returns."""
    shares = dict.fromkeys(PARTS, 0)
    for name, took, _ in rows:
        part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
        shares[part] += took
    total = sum(shares.values())
    return {part: took / total for part, took in shares.items()}


def step():
    """A training step's share of the rate at which this machine multiplies matrices."""
    n, k, m = (8192, 8192, 8192) if DEVICE.type == "cuda" else (1024, 768, 3072)
    dtype = getattr(torch, DTYPE)
    a = torch.randn(n, k, device=DEVICE, dtype=dtype)
    b = torch.randn(k, m, device=DEVICE, dtype=dtype)

    def products():
        for _ in range(20):
            a @ b

    model = make_model()
    B, T = 4, 32 if QUICK else 256
    if DEVICE.type == "cuda":
        T = 1024
        B = train_gpt2.fitting_batch_size(model, T, 2**19, DTYPE, DEVICE, 1)
    flops = B * T * train_gpt2.flops_per_token(model, T)
    train_model = model
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4)
    tokens = np.random.default_rng(0).integers(50257, size=50 * B * T, dtype=np.uint16)
    loader = train_gpt2.DataLoaderLite([tokens], B, T)
    x, y = train_gpt2.fetch_batch(loader, DEVICE)

    def update():
        nonlocal x, y
        optimizer.zero_grad()
        with train_gpt2.autocast(DEVICE, DTYPE):
            loss = train_model(x, y)[1]
        loss.backward()
        x, y = train_gpt2.fetch_batch(loader, DEVICE)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def share(what):
        update()  # compiles
        update()
        # (update's operations / its time) / (products' operations / their time). An (n, k) matrix
        # times a (k, m) matrix takes 2 * n * k * m operations.
        result = flops / (20 * 2 * n * k * m) * ratio(products, update)
        print(f"{result:8.2f}  {what}")
        return result

    products()
    share("not compiled, AdamW as PyTorch has it")
    optimizer = train_gpt2.configure_optimizer(model, 0.1, 6e-4)
    share("AdamW fused")
    train_gpt2.prepare(DEVICE)
    on_this_device = "TF32" if DEVICE.type == "cuda" else "the C library keeps freed memory"
    result = share(on_this_device)
    if not QUICK:
        torch._inductor.config.cpp.enable_kernel_profile = True  # its kernels get names
        train_model = train_gpt2.compile_model(model, True, DEVICE, DTYPE)
        result = share("compiled")

    with torch.profiler.profile() as profile:
        for _ in range(1 if QUICK else 3):
            update()
    for part, share_of_time in shares_of_parts(profiled(profile)).items():
        print(f"{100 * share_of_time:7.1f}%  of the step's time: {part}")
    return result


@torch.no_grad()
def one_at_a_time(model, example):
    """Return an example's four mean losses, computed the simple way, (4,).

    They take four whole rows, and every logit of each.
    """
    rendered = hellaswag.render(example)
    tokens = rendered.tokens.to(DEVICE)  # (4, T)
    mask = rendered.mask.to(DEVICE)  # (4, T)
    with train_gpt2.autocast(DEVICE, DTYPE):
        logits, _ = model(tokens)  # (4, T, vocab_size)
    logits = logits[:, :-1].float().flatten(0, 1)
    losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    return ((losses.view(4, -1) * mask[:, 1:]).sum(1) / mask.sum(1)).cpu()


def hellaswag_examples():
    """HellaSwag's examples a second, against one example at a time."""
    model = make_model()
    given = [arg for arg in sys.argv if arg.endswith(".jsonl")]
    path = given[0] if given else ROOT / "tests" / "hellaswag.jsonl"
    examples = hellaswag.read_examples(str(path))[: 12 if QUICK else 300]
    every = 1 if QUICK else 5  # of the slow way, each fifth
    few = examples[::every]
    slow = []
    fast = []

    def slowly():
        slow[:] = [one_at_a_time(model, example) for example in few]

    def quickly():
        rendered = [hellaswag.render(example) for example in examples]
        with train_gpt2.autocast(DEVICE, DTYPE):
            fast[:] = hellaswag.ending_losses(model, rendered)

    result = len(examples) / len(few) * ratio(slowly, quickly)
    agree = [a.argmin() == b.argmin() for a, b in zip(slow, fast[::every])]
    print(f"in {DTYPE} {sum(agree)} of {len(agree)} predictions are those of the simple way")
    return result


@torch.no_grad()
def sampling():
    """Tokens a second of four samples from 8 to 256 tokens, against no cache at all."""
    model = make_model()
    longest = 16 if QUICK else 256

    def recompute():  # for each eighth length only
        for T in range(8, longest, 8):
            logits, _ = model(torch.zeros(4, T, dtype=torch.int64, device=DEVICE))
            logits[:, -1, :50257].topk(50)

    def cached():
        prompt = "Hello, I'm a language model,"  # 8 tokens
        cache = train_gpt2.KVCache(model)
        train_gpt2.sample(model, prompt, max_new_tokens=longest - 8, cache=cache)

    return 8 * ratio(recompute, cached)


def tokenising():
    """fineweb.py's tokens a second with two workers, against twice what tiktoken does in one."""
    import pyarrow
    from pyarrow import parquet

    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    starts = [997 * i % (len(text) - 3000) for i in range(200 if QUICK else 40_000)]
    texts = [text[start : start + 3000] for start in starts]
    encoding = fineweb.gpt2_encoding()
    few = texts[: 100 if QUICK else 4000]
    with tempfile.TemporaryDirectory() as folder:
        parquet.write_table(pyarrow.table(dict(text=texts)), f"{folder}/a.parquet",
                            row_group_size=1000)
        numbers = iter(range(9))

        def alone():
            for text in few:
                encoding.encode_ordinary(text)

        # In a process of its own. Workers started from here would each import this file, and torch.
        def work():
            command = [sys.executable, "fineweb.py", "--files", f"{folder}/a.parquet"]
            command += ["--workers", "2", "--out", f"{folder}/{next(numbers)}"]
            command += ["--shard_size", "50000" if QUICK else "5000000"]
            subprocess.run(command, cwd=ROOT, check=True)

        # (texts / work's time) / (2 * few / alone's time)
        return len(texts) / len(few) / 2 * ratio(alone, work)


def start():
    """The time to --help's first line against that of `import torch`."""
    def first_line(*command):
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL)
        process.stdout.readline()
        process.kill()
        process.communicate()

    def program():
        first_line("train_gpt2.py", "--help")

    def torch_alone():
        first_line("-c", "import torch; print()")

    program()  # from now on the files are in memory
    return ratio(program, torch_alone, 1 if QUICK else 5)


# RssAnon is the process's own memory, without the files that are mapped into it.
MEMORY_PROBE = r"""
import re, sys, train_gpt2
def resident():
    with open("/proc/self/status") as f:
        return int(re.search(r"RssAnon:\s+(\d+)", f.read())[1])
before = resident()
arrays, _ = train_gpt2.open_shards(sys.argv[1])
loader = train_gpt2.DataLoaderLite(arrays, 64, 1024, shuffle_seed=1)
for _ in range(50):
    loader.next_batch()
print(1024 * (resident() - before))
"""


def memory():
    """The memory that reading a shard of 100M tokens takes, as a share of the shard's size."""
    size = 1_000_000 if QUICK else 100_000_000
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            fineweb.write_shard(folder, number, np.zeros(size, dtype=np.uint16))
        done = subprocess.run([sys.executable, "-c", MEMORY_PROBE, folder], cwd=ROOT,
                              capture_output=True, text=True, check=True)
    return int(done.stdout) / (2 * size)


# VmHWM is the most memory that the process ever had.
PEAK_PROBE = r"""
import re, train_gpt2
train_gpt2.launch(dict(model="laptop", data="input.txt", device="cpu", dtype="float32",
                     compile=False, max_steps=4, eval_interval=2, val_tokens=VAL_TOKENS,
                     log_dir=r"FOLDER"))
with open("/proc/self/status") as f:
    print("peak", re.search(r"VmHWM:\s+(\d+)", f.read())[1])
"""


def peak():
    """The peak memory of a short laptop's run on a CPU, with three evaluations, in gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        probe = PEAK_PROBE.replace("FOLDER", folder)
        probe = probe.replace("VAL_TOKENS", "1000" if QUICK else "100_000")  # or all there are
        done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True,
                              text=True, check=True)
    return int(re.search(r"^peak (\d+)$", done.stdout, re.M)[1]) * 1024 / 1e9


def save():
    """How long a checkpoint blocks the run, against writing its bytes to the same disk."""
    model = make_model()
    optimizer = train_gpt2.configure_optimizer(model, 0.1, 6e-4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # AdamW now has its averages, which are saved too
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        def checkpoint():
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            with fineweb.atomic_write(f"{folder}/a") as f:
                torch.save(state, f)

        checkpoint()
        data = Path(f"{folder}/a").read_bytes()

        def write():
            with fineweb.atomic_write(f"{folder}/b") as f:
                f.write(data)

        write()  # the first time may be slow: for both it has passed
        return ratio(checkpoint, write, 1 if QUICK else 9)


ROWS = dict(
    step=step, hellaswag=hellaswag_examples, sample=sampling, tokens=tokenising, start=start,
    memory=memory, peak=peak, save=save,
)

if __name__ == "__main__":
    needs_proc = ("memory", "peak")
    here = [name for name in ROWS if name not in needs_proc or sys.platform == "linux"]
    wanted = [name for name in here if name in sys.argv] or here
    table = []
    for name in wanted:
        if name != "step":  # step measures without this first, and then with it
            train_gpt2.prepare(DEVICE)
        table.append((name, ROWS[name]()))
    print(f"\n{DEVICE.type}, {torch.get_num_threads()} threads, {DTYPE}")
    for name, result in table:
        print(f"{result:8.2f}  {name:10s} {ROWS[name].__doc__}")
