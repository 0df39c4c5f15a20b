"""Two processes under a real torchrun, on CPUs with Gloo, do what one process does."""
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import EXAMPLES, INPUT, ROOT, flags, losses, val_losses

SETTINGS = dict(data=INPUT, seq_len=32, total_batch_size=256, max_steps=10, max_lr=3e-3,
                warmup_steps=2, eval_interval=5, val_tokens=1000, hellaswag_interval=10)
PROBE = """
import os, torch, train_gpt2
train_gpt2.MODEL_SIZES["laptop"] = dict(n_layer=2, n_head=2, n_embd=32)
given, options = train_gpt2.parse_flags()
model = train_gpt2.main(given, options.resume)
torch.save(model.state_dict(), f"weights_{os.environ.get('RANK', 'alone')}.pt")
"""


@pytest.fixture
def start(tmp_path):
    """Return a function that runs a script in so many processes; (all output, exit statuses)."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")

    def start(script, processes, *words, before=""):
        (tmp_path / "probe.py").write_text(before + PROBE)
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone",
                        f"--nproc_per_node={processes}"]
        done = subprocess.run([*command, str(script), *words], cwd=tmp_path, env=env,
                              capture_output=True, text=True, timeout=200)
        out = done.stdout + done.stderr
        return out, [int(status) for status in re.findall(r"exitcode +: (-?\d+)", out)]
    return start


def difference(a, b):
    """Return the largest difference of two lists of numbers, given as text."""
    assert len(a) == len(b) > 0
    return max(abs(float(x) - float(y)) for x, y in zip(a, b))


def test_two_processes_train_like_one(start, tmp_path):
    with open(EXAMPLES, encoding="utf-8") as f:
        lines = f.readlines()[:5]
    (tmp_path / "hellaswag_val.jsonl").write_text("".join(lines), encoding="utf-8")
    alone, failed = start("probe.py", 1, *flags(**SETTINGS), "--log_dir", "alone")
    together, failed = start("probe.py", 2, *flags(**SETTINGS), "--log_dir", "together")
    assert not failed, together
    assert len(losses(together)) == 10  # printed once, not by both
    assert difference(losses(alone), losses(together)) < 1e-4
    # After 0 updates the weights are equal, and so is the loss, whoever computed which batch.
    assert val_losses(alone)[0] == val_losses(together)[0]
    assert difference(val_losses(alone), val_losses(together)) < 1e-4
    counts = [re.findall(r"HellaSwag: \d+ of 5 right", out) for out in (alone, together)]
    assert counts[0][0] == counts[1][0] and len(counts[0]) == len(counts[1]) == 2

    first, second, lone = (torch.load(tmp_path / f"weights_{rank}.pt") for rank in (0, 1, "alone"))
    for name in lone:
        assert torch.equal(first[name], second[name])
        assert (first[name] - lone[name]).abs().max() < 1e-3
    assert first.keys() == lone.keys()  # no module. and no _orig_mod. in front


def test_nothing_holds_the_process_group_at_the_end(start):
    look = (
        "import gc, torch.distributed as dist, train_gpt2\n"
        "destroy = dist.destroy_process_group\n"
        "def look_and_destroy():\n"
        "    count = sum(type(o) is train_gpt2.DDP for o in gc.get_objects())\n"
        "    print('DDP objects:', count, flush=True)\n"
        "    destroy()\n"
        "dist.destroy_process_group = look_and_destroy\n"
    )
    settings = SETTINGS | dict(max_steps=1, hellaswag_interval=0)
    out, failed = start("probe.py", 2, *flags(**settings), before=look)
    assert not failed and out.count("DDP objects: 0\n") == 2, out


def test_a_fault_of_one_process_names_it(start, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text.txt").write_text("word" + " word" * 2000)
    move = "import os\nif os.environ['RANK'] == '1': os.chdir('elsewhere')\n"
    settings = SETTINGS | dict(data="text.txt")
    out, statuses = start("probe.py", 2, *flags(**settings), before=move)
    assert 2 in statuses
    line, = re.findall(r"^probe\.py: .*$", out, re.M)
    assert "[rank 1]" in line and "--data text.txt" in line and "elsewhere" in line


def test_processes_with_different_data_are_refused(start, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text.txt").write_text("word" + " word" * 2000)
    (tmp_path / "elsewhere" / "text.txt").write_text("ward" + " ward" * 2000)
    move = "import os\nif os.environ['RANK'] == '1': os.chdir('elsewhere')\n"
    settings = SETTINGS | dict(data="text.txt", hellaswag_interval=0)
    out, statuses = start("probe.py", 2, *flags(**settings), before=move)
    assert 2 in statuses and "| loss" not in out
    assert re.search(r"^probe\.py: \[rank \d\] .*--data", out, re.M), out


@pytest.mark.parametrize("words, name", [
    (["--max_step", "1"], "--max_step"),
    (["--total_batch_size", "64"], "--total_batch_size"),
    (["--data", "short.txt"], "--data short.txt"),
])
def test_bad_input_is_named_and_nothing_is_trained(start, tmp_path, words, name):
    (tmp_path / "short.txt").write_text("word" + " word" * 79)
    settings = SETTINGS | dict(hellaswag_interval=0)
    out, statuses = start(ROOT / "train_gpt2.py", 2, *flags(**settings), *words)
    assert 2 in statuses and "| loss" not in out
    lines = re.findall(r"^train_gpt2\.py: \[rank \d\] .*$", out, re.M)
    assert lines and all(name in line for line in lines), out
