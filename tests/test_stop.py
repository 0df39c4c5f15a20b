"""A run that is asked to stop, whose processes die, or become more or fewer, goes on as if nothing
had happened."""
import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SHAPE, forkserver, heed_signals

import train_gpt2

context = forkserver()

TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1",
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
]
FLAGS = (
    "--data text.txt --model laptop --seq_len 16 --total_batch_size 64 --max_steps 40 "
    "--max_lr 1e-2 --warmup_steps 2 --dtype float32 --device cpu --eval_interval 10 "
    "--val_tokens 200 --sample_interval 0 --checkpoint_interval 20"
).split()
# A small model. Step AT begins only when the file go_AT is there, and with AT=evaluation so does
# the first batch of an evaluation. Each process notes that it ended well.
PROBE = f"SHAPE = {SHAPE}" + """
import os, sys, time, train_gpt2
train_gpt2.MODEL_SIZES["laptop"] = SHAPE
at, rank = os.environ["AT"], os.environ.get("RANK", 0)
get_lr, evaluate = train_gpt2.get_lr, train_gpt2.evaluate

def wait(place):
    if str(place) == at:
        open(f"waits_{at}_{rank}", "w").close()
        while not os.path.exists(f"go_{at}"):
            time.sleep(0.01)

def wait_in_step(step, cfg):
    wait(step)
    return get_lr(step, cfg)

def wait_in_evaluation(*args):
    wait("evaluation")
    return evaluate(*args)

train_gpt2.get_lr = wait_in_step
train_gpt2.evaluate = wait_in_evaluation
train_gpt2.fineweb.run_program(train_gpt2.command)
open(f"ended_{at}_{rank}", "w").close()
"""


def be_a_process(folder, words, at, rank, world, port, elsewhere):
    """Be one of the processes of a run in folder: what torchrun would start, without torchrun."""
    os.chdir(elsewhere or folder)
    sys.stdout = sys.stderr = open(folder / f"out_{at}_{rank}.txt", "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    heed_signals()
    os.environ["AT"] = str(at)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                          LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    sys.argv = ["probe.py", *FLAGS, *words]
    exec(PROBE, {})


class Run:
    """A run in a folder, of processes that are forked from one that has imported everything.

    They start at once, where torchrun takes ten seconds.
    """

    def __init__(self, folder, *words, at="", processes=1, elsewhere=(), only_last=()):
        write_text(folder)
        port = free_port()
        self.outs = [folder / f"out_{at}_{rank}.txt" for rank in range(processes)]
        self.processes = []
        for rank in range(processes):
            place = dict(elsewhere).get(rank)
            own = words + only_last if rank == processes - 1 else words
            args = (folder, own, at, rank, processes, port, place)
            self.processes.append(context.Process(target=be_a_process, args=args))
            self.processes[-1].start()

    def read(self):
        """Return what the processes have printed so far."""
        return "".join(out.read_text() for out in self.outs if out.exists())

    def poll(self):
        """Return None while they all run."""
        return next((p.exitcode for p in self.processes if p.exitcode is not None), None)

    def signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def end(self):
        """Wait for the end of all. Return (what they printed, their exit statuses)."""
        for process in self.processes:
            process.join(100)
        return self.read(), [process.exitcode for process in self.processes]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_text(folder):
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:20_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")


def start(folder, *flags, at="", processes=1, script="probe.py", patience=3, by=(),
          launcher=None):
    """Start a run in folder. With probe.py it waits in step `at`, or in an "evaluation".

    torchrun has patience, in seconds, with a process that is to end.
    by: words to put before the command, which then gets a session of its own.
    launcher: what starts the script; by default Python, or torchrun for several processes.
    """
    (folder / "probe.py").write_text(PROBE)
    write_text(folder)
    launcher = launcher or [sys.executable]
    if processes > 1:
        launcher = [*TORCHRUN, f"--nproc_per_node={processes}", f"--shutdown-timeout={patience}"]
    env = dict(os.environ, PYTHONPATH=str(ROOT), AT=str(at), PYTHONUNBUFFERED="",
               TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # as README says
    return subprocess.Popen([*by, *launcher, str(script), *FLAGS, *flags], cwd=folder, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=bool(by), preexec_fn=heed_signals)


def wait_for(path, process):
    """Wait for a file that process, a Run or a Popen, makes."""
    while not path.exists():
        if process.poll() is not None:
            pytest.fail(process.read() if isinstance(process, Run) else process.communicate()[0])
        time.sleep(0.01)


def workers(process):
    """Return the process ids of torchrun's workers."""
    done = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True)
    return [int(pid) for pid in done.stdout.split()]


def stop(folder, at, name, processes, *words):
    """Start a run in folder, send it a signal where it waits, and return its output."""
    run = Run(folder, *words, at=at, processes=processes)
    for rank in range(processes):
        wait_for(folder / f"waits_{at}_{rank}", run)
    run.signal(getattr(signal, name))
    while "asked to stop" not in run.read():  # the request has arrived
        assert run.poll() is None, run.read()
        time.sleep(0.01)
    (folder / f"go_{at}").touch()
    out, statuses = run.end()
    assert statuses == [0] * processes and "Traceback" not in out, out
    for rank in range(processes):
        assert (folder / f"ended_{at}_{rank}").exists(), out  # it ended well
    assert out.count("asked to stop") == 1
    done = re.search(r"^stopped after (\d+) of 40 updates.*--resume", out, re.M)
    assert done and f"saved log/model_{int(done[1]):05d}.pt\n" in out
    return out


def resume_here(folder, capsys):
    """Go on with the run in folder, in this process, to its end. Return what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(train_gpt2.MODEL_SIZES, "laptop", SHAPE)
        train_gpt2.launch(dict(device="cpu"), resume=True)
    return capsys.readouterr().out


def last_weights(folder):
    return list(torch.load(folder / "log" / "model_00040.pt")["model"].values())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return (the log, the weights, the folder) of the run that nobody stops, in this process."""
    folder = tmp_path_factory.mktemp("unbroken")
    write_text(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(train_gpt2.MODEL_SIZES, "laptop", SHAPE)
        train_gpt2.launch(train_gpt2.parse_flags(FLAGS)[0])
    return (folder / "log" / "log.txt").read_text(), last_weights(folder), folder


def equals(folder, unbroken):
    """Tell whether the run in folder left what the unbroken one did, to the last bit."""
    log, weights, _ = unbroken
    same_log = (folder / "log" / "log.txt").read_text() == log
    return same_log and all(map(torch.equal, last_weights(folder), weights))


def like(folder, log):
    """Tell whether the log in folder is log, but for differences below 1e-4."""
    ours = [line.split() for line in (folder / "log" / "log.txt").read_text().splitlines()]
    theirs = [line.split() for line in log.splitlines()]
    if [line[:2] for line in ours] != [line[:2] for line in theirs]:
        return False
    return all(abs(float(a[2]) - float(b[2])) < 1e-4 for a, b in zip(ours, theirs))


def test_a_signal_stops_the_run_and_leaves_no_trace(tmp_path, unbroken, capsys):
    out = stop(tmp_path, "evaluation", "SIGINT", 1)
    assert "stopped after 1 of 40" in out  # the evaluation is finished, and the update behind it
    out = resume_here(tmp_path, capsys)
    assert "after 1 of 40 updates" in out and equals(tmp_path, unbroken)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_each_of_these_signals_is_a_request(name, capfd):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    with contextlib.closing(train_gpt2.StopRequest()) as stop:
        stop.listen()
        assert not stop.is_requested()
        os.kill(os.getpid(), number)
        assert stop.is_requested()
    assert "asked to stop" in capfd.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, before)


def test_ctrl_c_twice_ends_at_once(tmp_path):
    run = Run(tmp_path, at=3)
    wait_for(tmp_path / "waits_3_0", run)
    run.signal(signal.SIGINT)
    time.sleep(1.2)
    assert run.poll() is None  # the step isn't done
    run.signal(signal.SIGINT)
    out, statuses = run.end()
    assert statuses == [130] and "Traceback" not in out


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


def test_ctrl_c_before_the_first_step(tmp_path):
    (tmp_path / "probe.py").write_text(f"""
import runpy, time, torch

def wait(precision):
    open("waits", "w").close()
    time.sleep(100)

torch.set_float32_matmul_precision = wait  # called when the program gets ready
runpy.run_path("{ROOT / 'train_gpt2.py'}", run_name="__main__")
""")
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, "probe.py"], cwd=tmp_path, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_signals)
    wait_for(tmp_path / "waits", process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100)[1] == "" and process.returncode == 130


def test_another_number_of_processes_goes_on(tmp_path, unbroken, capsys):
    # One process has done 20 updates when its machine fails.
    log = unbroken[2] / "log"
    (tmp_path / "log").mkdir()
    shutil.copy(log / "log.txt", tmp_path / "log")
    shutil.copy(log / "model_00020.pt", tmp_path / "log")

    run = Run(tmp_path, "--resume", at=25, processes=2)
    wait_for(tmp_path / "waits_25_1", run)
    os.kill(run.processes[1].pid, signal.SIGTERM)  # one is asked, and all stop
    (tmp_path / "go_25").touch()
    out, statuses = run.end()
    assert statuses == [0, 0] and re.search(r"^stopped after 2[67] of 40", out, re.M), out

    stop(tmp_path, 33, "SIGINT", 4, "--resume")
    out = resume_here(tmp_path, capsys)
    assert "after 34 of 40 updates" in out and like(tmp_path, unbroken[0])


def test_torchrun_starts_a_killed_process_again(tmp_path, unbroken):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text("0 train 1.0\n")  # of another run, long ago
    process = start(tmp_path, "--resume", "--checkpoint_interval", "5", at=12, processes=2)
    for rank in range(2):
        wait_for(tmp_path / f"waits_12_{rank}", process)
    os.kill(workers(process)[1], signal.SIGKILL)
    (tmp_path / "go_12").touch()
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and "after 10 of 40 updates" in out, out
    assert like(tmp_path, unbroken[0])
    assert (tmp_path / "log" / "log.1" / "log.txt").read_text() == "0 train 1.0\n"


def test_two_torchruns_start_a_killed_process_again(tmp_path, unbroken):
    """Two machines, as far as one can show them: each has a torchrun, and they meet by a port."""
    meet = ["--nnodes=2", "--rdzv_id=test", "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--max-restarts=3"]
    words = ["--resume", "--checkpoint_interval", "5"]
    agents = [start(tmp_path, *words, at=12, launcher=[*TORCHRUN[:3], *meet]) for _ in range(2)]
    for rank in range(2):
        wait_for(tmp_path / f"waits_12_{rank}", agents[0])
    os.kill(workers(agents[1])[0], signal.SIGKILL)
    (tmp_path / "go_12").touch()
    outs = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert "after 10 of 40 updates" in "".join(outs)
    assert like(tmp_path, unbroken[0])


def test_a_restart_without_resume_is_one_line(monkeypatch, fails):
    for name, value in dict(RANK=0, WORLD_SIZE=2, TORCHELASTIC_RESTART_COUNT=1).items():
        monkeypatch.setenv(name, str(value))
    assert "--resume" in fails(train_gpt2.launch, {})
    train_gpt2.check_torchrun(resume=True)


def test_processes_that_find_different_checkpoints(tmp_path, unbroken):
    for folder, checkpoints in ((tmp_path, (0, 20)), (tmp_path / "other", (0,))):
        (folder / "log").mkdir(parents=True)
        for number in checkpoints:
            name = f"log/model_{number:05d}.pt"
            os.link(unbroken[2] / name, folder / name)
    run = Run(tmp_path, "--resume", processes=2, elsewhere={1: tmp_path / "other"})
    out, statuses = run.end()
    assert statuses == [2, 2]
    assert re.search(r"^probe\.py: \[rank \d\] .*20.*--log_dir", out, re.M), out


def test_processes_with_different_settings(tmp_path):
    out, statuses = Run(tmp_path, processes=2, only_last=("--max_lr", "0.5")).end()
    assert statuses == [2, 2]
    assert re.search(r"^probe\.py: \[rank \d\] .*max_lr.*0\.5", out, re.M), out
    assert "| loss" not in out


def test_a_partner_that_does_not_come(tmp_path):
    run = Run(tmp_path, "--timeout_minutes", "0.03", processes=2)
    run.processes[1].kill()
    out, statuses = run.end()
    assert statuses[0] == 2 and "Traceback" not in out
    assert "waits for all 2 processes" in out
    assert re.search(r"^probe\.py: \[rank 0\] .*--timeout_minutes 0.03", out, re.M), out


def test_nobody_waits_for_ever(tmp_path):
    run = Run(tmp_path, "--timeout_minutes", "0.05", "--max_steps", "100000",
              "--checkpoint_interval", "4", processes=2)
    wait_for(tmp_path / "log" / "model_00004.pt", run)
    waiting, hanging = run.processes
    os.kill(hanging.pid, signal.SIGSTOP)
    waiting.join(60)
    assert waiting.exitcode not in (None, 0)  # the one that waits ends by itself
    hanging.kill()
    run.end()
