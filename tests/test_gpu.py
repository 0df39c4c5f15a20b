"""On a GPU the programs compute what they compute on a CPU, and run as a user starts them there.

    python -m pytest -m gpu                      # on a machine with an NVIDIA GPU
    GPU_TESTS_ON=cpu python -m pytest -m gpu     # tries the tests themselves where there is none
"""
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES, ROOT, flags, losses, val_losses

import hellaswag
import train_gpt2
from train_gpt2 import GPT, GPTConfig

DEVICE = torch.device(os.environ.get("GPU_TESTS_ON", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]

# A run on text.txt that is long enough for rounding to add up, and short enough for a test.
SHAPE = dict(n_layer=2, n_head=4, n_embd=64)
SETTINGS = dict(
    device=DEVICE.type, batch_size=4, seq_len=64, total_batch_size=512, max_steps=20, max_lr=4e-3,
    warmup_steps=4,
)
PROBE = f"""
import train_gpt2
train_gpt2.MODEL_SIZES["laptop"] = {SHAPE}
given, options = train_gpt2.parse_flags()
train_gpt2.launch(given, options.resume)
"""
# The address is this machine's in any case, also where its name leads nowhere.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
            "--local_addr=127.0.0.1"]
# One process in a group of its own: what it does under torchrun with eight GPUs, as far as one
# GPU can show it.
DDP_PROBE = """
import os, torch, train_gpt2
import torch.distributed as dist
device = torch.device(os.environ["DEVICE"])
if device.type == "cuda":
    device = torch.device("cuda", 0)
train_gpt2.prepare(device)
train_gpt2.meet_others(device, 0, 1, 1.0)
found = [None]
dist.all_gather_object(found, dict(data="text"))
assert found == [dict(data="text")]
dist.barrier()
for compiled in (False, True):
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=2, n_head=4, n_embd=64)).to(device)
    train_model = train_gpt2.compile_model(model, compiled, device, "bfloat16")
    x = torch.randint(50257, (4, 64), device=device)
    y = torch.randint(50257, (4, 64), device=device)
    with train_gpt2.autocast(device, "bfloat16"):
        train_model(x, y)[1].backward()
    alone = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    ids = [device] if device.type == "cuda" else None
    train_model = train_gpt2.DDP(train_model, device_ids=ids)
    for sync in (False, True):
        train_model.require_backward_grad_sync = sync
        with train_gpt2.autocast(device, "bfloat16"):
            loss = train_model(x, y)[1]
        (loss / 2).backward()
    for p, grad in zip(model.parameters(), alone):
        error = (p.grad - grad).norm() / grad.norm()
        assert error < 2e-2, error
    del train_model
totals = torch.ones(3, device=device)
dist.all_reduce(totals)
assert totals.tolist() == [1.0, 1.0, 1.0]
dist.destroy_process_group()
print("all is well")
"""


@pytest.fixture(autouse=True)
def same_rules(small, monkeypatch):
    """Let float32 products be exact, unless a run asks for TF32, and SHAPE be the laptop's."""
    monkeypatch.setitem(train_gpt2.MODEL_SIZES, "laptop", SHAPE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def environment(**settings):
    """Return the environment of a program that is started in a folder of its own."""
    folders = [str(ROOT)]
    if "PYTHONPATH" in os.environ:
        folders.append(os.environ["PYTHONPATH"])
    return dict(os.environ, PYTHONPATH=os.pathsep.join(folders), **settings)


def make_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50304, **SHAPE))


def relative_error(found, expected):
    expected = expected.cpu()
    return float((found.cpu() - expected).norm() / expected.norm())


def largest_difference(a, b):
    assert len(a) == len(b) > 0
    return max(abs(float(x) - float(y)) for x, y in zip(a, b))


@pytest.mark.parametrize("precision, limit", [("highest", 1e-4), ("high", 5e-3)])
def test_logits_and_loss_are_those_of_a_cpu(precision, limit):
    torch.set_float32_matmul_precision(precision)
    model = make_model()
    idx = torch.randint(50257, (4, 65))
    x, y = idx[:, :-1], idx[:, 1:]
    with torch.no_grad():
        expected_logits, expected_loss = model(x, y)
        logits, loss = model.to(DEVICE)(x.to(DEVICE), y.to(DEVICE))
    assert relative_error(logits, expected_logits) < limit
    assert abs(loss.item() - expected_loss.item()) < limit


def test_the_loss_of_bfloat16_logits_is_computed_in_float32():
    model = make_model().to(DEVICE)
    idx = torch.randint(50257, (4, 65), device=DEVICE)
    with torch.no_grad(), train_gpt2.autocast(DEVICE, "bfloat16"):
        logits, loss = model(idx[:, :-1], idx[:, 1:])
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.flatten(0, 1).float(), idx[:, 1:].flatten())
    assert abs(loss.item() - expected.item()) < 1e-4


def test_20_updates_in_each_type_and_compiled(train, compiler):
    def run(**settings):
        return losses(train(**(SETTINGS | settings))[1])

    on_the_cpu = run(device="cpu", dtype="float32", compile=False)
    in_float32 = run(dtype="float32", compile=False)
    in_bfloat16 = run(dtype="bfloat16", compile=False)
    compiled = run(dtype="bfloat16", compile=True)
    steps = 20 if DEVICE.type == "cuda" else 4  # a CPU needs 14 seconds for each
    in_float16 = run(dtype="float16", compile=False, max_steps=steps)
    assert len(on_the_cpu) == 20
    assert float(on_the_cpu[-1]) < float(on_the_cpu[0]) - 1
    assert largest_difference(in_float32, on_the_cpu) < 5e-3  # the GPU may use TF32
    assert largest_difference(in_bfloat16, in_float32) < 1e-2
    assert largest_difference(compiled, in_bfloat16) < 1e-2
    assert largest_difference(in_float16, in_float32[:steps]) < 1e-2


def test_a_batch_arrives_whole_while_the_gpu_works(small):
    arrays, _ = train_gpt2.load_data("text.txt")
    loader = train_gpt2.DataLoaderLite(arrays, 4, 64, shuffle_seed=1)
    expected = [loader.next_batch() for _ in range(40)]
    loader.next_row = 0
    a = torch.randn(2048, 2048, device=DEVICE)
    found = []
    for _ in range(40):
        for _ in range(20 if DEVICE.type == "cuda" else 0):
            a @ a  # so that the copies have to queue
        found.append(train_gpt2.fetch_batch(loader, DEVICE))
    for (x, y), (expected_x, expected_y) in zip(found, expected):
        assert torch.equal(x.cpu(), expected_x)
        assert torch.equal(y.cpu(), expected_y)


@pytest.mark.parametrize("dtype, compile", [("bfloat16", True), ("float16", False)])
def test_a_resumed_run_goes_on_as_the_whole_one(train, compiler, tmp_path, dtype, compile):
    settings = SETTINGS | dict(
        max_steps=8, eval_interval=4, val_tokens=1000, checkpoint_interval=4, dtype=dtype,
        compile=compile,
    )
    _, whole = train(**settings)
    os.remove("log/model_00008.pt")
    _, resumed = train(resume=True, dtype=dtype, compile=compile, device=DEVICE.type)
    assert "Going on after 4 of 8" in resumed
    assert largest_difference(losses(resumed), losses(whole)[4:]) < 1e-2
    assert largest_difference(val_losses(resumed), val_losses(whole)[1:]) < 1e-2


def test_a_second_run_starts_from_a_checkpoint(train):
    train(**SETTINGS | dict(max_steps=20, checkpoint_interval=20))
    settings = dict(data="text.txt", init_from="log/model_00020.pt", log_dir="log2", max_steps=2,
                    seq_len=64, batch_size=2, total_batch_size=256, device=DEVICE.type)
    train_gpt2.launch(settings)
    with open("log/log.txt", encoding="utf-8") as f:
        end = float(f.readlines()[-1].split()[2])
    with open("log2/log.txt", encoding="utf-8") as f:
        lines = [line.split() for line in f]
    first = float(next(value for step, kind, value in lines if kind == "train"))
    assert abs(first - end) < 1  # a new model would begin at 10.9


def test_keys_and_values_that_are_kept_change_nothing():
    model = make_model().to(DEVICE)
    idx = torch.randint(50257, (3, 40), device=DEVICE)
    cache = train_gpt2.KVCache(model)
    with torch.no_grad():
        expected = model.hidden(idx)[:, 9:]  # (3, 31, 64)
        found = [cache.newest_vector(idx[:, :T]) for T in range(10, 41)]
    assert relative_error(torch.stack(found, dim=1), expected) < 1e-4


def test_samples_repeat():
    model = make_model().to(DEVICE)
    texts = train_gpt2.sample(model, "Hello", num_samples=3, max_new_tokens=20)
    assert len(texts) == 3
    assert texts == train_gpt2.sample(model, "Hello", num_samples=3, max_new_tokens=20)


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-3), ("bfloat16", 0.1)])
def test_hellaswag_costs_what_it_costs_the_simple_way(dtype, limit):
    model = make_model().to(DEVICE)
    examples = [hellaswag.render(example) for example in hellaswag.read_examples(EXAMPLES)[:50]]
    with train_gpt2.autocast(DEVICE, dtype):
        found = hellaswag.ending_losses(model, examples)  # (N, 4)
    for costs, example in zip(found, examples):
        tokens = example.tokens.to(DEVICE)
        mask = example.mask[:, 1:]
        with torch.no_grad():
            logits, _ = model(tokens[:, :-1])  # (4, T - 1, vocab_size)
        next_tokens = tokens[:, 1:].flatten()
        logits = logits.flatten(0, 1).float()
        each = F.cross_entropy(logits, next_tokens, reduction="none")
        each = each.view(mask.shape).cpu()
        expected = (each * mask).sum(dim=1) / mask.sum(dim=1)  # (4,)
        assert (costs - expected).abs().max() < limit


def test_gradients_in_a_process_group_are_those_without(tmp_path):
    (tmp_path / "probe.py").write_text(DDP_PROBE)
    env = environment(DEVICE=DEVICE.type, TORCHDYNAMO_DISABLE="0")
    done = subprocess.run([*TORCHRUN, "probe.py"], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "all is well" in done.stdout
    assert "barrier" not in done.stderr  # which warns when it has to guess the device


def test_torchrun_sigterm_resume_sample_and_hellaswag(small, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    words = flags(**SETTINGS | dict(
        max_steps=100_000, eval_interval=50_000, val_tokens=1000, sample_interval=50_000,
        hellaswag_interval=50_000, checkpoint_interval=50_000, compile=True, dtype="bfloat16"))
    with open(EXAMPLES, encoding="utf-8") as f:
        lines = f.readlines()[:20]
    (tmp_path / "hellaswag_val.jsonl").write_text("".join(lines), encoding="utf-8")
    env = environment(TORCHDYNAMO_DISABLE="0")

    def stopped(command):
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        out = ""
        for line in process.stdout:
            out += line
            if "| loss: " in line and out.count("| loss: ") == 5:
                process.terminate()
        _, errors = process.communicate(timeout=60)
        return process.returncode, out, errors

    # torchrun's own status is 1 after a signal.
    _, out, errors = stopped([*TORCHRUN, "probe.py", *words])
    assert re.search(r"stopped after \d+ of 100000 updates", out), errors
    assert re.search(r"HellaSwag: \d+ of 20 right", out)
    assert out.count("> Hello, I'm a language model,") == 4
    done_before = int(re.search(r"stopped after (\d+) of", out)[1])
    assert (tmp_path / "log" / f"model_{done_before:05d}.pt").exists()

    status, out, errors = stopped([sys.executable, "probe.py", "--resume"])
    assert status == 0, errors
    assert f"Going on after {done_before} of" in out

    device = ["--device", DEVICE.type]
    for command in (
        ["train_gpt2.py", "--sample", "Hello", "--max_new_tokens", "9", *device],
        ["hellaswag.py", "-m", "log", "--data", "hellaswag_val.jsonl", *device],
    ):
        done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], cwd=tmp_path,
                              env=env, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert "Hello" in done.stdout or "accuracy by" in done.stdout
