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


@pytest.fixture
def compile_for(monkeypatch):
    """Return a function that calls compile_model, with a compiler that works or doesn't.

    It returns whether the model is compiled.
    """
    def compile_for(kind, dtype, wanted, works=True):
        def compile(what):
            if not works:
                raise RuntimeError("no compiler found\nand much more")
            return lambda *args: what

        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", compile)
            patch.setattr(torch, "ones", lambda *size, device: None)  # on a GPU that isn't there
            model = torch.nn.Linear(1, 1)
            found = train_gpt2.compile_model(model, wanted, torch.device(kind), dtype)
        if found is model:
            return False
        assert found() is model
        return True

    return compile_for


@pytest.mark.parametrize("kind, dtype, compiles", [
    ("cpu", "bfloat16", True), ("cpu", "float32", False),  # there it is faster without
    ("cuda", "bfloat16", True), ("cuda", "float16", True), ("mps", "bfloat16", False),
])
def test_the_machine_decides_whether_to_compile(compile_for, capsys, kind, dtype, compiles):
    assert compile_for(kind, dtype, None) is compiles
    assert compile_for(kind, dtype, True) is True
    assert capsys.readouterr().err == ""
    assert compile_for(kind, dtype, False) is False
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_compiler_that_does_not_work_is_a_warning(compile_for, capsys, kind):
    assert compile_for(kind, "bfloat16", None, works=False) is False
    out, errors = capsys.readouterr()
    assert out == ""
    assert "torch.compile" in errors and "no compiler found" in errors


def test_prepare_switches_tf32_on():
    torch.set_float32_matmul_precision("highest")
    try:
        train_gpt2.prepare(CPU)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
