"""README keeps its word: the flags, files and steps that it names are there."""
import math
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import train_gpt2

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["train_gpt2.py", "fineweb.py", "hellaswag.py"])
def test_every_command_line_is_understood(script):
    help_text = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [line.split("#")[0] for line in README.splitlines() if f" {script} " in line + " " and line.startswith("    ")]
    assert lines
    for flag in re.findall(r" (--?[a-z_]+)", " ".join(line.split(script, 1)[1] for line in lines)):
        assert flag + " " in help_text.replace(",", " ")


@pytest.mark.parametrize("line", re.findall(r"^    ((?:torchrun|python) .*?train_gpt2\.py.*)", README + train_gpt2.__doc__, re.M))
def test_every_command_line_fits_its_number_of_processes(line, monkeypatch):
    monkeypatch.setattr(train_gpt2, "has_bfloat16", lambda device: True)  # would ask a GPU that isn't there
    words = shlex.split(line, comments=True)
    world = math.prod(int(n) for n in re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", line))
    cfg = train_gpt2.parse_flags(words[words.index("train_gpt2.py") + 1 :])
    if cfg.device != "cpu" and world > 1:  # the lecture's row
        device, cfg.data = torch.device("cuda"), str(ROOT)
    else:
        device, cfg.data = torch.device("cpu"), "input.txt"
    train_gpt2.check(train_gpt2.fill_defaults(cfg, device, world), world)


def test_every_flag_in_the_text_is_one():
    known = "".join((ROOT / name).read_text() for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py"))
    known += "--help --history --reverse --oneline --standalone --nproc_per_node --nnodes --rdzv_id --rdzv_backend --rdzv_endpoint "
    known += "--max-restarts --shutdown-timeout --signals-to-handle"
    for flag in re.findall(r"--(?:no-)?(\w[\w-]*)", README):
        assert re.search(rf"--{flag}\b|^    {flag}: |\"--{flag}\"", known, re.M), flag


def test_the_files_it_shows_are_there():
    for path in re.findall(r"\]\((assets/[^)]+)\)", README) + ["play.ipynb", "input.txt", "requirements.txt", "LICENSE"]:
        assert (ROOT / path).is_file(), path


def test_the_program_is_short_enough_to_be_read():
    assert len((ROOT / "train_gpt2.py").read_text(encoding="utf-8").splitlines()) < 700


def test_every_test_it_points_at_is_there():
    files = list((ROOT / "tests").glob("test_*.py"))
    known = [path.stem for path in files] + re.findall(r"^def (test_\w+)", "".join(map(Path.read_text, files)), re.M)
    named = re.findall(r"\btest_\w+", README)
    assert len(named) > 20
    for name in named:
        assert any(test.startswith(name) for test in known), name


def test_a_model_goes_to_hugging_face_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").mkdir()
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)  # biases too, which are 0 at first
    torch.save(dict(model=model.state_dict(), model_config=vars(model.config), train_config={}), "log/model_19073.pt")
    code = README.split("**In Hugging Face?**")[1].split("The tokenizer")[0].split("\n\n", 1)[1]
    exec(textwrap.dedent(code), {})
    idx = torch.randint(50257, (2, 16))
    again = train_gpt2.GPT.from_pretrained("my-gpt2")
    assert torch.allclose(again(idx)[0], model(idx)[0][:, :, :50257], atol=1e-5)


def test_the_steps_it_points_at_are_in_the_history():
    if not (ROOT / ".git").exists():
        pytest.skip("this tree has no git history")
    subjects = subprocess.run(["git", "log", "--format=%s"], cwd=ROOT, capture_output=True, text=True).stdout
    for step in re.findall(r"/\^(\d+\.\d+) ", README):
        assert re.search(rf"^{re.escape(step)} ", subjects, re.M), step


def test_the_table_has_each_row_of_the_benchmark():
    import bench

    table = README.split("`python tests/bench.py FILE.jsonl`")[1].split("## ")[0]
    assert len(re.findall(r"^\|.*\|$", table, re.M)) == 2 + len(bench.ROWS)
