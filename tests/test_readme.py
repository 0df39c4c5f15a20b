"""README keeps its word: the flags, files, tests and steps that it names are there."""
import math
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ["train_gpt2.py", "fineweb.py", "hellaswag.py"]
COMMANDS = re.findall(r"^    ((?:torchrun|python) .*)", README + train_gpt2.__doc__, re.M)


def words_of(command):
    """Return the words of a command line, without the comment behind it."""
    return shlex.split(command, comments=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_of_a_command_is_in_the_programs_help(program):
    done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    commands = [words_of(line) for line in COMMANDS if program in words_of(line)]
    assert commands
    for words in commands:
        for word in words[words.index(program) + 1 :]:
            if word.startswith("-"):
                assert re.search(rf"{word}\b", done.stdout), word


@pytest.mark.parametrize("line", [
    line for line in COMMANDS if "train_gpt2.py" in line and "--help" not in line
])
def test_every_command_has_settings_that_fit_its_number_of_processes(line, monkeypatch):
    words = words_of(line)
    given, _ = train_gpt2.parse_flags(words[words.index("train_gpt2.py") + 1 :])
    numbers = re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", line)
    world = math.prod(int(number) for number in numbers)
    gpu = torch.device("cuda", 0)
    device = torch.device("cpu") if given.get("device") == "cpu" else gpu
    memory = type("Properties", (), dict(total_memory=80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    given.setdefault("data", str(ROOT) if device == gpu else "input.txt")  # a folder: shards
    cfg = train_gpt2.choose_config(given, None, device)
    T = cfg.seq_len or 1024
    shape = train_gpt2.MODEL_SIZES[cfg.model]
    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=T, **shape))
    B = train_gpt2.fitting_batch_size(model, T, cfg.total_batch_size, "bfloat16", device, world)
    train_gpt2.check_batch(model, B, T, cfg.total_batch_size, world)


def test_every_flag_in_the_text_is_one():
    known = "".join((ROOT / name).read_text(encoding="utf-8") for name in PROGRAMS)
    git_and_torchrun = {
        "detach", "help", "history", "first-parent", "reverse", "oneline",
        "standalone", "nproc_per_node", "nnodes", "rdzv_id", "rdzv_backend", "rdzv_endpoint",
        "max-restarts", "shutdown-timeout", "signals-to-handle",
    }
    for flag in re.findall(r"(?<=[ `])--(?:no-)?(\w[\w-]*)", README):
        is_ours = re.search(rf"^    {flag}: |\"--{flag}\"", known, re.M)
        assert is_ours or flag in git_and_torchrun, flag


def test_the_files_it_shows_are_there():
    names = re.findall(r"\]\((assets/[^)]+)\)", README)
    for name in [*names, "play.ipynb", "input.txt", "requirements.txt", "LICENSE", *PROGRAMS]:
        assert (ROOT / name).is_file(), name


def test_every_test_it_points_at_is_there():
    files = list((ROOT / "tests").glob("test_*.py"))
    known = [path.stem for path in files]
    for path in files:
        known += re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    named = re.findall(r"\btest_\w+", README)
    assert len(named) > 20
    for name in named:
        assert any(test.startswith(name) for test in known), name


def test_the_steps_it_points_at_are_in_the_history():
    if not (ROOT / ".git").exists():
        pytest.skip("this tree has no git history")
    done = subprocess.run(["git", "log", "--format=%s"], cwd=ROOT, capture_output=True, text=True)
    for step in re.findall(r"/\^(\d+\.\d+) ", README):
        assert re.search(rf"^{re.escape(step)} ", done.stdout, re.M), step
