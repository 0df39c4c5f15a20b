"""Training runs, with a model that is small enough for a test."""
import math
import os
import re

import pytest
import torch

from train_gpt2 import (GPT, SIZES, DataLoaderLite, GPTConfig, TrainConfig, accumulate_gradients, configure_optimizer,
                        get_lr, main)

INPUT = os.path.join(os.path.dirname(__file__), "..", "input.txt")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "laptop", dict(n_layer=2, n_head=2, n_embd=64))  # whatever it is in a real run


def train(capsys, **settings):
    """Train the laptop's model as settings say; return (the model, the losses printed, all that was printed)."""
    cfg = dict(model="laptop", data=INPUT, batch_size=4, seq_len=32, total_batch_size=128, max_steps=20, max_lr=3e-3,
               dtype="float32", warmup_steps=10, weight_decay=0.1, eval_interval=0, sample_interval=0,
               checkpoint_interval=0)
    model = main(TrainConfig(**(cfg | settings)))
    out = capsys.readouterr().out
    return model, [float(loss) for loss in re.findall(r"^step +\d+ \| loss: (\d+\.\d{6})", out, re.M)], out


def test_one_batch_is_learnt_by_heart(capsys, tmp_path):
    with open(INPUT) as f:
        (tmp_path / "short.txt").write_text(f.read(600))  # more than one batch of 128 tokens, less than two
    _, losses, _ = train(capsys, data=str(tmp_path / "short.txt"), max_steps=80, max_lr=8e-3)
    assert abs(losses[0] - 10.9) < 0.3 and losses[-1] < 1
    assert len(losses) == 80


def test_a_run_repeats(capsys):
    assert train(capsys, max_steps=3)[1] == train(capsys, max_steps=3)[1] != train(capsys, max_steps=3, seed=1)[1]


def test_other_batches_have_other_losses_and_fall_too(capsys):
    _, losses, _ = train(capsys, max_steps=40)
    assert sum(losses[-5:]) / 5 < losses[0] - 2.5
    _, repeated, _ = train(capsys, max_steps=2, max_lr=1e-30)
    assert repeated[0] != repeated[1]  # nothing was learnt: the batch is another one


def test_the_step_is_timed(capsys):
    _, _, out = train(capsys, max_steps=2)
    times = re.findall(r"dt: (\d+\.\d\d)ms \| tok/sec: (\d+\.\d\d)$", out, re.M)
    assert len(times) == 2
    for dt, tok_per_sec in times:
        assert abs(float(tok_per_sec) * float(dt) / 1000 / 128 - 1) < 0.01


def test_a_step_waits_once(capsys, monkeypatch):
    waits = []  # on a GPU each of these would wait for all that is queued
    for name in ("item", "tolist", "cpu", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args, name=name, real=getattr(torch.Tensor, name): (
            waits.append(name), real(*args))[1])
    train(capsys, max_steps=3)
    assert waits.count("tolist") == 3 and len(waits) == 3, waits


def test_bfloat16_trains_like_float32(capsys):
    _, exact, _ = train(capsys, max_steps=5)
    model, rounded, _ = train(capsys, max_steps=5, dtype="bfloat16")
    assert exact != rounded and max(abs(a - b) for a, b in zip(exact, rounded)) < 0.05
    assert all(p.dtype == torch.float32 for p in model.parameters())  # only products are rounded


def test_compiled_losses_equal_eager_ones_and_repeat(capsys, compiler, monkeypatch):
    monkeypatch.setitem(SIZES, "laptop", dict(n_layer=2, n_head=2, n_embd=16))
    shape = dict(batch_size=2, seq_len=16, total_batch_size=64)  # test_run.py's: what is compiled once is kept on disk
    model, eager, _ = train(capsys, **shape)
    compiled_model, compiled, _ = train(capsys, compile=True, **shape)
    assert max(abs(a - b) for a, b in zip(eager, compiled)) < 1e-3
    assert list(compiled_model.state_dict()) == list(model.state_dict())  # no _orig_mod. in front
    again, losses, _ = train(capsys, compile=True, **shape)
    assert losses == compiled
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), compiled_model.parameters()))


def test_no_gradient_is_made_for_logits_beside_a_loss():
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16))
    idx = torch.randint(64, (2, 8))
    logits, loss = model(idx, idx)
    assert loss.requires_grad and not logits.requires_grad  # so torch.compile has nothing to make one for
    alone, _ = model(idx)
    assert alone.requires_grad and torch.equal(alone, logits)


def test_the_vocabulary_is_padded_and_the_first_loss_stays(capsys):
    model, losses, _ = train(capsys, max_steps=1)
    assert model.lm_head.weight.shape == (50304, 64) and 50304 % 128 == 0
    assert abs(losses[0] - 10.83) < 0.3  # ln(50304)


def test_the_gradient_is_clipped(capsys):
    _, unclipped, out = train(capsys, grad_clip=1e9)
    norms = [float(norm) for norm in re.findall(r"\| norm: (\d+\.\d{4}) \|", out)]
    assert len(norms) == 20 and max(norms) > 1
    assert train(capsys, grad_clip=1.0)[1] != unclipped
    model, _, _ = train(capsys, grad_clip=1e-12, max_steps=1, weight_decay=0.0)
    start = train(capsys, max_lr=1e-30, max_steps=1)[0]
    moved = max((a - b).abs().max().item() for a, b in zip(model.parameters(), start.parameters()))
    assert moved < 1e-4  # a thirtieth of the rate: Adam undoes any scale but eps: a gradient far below 1e-8 moves nothing


def test_learning_rate():
    cfg = TrainConfig(max_lr=6e-4, warmup_steps=10, max_steps=50)
    rates = [get_lr(step, cfg) for step in range(50)]
    assert math.isclose(rates[0], 6e-5)
    assert rates[9] == 6e-4 and rates.count(6e-4) == 1  # the peak, once
    assert all(a < b for a, b in zip(rates[:9], rates[1:10])) and all(a > b for a, b in zip(rates[9:], rates[10:]))
    assert math.isclose(rates[29], (6e-4 + 6e-5) / 2)  # halfway down after half of the 40 steps
    assert math.isclose(rates[-1], 6e-5)
    assert [get_lr(step, TrainConfig(max_lr=1.0, warmup_steps=0, max_steps=2)) for step in range(2)] == [1.0, 0.1]


def test_the_optimizer_gets_the_scheduled_rate(capsys):
    _, _, out = train(capsys, max_steps=12, max_lr=1e-3)
    printed = [float(lr) for lr in re.findall(r"\| lr (\S+) \|", out)]
    cfg = TrainConfig(max_lr=1e-3, max_steps=12, warmup_steps=10)
    assert printed == pytest.approx([get_lr(step, cfg) for step in range(12)], rel=1e-3)
    start = train(capsys, max_lr=1e-30, max_steps=1)[0]
    one = train(capsys, max_lr=1e-3, max_steps=1)[0]  # Adam's first step moves by the rate: a tenth of the peak
    moved = max((a - b).abs().max().item() for a, b in zip(one.parameters(), start.parameters()))
    assert moved == pytest.approx(1e-4, rel=0.02)


def test_only_matrices_are_decayed(capsys):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304))
        decayed, rest = configure_optimizer(model, weight_decay=0.1, lr=1.0).param_groups
    assert capsys.readouterr().out == ("weight decay 0.1 on 50 tensors, 124,354,560 parameters; "
                                       "none on 98 tensors, 121,344 parameters\n")
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert decayed["fused"] and rest["fused"]
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}


def test_fused_adamw_is_adamw():
    torch.manual_seed(0)
    models = [GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fused = configure_optimizer(models[0], weight_decay=0.1, lr=1e-2)
    groups = [dict(params=[p for p in models[1].parameters() if (p.dim() >= 2) == decay], weight_decay=0.1 * decay)
              for decay in (True, False)]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    idx = torch.randint(64, (4, 9))
    for model, optimizer in zip(models, (fused, plain)):
        for _ in range(5):
            optimizer.zero_grad()
            model(idx[:, :-1], idx[:, 1:])[1].backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.allclose(a, b, atol=1e-9)


def test_four_micro_batches_give_the_gradient_of_one_large_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32)).double()
    tokens = torch.randint(50257, (500,)).numpy().astype("uint16")
    results = []
    for B in (8, 2):
        model.zero_grad()
        loss = accumulate_gradients(model, DataLoaderLite(tokens, B, 16, 128), micro_steps=8 // B, dtype="float32")
        results.append([loss.double()] + [p.grad.clone() for p in model.parameters()])
    for large, small in zip(*results):
        assert (large - small).norm() / large.norm() < 1e-6


def test_micro_batches_train_like_one_large_batch(capsys):
    _, large, _ = train(capsys)
    _, small, out = train(capsys, batch_size=1)
    assert "1 update = 128 tokens = 4 micro-batches of 1 x 32" in out
    assert max(abs(a - b) for a, b in zip(large, small)) < 1e-4

