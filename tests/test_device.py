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
               sample_interval=0, checkpoint_interval=0)
    train_gpt2.main(train_gpt2.TrainConfig(**cfg))
    assert torch.get_float32_matmul_precision() == "high"
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


@pytest.mark.parametrize("triton, capability, answer", [(True, (8, 0), True), (None, (8, 0), False), (True, (6, 1), False)])
def test_compile_is_the_default_only_where_it_can_work(monkeypatch, triton, capability, answer):
    monkeypatch.setattr(train_gpt2, "find_spec", lambda name: triton)
    monkeypatch.setattr(train_gpt2, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train_gpt2.fill_defaults(train_gpt2.TrainConfig(), torch.device("cuda")).compile is answer
    assert train_gpt2.fill_defaults(train_gpt2.TrainConfig(), torch.device("cpu")).compile is False
