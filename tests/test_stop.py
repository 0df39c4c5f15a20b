"""A run that is asked to stop, whose processes die, or become more or fewer, goes on as if nothing had happened."""
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
FLAGS = ("--data text.txt --model laptop --seq_len 16 --total_batch_size 64 --max_steps 40 --max_lr 1e-2 "
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


def heed_signals():
    """Undo in a process that starts what it would inherit: pytest-xdist ignores SIGINT, nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(folder, *flags, at="", processes=1, script="probe.py", patience=3, by=()):
    """Start a run in folder that, if by probe.py, waits within step `at`; torchrun has patience, s, with who is to end.

    by: words to put before the command, which then gets a session of its own.
    """
    (folder / "probe.py").write_text(PROBE)
    (folder / "text.txt").write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    torchrun = [*TORCHRUN, f"--nproc_per_node={processes}", f"--shutdown-timeout={patience}"]
    launcher = torchrun if processes > 1 else [sys.executable]
    env = dict(os.environ, PYTHONPATH=str(ROOT), AT=str(at), PYTHONUNBUFFERED="")  # empty: not so, as for most
    return subprocess.Popen([*by, *launcher, str(script), *FLAGS, *flags], cwd=folder, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=bool(by), preexec_fn=heed_signals)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def stop(folder, at, name, processes, *flags):
    """Start a run in folder and send it a signal within step `at`; return (its exit status, all that it printed)."""
    process = start(folder, *flags, at=at, processes=processes, patience=60)
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


def like(folder, log):
    """Tell whether the log in folder is log, but for differences below 1e-4."""
    ours, theirs = ([line.split() for line in text.splitlines()] for text in ((folder / "log" / "log.txt").read_text(), log))
    return len(ours) == len(theirs) and all(
        a[:2] == b[:2] and abs(float(a[2]) - float(b[2])) < 1e-4 for a, b in zip(ours, theirs))


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


def test_a_terminal_that_closes_leaves_no_trace(tmp_path, unbroken):
    here, there = os.openpty()
    terminal = os.ttyname(there)
    process = start(tmp_path, at=2, by=["sh", "-c", f'exec "$@" <{terminal} >{terminal} 2>&1', "sh"])
    wait_for(tmp_path / "waits_2_0", process)
    os.close(there)
    os.close(here)  # the system sends SIGHUP, and whoever prints now gets an error
    (tmp_path / "go_2").touch()
    assert process.wait(100) == 0
    assert sorted(path.name for path in tmp_path.glob("log/*.pt")) == ["model_00000.pt", "model_00003.pt"]
    # nohup has SIGHUP ignored; and who reads the pipe ends
    process = start(tmp_path, "--resume", at=5, by=["nohup"])
    wait_for(tmp_path / "waits_5_0", process)
    assert select.select([process.stdout], [], [], 10)[0]  # what is printed is there at once, not when a buffer is full
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    (tmp_path / "go_5").touch()
    assert process.wait(100) == 0
    assert (tmp_path / "log" / "log.txt").read_text() == unbroken[0]
    assert all(torch.equal(a, b) for a, b in zip(last_weights(tmp_path), unbroken[1]))


@pytest.mark.parametrize("script", ["train_gpt2.py", "hellaswag.py"])
def test_ctrl_c_before_the_first_step(tmp_path, script):
    (tmp_path / "probe.py").write_text(f"""
import runpy, time, torch

def wait(precision):
    open("waits", "w").close()
    time.sleep(100)

torch.set_float32_matmul_precision = wait  # called when the program gets ready
runpy.run_path("{ROOT / script}", run_name="__main__")
""")
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, "probe.py"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals)
    wait_for(tmp_path / "waits", process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100)[1] == "" and process.returncode == 130


def workers(process):
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout.split()]


def test_all_stop_when_one_is_asked(tmp_path):
    process = start(tmp_path, at=3, processes=2)
    wait_for(tmp_path / "waits_3_1", process)
    os.kill(workers(process)[1], signal.SIGTERM)
    (tmp_path / "go_3").touch()
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and re.search(r"\nstopped after [45] of 40 updates", out), out


def test_another_number_of_processes_goes_on(tmp_path, unbroken):
    stop(tmp_path, 9, "SIGTERM", 1)
    stop(tmp_path, 28, "SIGINT", 2, "--resume")
    out = start(tmp_path, "--resume").communicate(timeout=100)[0]
    assert "29 of 40 updates are done" in out and like(tmp_path, unbroken[0])
    config = torch.load(tmp_path / "log" / "model_00040.pt")["train_config"]  # what was left open stays open
    assert (config["batch_size"], config["dtype"], config["compile"]) == (None, "float32", None)


def test_torchrun_starts_a_killed_process_again(tmp_path, unbroken):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text("0 train 1.0\n")  # of another run, long ago
    process = start(tmp_path, "--checkpoint_interval", "5", at=12, processes=2)
    for rank in range(2):
        wait_for(tmp_path / f"waits_12_{rank}", process)
    os.kill(workers(process)[1], signal.SIGKILL)
    (tmp_path / "go_12").touch()
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and "going on from log/model_00010.pt: 10 of 40 updates are done" in out, out
    assert like(tmp_path, unbroken[0]) and (tmp_path / "log.1" / "log.txt").read_text() == "0 train 1.0\n"


def test_processes_that_find_different_checkpoints(tmp_path):
    stop(tmp_path, 9, "SIGTERM", 1)
    probe = "import os\nif os.environ['RANK'] == '1': os.chdir('other')\n" + PROBE
    (tmp_path / "probe2.py").write_text(probe)
    (tmp_path / "other" / "log").mkdir(parents=True)
    (tmp_path / "other" / "log" / "log.txt").touch()
    (tmp_path / "other" / "text.txt").write_text("word " * 9000)
    out = start(tmp_path, "--resume", processes=2, script="probe2.py").communicate(timeout=100)[0]
    assert "--resume: the processes find different checkpoints, after [10, -1] updates; share log among them" in out


def test_nobody_waits_for_ever(tmp_path):
    process = start(tmp_path, "--timeout_minutes", "0.05", "--max_steps", "100000", "--checkpoint_interval", "4",
                    processes=2, script=ROOT / "train_gpt2.py")
    wait_for(tmp_path / "log" / "model_00004.pt", process)
    hanging = workers(process)[1]
    os.kill(hanging, signal.SIGSTOP)
    out = ""
    for line in process.stdout:
        out += line
        if "waited for it in vain" in line:
            break
    process.send_signal(signal.SIGTERM)  # torchrun itself waits for the one that hangs
    os.kill(hanging, signal.SIGCONT)
    process.communicate()
    assert re.search(r"^train_gpt2\.py: a process died or hangs, and process 0 waited for it in vain; --resume goes on from "
                     r"the newest checkpoint \(.*\)$", out, re.M), out
