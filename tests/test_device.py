"""Where the program runs, and what it finds out about the machine."""
import os

import pytest
import torch
from conftest import flags

import train_gpt2
from train_gpt2 import GPT, GPTConfig, TrainConfig, best_dtype, has_bfloat16, pick_device

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def have_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("gpus, mps, best", [
    (1, True, "cuda"), (0, True, "mps"), (0, False, "cpu"),
])
def test_the_best_device_is_picked(monkeypatch, fails, gpus, mps, best):
    have_gpus(monkeypatch, gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device().type == best
    assert pick_device("cpu") == CPU
    if best != "cuda":
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


@pytest.mark.parametrize("kind, bfloat16, compiles", [
    ("cpu", True, True), ("cpu", False, False), ("cuda", True, True), ("cuda", False, True),
])
def test_the_machine_decides_on_dtype_and_compile(monkeypatch, kind, bfloat16, compiles):
    monkeypatch.setattr(train_gpt2, "has_bfloat16", lambda device: bfloat16)
    device = torch.device(kind)
    cfg = train_gpt2.make_config(dict(model="gpt2"), device)
    assert cfg.device == kind
    assert cfg.dtype == best_dtype(device)
    assert cfg.compile is compiles
    cfg = train_gpt2.make_config(dict(model="gpt2", dtype="float32"), device)
    assert cfg.compile is (kind == "cuda")  # on a CPU, float32 is faster without
    by_hand = dict(model="gpt2", dtype="float32", compile=not compiles)
    cfg = train_gpt2.make_config(by_hand, device)
    assert cfg.dtype == "float32"
    assert cfg.compile is not compiles


@pytest.mark.parametrize("kind, works, answer", [
    ("cpu", True, True), ("cpu", False, False), ("cuda", True, True), ("cuda", False, False),
    ("mps", True, False),
])
def test_whether_it_can_compile(monkeypatch, capsys, kind, works, answer):
    def compile(function):
        if not works:
            raise RuntimeError("no compiler found\nand much more")
        return lambda x: None

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)  # on a GPU that isn't there
    assert train_gpt2.can_compile(torch.device(kind)) is answer
    out = capsys.readouterr().out
    if works:
        assert out == ""
    else:
        assert "torch.compile" in out
        assert "no compiler found" in out
        assert out.count("\n") == 1


def test_without_a_compiler_it_trains_all_the_same(run, compiler, tmp_path):
    (tmp_path / "text.txt").write_text("Neither a borrower nor a lender be. " * 100)
    nothing = dict(os.environ, PATH=str(tmp_path), CXX="",
                   TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = run(*flags(max_steps=1, compile=True), env=nothing)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.compile doesn't work here") == 1
    assert "step     0 | loss: " in done.stdout


def test_prepare_switches_tf32_on():
    torch.set_float32_matmul_precision("highest")
    try:
        train_gpt2.prepare(CPU)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_is_compiled_for_a_cpu_is_deterministic():
    torch.use_deterministic_algorithms(False)
    train_gpt2.compile_model(torch.nn.Linear(1, 1), CPU)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # it only costs time


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", None), ("NVIDIA A100-SXM4-80GB", 312),
    ("Tesla T4", 65), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce GTX 1080", None),
])
def test_a_gpus_peak_by_its_name(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    if teraflops is None:
        assert train_gpt2.peak_flops(CUDA, 1, "float16") is None
    else:
        assert train_gpt2.peak_flops(CUDA, 1, "bfloat16") == teraflops * 1e12
        assert train_gpt2.peak_flops(CUDA, 8, "bfloat16") == 8 * teraflops * 1e12
        assert train_gpt2.peak_flops(CUDA, 1, "float32") is None


def test_a_cpus_peak_is_not_known():
    assert train_gpt2.peak_flops(CPU, 1, "bfloat16") is None


@pytest.mark.parametrize("gigabytes, world, B", [
    (80, 1, 64), (80, 8, 64), (24, 1, 16), (16, 1, 8), (2, 1, 1),
])
def test_the_micro_batch_fits_the_card(monkeypatch, gigabytes, world, B):
    class Card:
        total_memory = gigabytes * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304))
    fitting = train_gpt2.fitting_batch_size(TrainConfig(), model, CUDA, world)
    assert fitting == B
    used = train_gpt2.expected_memory(model, B, 1024, "bfloat16")
    assert B == 1 or used < Card.total_memory


@pytest.mark.parametrize("world, B", [(1, 16), (2, 8), (3, 1), (16, 1)])
def test_the_micro_batch_divides_an_update(world, B):
    cfg = TrainConfig(batch_size=16, seq_len=64, total_batch_size=1024)
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304))
    assert train_gpt2.fitting_batch_size(cfg, model, CPU, world) == B
