"""Where the program runs, and what it finds out about the machine."""
import ctypes
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, flags

import train_gpt2
from train_gpt2 import (
    GPT,
    GPTConfig,
    best_dtype,
    check_torchrun,
    expected_memory,
    fitting_batch_size,
    has_bfloat16,
    pick_device,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def have_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def set_environment(monkeypatch, **values):
    """Set these variables of torchrun's, and no others of them."""
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("values", [
    dict(), dict(RANK="0", WORLD_SIZE="1"), dict(RANK="7", WORLD_SIZE="8"),
])
def test_a_place_among_the_processes(monkeypatch, values):
    set_environment(monkeypatch, **values)
    check_torchrun(resume=False)


@pytest.mark.parametrize("values", [
    dict(RANK="1"), dict(WORLD_SIZE="2"), dict(WORLD_SIZE=""), dict(RANK="0", WORLD_SIZE=""),
    dict(RANK="", WORLD_SIZE="2"), dict(RANK="2", WORLD_SIZE="2"), dict(RANK="-1", WORLD_SIZE="2"),
    dict(RANK="0", WORLD_SIZE="0"), dict(RANK="first", WORLD_SIZE="2"),
])
def test_half_of_a_place_is_refused(small, monkeypatch, fails, tmp_path, values):
    set_environment(monkeypatch, **values)
    message = fails(train_gpt2.launch, SMALL)
    assert "RANK" in message and "WORLD_SIZE" in message
    assert os.listdir(tmp_path) == ["text.txt"]  # nothing was begun


def test_a_run_that_torchrun_starts_again_has_to_resume(monkeypatch, fails):
    set_environment(monkeypatch, RANK="0", WORLD_SIZE="2", TORCHELASTIC_RESTART_COUNT="1")
    assert "--resume" in fails(check_torchrun, resume=False)
    check_torchrun(resume=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    check_torchrun(resume=False)


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


@pytest.mark.parametrize("mps, best", [(True, "mps"), (False, "cpu")])
def test_a_device_that_is_not_there(monkeypatch, fails, mps, best):
    have_gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    message = fails(pick_device, "cuda")
    assert "--device cuda" in message
    assert best in message


def test_each_process_gets_a_gpu_of_its_own(monkeypatch, fails):
    have_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pick_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    message = fails(pick_device, "cuda")
    for word in ("3 processes", "2", "--device cpu"):
        assert word in message
    assert pick_device("cpu") == CPU


def test_several_processes_do_not_share_an_apple_gpu(monkeypatch):
    have_gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pick_device() == CPU


@pytest.mark.parametrize("features, answer", [
    ({"avx512_bf16": True}, True), ({"avx512_f": True}, False), ({"amx_bf16": True}, True),
    ({"bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False),
])
def test_bfloat16_on_a_cpu_only_in_hardware(monkeypatch, features, answer):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert has_bfloat16(CPU) is answer
    assert best_dtype(CPU) == ("bfloat16" if answer else "float32")


@pytest.mark.parametrize("hardware, name", [(True, "bfloat16"), (False, "float16")])
def test_float16_on_a_gpu_without_bfloat16(monkeypatch, hardware, name):
    def is_bf16_supported(including_emulation=True):
        return hardware or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert has_bfloat16(CUDA) is hardware
    assert best_dtype(CUDA) == name


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
                    reason="it is glibc's setting")
def test_on_a_cpu_freed_memory_stays_with_the_process():
    code = """
import re, torch, train_gpt2

def resident():  # in kB
    with open("/proc/self/status") as f:
        return int(re.search(r"VmRSS:\\s+(\\d+)", f.read())[1])

train_gpt2.prepare(torch.device("cpu"))
before = resident()
x = torch.ones(25_000_000)  # 100 MB
del x
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) > 90_000, done.stderr


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

    yield compile_for
    torch.use_deterministic_algorithms(False)


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
    assert errors.count("\n") == 1


def test_without_a_compiler_it_trains_all_the_same(run, compiler, tmp_path):
    (tmp_path / "text.txt").write_text("Neither a borrower nor a lender be. " * 100)
    nothing = dict(os.environ, PATH=str(tmp_path), CXX="",
                   TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = run(*flags(max_steps=1, compile=True), env=nothing)
    assert done.returncode == 0, done.stderr
    warning, = done.stderr.splitlines()
    assert "torch.compile" in warning
    assert "step     0 | loss: " in done.stdout


def test_prepare_switches_tf32_on():
    torch.set_float32_matmul_precision("highest")
    try:
        train_gpt2.prepare(CPU)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_is_compiled_for_a_cpu_is_deterministic(compile_for):
    torch.use_deterministic_algorithms(False)
    assert not compile_for("cpu", "bfloat16", False)
    assert not torch.are_deterministic_algorithms_enabled()  # without the compiler it always is
    assert compile_for("cpu", "bfloat16", True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # it only costs time


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H200", 989),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA H100 PCIe", None), ("NVIDIA H200 NVL", None), ("NVIDIA GH200 480GB", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Tesla T4", None),
])
def test_a_gpus_peak_by_its_whole_name(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    if teraflops is None:
        assert train_gpt2.peak_flops(CUDA, "float16", 8) is None
    else:
        assert train_gpt2.peak_flops(CUDA, "bfloat16", 1) == teraflops * 1e12
        assert train_gpt2.peak_flops(CUDA, "bfloat16", 8) == 8 * teraflops * 1e12
        assert train_gpt2.peak_flops(CUDA, "float32", 1) is None


def test_a_cpus_peak_is_not_known():
    assert train_gpt2.peak_flops(CPU, "bfloat16", 1) is None


@pytest.fixture(scope="module")
def gpt2():
    """Return a GPT-2 (124M) without numbers."""
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size=50304))


@pytest.mark.parametrize("gigabytes, world, B", [
    (80, 1, 64), (80, 8, 64), (24, 1, 16), (16, 1, 8), (2, 1, 1),
])
def test_the_micro_batch_fits_the_card(monkeypatch, gpt2, gigabytes, world, B):
    class Card:
        total_memory = gigabytes * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert fitting_batch_size(gpt2, 1024, 2**19, "bfloat16", CUDA, world) == B
    used = expected_memory(gpt2, B, 1024, "bfloat16", world)
    assert B == 1 or used < Card.total_memory
    # Twice as much wouldn't fit, or wouldn't be needed.
    assert B == 64 or expected_memory(gpt2, 2 * B, 1024, "bfloat16", world) > Card.total_memory


def test_what_the_memory_is_for(gpt2):
    parameters = 124_475_904  # with 47 more rows of 768
    alone = expected_memory(gpt2, 8, 1024, "bfloat16", 1)
    assert alone > 18 * parameters
    assert expected_memory(gpt2, 8, 1024, "bfloat16", 8) == alone + 4 * parameters  # DDP's copy
    assert expected_memory(gpt2, 16, 1024, "bfloat16", 1) > alone
    assert expected_memory(gpt2, 8, 1024, "float32", 1) > alone


@pytest.mark.parametrize("T, rows, B", [
    (64, 64, 8), (64, 8, 8), (64, 12, 4), (64, 7, 1), (16, 512, 32), (4, 512, 64),
    (1024, 512, 1), (8192, 4, 1),  # 512 tokens keep a CPU busy
])
@pytest.mark.parametrize("world", [1, 3])
def test_the_micro_batch_divides_an_update(gpt2, T, rows, B, world):
    total_batch_size = T * rows * world
    assert fitting_batch_size(gpt2, T, total_batch_size, "float32", CPU, world) == B


def test_a_micro_batch_for_an_update_that_is_too_small(gpt2, fails):
    B = fitting_batch_size(gpt2, 64, 100, "float32", CPU, 1)
    assert "--total_batch_size 100" in fails(train_gpt2.check_batch, gpt2, B, 64, 100, 1)
