"""Where the program runs."""
import os

import pytest
import torch

import hellaswag
import train_gpt2

INPUT = os.path.join(os.path.dirname(__file__), "..", "input.txt")


@pytest.mark.parametrize("cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_picked(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert hellaswag.pick_device().type == best


def test_each_process_gets_a_gpu_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert hellaswag.pick_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as end:
        hellaswag.pick_device("cuda")
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "train_gpt2.py: 3 processes want a GPU each, and here are 2: start as many processes as there are GPUs, "
        "or say --device cpu\n")


def test_tf32_is_switched_on(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_float32_matmul_precision("highest")
    cfg = dict(data=INPUT, model="laptop", batch_size=1, seq_len=8, total_batch_size=8, max_steps=1, eval_interval=0,
               sample_interval=0, checkpoint_interval=0, compile=False)
    train_gpt2.main(train_gpt2.TrainConfig(**cfg))
    assert torch.get_float32_matmul_precision() == "high"
    assert "float32 products: high, " in (out := capsys.readouterr().out) and "compile: False\n" in out
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("features, answer", [({"avx512_bf16": True}, True), ({"avx512_f": True}, False),
                                              ({"amx_bf16": True}, True), ({"bf16": True}, True),
                                              ({"avx512_bf16": False}, False)])
def test_bfloat16_on_a_cpu_only_in_hardware(monkeypatch, features, answer):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert hellaswag.has_bfloat16(torch.device("cpu")) is answer
    dtype = train_gpt2.fill_defaults(train_gpt2.TrainConfig(), torch.device("cpu")).dtype
    assert dtype == ("bfloat16" if answer else "float32")
    by_hand = train_gpt2.fill_defaults(train_gpt2.TrainConfig(dtype="float32"), torch.device("cpu"))
    assert by_hand.dtype == "float32"


@pytest.mark.parametrize("kind, works, answer", [("cpu", True, True), ("cpu", False, False), ("cuda", True, True),
                                                 ("cuda", False, False), ("mps", True, False)])
def test_compile_is_the_default_only_where_it_works(monkeypatch, capsys, kind, works, answer):
    def compile(function):
        if not works:
            raise RuntimeError("no compiler found\nand much more")
        return lambda x: None

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: None)  # on a GPU that isn't there
    torch.use_deterministic_algorithms(False)
    assert hellaswag.can_compile(torch.device(kind)) is answer
    assert torch.are_deterministic_algorithms_enabled() is (kind == "cpu")
    line = "torch.compile doesn't work here, so the model runs without it: no compiler found\n"
    assert capsys.readouterr().out == (line if not works else "")


@pytest.mark.parametrize("kind, bfloat16, answer", [("cpu", True, True), ("cpu", False, False), ("cuda", False, True)])
def test_compile_is_the_default_only_where_it_helps(monkeypatch, kind, bfloat16, answer):
    monkeypatch.setattr(train_gpt2, "has_bfloat16", lambda device: bfloat16)
    for asked, found in ((None, answer), (True, True), (False, False)):
        cfg = train_gpt2.fill_defaults(train_gpt2.TrainConfig(data="input.txt", compile=asked), torch.device(kind))
        assert cfg.compile is found


def test_without_a_compiler_it_trains_all_the_same(run, compiler, tmp_path):
    alone = dict(os.environ, PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), CXX="")
    done = run("--data", INPUT, "--device", "cpu", "--batch_size", "1", "--seq_len", "8", "--total_batch_size", "8", "--max_steps", "1",
               "--eval_interval", "0", "--sample_interval", "0", "--checkpoint_interval", "0", "--compile", env=alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.compile doesn't work here") == 1 and "step     0 | loss: " in done.stdout
