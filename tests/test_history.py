"""Replay the lecture: each step's `Run:` has to print what its `Expect:` says, in that step's tree.

    python -m pytest --history              # all steps
    python -m pytest --history -k "2.3"     # one step

Only first parents are followed: an older history that was merged in isn't replayed.
"""
import io
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading

import pytest
from conftest import ROOT, git

LIMIT = 300  # seconds that a command may take

# On Linux, unshare runs a command without a network. When the command is stopped, all processes
# that it started are killed.
ISOLATE = ["unshare", "--map-root-user", "--net", "--pid", "--kill-child", "--mount-proc"]

# There even 127.0.0.1 is down. Programs need it to talk to their own processes. This brings it up:
# the call SIOCSIFFLAGS (0x8914) gives the device "lo" the flags IFF_UP and IFF_RUNNING (0x41).
LOOPBACK_UP = (
    "import fcntl, socket, struct; "
    "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sH14x', b'lo', 0x41))"
)


def read_steps(root):
    """Return the lecture's steps, oldest first: [(sha, subject, [(command, regex), ...]), ...].

    A step is a commit whose subject begins with a number, as "2.3 ". Without a git history the list
    is empty.
    """
    if not (root / ".git").exists():
        return []
    log = git("log", "--first-parent", "--reverse", "--format=%H%n%B%x00",
              "--ignore-missing", "HEAD", cwd=root)  # HEAD is missing before the first commit
    steps = []
    for commit in log.decode().split("\0")[:-1]:
        sha, _, message = commit.strip("\n").partition("\n")
        subject = message.partition("\n")[0]
        if re.match(r"\d+\.\d+ ", subject):
            pairs = re.findall(r"^Run: (.+)\nExpect: (.+)$", message, re.M)
            steps.append((sha, subject, pairs))
    return steps


def can_isolate():
    """Return whether this system has unshare and allows it."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*ISOLATE, "true"], capture_output=True).returncode == 0


def offline(command):
    """Return the argv that runs a shell command, without internet if can_isolate()."""
    if not can_isolate():
        return ["sh", "-c", command]
    loopback_up = f"{shlex.quote(sys.executable)} -c {shlex.quote(LOOPBACK_UP)}"
    return [*ISOLATE, "sh", "-c", f"{loopback_up} || exit\n{command}"]


def kill_group(pid):
    """Kill the process that leads a group, and all others of the group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # the group has ended; macOS then raises PermissionError


def run_until(command, regex, cwd, limit):
    """Run a shell command in cwd until its output matches regex, or for limit seconds.

    Return (whether it matched, the output).
    """
    env = dict(os.environ, PYTHONUNBUFFERED="1", NO_COLOR="1")
    env["CUDA_VISIBLE_DEVICES"] = ""  # no NVIDIA GPU: the messages say what a CPU prints
    env.pop("TORCHDYNAMO_DISABLE", None)  # which is for the other tests
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]  # the same python
    output = ""
    matched = False
    with subprocess.Popen(offline(command), cwd=cwd, env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          start_new_session=True) as process:
        timer = threading.Timer(limit, kill_group, [process.pid])
        timer.start()
        try:
            for line in process.stdout:
                output += line.decode(errors="replace")
                matched = re.search(regex, output) is not None
                if matched:
                    break
        finally:
            timer.cancel()
            kill_group(process.pid)
    return matched, output


def replay(root, step, folder, limit=LIMIT):
    """Unpack a step's tree into folder and run its commands there.

    The test fails if one of them doesn't print what it should.
    """
    sha, subject, pairs = step
    assert pairs, f"{subject}: its message has no Run: with an Expect: in the next line"
    archive = git("archive", "--format=tar", sha, cwd=root)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
        tree.extractall(folder, filter="data")
    for command, regex in pairs:
        matched, output = run_until(command, regex, folder, limit)
        if not matched:
            pytest.fail(
                f"{subject}\nRun: {command}\nExpect: {regex}\nIts output has no such text. (It may "
                f"take {limit} seconds.) The output ends with:\n{output[-3000:]}",
                pytrace=False,
            )


STEPS = read_steps(ROOT)


@pytest.mark.history
def test_the_whole_history_is_here():
    assert (ROOT / ".git").exists(), "this folder has no git history; a clone has it"
    shallow = git("rev-parse", "--is-shallow-repository").strip() == b"true"
    assert not shallow, "this is a shallow clone; git fetch --unshallow brings the rest"


@pytest.mark.history
@pytest.mark.parametrize("step", STEPS, ids=[subject for _, subject, _ in STEPS])
def test_step(step, tmp_path):
    replay(ROOT, step, tmp_path)


@pytest.mark.history
def test_a_steps_tests_are_an_exercise(tmp_path):
    """README says how: they are red in the tree before the step, and green when it is written."""
    clone = tmp_path / "clone"
    git("clone", "-q", str(ROOT), str(clone))
    git("switch", "-q", "--detach", ":/^2.3 ", cwd=clone)
    git("checkout", "-q", ":/^2.4 ", "--", "tests", cwd=clone)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_data.py"]
    before = subprocess.run(command, cwd=clone, capture_output=True, text=True).stdout
    assert re.search(r"^\d+ failed, \d+ passed", before, re.M), before
    git("checkout", "-q", ":/^2.4 ", "--", "train_gpt2.py", cwd=clone)
    after = subprocess.run(command, cwd=clone, capture_output=True, text=True).stdout
    assert re.search(r"^\d+ passed", after, re.M), after


# The replay itself, on small histories that are made for it

MESSAGE = "{}\n\nRun: python hello.py\nExpect: {}"


def commit_hello(root, name, message):
    """Commit hello.py, a program that says hello to name."""
    (root / "hello.py").write_text(f"print('hello {name}')\n")
    git("add", ".", cwd=root)
    git("commit", "-q", "-m", message, cwd=root)


def test_each_step_runs_in_its_own_tree(repository, tmp_path):
    commit_hello(repository, "Ann", MESSAGE.format("0.1 a step", "hello Ann"))
    commit_hello(repository, "Bob", MESSAGE.format("1.1 a step", "hello Bob"))
    commit_hello(repository, "Cid", "edition: a commit that is no step")
    steps = read_steps(repository)
    assert [subject for _, subject, _ in steps] == ["0.1 a step", "1.1 a step"]
    for step in steps:
        folder = tmp_path / step[1]
        folder.mkdir()
        replay(repository, step, folder)


def test_a_step_that_prints_something_else_fails_and_is_named(repository, tmp_path):
    commit_hello(repository, "Ann", MESSAGE.format("0.1 a wrong step", "goodbye"))
    [step] = read_steps(repository)
    with pytest.raises(pytest.fail.Exception) as failure:
        replay(repository, step, tmp_path)
    for text in ("0.1 a wrong step", "python hello.py", "goodbye", "hello Ann"):
        assert text in str(failure.value)


def test_a_step_without_its_expect_fails_and_is_named(repository, tmp_path):
    commit_hello(repository, "Ann", "0.1 half a step\n\nRun: python hello.py")
    [step] = read_steps(repository)
    with pytest.raises(AssertionError, match=r"0\.1 half a step"):
        replay(repository, step, tmp_path)


def test_an_older_history_that_was_merged_is_not_replayed(repository):
    commit_hello(repository, "Ann", MESSAGE.format("1.1 an old step", "hello Ann"))
    git("branch", "old", cwd=repository)
    git("checkout", "-q", "--orphan", "new", cwd=repository)
    commit_hello(repository, "Bob", MESSAGE.format("0.1 a new step", "hello Bob"))
    git("merge", "-q", "-s", "ours", "--allow-unrelated-histories", "-m", "kept", "old",
        cwd=repository)
    steps = read_steps(repository)
    assert [subject for _, subject, _ in steps] == ["0.1 a new step"]


def test_where_there_is_no_history_there_are_no_steps(repository, tmp_path):
    assert read_steps(repository) == []  # nothing was committed yet
    assert read_steps(tmp_path) == []  # no repository


def test_a_hooks_variables_dont_lead_git_elsewhere(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert git("rev-parse", "--git-dir", cwd=repository) == b".git\n"


def test_a_command_is_stopped_at_the_match(tmp_path):
    assert run_until("seq 3", "2", tmp_path, limit=20) == (True, "1\n2\n")


def test_a_command_is_stopped_at_its_limit(tmp_path):
    assert run_until("sleep 600; echo ended", "ended", tmp_path, limit=0.1) == (False, "")


needs_unshare = pytest.mark.skipif(not can_isolate(), reason="needs Linux's unshare")


@needs_unshare
def test_a_command_reaches_its_own_loopback_and_nothing_outside(tmp_path):
    (tmp_path / "reach.py").write_text(
        "import socket, sys\n"
        "try:\n"
        "    socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "except ConnectionRefusedError:\n"
        "    print('refused')\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname())\n"
        "print('loopback')\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as outside:
        command = f"python reach.py {outside.getsockname()[1]}"
        matched, output = run_until(command, r"refused\s+loopback", tmp_path, limit=20)
    assert matched, output


@needs_unshare
def test_a_command_finds_its_own_processes_in_proc(tmp_path):
    (tmp_path / "find.py").write_text("import os; print(os.readlink('/proc/self'), os.getpid())\n")
    matched, output = run_until("python find.py", r"(\d+) \1\n", tmp_path, limit=20)
    assert matched, output


@needs_unshare
def test_nothing_outlives_a_command(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = "exec setsid sh -c 'echo started; sleep 600'"  # leaves the group, holds the pipe open
    matched, output = run_until(f"exec 3> pipe; {child}", "started", tmp_path, limit=20)
    assert matched, output
    closed, _, _ = select.select([reader], [], [], 20)  # the pipe closes when the child is dead
    assert closed == [reader]
    os.close(reader)
