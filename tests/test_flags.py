"""The command line: what is asked for is done. What can't be done is said in one line, status 2."""
import io
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, flags

import fineweb
import train_gpt2
from train_gpt2 import TrainConfig, parse_flags


@pytest.fixture
def start(monkeypatch):
    """Return a function that does what `python train_gpt2.py WORDS` does, in this process."""
    def start(words):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *words])
        train_gpt2.command()
    return start


def test_every_setting_is_a_flag():
    given, options = parse_flags([])
    assert given == {} and not options.resume
    words = "--max_lr 1e-3 --batch_size 8 --no-compile --dtype float32 --resume"
    given, options = parse_flags(words.split())
    assert given == dict(max_lr=1e-3, batch_size=8, compile=False, dtype="float32")
    assert options.resume
    no_default = dict(device="cpu", dtype="bfloat16", batch_size=3)
    for field in fields(TrainConfig):
        value = no_default.get(field.name, field.default)
        words = [f"--{field.name}", str(value)]
        if field.type is bool:
            value = True
            words = [f"--{field.name}"]
        assert parse_flags(words)[0] == {field.name: value}


def test_help_explains_each_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse_flags(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(TrainConfig):
        assert f"--{field.name}" in text
        assert f"{field.metadata['meaning']} [" in text
        if field.default is not None:
            assert f"{field.metadata['meaning']} [{field.default}]" in text
        for choice in field.metadata["choices"] or ():
            assert choice in text
    for preset, changes in train_gpt2.PRESETS.items():
        assert f" {preset} " in text
        for name, value in changes.items():
            assert f"{name} {value}" in text


# What each way to start means. The rest of TrainConfig's defaults is that of GPT-2 (124M).
LAPTOP = dict(seq_len=64, total_batch_size=1024, max_lr=6e-3, weight_decay=0.8, max_steps=850,
              warmup_steps=300, hellaswag_interval=0)
GPT2 = dict(seq_len=1024, total_batch_size=524288, max_lr=6e-4, weight_decay=0.1,
            max_steps=19073, warmup_steps=715, hellaswag_interval=250)


@pytest.mark.parametrize("words, gpu, shards, expected", [
    ("", False, False, LAPTOP | dict(model="laptop", data="input.txt")),
    ("", False, True, LAPTOP | dict(model="laptop", data="edu_fineweb10B")),
    ("", True, False, LAPTOP | dict(model="laptop", data="input.txt")),
    ("", True, True, GPT2 | dict(model="gpt2", data="edu_fineweb10B")),
    ("--device cpu", True, True, LAPTOP | dict(model="laptop", data="edu_fineweb10B")),
    ("--data my.txt", True, True, LAPTOP | dict(model="laptop", data="my.txt")),
    ("--max_lr 1e-3", True, True, GPT2 | dict(max_lr=1e-3)),
    ("--model gpt2", False, False, GPT2 | dict(data="input.txt")),
    ("--model gpt2", False, True, GPT2 | dict(data="edu_fineweb10B")),
    ("--model gpt2", True, False, GPT2 | dict(data="input.txt")),
    ("--model gpt2", True, True, GPT2 | dict(data="edu_fineweb10B")),
])
def test_the_settings_of_each_way_to_start(tmp_path, monkeypatch, capsys, words, gpu, shards,
                                           expected):
    monkeypatch.chdir(tmp_path)
    if shards:
        (tmp_path / "edu_fineweb10B").mkdir()
        (tmp_path / "edu_fineweb10B" / fineweb.shard_name(1)).touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    given, _ = parse_flags(words.split())
    device = train_gpt2.pick_device(given.get("device"))
    cfg = train_gpt2.choose_config(given, None, device)
    for name, value in expected.items():
        assert getattr(cfg, name) == value, name
    for name in ("dtype", "compile", "batch_size"):  # the machine decides
        assert getattr(cfg, name) is None
    # Without the shards it says what it does instead.
    instead = not shards and "data" not in given
    out = capsys.readouterr().out
    assert ("edu_fineweb10B" in out and "input.txt" in out) == instead
    assert out.count("\n") == instead


def test_flags_reach_the_run(small, start, capsys):
    start(flags(max_steps=3, max_lr=2e-3))
    out = capsys.readouterr().out
    assert out.count("| loss: ") == 3 and "lr 2.0000e-03" in out
    assert "2 micro-batches of 2 x 16 tokens" in out


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    given, _ = parse_flags(["--data=~/a.txt", "--log_dir=~/runs/a"])
    found = {name: os.path.normpath(path) for name, path in given.items()}
    assert found == dict(data=str(tmp_path / "a.txt"), log_dir=str(tmp_path / "runs" / "a"))


@pytest.mark.parametrize("words, named", [
    ("--learning_rate 1", ["--learning_rate"]),
    ("--max_step 1", ["--max_step"]),
    ("--max_steps many", ["--max_steps", "many"]),
    ("--batch_size 0", ["--batch_size 0"]),
    ("--seq_len -1", ["--seq_len -1"]),
    ("--max_lr nan", ["--max_lr nan"]),
    ("--max_lr inf", ["--max_lr inf"]),
    ("--weight_decay -0.1", ["--weight_decay -0.1"]),
    ("--seed 18446744073709551616", ["--seed 18446744073709551616"]),
    ("--model gpt3", ["--model gpt3", "gpt2-medium"]),
    ("--model fine-tune", ["--model fine-tune", "gpt2"]),
    ("--dtype int8", ["--dtype int8", "bfloat16", "float32"]),
    ("--total_batch_size 100", ["--total_batch_size 100", "--batch_size", "--seq_len"]),
    ("--data no.txt", ["--data no.txt"]),
    ("--data short.txt", ["--data short.txt"]),
    ("--data short.txt --seq_len 1000 --total_batch_size 2000", ["--data short.txt"]),
    ("--seq_len 100000 --total_batch_size 200000", ["--data", "--seq_len"]),
    ("--data cafe.txt", ["--data cafe.txt", "UTF-8"]),
    ("--data folder", ["--data folder", "fineweb.py"]),
    ("--data my.jsonl", ["--data my.jsonl", "fineweb.py --files my.jsonl"]),
    ("--device cuda", ["--device cuda", "cpu"]),
    ("--device gpu", ["--device gpu", "cuda, mps, cpu", "CUDA_VISIBLE_DEVICES"]),
    ("--device cuda:0", ["--device cuda:0", "cuda, mps, cpu", "CUDA_VISIBLE_DEVICES"]),
])
def test_what_cannot_be_done_is_one_line(small, tmp_path, monkeypatch, fails, start, words, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    too_late = lambda *args: pytest.fail("it waits for the compiler first")
    monkeypatch.setattr(train_gpt2, "compile_model", too_late)
    (tmp_path / "short.txt").write_text("To be or")
    (tmp_path / "cafe.txt").write_bytes(b"caf\xe9" * 100)
    (tmp_path / "my.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "log").mkdir()
    before = sorted(tmp_path.iterdir())
    message = fails(start, [*flags(max_steps=3), *words.split()])
    for word in named:
        assert word in message
    assert sorted(tmp_path.iterdir()) == before  # nothing was harmed, and nothing left behind
    assert set(os.listdir("log")) <= {".lock"}


def test_the_program_then_ends_with_status_2(run, tmp_path):
    done = run("--model", "laptop", "--device", "cpu")
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert line.startswith("train_gpt2.py: --data input.txt") and str(tmp_path) in line


def test_other_errors_keep_their_traceback(small, start, monkeypatch):
    def fault(device):
        raise RuntimeError("a fault in the program")

    monkeypatch.setattr(train_gpt2, "prepare", fault)
    with pytest.raises(RuntimeError, match="^a fault in the program$"):
        start(flags())


def test_it_trains_where_nobody_reads_it(small, tmp_path):
    words = flags(max_steps=2, eval_interval=2, val_tokens=64, checkpoint_interval=2)
    command = subprocess.list2cmdline([sys.executable, str(ROOT / "train_gpt2.py"), *words])
    done = subprocess.run(f"{command} >&- 2>&-", shell=True, cwd=tmp_path)  # both are closed
    assert done.returncode == 0
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    kinds = [line.split()[:2] for line in lines]
    assert kinds == [["0", "val"], ["0", "train"], ["1", "train"], ["2", "val"]]
    assert (tmp_path / "log" / "model_00002.pt").exists()


def test_a_stream_that_cannot_be_reconfigured_is_left_alone(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())  # as in a notebook
    fineweb.run_program(lambda: print("done"))
    assert sys.stdout.getvalue() == "done\n" and sys.stderr.getvalue() == ""
