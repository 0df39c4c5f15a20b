"""pytest's set-up: --history, and a short way to run train_gpt2.py."""
import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fineweb

ROOT = Path(__file__).resolve().parent.parent
fineweb.gpt2_encoding = functools.cache(fineweb.gpt2_encoding)  # each test in this process would read it again

if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # tests in this process: half the time
    libc.mallopt(-4, 0)  # M_MMAP_MAX: glibc keeps large blocks, where each new one would come from the system,
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: empty, to be filled page by page


def pytest_addoption(parser):
    parser.addoption("--history", action="store_true", help="replay every step of the history, and nothing else")


os.environ["TORCHDYNAMO_DISABLE"] = "1"  # tiny runs would only wait for the compiler; tests that are about it turn it on

if "PYTEST_XDIST_WORKER" in os.environ:  # several tests run side by side, so each gets along with one thread
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_xdist_auto_num_workers(config):
    """Say how many tests run side by side; a step that is replayed wants the machine for itself."""
    return 0 if config.getoption("--history") else min(4, os.cpu_count())


def pytest_configure(config):
    config.addinivalue_line("markers", "history: replays a step of the history (minutes; only with --history)")


def pytest_collection_modifyitems(config, items):
    wanted = [item for item in items if ("history" in item.keywords) == config.getoption("--history")]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


@pytest.fixture
def run(tmp_path):
    """Return a function that runs this folder's train_gpt2.py in an empty folder and returns the finished process."""
    def run(*args, **kwargs):
        command = (sys.executable, str(ROOT / "train_gpt2.py"), *map(str, args))
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, **kwargs)
    return run


@pytest.fixture
def compiler(monkeypatch):
    """Let torch.compile compile, in this process and those that it starts."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """Be train_gpt2.py, whose name stands before an error, where a test doesn't say otherwise."""
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py"])


def damaged(data, cuts, flips):
    """Yield data, bytes, cut at so many places, and with so many bytes flipped, one at a time."""
    random = np.random.default_rng(0)
    for length in np.linspace(0, len(data) - 1, cuts, dtype=int):
        yield data[:length]
    for place in random.integers(len(data), size=flips):
        yield data[:place] + bytes([data[place] ^ int(random.integers(1, 256))]) + data[place + 1 :]
