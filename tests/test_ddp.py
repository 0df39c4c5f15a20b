"""Two processes under a real torchrun, on CPUs with Gloo, do what one process does."""
import os
import re
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = ("--data", os.path.join(ROOT, "input.txt"), "--model", "laptop", "--batch_size", "2", "--seq_len", "32",
         "--total_batch_size", "256", "--max_steps", "10", "--max_lr", "3e-3", "--warmup_steps", "2",
         "--dtype", "float32", "--device", "cpu", "--weight_decay", "0.1", "--eval_interval", "5", "--val_tokens", "1000",
         "--sample_interval", "0", "--hellaswag_interval", "10")
PROBE = """
import os, torch, train_gpt2
train_gpt2.SIZES["laptop"] = dict(n_layer=2, n_head=2, n_embd=32)
model = train_gpt2.main(train_gpt2.parse_flags())
torch.save(model.state_dict(), f"weights{os.environ.get('RANK', 'alone')}.pt")
"""


def torchrun(*command, cwd):
    """Run a script in two processes; return (both outputs as one text, the workers' exit statuses if any failed)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, *command], cwd=cwd, env=dict(os.environ, PYTHONPATH=ROOT), capture_output=True,
                          text=True, timeout=200)
    out = done.stdout + done.stderr
    return out, [int(status) for status in re.findall(r"exitcode +: (-?\d+)", out)]


def losses(out):
    return [float(loss) for loss in re.findall(r"^step +\d+ \| loss: (\d+\.\d{6})", out, re.M)]


def val_losses(out):
    return [float(loss) for loss in re.findall(r"val loss: (\d+\.\d{6})", out)]


def test_nothing_holds_the_process_group_at_the_end(tmp_path):
    (tmp_path / "probe.py").write_text(
        "import gc, torch.distributed as dist, train_gpt2\n"
        "destroy = dist.destroy_process_group\n"
        "def look_and_destroy():\n"
        "    print('DDP objects:', sum(type(o) is train_gpt2.DDP for o in gc.get_objects()))\n"
        "    destroy()\n"
        "dist.destroy_process_group = look_and_destroy\n"
        "train_gpt2.main(train_gpt2.parse_flags())\n")
    out, failed = torchrun("probe.py", *FLAGS, "--max_steps", "1", "--hellaswag_interval", "0", cwd=tmp_path)
    assert not failed and out.count("DDP objects: 0\n") == 2, out


def test_two_processes_train_like_one(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    with open(os.path.join(ROOT, "tests", "hellaswag.jsonl"), encoding="utf-8") as f:
        (tmp_path / "hellaswag_val.jsonl").write_text("".join(f.readlines()[:5]), encoding="utf-8")
    alone = subprocess.run([sys.executable, "probe.py", *FLAGS], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=ROOT),
                           capture_output=True, text=True, timeout=200).stdout
    together, failed = torchrun("probe.py", *FLAGS, cwd=tmp_path)
    assert not failed and "processes: 2" in together
    one, two = losses(alone), losses(together)
    assert len(one) == len(two) == 10  # and printed once, not by both
    assert max(abs(a - b) for a, b in zip(one, two)) < 1e-4
    # after 0 updates the weights are equal to the last bit, and so is the loss, whoever computed which batch
    assert val_losses(alone)[0] == val_losses(together)[0] and len(val_losses(alone)) == len(val_losses(together)) == 3
    assert max(abs(a - b) for a, b in zip(val_losses(alone), val_losses(together))) < 1e-4
    counts = [re.findall(r"HellaSwag: \d+ of 5 right", out) for out in (alone, together)]
    assert counts[0][0] == counts[1][0] and len(counts[0]) == len(counts[1]) == 2
    first, second = (torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lone = torch.load(tmp_path / "weightsalone.pt")
    assert all((first[name] - lone[name]).abs().max() < 1e-3 for name in first)
    assert not any("module." in name or "_orig_mod." in name for name in first)


def test_a_fault_of_one_process(tmp_path):
    (tmp_path / "probe.py").write_text("import os, train_gpt2\n"
                                       "if os.environ['RANK'] == '1': os.chdir('elsewhere')\n" + PROBE)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text.txt").write_text("word" + " word" * 2000)
    out, statuses = torchrun("probe.py", *FLAGS, "--data", "text.txt", cwd=tmp_path)
    assert 2 in statuses
    assert re.findall(r"^probe\.py: .*$", out, re.M) == [
        f"probe.py: --data text.txt: there is no such file or folder in {tmp_path}/elsewhere; start in the folder that holds it"]


@pytest.mark.parametrize("flags, line", [
    (["--max_step", "1"], "unrecognized arguments: --max_step 1"),
    (["--total_batch_size", "64"], "--total_batch_size 64 is not a multiple of batch_size x seq_len x processes = "
                                   "2 x 32 x 2; give another --batch_size, or none"),
    (["--data", "short.txt"], "72 tokens are there to train on, and one micro-batch of 2 x 32 for each of 2 process(es) "
                              "needs 129; lower --batch_size or --seq_len"),
])
def test_bad_input_ends_all_processes_with_one_line(tmp_path, flags, line):
    (tmp_path / "short.txt").write_text("word" + " word" * 79)
    out, statuses = torchrun(os.path.join(ROOT, "train_gpt2.py"), *FLAGS, *flags, cwd=tmp_path)
    assert statuses == [2, 2]
    assert re.findall(r"^train_gpt2\.py: .*$", out, re.M) == [f"train_gpt2.py: {line}"]
    assert "| loss" not in out
