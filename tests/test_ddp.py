"""Two processes under a real torchrun, on CPUs with Gloo, do what one process does."""
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import EXAMPLES, INPUT, ROOT, flags, losses, val_losses

SETTINGS = dict(data=INPUT, seq_len=128, total_batch_size=512, max_steps=8, max_lr=3e-3,
                warmup_steps=2, eval_interval=4, val_tokens=1000, hellaswag_interval=8)
PROBE = """
import os, torch, train_gpt2
train_gpt2.MODEL_SIZES["laptop"] = dict(n_layer=2, n_head=2, n_embd=32)
launch = train_gpt2.launch

def launch_and_keep(given, resume):
    model = launch(given, resume)
    torch.save(model.state_dict(), f"weights_{os.environ.get('RANK', 'alone')}.pt")

train_gpt2.launch = launch_and_keep
train_gpt2.fineweb.run_program(train_gpt2.command)
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
    assert len(losses(together)) == 8  # printed once, not by both
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
