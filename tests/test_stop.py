"""A run that is asked to stop, whose processes die, or become more or fewer, goes on as if nothing
had happened."""
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1",
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
]
FLAGS = (
    "--data text.txt --model laptop --seq_len 16 --total_batch_size 64 --max_steps 40 "
    "--max_lr 1e-2 --warmup_steps 2 --dtype float32 --device cpu --eval_interval 10 "
    "--val_tokens 200 --sample_interval 0 --checkpoint_interval 20"
).split()
# A small model. Step AT begins only when the file go_AT is there. With SLOW each batch of an
# evaluation takes that many seconds. Each process notes how it ended.
PROBE = """
import os, time, torch, train_gpt2
train_gpt2.MODEL_SIZES["laptop"] = dict(n_layer=2, n_head=2, n_embd=16)
at, slow, rank = os.environ.get("AT"), os.environ.get("SLOW"), os.environ.get("RANK", 0)
get_lr, forward = train_gpt2.get_lr, train_gpt2.GPT.forward

def wait_in_step(step, cfg):
    if str(step) == at:
        open(f"waits_{at}_{rank}", "w").close()
        while not os.path.exists(f"go_{at}"):
            time.sleep(0.01)
    return get_lr(step, cfg)

def slow_forward(self, idx, targets=None):
    if slow and not torch.is_grad_enabled():
        open(f"evaluates_{rank}", "w").close()
        time.sleep(float(slow))
    return forward(self, idx, targets)

train_gpt2.get_lr = wait_in_step
train_gpt2.GPT.forward = slow_forward
given, options = train_gpt2.parse_flags()
train_gpt2.main(given, options.resume)
open(f"ended_{at}_{rank}", "w").close()
"""


def heed_signals():
    """Undo what a process would inherit: pytest-xdist ignores SIGINT, nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(folder, *flags, at="", slow="", processes=1, script="probe.py", patience=3, by=()):
    """Start a run in folder. With probe.py it waits within step `at`.

    torchrun has patience, in seconds, with a process that is to end.
    by: words to put before the command, which then gets a session of its own.
    """
    (folder / "probe.py").write_text(PROBE)
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:20_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    launcher = [sys.executable]
    if processes > 1:
        launcher = [*TORCHRUN, f"--nproc_per_node={processes}", f"--shutdown-timeout={patience}"]
    env = dict(os.environ, PYTHONPATH=str(ROOT), AT=str(at), SLOW=str(slow), PYTHONUNBUFFERED="")
    return subprocess.Popen([*by, *launcher, str(script), *FLAGS, *flags], cwd=folder, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=bool(by), preexec_fn=heed_signals)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def workers(process):
    """Return the process ids of torchrun's workers."""
    done = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True)
    return [int(pid) for pid in done.stdout.split()]


def stop(folder, at, name, processes, *flags):
    """Start a run in folder and send it a signal within step `at`; (its status, its output)."""
    process = start(folder, *flags, at=at, processes=processes, patience=60)
    for rank in range(processes):
        wait_for(folder / f"waits_{at}_{rank}", process)
    process.send_signal(getattr(signal, name))
    time.sleep(0.5)  # torchrun passes it on
    (folder / f"go_{at}").touch()
    out = process.communicate(timeout=100)[0]
    for rank in range(processes):
        assert (folder / f"ended_{at}_{rank}").exists(), out  # it ended with status 0
    assert out.count("asked to stop") == 1  # it says that the request has arrived
    assert f"saved log/model_{at + 1:05d}.pt\n" in out
    assert re.search(rf"^stopped after {at + 1} of 40 updates.*--resume", out, re.M), out
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


def equals(folder, unbroken):
    """Tell whether the run in folder left what the unbroken one did, to the last bit."""
    log, weights = unbroken
    same_log = (folder / "log" / "log.txt").read_text() == log
    return same_log and all(map(torch.equal, last_weights(folder), weights))


def like(folder, log):
    """Tell whether the log in folder is log, but for differences below 1e-4."""
    ours = [line.split() for line in (folder / "log" / "log.txt").read_text().splitlines()]
    theirs = [line.split() for line in log.splitlines()]
    if [line[:2] for line in ours] != [line[:2] for line in theirs]:
        return False
    return all(abs(float(a[2]) - float(b[2])) < 1e-4 for a, b in zip(ours, theirs))


def test_each_signal_stops_the_run_and_leaves_no_trace(tmp_path, unbroken):
    stops = ((5, "SIGTERM", []), (19, "SIGINT", ["--resume"]), (28, "SIGUSR1", ["--resume"]))
    for at, name, flags in stops:
        status, out = stop(tmp_path, at, name, 1, *flags)
        assert status == 0 and "Traceback" not in out
    out = start(tmp_path, "--resume").communicate(timeout=100)[0]
    assert "after 29 of 40 updates" in out and equals(tmp_path, unbroken)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_during_an_evaluation_is_heeded_within_a_batch(tmp_path, unbroken, processes):
    # 200 tokens in 12 batches of 16 take 36 seconds, or 18 in two processes
    process = start(tmp_path, "--batch_size", "1", slow=3, processes=processes, patience=60)
    for rank in range(processes):
        wait_for(tmp_path / f"evaluates_{rank}", process)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=100)[0]
    assert time.monotonic() - begin < 12, out
    assert "stopped after 0 of 40 updates" in out and "| loss" not in out
    for rank in range(processes):
        assert (tmp_path / f"ended__{rank}").exists(), out
    if processes == 1:
        out = start(tmp_path, "--resume", "--batch_size", "4").communicate(timeout=100)[0]
        assert equals(tmp_path, unbroken), out


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
    shell = ["sh", "-c", f'exec "$@" <{terminal} >{terminal} 2>&1', "sh"]
    process = start(tmp_path, at=2, by=shell)
    wait_for(tmp_path / "waits_2_0", process)
    os.close(there)
    os.close(here)  # the system sends SIGHUP, and whoever prints now gets an error
    (tmp_path / "go_2").touch()
    assert process.wait(100) == 0
    assert (tmp_path / "log" / "model_00003.pt").exists()
    # nohup has SIGHUP ignored; and the reader of the pipe ends
    process = start(tmp_path, "--resume", at=5, by=["nohup"])
    wait_for(tmp_path / "waits_5_0", process)
    assert select.select([process.stdout], [], [], 10)[0]  # what is printed is there at once
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    (tmp_path / "go_5").touch()
    assert process.wait(100) == 0 and equals(tmp_path, unbroken)


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
    process = subprocess.Popen([sys.executable, "probe.py"], cwd=tmp_path, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_signals)
    wait_for(tmp_path / "waits", process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100)[1] == "" and process.returncode == 130


def test_all_stop_when_one_is_asked(tmp_path):
    process = start(tmp_path, at=3, processes=2)
    wait_for(tmp_path / "waits_3_1", process)
    os.kill(workers(process)[1], signal.SIGTERM)
    (tmp_path / "go_3").touch()
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and re.search(r"^stopped after [45] of 40", out, re.M), out


def test_another_number_of_processes_goes_on(tmp_path, unbroken):
    stop(tmp_path, 9, "SIGTERM", 1)
    stop(tmp_path, 17, "SIGINT", 2, "--resume")
    stop(tmp_path, 28, "SIGTERM", 4, "--resume")
    out = start(tmp_path, "--resume").communicate(timeout=100)[0]
    assert "after 29 of 40 updates" in out and like(tmp_path, unbroken[0])
    # What the machine decides, and wasn't given, is decided anew each time.
    config = torch.load(tmp_path / "log" / "model_00040.pt")["train_config"]
    assert config["dtype"] == "float32" and "batch_size" not in config


def test_torchrun_starts_a_killed_process_again(tmp_path, unbroken):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text("0 train 1.0\n")  # of another run, long ago
    process = start(tmp_path, "--checkpoint_interval", "5", at=12, processes=2)
    for rank in range(2):
        wait_for(tmp_path / f"waits_12_{rank}", process)
    os.kill(workers(process)[1], signal.SIGKILL)
    (tmp_path / "go_12").touch()
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and "after 10 of 40 updates" in out, out
    assert like(tmp_path, unbroken[0])
    assert (tmp_path / "log" / "log.1" / "log.txt").read_text() == "0 train 1.0\n"


def test_processes_that_find_different_checkpoints(tmp_path):
    stop(tmp_path, 9, "SIGTERM", 1)
    (tmp_path / "other" / "log").mkdir(parents=True)
    os.link(tmp_path / "log" / "model_00000.pt", tmp_path / "other" / "log" / "model_00000.pt")
    os.link(tmp_path / "text.txt", tmp_path / "other" / "text.txt")
    move = "import os\nif os.environ['RANK'] == '1': os.chdir('other')\n"
    (tmp_path / "probe2.py").write_text(move + PROBE)
    process = start(tmp_path, "--resume", processes=2, script="probe2.py")
    out = process.communicate(timeout=100)[0]
    assert re.search(r"^probe2\.py: \[rank \d\] .*10.*--log_dir", out, re.M), out


def test_nobody_waits_for_ever(tmp_path):
    process = start(tmp_path, "--timeout_minutes", "0.05", "--max_steps", "100000",
                    "--checkpoint_interval", "4", processes=2, script=ROOT / "train_gpt2.py")
    wait_for(tmp_path / "log" / "model_00004.pt", process)
    waiting, hanging = workers(process)
    os.kill(hanging, signal.SIGSTOP)
    for _ in range(600):  # the one that waits ends by itself
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(waiting)], capture_output=True)
        if state.stdout.strip()[:1] in (b"", b"Z"):
            break
        time.sleep(0.1)
    else:
        pytest.fail("it still waits")
    process.send_signal(signal.SIGTERM)  # torchrun itself waits for the one that hangs
    os.kill(hanging, signal.SIGCONT)
    process.communicate()
    assert process.returncode != 0
