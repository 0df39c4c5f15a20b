"""How fast is it? One run, one table of ratios, each of two things measured side by side.

    python tests/bench.py            # GPT-2 (124M); a few minutes on two cores
    python tests/bench.py --quick    # a tiny model, once each: seconds; shows that it runs, not how fast
    python tests/bench.py hellaswag other.jsonl      # one row, of your own examples
    python tests/bench.py step       # one row (step, hellaswag, sample, tokens, start, memory, save)

A ratio is the median of three, start's of five, save's of nine; memory is looked at once. Below the step's stand what
each part of it won, and what its time is spent on.
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
DEVICE = hellaswag.pick_device()
DTYPE = "bfloat16" if hellaswag.has_bfloat16(DEVICE) else "float32"
SHAPE = dict(n_layer=2, n_head=2, n_embd=32) if QUICK else train_gpt2.SIZES["gpt2"]
PARTS = {  # of a step, by what PyTorch calls its operations; the first pattern that fits counts
    "matrix products": r"^aten::(mm|addmm)$|gemm",
    "attention": "scaled_dot_product|flash",
    "AdamW": "adam",
    "logits' losses and their gradient": "softmax|nll_loss",
    "GELU": "gelu",
    "LayerNorm, residual stream": "layer_norm",
    "casts, copies, sums, the gradient's norm, Python": "",
}


def seconds(work):
    """Return how long work() takes."""
    t0 = time.perf_counter()
    work()
    torch.get_device_module(DEVICE).synchronize()
    return time.perf_counter() - t0


def ratio(a, b, times=1 if QUICK else 3):
    """Return how many times b()'s time a() takes, the median of so many; they take turns, as a machine's pace changes."""
    return statistics.median(seconds(a) / seconds(b) for _ in range(times))


def make_model():
    torch.manual_seed(0)
    return train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=50304, **SHAPE)).to(DEVICE)


def step():
    """A training step's share of the rate at which this machine multiplies matrices."""
    n, k, m = (8192, 8192, 8192) if DEVICE.type == "cuda" else (1024, 768, 3072)
    a, b = (torch.randn(*shape, device=DEVICE, dtype=getattr(torch, DTYPE)) for shape in ((n, k), (k, m)))

    def products():
        for _ in range(20):
            a @ b

    B, T = (64, 1024) if DEVICE.type == "cuda" else (4, 32 if QUICK else 256)
    model = make_model()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.transformer.wpe.weight.numel()
    flops = B * T * (6 * matrices + 12 * model.config.n_layer * model.config.n_embd * T)
    train_model, optimizer = model, torch.optim.AdamW(model.parameters(), 6e-4, fused=False)
    tokens = np.random.default_rng(0).integers(50257, size=50 * B * T, dtype=np.uint16)
    loader = train_gpt2.DataLoaderLite(tokens, B, T, B * T)

    def update():
        optimizer.zero_grad()
        train_gpt2.accumulate_gradients(train_model, loader, 1, DTYPE)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def share(what):
        update()  # compiles
        update()
        result = flops / (20 * 2 * n * k * m) * ratio(products, update)
        print(f"{result:8.2f}  {what}")
        return result

    products()
    share("eager, AdamW as PyTorch has it")
    optimizer = train_gpt2.configure_optimizer(model, 0.1, 6e-4)
    share("AdamW fused")
    hellaswag.prepare(DEVICE)
    result = share("on a CPU, the C library keeps freed memory")
    if not QUICK and hellaswag.can_compile(DEVICE):
        torch._inductor.config.cpp.enable_kernel_profile = True  # so that what it compiles has names below
        train_model = torch.compile(model)
        result = share("compiled")
    with torch.profiler.profile() as profile:
        for _ in range(1 if QUICK else 3):
            update()
    shares = dict.fromkeys(PARTS, 0)
    for event in profile.key_averages():
        took = event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total
        shares[next(part for part, pattern in PARTS.items() if re.search(pattern, event.key))] += took
    for part, took in shares.items():
        print(f"{100 * took / sum(shares.values()):7.1f}%  of the step's time: {part}")
    return result


@torch.no_grad()
def one_at_a_time(model, enc, example):
    """Return an example's four mean losses as the lecture first computed them: four whole rows, every logit of each."""
    tokens, mask = (t.to(DEVICE) for t in hellaswag.render(example, enc))  # (4, T)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DTYPE == "bfloat16"):
        logits, _ = model(tokens)  # (4, T, vocab_size)
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return ((losses.view(4, -1) * mask[:, 1:]).sum(1) / mask.sum(1)).cpu()


def hellaswag_examples():
    """HellaSwag's examples a second, against one example at a time."""
    model, enc = make_model(), fineweb.gpt2_encoding()
    data = [arg for arg in sys.argv if arg.endswith(".jsonl")] or [ROOT / "tests" / "hellaswag.jsonl"]
    examples = hellaswag.read_examples(str(data[0]))[: 12 if QUICK else 300]
    slow, fast = [], []
    few = examples[:: 1 if QUICK else 5]  # of the slow way, each fifth

    def slowly():
        slow[:] = [one_at_a_time(model, enc, example) for example in few]

    def quickly():
        fast[:] = hellaswag.costs(model, enc, examples, DTYPE)[:, 1]

    result = len(examples) / len(few) * ratio(slowly, quickly)
    agree = [a.argmin() == b.argmin() for a, b in zip(slow, fast[:: 1 if QUICK else 5])]
    print(f"in {DTYPE} {sum(agree)} of {len(agree)} predictions are those of the simple way")
    return result


@torch.no_grad()
def sampling():
    """Tokens a second of four samples from 8 to 256 tokens, against computing everything again for each token."""
    model, enc = make_model(), fineweb.gpt2_encoding()
    longest = 16 if QUICK else 256

    def recompute():  # for each eighth length only
        for T in range(8, longest, 8):
            logits, _ = model(torch.zeros(4, T, dtype=torch.int64, device=DEVICE))
            logits[:, -1, : enc.n_vocab].topk(50)

    prompt = "Hello, I'm a language model,"  # 8 tokens
    return 8 * ratio(recompute, lambda: train_gpt2.sample(model, enc, prompt, max_new_tokens=longest - 8))


def tokenising():
    """fineweb.py's tokens a second with two workers, from a parquet file, against twice what tiktoken does in one."""
    import pyarrow
    from pyarrow import parquet

    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    texts = [text[997 * i % (len(text) - 3000) :][:3000] for i in range(200 if QUICK else 40_000)]
    enc = fineweb.gpt2_encoding()
    few = texts[: 100 if QUICK else 4000]
    with tempfile.TemporaryDirectory() as folder:
        parquet.write_table(pyarrow.table(dict(text=texts)), f"{folder}/a.parquet", row_group_size=1000)
        numbers = iter(range(9))

        def alone():
            for text in few:
                enc.encode_ordinary(text)

        def work():
            flags = ["--files", f"{folder}/a.parquet", "--workers", "2", "--shard_size", "50000" if QUICK else "5000000"]
            fineweb.main([*flags, "--stream", "--out", f"{folder}/{next(numbers)}"])

        return len(texts) / len(few) / 2 * ratio(alone, work)


def start():
    """The time to --help's first line against that of `import torch`."""
    def first_line(*command):
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()
        process.kill()
        process.communicate()

    first_line("train_gpt2.py", "--help")  # into the page cache
    return ratio(lambda: first_line("train_gpt2.py", "--help"), lambda: first_line("-c", "import torch; print()"),
                 1 if QUICK else 5)


def memory():
    """The memory (RssAnon) that reading a shard of 100M tokens takes, as a share of the shard's size."""
    probe = ("import fineweb, re, sys, train_gpt2\n"
             "anon = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
             "before = anon()\n"
             "train, _ = fineweb.open_shards(sys.argv[1], 50257)\n"
             "loader = train_gpt2.DataLoaderLite(train, 64, 1024, 2**16, seed=1)\n"
             "for _ in range(50): loader.next_batch()\n"
             "print(1000 * (anon() - before))\n")
    size = 1_000_000 if QUICK else 100_000_000
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            fineweb.write_shard(folder, number, np.zeros(size, dtype=np.uint16))
        done = subprocess.run([sys.executable, "-c", probe, folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(re.search(r"\d+", done.stdout)[0]) / (2 * size)


def save():
    """How long a checkpoint of model and AdamW blocks the run, against writing its bytes to the same disk."""
    model = make_model()
    optimizer = train_gpt2.configure_optimizer(model, 0.1, 6e-4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        def checkpoint():
            with fineweb.replacing(f"{folder}/a") as f:
                torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict()), f)

        checkpoint()
        data = Path(f"{folder}/a").read_bytes()

        def write():
            with fineweb.replacing(f"{folder}/b") as f:
                f.write(data)

        write()  # the first time may be slow: for both it has passed
        return ratio(checkpoint, write, 1 if QUICK else 9)


ROWS = dict(step=step, hellaswag=hellaswag_examples, sample=sampling, tokens=tokenising, start=start, memory=memory, save=save)

if __name__ == "__main__":
    here = [name for name in ROWS if name != "memory" or sys.platform == "linux"]  # it asks /proc
    wanted = [name for name in here if name in sys.argv] or here
    table = []
    for name in wanted:
        if name != "step":  # which first measures what this is good for
            hellaswag.prepare(DEVICE)
        table.append((name, ROWS[name]()))
    print(f"\n{DEVICE.type}, {torch.get_num_threads()} threads, {DTYPE}")
    for name, result in table:
        print(f"{result:8.2f}  {name:10s} {ROWS[name].__doc__}")
