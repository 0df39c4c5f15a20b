"""pytest's set-up: --history, and what several test files need."""
import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
INPUT = str(ROOT / "input.txt")
EXAMPLES = str(ROOT / "tests" / "hellaswag.jsonl")  # 200 in HellaSwag's format, of input.txt's lines

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # tiny runs would only wait for the compiler; tests that are about it turn it on

if "PYTEST_XDIST_WORKER" in os.environ:  # several tests run side by side, so each gets along with one thread
    os.environ["OMP_NUM_THREADS"] = "1"

if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # tests in this process: half the time
    libc.mallopt(-4, 0)  # M_MMAP_MAX: glibc keeps large blocks, where each new one would come from the system,
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: empty, to be filled page by page


def pytest_addoption(parser):
    parser.addoption("--history", action="store_true", help="replay the history, and nothing else")


def pytest_xdist_auto_num_workers():
    """Return how many processes share the tests."""
    return min(4, os.cpu_count() + 1)  # one more than cores, since some tests only wait


def pytest_collection_modifyitems(config, items):
    """Keep the steps of the history with --history, and all other tests without it."""
    replaying = config.getoption("--history")
    wanted = []
    others = []
    for item in items:
        is_step = item.get_closest_marker("history") is not None
        if is_step == replaying:
            wanted.append(item)
        else:
            others.append(item)
    config.hook.pytest_deselected(items=others)
    # The slowest file comes first, so that no process is left alone with it at the end.
    wanted.sort(key=lambda item: item.path.name != "test_stop.py")
    items[:] = wanted


def git(*args, cwd=ROOT):
    """Run a git command; return what it printed, as bytes.

    Git's hooks set variables such as GIT_DIR. They name another repository, so they are left out.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ("git", *args)
    return subprocess.run(command, cwd=cwd, env=env, check=True, stdout=subprocess.PIPE).stdout


@pytest.fixture
def repository(tmp_path):
    """Return the folder of a new git repository."""
    root = tmp_path / "repository"
    root.mkdir()
    git("init", "-q", cwd=root)
    git("config", "user.name", "a test", cwd=root)
    git("config", "user.email", "a.test@example.com", cwd=root)
    git("config", "commit.gpgsign", "false", cwd=root)
    return root


# A model and a run that are small enough for a test. SHAPE takes the place of the laptop's shape.
SHAPE = dict(n_layer=2, n_head=2, n_embd=16)
SMALL = dict(
    data="text.txt",
    model="laptop",
    batch_size=2,
    seq_len=16,
    total_batch_size=64,
    max_steps=6,
    max_lr=1e-2,
    warmup_steps=1,
    weight_decay=0.1,
    dtype="float32",
    device="cpu",
    eval_interval=0,
    sample_interval=0,
    checkpoint_interval=0,
    checkpoint_minutes=0.0,
)


def flags(**settings):
    """Return the command line for SMALL and settings, as a list of words."""
    words = []
    for name, value in (SMALL | settings).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def losses(out):
    """Return the training losses that a run printed, as text."""
    return re.findall(r"^step +\d+ \| loss: (\S+)", out, re.M)


def val_losses(out):
    """Return the validation losses that a run printed, as text."""
    return re.findall(r"^step +\d+ \| val loss: (\S+)", out, re.M)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Be in an empty folder with text.txt, 20,000 letters, and have the laptop's model be tiny."""
    import train_gpt2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_gpt2.MODEL_SIZES, "laptop", SHAPE)
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:20_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")


@pytest.fixture
def train(small, capsys):
    """Return a function that trains in this process: (the model, all that was printed).

    Its keyword arguments are settings, beside those of SMALL. With resume=True they stand alone.
    What differs between equal runs, the times, is left out of the text.
    """
    import train_gpt2

    def train(resume=False, **settings):
        capsys.readouterr()
        model = train_gpt2.launch(settings if resume else SMALL | settings, resume)
        out = capsys.readouterr().out
        return model, re.sub(r"dt: [^\n]*", "", out)
    return train


@pytest.fixture
def fails():
    """Return a function that calls another one, which has to raise UserError; it returns the line."""
    import fineweb

    def fails(function, *args, **kwargs):
        with pytest.raises(fineweb.UserError) as error:
            function(*args, **kwargs)
        message = str(error.value)
        assert "\n" not in message and len(message) < 400
        return message
    return fails


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a program of ours in an empty folder; the finished process."""
    def run(*args, script="train_gpt2.py", **kwargs):
        command = (sys.executable, str(ROOT / script), *map(str, args))
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200,
                              **kwargs)
    return run


@pytest.fixture
def compiler(monkeypatch):
    """Let torch.compile compile, in this process and those that it starts."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")


def heed_signals():
    """Undo what a process would inherit: a shell's & ignores SIGINT, nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def forkserver():
    """Return what starts processes by forking one that has imported what a run needs.

    A start takes no time then. AdamW would import torch._dynamo.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_gpt2", "torch._dynamo"])
    return context


def damaged(data, cuts, flips):
    """Yield data, bytes, cut at so many places, and with so many bytes flipped, one at a time."""
    random = np.random.default_rng(0)
    for length in np.linspace(0, len(data) - 1, cuts, dtype=int):
        yield data[:length]
    for place in random.integers(len(data), size=flips):
        yield data[:place] + bytes([data[place] ^ int(random.integers(1, 256))]) + data[place + 1 :]
