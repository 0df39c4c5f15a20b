"""How fast is it on an NVIDIA GPU?

    python tests/gpu_bench.py                    # all of it
    python tests/gpu_bench.py --quick            # tiny, on a CPU: does this file work?

    ladder    milliseconds an update of 16 x 1024 tokens, from plain float32 to all that we use

Each figure comes from one run on the card that is named in the first line.
"""
import gc
import os
import statistics
import sys
import tempfile
import time
import traceback

import torch
import torch.nn.functional as F
from bench import QUICK

import train_gpt2
from train_gpt2 import CausalSelfAttention, GPT, GPTConfig

DEVICE = train_gpt2.pick_device("cpu" if QUICK else "cuda")
SHAPE = dict(n_layer=2, n_head=2, n_embd=32) if QUICK else train_gpt2.MODEL_SIZES["gpt2"]
T = 32 if QUICK else 1024


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


ROWS = dict(ladder=ladder)

if __name__ == "__main__":
    wanted = [arg for arg in sys.argv[1:] if arg.split("=")[0] in ROWS] or list(ROWS)
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "a CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for words in wanted:
            row, _, argument = words.partition("=")
            print(f"\n{row}: {ROWS[row].__doc__}", flush=True)
            t0 = time.monotonic()
            try:
                ROWS[row](*[argument] if argument else [])
            except Exception:  # the other rows can still be measured
                traceback.print_exc()
            print(f"{row} took {time.monotonic() - t0:.0f} s", flush=True)
