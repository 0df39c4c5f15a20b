"""Where the program runs, and what it finds out about the machine."""
import pytest
import torch

import train_gpt2
from train_gpt2 import (
    best_dtype,
    has_bfloat16,
    pick_device,
)

CPU = torch.device("cpu")


def have_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("gpus, mps, best", [
    (1, True, "cuda"), (0, True, "mps"), (0, False, "cpu"),
])
def test_the_best_device_is_picked(monkeypatch, gpus, mps, best):
    have_gpus(monkeypatch, gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device().type == best


def test_a_device_that_is_named(monkeypatch):
    have_gpus(monkeypatch, 1)
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("features, answer", [
    ({"avx512_bf16": True}, True), ({"avx512_f": True}, False), ({"amx_bf16": True}, True),
    ({"bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False),
])
def test_bfloat16_on_a_cpu_only_in_hardware(monkeypatch, features, answer):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert has_bfloat16(CPU) is answer
    assert best_dtype(CPU) == ("bfloat16" if answer else "float32")


def test_prepare_switches_tf32_on():
    torch.set_float32_matmul_precision("highest")
    try:
        train_gpt2.prepare(CPU)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
