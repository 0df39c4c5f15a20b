"""A run that is asked to stop ends its step, saves it, and goes on when it is told to."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
FLAGS = ("--data text.txt --model laptop --batch_size 1 --seq_len 16 --total_batch_size 64 --max_steps 40 --max_lr 1e-2 "
         "--dtype float32 --device cpu --eval_interval 10 --val_tokens 200 --sample_interval 0 "
         "--checkpoint_interval 20").split()
# a small model, whose step AT lasts until the file go_AT is there; and every process notes how it ended
PROBE = """
import os, time, train_gpt2
train_gpt2.SIZES["laptop"] = dict(n_layer=2, n_head=2, n_embd=16)
at, rank = os.environ.get("AT"), os.environ.get("RANK", 0)
accumulate_gradients = train_gpt2.accumulate_gradients

def slowly(model, loader, *args):
    if at and loader.position == 64 * int(at):
        open(f"waits_{at}_{rank}", "w").close()
        while not os.path.exists(f"go_{at}"):
            time.sleep(0.01)
    return accumulate_gradients(model, loader, *args)

train_gpt2.accumulate_gradients = slowly
train_gpt2.main(train_gpt2.parse_flags())
open(f"ended_{at}_{rank}", "w").close()
"""


def start(folder, *flags, at="", processes=1, script="probe.py"):
    """Start a run in folder that, if by probe.py, waits within step `at`."""
    (folder / "probe.py").write_text(PROBE)
    (folder / "text.txt").write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    launcher = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    env = dict(os.environ, PYTHONPATH=str(ROOT), AT=str(at))
    return subprocess.Popen([*launcher, str(script), *FLAGS, *flags], cwd=folder, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def stop(folder, at, name, processes, *flags):
    """Start a run in folder and send it a signal within step `at`; return (its exit status, all that it printed)."""
    process = start(folder, *flags, at=at, processes=processes)
    for rank in range(processes):
        wait_for(folder / f"waits_{at}_{rank}", process)
    process.send_signal(getattr(signal, name))
    time.sleep(0.5)  # torchrun passes it on
    (folder / f"go_{at}").touch()
    out = process.communicate(timeout=100)[0]
    assert all((folder / f"ended_{at}_{rank}").exists() for rank in range(processes)), out  # each with status 0, so
    saved = f"step {at + 1:5d} | saved log/model_{at + 1:05d}.pt\n"
    assert out.count(f"{saved}stopped after {at + 1} of 40 updates; --resume goes on\n") == 1
    return process.returncode, out


def last_weights(folder):
    return list(torch.load(folder / "log" / "model_00040.pt")["model"].values())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return (the log, the weights) of the run that nobody stops."""
    folder = tmp_path_factory.mktemp("unbroken")
    out = start(folder).communicate(timeout=100)[0]
    assert "step    39" in out, out
    return (folder / "log" / "log.txt").read_text(), last_weights(folder)


def test_each_signal_stops_the_run_and_leaves_no_trace(tmp_path, unbroken):
    for at, name, flags in ((5, "SIGTERM", []), (19, "SIGINT", ["--resume"]), (28, "SIGUSR1", ["--resume"])):
        status, out = stop(tmp_path, at, name, 1, *flags)
        assert status == 0 and "Traceback" not in out
    out = start(tmp_path, "--resume").communicate(timeout=100)[0]
    assert "going on from log/model_00029.pt: 29 of 40 updates are done" in out
    assert (tmp_path / "log" / "log.txt").read_text() == unbroken[0]
    assert all(torch.equal(a, b) for a, b in zip(last_weights(tmp_path), unbroken[1]))


def test_ctrl_c_twice_ends_at_once(tmp_path):
    process = start(tmp_path, at=3)
    wait_for(tmp_path / "waits_3_0", process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None  # the step isn't done
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert "Traceback" not in process.stdout.read()


def workers(process):
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout.split()]


def test_all_stop_when_one_is_asked(tmp_path):
    process = start(tmp_path, at=3, processes=2)
    wait_for(tmp_path / "waits_3_1", process)
    os.kill(workers(process)[1], signal.SIGTERM)
    (tmp_path / "go_3").touch()
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and re.search(r"\nstopped after [45] of 40 updates", out), out
