"""Replay the history: every step's `Run:` must print what its `Expect:` says, from that very commit's tree.

    python -m pytest --history              # all of them, one after another
    python -m pytest --history -k "2.3"     # one
"""
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds a step
TWICE = ("6.12 fineweb.py goes on",)  # its kills, at random moments, now and then find the fault that an errata mended
# Commands run in a network of their own (Linux's unshare), where even loopback has to be switched on first, or, on
# other systems, behind proxies that nobody answers.
LOOPBACK_UP = (
    "import fcntl, socket, struct; s = socket.socket(); "
    "fcntl.ioctl(s, 0x8914, struct.pack('16sH14x', b'lo', 0x41))"  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
)


def git(*args, cwd=ROOT):
    return subprocess.run(("git", *args), cwd=cwd, check=True, capture_output=True).stdout


def read_steps(root):
    """Return ([(sha, subject, [(command, regex), ...]), ...] oldest first, None), or ([], why there are none)."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return [], "this tree has no git history"
    if git("rev-parse", "--is-shallow-repository", cwd=root).strip() == b"true":
        return [], "this is a shallow clone; git fetch --unshallow brings the history"
    steps = []
    for record in git("log", "--reverse", "--format=%H%n%B%x00", cwd=root).decode().split("\0")[:-1]:
        sha, subject, *body = record.strip("\n").split("\n")
        trailers = re.findall(r"^(Run|Expect): (.+)$", "\n".join(body), re.M)
        if trailers:
            kinds = [kind for kind, _ in trailers]
            assert kinds == ["Run", "Expect"] * (len(kinds) // 2), f"{subject}: trailers are {kinds}"
            texts = [text for _, text in trailers]
            steps.append((sha, subject, list(zip(texts[::2], texts[1::2]))))
    return steps, None


def offline(command):
    """Return (argv, extra environment) that run a shell command without a network."""
    if shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0:
        lo_up = f"{shlex.quote(sys.executable)} -c {shlex.quote(LOOPBACK_UP)}"
        return ["unshare", "-rn", "sh", "-c", f"{lo_up} && {command}"], {}
    nobody = "http://127.0.0.1:9"
    return ["sh", "-c", command], {name: nobody for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


def run_until(command, regex, cwd, limit, inductor_cache):
    """Run command in cwd until its output matches regex. Return (whether it did, the output)."""
    argv, extra = offline(command)
    env = dict(os.environ, PYTHONUNBUFFERED="1", TORCHINDUCTOR_CACHE_DIR=str(inductor_cache), **extra)
    env["CUDA_VISIBLE_DEVICES"] = ""  # the messages say what a CPU prints
    env.pop("TORCHDYNAMO_DISABLE", None)  # which is for the other tests
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]  # python means this one
    process = subprocess.Popen(argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)

    def kill():  # the whole group: torchrun has children
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    timer = threading.Timer(limit, kill)
    timer.start()
    output, matched = "", False
    for line in process.stdout:
        output += line.decode(errors="replace")
        if matched := bool(re.search(regex, output)):
            break
    timer.cancel()
    kill()
    process.stdout.close()
    process.wait()
    return matched, output


def replay(root, step, tmp_path, inductor_cache, limit=LIMIT):
    """Export step's tree into tmp_path and run its commands there; fail the test where one doesn't do as it says."""
    sha, subject, pairs = step
    with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", sha, cwd=root))) as tree:
        tree.extractall(tmp_path, filter="data")
    for command, regex in pairs:
        for _ in range(2 if subject in TWICE else 1):
            matched, output = run_until(command, regex, tmp_path, limit, inductor_cache)
            if matched:
                break
        else:
            pytest.fail(f"{subject}\nRun: {command}\nExpect: {regex}\nprinted no such thing within {limit} s. "
                        f"The end of what it printed:\n{output[-3000:]}", pytrace=False)


STEPS, WHY_NONE = read_steps(ROOT)
NONE = pytest.param(None, id="none", marks=pytest.mark.skip(reason=WHY_NONE or "no step has a Run: yet"))


@pytest.fixture(scope="session")
def inductor_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("inductor")


@pytest.mark.history
@pytest.mark.parametrize("step", [pytest.param(s, id=s[1]) for s in STEPS] or [NONE])
def test_step(step, tmp_path, inductor_cache):
    replay(ROOT, step, tmp_path, inductor_cache)


# The replay itself, on small histories made for it


@pytest.fixture
def make_history(tmp_path):
    """Return a function that makes a repository whose commits have the messages given; each holds hello.py."""
    def make(*messages):
        root = tmp_path / "repository"
        root.mkdir()
        git("init", "-q", cwd=root)
        for n, message in enumerate(messages):
            (root / "hello.py").write_text(f"import time\nprint('hello', {n}, flush=True)\ntime.sleep(60)\n")
            git("add", ".", cwd=root)
            git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", message, cwd=root)
        return root
    return make


def test_replay_runs_each_step_in_its_own_tree(make_history, tmp_path):
    trailers = "Run: python hello.py\nExpect: hello {}"
    root = make_history(*(f"1.{n + 1} a step\n\n" + trailers.format(n) for n in range(2)), "a note\n\nno trailers")
    steps, _ = read_steps(root)
    assert [subject for _, subject, _ in steps] == ["1.1 a step", "1.2 a step"]
    for n, step in enumerate(steps):  # hello.py sleeps for a minute after its line: a match has to stop it
        (tmp_path / str(n)).mkdir()
        replay(root, step, tmp_path / str(n), tmp_path, limit=20)


def test_replay_names_the_step_that_fails(make_history, tmp_path):
    root = make_history("1.1 a wrong step\n\nRun: python hello.py\nExpect: goodbye")
    with pytest.raises(pytest.fail.Exception, match=r"1\.1 a wrong step\nRun: python hello\.py\n[\s\S]*hello 0"):
        replay(root, read_steps(root)[0][0], tmp_path, tmp_path, limit=2)


def test_replay_tries_a_step_of_chance_twice(make_history, tmp_path, monkeypatch):
    command = "test -e mark && python hello.py; touch mark"  # the first time nothing, the second time hello
    root = make_history(f"1.1 a throw of dice\n\nRun: {command}\nExpect: hello")
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    with pytest.raises(pytest.fail.Exception):
        replay(root, read_steps(root)[0][0], tmp_path / "once", tmp_path, limit=20)
    monkeypatch.setattr("test_history.TWICE", ("1.1 a throw of dice",))
    replay(root, read_steps(root)[0][0], tmp_path / "twice", tmp_path, limit=20)


def test_replay_has_no_network_but_loopback(tmp_path):
    script = ("import socket, urllib.request as u\n"
              "server = socket.create_server(('127.0.0.1', 0))\n"
              "socket.create_connection(server.getsockname()); print('loopback')\n"
              "try: u.urlopen('http://pypi.org', timeout=5); print('reached it')\n"
              "except OSError: print('refused')\n")
    (tmp_path / "try.py").write_text(script)
    matched, output = run_until("python try.py", r"loopback\s+refused", tmp_path, 20, tmp_path)
    assert matched, output


def test_no_history_is_said(make_history, tmp_path):
    root = make_history("1.1 a step\n\nRun: python hello.py\nExpect: hello", "1.2 another\n\nRun: true\nExpect: x")
    git("clone", "-q", "--depth", "1", f"file://{root}", str(tmp_path / "shallow"))
    assert read_steps(tmp_path / "shallow") == ([], "this is a shallow clone; git fetch --unshallow brings the history")
    assert read_steps(tmp_path) == ([], "this tree has no git history")
