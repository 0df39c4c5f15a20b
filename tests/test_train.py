"""The recipe and the training step, with a model that is small enough for a test."""
import math
import os
import re

import pytest
import torch
from conftest import SMALL, losses

import train_gpt2
from train_gpt2 import (
    GPT,
    GPTConfig,
    TrainConfig,
    configure_optimizer,
    get_lr,
)


@pytest.fixture
def wide(small, monkeypatch):
    """Have the laptop's model be wide enough to learn something."""
    shape = dict(n_layer=2, n_head=2, n_embd=64)
    monkeypatch.setitem(train_gpt2.MODEL_SIZES, "laptop", shape)


def numbers(out):
    return [float(loss) for loss in losses(out)]


def largest_difference(model, other):
    pairs = zip(model.parameters(), other.parameters())
    return max((a - b).abs().max().item() for a, b in pairs)


# -------------------------------------------------------------------------------------------------
# The recipe


def test_learning_rate():
    cfg = TrainConfig(max_lr=6e-4, warmup_steps=10, max_steps=50)
    rates = [get_lr(step, cfg) for step in range(50)]
    assert math.isclose(rates[0], 6e-5)
    assert rates[9] == 6e-4
    assert rates.count(6e-4) == 1  # the peak, once
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert len(set(rates[9:])) == 41
    assert math.isclose(rates[29], (6e-4 + 6e-5) / 2)  # half of the way after half of 40 updates
    assert math.isclose(rates[-1], 6e-5)


def test_learning_rate_without_a_warm_up():
    cfg = TrainConfig(max_lr=1.0, warmup_steps=0, max_steps=2)
    assert [get_lr(step, cfg) for step in range(2)] == [1.0, 0.1]


def test_the_optimizer_gets_the_scheduled_rate(train):
    _, out = train(max_steps=12, warmup_steps=10, max_lr=1e-3)
    printed = [float(lr) for lr in re.findall(r"\| lr (\S+) \|", out)]
    cfg = TrainConfig(max_lr=1e-3, max_steps=12, warmup_steps=10)
    assert printed == pytest.approx([get_lr(step, cfg) for step in range(12)], rel=1e-3)
    start, _ = train(max_lr=1e-30, max_steps=1)
    one, _ = train(max_lr=1e-3, max_steps=1, warmup_steps=10)
    # Adam's first step moves by the rate, which is a tenth of the peak here
    assert largest_difference(one, start) == pytest.approx(1e-4, rel=0.02)


def test_only_matrices_are_decayed():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304))
    decayed, rest = configure_optimizer(model, weight_decay=0.1, lr=1.0).param_groups
    assert decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}
    assert len(decayed["params"]) == 50
    assert sum(p.numel() for p in decayed["params"]) == 124_354_560
    assert sum(p.numel() for p in rest["params"]) == 121_344
    for group in (decayed, rest):
        assert group["fused"]
        assert group["betas"] == (0.9, 0.95)
        assert group["eps"] == 1e-8


def test_fused_adamw_is_adamw():
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16)
    model = GPT(config).double()
    other = GPT(config).double()
    other.load_state_dict(model.state_dict())
    fused = configure_optimizer(model, weight_decay=0.1, lr=1e-2)
    matrices = [p for p in other.parameters() if p.dim() == 2]
    vectors = [p for p in other.parameters() if p.dim() == 1]
    plain = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False,
    )
    x = torch.randint(64, (4, 8))
    y = torch.randint(64, (4, 8))
    for trained, optimizer in ((model, fused), (other, plain)):
        for _ in range(5):
            optimizer.zero_grad()
            trained(x, y)[1].backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.allclose(a, b, atol=1e-9)


# -------------------------------------------------------------------------------------------------
# The losses


def test_one_batch_is_learnt_by_heart(train, wide):
    with open("text.txt", encoding="utf-8") as f:
        start = f.read(330)
    with open("short.txt", "w", encoding="utf-8") as f:
        f.write(start)  # more than one update of 64 tokens, less than two
    _, out = train(data="short.txt", max_steps=50, max_lr=1e-2, warmup_steps=10, batch_size=4)
    found = numbers(out)
    assert len(found) == 50
    assert abs(found[0] - math.log(50304)) < 0.3
    assert found[-1] < 1
    assert "40.00 epochs" in out  # an epoch is 5 rows of 16 tokens


def test_the_loss_falls_on_batches_that_differ(train, wide):
    _, out = train(max_steps=40, batch_size=4, warmup_steps=10)
    found = numbers(out)
    assert sum(found[-5:]) / 5 < found[0] - 2
    _, out = train(max_steps=2, batch_size=4, max_lr=1e-30)
    first, second = losses(out)
    assert first != second  # nothing was learnt: the batch is another one


def test_a_run_repeats(train):
    _, out = train(max_steps=3)
    assert losses(train(max_steps=3)[1]) == losses(out)
    assert losses(train(max_steps=3, seed=1)[1]) != losses(out)


def test_the_vocabulary_is_padded_and_the_first_loss_stays(train):
    model, out = train(max_steps=1)
    assert model.lm_head.weight.shape == (50304, 16)
    assert abs(numbers(out)[0] - math.log(50304)) < 0.3


@pytest.mark.parametrize("dtype, steps", [("bfloat16", 4), ("float16", 3)])
def test_16_bits_train_like_float32(train, dtype, steps):
    _, exact = train(max_steps=steps)
    model, rounded = train(max_steps=steps, dtype=dtype)
    assert losses(exact) != losses(rounded)
    assert numbers(rounded) == pytest.approx(numbers(exact), abs=0.05)
    for p in model.parameters():
        assert p.dtype == torch.float32  # only products are rounded


def test_compiled_losses_equal_eager_ones_and_repeat(train, compiler):
    model, out = train(compile=False)
    compiled_model, compiled_out = train(compile=True)
    assert numbers(compiled_out) == pytest.approx(numbers(out), abs=1e-3)
    assert list(compiled_model.state_dict()) == list(model.state_dict())  # no _orig_mod. in front
    again, again_out = train(compile=True)
    assert losses(again_out) == losses(compiled_out)
    assert largest_difference(again, compiled_model) == 0


# -------------------------------------------------------------------------------------------------
# One update


def test_four_micro_batches_give_the_gradient_of_one_large_batch(train, monkeypatch):
    build_model = train_gpt2.build_model

    def build_double(cfg, checkpoint):
        return build_model(cfg, checkpoint).double()

    monkeypatch.setattr(train_gpt2, "build_model", build_double)
    gradients = []
    for B in (4, 1):
        model, out = train(batch_size=B, max_steps=1, grad_clip=1e9)
        assert f"{4 // B} micro-batches of {B} x 16" in out
        gradients.append([p.grad for p in model.parameters()])
    for large, small in zip(*gradients):
        assert (large - small).norm() < 1e-6 * large.norm()


def test_micro_batches_train_like_one_large_batch(train):
    _, large = train(batch_size=4)
    _, small = train(batch_size=1)
    assert numbers(small) == pytest.approx(numbers(large), abs=1e-4)


def test_the_gradient_is_clipped(train, wide):
    _, out = train(grad_clip=1e9)
    norms = [float(norm) for norm in re.findall(r"\| norm: (\d+\.\d{4}) \|", out)]
    assert len(norms) == 6
    assert max(norms) > 1
    assert losses(train(grad_clip=1.0)[1]) != losses(out)
    # Adam undoes any scale but eps: a gradient far below 1e-8 moves nothing
    still, _ = train(grad_clip=1e-12, max_steps=1, weight_decay=0)
    start, _ = train(max_lr=1e-30, max_steps=1)
    assert largest_difference(still, start) < 3e-4  # the rate is 1e-2


# -------------------------------------------------------------------------------------------------
# What is printed

STEP = re.compile(
    r"step +(\d+) \| loss: \d+\.\d{6} \| lr \d\.\d{4}e-\d\d \| norm: \d+\.\d{4} \| "
    r"dt: (\d+\.\d\d)ms \| tok/sec: (\d+\.\d\d)(.*)"
)


def step_lines(capsys, **settings):
    """Return the matches of STEP with the lines of a run's steps."""
    train_gpt2.launch(SMALL | settings)
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if re.match(r"step +\d+ \| loss", line)]
    assert found[0].startswith("step     0 | loss: ")
    return [STEP.fullmatch(line) for line in found]


def test_the_steps_line(small, capsys):
    matches = step_lines(capsys, max_steps=4)
    assert [int(match[1]) for match in matches] == [0, 1, 2, 3]
    for match in matches:
        seconds = float(match[2]) / 1000
        assert float(match[3]) * seconds == pytest.approx(64, rel=0.01)
        assert "mfu" not in match[4]  # a CPU's isn't known
    ends = [match[4] for match in matches if match[4]]
    assert len(ends) == 1
    assert re.fullmatch(r" \| left: \d+\.\d min", ends[0])


def test_the_steps_line_where_the_peak_is_known(small, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt2, "peak_flops", lambda device, dtype, world: 1e12)
    model = GPT(GPTConfig(**train_gpt2.MODEL_SIZES["laptop"], vocab_size=50304))
    matrices = 50304 * 16 + 2 * 12 * 16 * 16
    flops = 6 * matrices + 12 * 2 * 16 * 16  # a token, with 2 layers, 16 wide, 16 long
    assert train_gpt2.flops_per_token(model, 16) == flops
    for match in step_lines(capsys, max_steps=2, dtype="bfloat16"):
        percent = float(re.fullmatch(r" \| mfu: (\d+(?:\.\d+)?)%", match[4])[1])
        assert percent == pytest.approx(100 * flops * float(match[3]) / 1e12, abs=0.06)


def test_the_first_lines_of_a_run(train):
    model, out = train(max_steps=5)
    beginning = out[: out.index("step ")]
    parameters = sum(p.numel() for p in model.parameters())
    tokens = 5 * 64
    for word in (
        f"{parameters:,}",
        "text.txt",
        "cpu",
        "float32",
        "5 updates",
        "64 tokens",
        "2 micro-batches of 2 x 16",
        "laptop",
        "log/",
        "Ctrl-C",
        "--resume",
        "FLOPs",
    ):
        assert word in beginning, word
    train_data, _ = train_gpt2.load_data("text.txt")
    loader = train_gpt2.DataLoaderLite(train_data, 2, 16)
    assert f"{tokens / (loader.rows_per_epoch * 16):.2f} epochs" in beginning


def test_the_log_holds_each_loss_that_was_printed(train):
    _, out = train(max_steps=3)
    with open(os.path.join("log", "log.txt"), encoding="utf-8") as f:
        lines = f.read().splitlines()
    assert lines == [f"{step} train {loss}" for step, loss in enumerate(losses(out))]
