"""What a run does beside training: the validation loss, samples, HellaSwag, the log, checkpoints, resuming."""
import math
import os
import re
import shutil
import subprocess
import sys

import hub
import numpy as np
import pytest
import torch
from conftest import damaged

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT, GPTConfig, TrainConfig, evaluate, gpt2_encoding, load_checkpoint, main

INPUT = os.path.join(os.path.dirname(__file__), "..", "input.txt")


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Run each test in an empty folder, with a text and with a model that learns it in no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_gpt2.SIZES, "laptop", dict(n_layer=2, n_head=2, n_embd=16))
    with open(INPUT, encoding="utf-8") as f:
        (tmp_path / "text.txt").write_text(f.read(20_000), encoding="utf-8")


def train(capsys, **settings):
    """Train the small model as settings say; return (the model, all that was printed, without the times)."""
    cfg = dict(data="text.txt", model="laptop", batch_size=2, seq_len=16, total_batch_size=64, max_steps=6, max_lr=1e-2,
               warmup_steps=1, dtype="float32", device="cpu", eval_interval=0, sample_interval=0,
               checkpoint_interval=0)
    capsys.readouterr()
    model = main(TrainConfig(**(cfg | settings)))
    return model, re.sub(r"dt: .*|at this pace.*\n", "", capsys.readouterr().out)


def losses(out):
    return re.findall(r"^step +\d+ \| loss: (\S+)", out, re.M)


@pytest.mark.parametrize("B, T", [(1, 16), (3, 16), (4, 8)])
def test_validation_loss_is_that_of_every_token_once(B, T):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=2, n_head=2, n_embd=16))
    tokens = np.random.default_rng(0).integers(100, size=103).astype(np.uint16)  # 102 to predict: no multiple of T
    total = 0.0
    for start in range(0, 102, T):  # a row at a time, without a batch
        row = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))
        with torch.no_grad():
            logits, _ = model(row[None, :-1])
        total -= sum(logits[0, i].log_softmax(-1)[row[i + 1]].item() for i in range(len(row) - 1))
    assert evaluate(model, tokens, B, T, "float32") == pytest.approx(total / 102, abs=1e-5)


def test_validation_on_less_than_a_row():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=32))
    tokens = np.array([464, 3290, 318], dtype=np.uint16)
    _, loss = model(torch.tensor([[464, 3290]]), torch.tensor([[3290, 318]]))
    assert evaluate(model, tokens, 2, 16, "float32") == pytest.approx(loss.item(), abs=1e-6)


def test_bits_per_byte(capsys):
    model, out = train(capsys, eval_interval=4, max_steps=6)
    found = re.findall(r"^step +(\d+) \| val loss: (\d+\.\d{6}) \| bits per byte: (\d+\.\d{4})$", out, re.M)
    assert [int(step) for step, _, _ in found] == [0, 4, 6]  # and after the last update
    with open("text.txt", encoding="utf-8") as f:
        text = f.read()
    tokens = gpt2_encoding().encode_ordinary(text)
    val = tokens[len(tokens) * 9 // 10 :]
    size = len(gpt2_encoding().decode_bytes(val[1:]))
    assert size > 1500
    for _, loss, bits in found:
        assert float(bits) == pytest.approx(float(loss) / math.log(2) * (len(val) - 1) / size, abs=1e-4)
    assert float(found[2][1]) == pytest.approx(evaluate(model, np.array(val), 7, 16, "float32"), abs=1e-5)
    assert float(found[2][1]) < float(found[0][1]) - 0.2


def test_end_of_text_has_no_bytes(capsys):
    os.mkdir("shards")
    tokens = np.array([50256, 464, 3290, 50256, 464, 3797] * 50, dtype=np.uint16)  # The dog, The cat
    for i in range(2):
        fineweb.write_shard("shards", i, tokens)
    _, out = train(capsys, data="shards", eval_interval=1, max_steps=1)
    loss, bits = re.search(r"val loss: (\S+) \| bits per byte: (\S+)", out).groups()
    size = 50 * len("The dogThe cat")
    assert float(bits) == pytest.approx(float(loss) / math.log(2) * 299 / size, abs=1e-4)


def test_a_damaged_validation_shard_is_one_line(capsys, tmp_path):
    os.mkdir("shards")
    for i in range(2):
        fineweb.write_shard("shards", i, np.arange(500, dtype=np.uint16))
    path = tmp_path / "shards" / "edufineweb_val_000000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(SystemExit) as end:
        train(capsys, data="shards", eval_interval=1)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("train_gpt2.py: --data shards: edufineweb_val_000000.npy is damaged: ")


def test_val_tokens_limits_the_measurement(capsys):
    model, out = train(capsys, eval_interval=6, val_tokens=50)
    tokens = gpt2_encoding().encode_ordinary(open("text.txt", encoding="utf-8").read())
    val = np.array(tokens[len(tokens) * 9 // 10 :][:51])
    assert f"val loss: {evaluate(model, val, 2, 16, 'float32'):.6f}" in out


@pytest.mark.parametrize("compile", [False, True])
def test_evaluation_and_samples_change_nothing(capsys, compiler, compile):
    model, out = train(capsys, compile=compile)
    other, with_all = train(capsys, compile=compile, eval_interval=1, sample_interval=1)
    assert losses(with_all) == losses(out) and len(losses(out)) == 6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert with_all.count("val loss") == 7 and with_all.count("\n> Hello, I'm a language model,") == 28


def test_samples_are_the_models(capsys):
    model, out = train(capsys, sample_interval=4)
    texts = train_gpt2.sample(model, gpt2_encoding(), "Hello, I'm a language model,")
    assert out.endswith("".join(f"> {text}\n" for text in texts)) and len(set(texts)) == 4
    assert out.count("\n> Hello, I'm a language model,") == 12  # at 0, 4 and 6


EXAMPLES = os.path.join(os.path.dirname(__file__), "hellaswag.jsonl")


def test_hellaswag_in_a_run(capsys):
    with open(EXAMPLES, encoding="utf-8") as source, open("hellaswag_val.jsonl", "w", encoding="utf-8") as f:
        f.writelines(source.readlines()[:20])
    examples = hellaswag.read_examples()
    plain, out = train(capsys)
    model, with_hellaswag = train(capsys, hellaswag_interval=4)
    found = re.findall(r"^step +(\d+) \| HellaSwag: (\d+) of 20 right = (\d\.\d{4})$", with_hellaswag, re.M)
    assert [int(step) for step, _, _ in found] == [0, 4, 6]
    right = hellaswag.count_right(model, gpt2_encoding(), examples)[1]
    assert (int(found[2][1]), float(found[2][2])) == (right, round(right / 20, 4))
    assert losses(with_hellaswag) == losses(out)


def test_no_evaluation_makes_it_compile_again(capsys, compiler):
    from torch._dynamo.utils import counters

    with open(EXAMPLES, encoding="utf-8") as source, open("hellaswag_val.jsonl", "w", encoding="utf-8") as f:
        f.writelines(source.readlines()[:3])
    torch._dynamo.reset()
    counters.clear()
    train(capsys, compile=True, max_steps=3, eval_interval=1, hellaswag_interval=1, sample_interval=1, checkpoint_interval=1)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["recompiles"]  # can_compile's trial; the model


def test_hellaswag_that_cannot_be_had_ends_the_run_before_it_begins(capsys, monkeypatch):
    def download():
        raise OSError("no way there")
    monkeypatch.setattr(hellaswag, "download", download)
    with pytest.raises(SystemExit) as end:
        train(capsys, hellaswag_interval=4)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and "| loss" not in out
    assert err == "train_gpt2.py: --hellaswag_interval 4 (0 does without HellaSwag): no way there\n"


def test_the_log(capsys, tmp_path):
    _, out = train(capsys, eval_interval=4)
    printed = re.findall(r"^step +(\d+) \| (val )?loss: (\d+\.\d{6})", out, re.M)
    assert (tmp_path / "log" / "log.txt").read_text() == "".join(
        f"{step} {'val' if val else 'train'} {loss}\n" for step, val, loss in printed)
    assert len(printed) == 6 + 3


def test_an_earlier_run_is_kept(capsys, tmp_path):
    logs = []
    for seed in (1, 2, 3):
        _, out = train(capsys, seed=seed, max_steps=1)
        logs.append((tmp_path / "log" / "log.txt").read_bytes())
    assert "log held an earlier run, which is in log.2 now\n" in out
    assert [(tmp_path / name / "log.txt").read_bytes() for name in ("log.1", "log.2", "log")] == logs
    assert len(set(logs)) == 3


def test_a_log_folder_that_cannot_be_written(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        train(capsys, log_dir="text.txt/log")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and "| loss" not in out
    assert err == "train_gpt2.py: --log_dir text.txt/log: Not a directory\n"


def test_a_checkpoint_needs_nothing_of_ours(capsys, tmp_path):
    model, out = train(capsys, checkpoint_interval=4)
    assert sorted(os.listdir("log")) == ["log.txt", "model_00000.pt", "model_00004.pt", "model_00006.pt"]  # the last one too
    assert "step     6 | saved log/model_00006.pt\n" in out
    (tmp_path / "read.py").write_text(
        "import sys, torch\n"
        "checkpoint = torch.load('log/model_00006.pt')\n"
        "assert 'train_gpt2' not in sys.modules\n"
        "print(checkpoint['step'], checkpoint['model_config'], *checkpoint['model'])\n")
    done = subprocess.run([sys.executable, "-P", "read.py"], capture_output=True, text=True, timeout=100)
    assert done.stdout == f"6 {train_gpt2.asdict(model.config)} {' '.join(model.state_dict())}\n", done.stderr
    loaded, _ = load_checkpoint("log/model_00006.pt")
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))


def test_a_run_from_a_checkpoint(capsys):
    model, _ = train(capsys, checkpoint_interval=6)
    _, out = train(capsys, init_from="log/model_00006.pt", log_dir="log2", max_lr=1e-30, eval_interval=6)
    tokens = gpt2_encoding().encode_ordinary(open("text.txt", encoding="utf-8").read())
    val = np.array(tokens[len(tokens) * 9 // 10 :])
    assert f"step     0 | val loss: {evaluate(model, val, 2, 16, 'float32'):.6f}" in out


def test_hellaswag_py_scores_a_checkpoint(capsys):
    model, _ = train(capsys, checkpoint_interval=6)
    hellaswag.main(["-m", "log/model_00006.pt", "--data", EXAMPLES, "--limit", "20", "-d", "cpu"])
    right = hellaswag.count_right(model, gpt2_encoding(), hellaswag.read_examples(EXAMPLES)[:20])
    assert [f"{n / 20:.4f}" for n in right] == re.findall(r"(\d\.\d{4}) \+-", capsys.readouterr().out)


@pytest.mark.parametrize("way", ["flipped", "cut", "empty", "text", "other", "gone"])
def test_a_damaged_checkpoint_is_one_line(capsys, way):
    train(capsys, checkpoint_interval=6, max_steps=1)
    path = "log/model_00001.pt"
    data = bytearray(open(path, "rb").read())
    data[len(data) // 2] ^= 1
    damaged = dict(flipped=data, cut=data[: len(data) // 2], empty=b"", text=b"To be, or not to be")
    if way in damaged:
        open(path, "wb").write(damaged[way])
    elif way == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        os.remove(path)
    for run in (lambda: train(capsys, init_from=path, log_dir="log2"),
                lambda: hellaswag.main(["-m", path, "--data", EXAMPLES, "-d", "cpu"])):
        with pytest.raises(SystemExit) as end:
            run()
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1 and path in err
        assert way == "gone" or "is damaged, or no checkpoint of train_gpt2.py" in err
    assert not os.path.exists("log2")


EVERYTHING = dict(eval_interval=3, sample_interval=10, checkpoint_interval=1, keep_checkpoints=100, val_tokens=200)


def resume_each(capsys, settings, steps):
    """Train, then go on from the checkpoints after steps, as if the run had stopped there: all has to be the same."""
    model, whole = train(capsys, **EVERYTHING, **settings)
    shutil.copytree("log", "whole")
    last = torch.load(max(f"whole/{name}" for name in os.listdir("whole") if name.endswith(".pt")))
    for k in steps:
        shutil.rmtree("log")
        shutil.copytree("whole", "log")  # its log is longer than it was at step k
        for name in os.listdir("log"):
            if name.endswith(".pt") and int(name[6:-3]) > k:
                os.remove(f"log/{name}")
        capsys.readouterr()
        resumed = main(TrainConfig(resume=True))
        out = re.sub(r"dt: .*|(at this pace|device:).*\n", "", capsys.readouterr().out)
        assert open("log/log.txt").read() == open("whole/log.txt").read()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
        assert f"going on from log/model_{k:05d}.pt: {k} of {last['step']} updates are done\n" in out
        saved = f"step {k:5d} | saved log/model_{k:05d}.pt\n"
        assert out.split("updates are done\n")[1] == whole.split(saved)[1]  # the same losses, samples, evaluations
        again = torch.load(f"log/model_{last['step']:05d}.pt")
        assert again["position"] == last["position"]
        states = [torch.cat([v.flatten() for state in c["optimizer"]["state"].values() for v in state.values()])
                  for c in (again, last)]
        assert torch.equal(*states)


@pytest.mark.parametrize("shuffle", [False, True])
def test_resume_over_shards(capsys, shuffle):
    fineweb.start_worker(gpt2_encoding())
    texts = [fineweb.tokenize([text])[0] for text in hub.make_documents(20)]
    os.mkdir("shards")
    for i, (shard, _, _) in enumerate(fineweb.cut(texts, 300)):
        fineweb.write_shard("shards", i, shard)
    _, out = train(capsys, data="shards", max_steps=1, shuffle=shuffle)
    per_epoch = int(re.search(r"1 epoch = (\d+)\.0 updates", out)[1])
    assert 20 < per_epoch < 40
    # 300 tokens are 4.7 updates of 64: stops within a shard, just after the update that crosses its end, and around the
    # epoch's end
    resume_each(capsys, dict(data="shards", shuffle=shuffle, max_steps=per_epoch + 4), [2, 5, per_epoch - 1, per_epoch, per_epoch + 1])


def test_resume_compiled(capsys, compiler):
    resume_each(capsys, dict(compile=True), [3])


def test_flags_win_over_the_checkpoint_but_for_the_shape(capsys):
    train(capsys, checkpoint_interval=3, weight_decay=0.5)
    capsys.readouterr()
    main(TrainConfig(resume=True, max_steps=8, eval_interval=8))
    out = capsys.readouterr().out
    assert "6 of 8 updates are done" in out and "weight decay 0.5" in out
    assert out.count("| loss: ") == 2 and out.count("val loss") == 1
    assert torch.load("log/model_00008.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    main(TrainConfig(resume=True, max_steps=9, weight_decay=0.25))
    assert torch.load("log/model_00009.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0.25
    capsys.readouterr()
    for name, begun in (("model", "laptop"), ("init_from", "scratch")):
        with pytest.raises(SystemExit) as end:
            main(TrainConfig(resume=True, **{name: "gpt2"}))
        assert end.value.code == 2
        assert capsys.readouterr().err == (
            f"train_gpt2.py: --{name} gpt2: the run in log was begun with {begun}; leave the flag out\n")


def test_a_flag_given_at_its_default_wins_too(capsys):
    train(capsys, checkpoint_interval=1, keep_checkpoints=9, shuffle=False, seed=7)
    assert len(os.listdir("log")) == 8
    main(train_gpt2.parse_flags(["--resume", "--max_steps", "7", "--keep_checkpoints", "3", "--shuffle"]))
    assert sorted(os.listdir("log")) == ["log.txt", "model_00005.pt", "model_00006.pt", "model_00007.pt"]
    config = torch.load("log/model_00007.pt")["train_config"]
    assert config["shuffle"] and config["seed"] == 7


def test_resume_where_nothing_can_be_resumed(capsys):
    with pytest.raises(SystemExit) as end:
        main(TrainConfig(resume=True))
    assert end.value.code == 2
    assert capsys.readouterr().err == "train_gpt2.py: --resume: no run began in log; leave the flag out to begin one\n"
    assert not os.path.exists("log")


def test_resume_of_a_run_that_saved_nothing(capsys):
    train(capsys)
    whole = open("log/log.txt").read()
    _, out = train(capsys, resume=True)
    assert "the run in log has no whole checkpoint: starting at step 0\n" in out
    assert open("log/log.txt").read() == whole == open("log.1/log.txt").read()


def plant(monkeypatch, steps, way):
    """Spoil the first of the two micro-batches of these steps: its loss, or its gradient alone."""
    forward, calls = GPT.forward, iter(range(10**6))

    def spoilt(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        if torch.is_grad_enabled() and next(calls) in [2 * step for step in steps]:
            loss = loss * math.nan if way == "loss" else loss + (0 * loss).sqrt()  # 0, and its slope is not
        return logits, loss
    monkeypatch.setattr(GPT, "forward", spoilt)


@pytest.mark.parametrize("way", ["loss", "gradient"])
def test_a_number_gone_bad_never_reaches_the_weights(capsys, monkeypatch, way):
    plant(monkeypatch, [2, 4], way)
    _, out = train(capsys, checkpoint_interval=1, max_steps=6, keep_checkpoints=9)
    assert re.findall(r"^step +(\d+) .* norm: nan \|", out, re.M) == ["2", "4"]
    assert ("2 train nan\n" in open("log/log.txt").read()) == (way == "loss")
    saved = [torch.load(f"log/model_0000{n}.pt") for n in range(1, 7)]
    for n in range(1, 6):
        a, b = saved[n - 1], saved[n]  # before and after step n
        same = [torch.equal(a["model"][name], b["model"][name]) for name in a["model"]]
        same += [torch.equal(a["optimizer"]["state"][i][name], b["optimizer"]["state"][i][name])
                 for i in a["optimizer"]["state"] for name in ("step", "exp_avg", "exp_avg_sq")]
        assert all(same) if n in (2, 4) else not any(same)
        assert b["position"] == a["position"] + 64 and b["skipped"] == (n in (2, 4))


def test_bad_numbers_that_go_on_stop_the_run(capsys, monkeypatch):
    plant(monkeypatch, [0, 2, 3, 4, 5, 6], "loss")
    with pytest.raises(SystemExit) as end:
        train(capsys, checkpoint_interval=2, max_steps=20)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and re.findall(r"skipped, (\d) in a row", out) == ["1", "1", "2", "3", "4", "5"]
    assert re.fullmatch(r"train_gpt2\.py: step 6: loss or gradient was no finite number 5 times in a row, last in the text "
                        r"at token [\d,]+; the weights are those of step 2\. A lower --max_lr may help, or another --seed\n", err)
    last, before = load_checkpoint("log/model_00006.pt")[0], load_checkpoint("log/model_00002.pt")[0]
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), before.parameters()))
    assert sorted(os.listdir("log"))[-1] == "model_00006.pt"


def test_the_newest_checkpoints_are_kept_and_every_5000th(capsys):
    train(capsys, checkpoint_interval=1, max_steps=5)
    assert sorted(os.listdir("log")) == ["log.txt", "model_00003.pt", "model_00004.pt", "model_00005.pt"]
    checkpoint = torch.load("log/model_00005.pt") | dict(step=4998)
    for name in ("model_00003.pt", "model_00004.pt", "model_00005.pt"):
        os.remove(f"log/{name}")
    torch.save(checkpoint, "log/model_04998.pt")
    main(TrainConfig(resume=True, max_steps=5004, keep_checkpoints=2))
    assert sorted(os.listdir("log")) == ["log.txt", "model_05000.pt", "model_05003.pt", "model_05004.pt"]


def test_a_checkpoint_every_so_many_minutes(capsys):
    train(capsys, checkpoint_minutes=1e-9, max_steps=3, keep_checkpoints=9)
    assert sorted(os.listdir("log")) == ["log.txt", *(f"model_0000{step}.pt" for step in range(4))]


def test_no_damage_of_a_checkpoint_goes_unseen(capsys, tmp_path):
    train(capsys, checkpoint_interval=2, max_steps=2)
    whole = load_checkpoint("log/model_00002.pt")[1]
    data = (tmp_path / "log" / "model_00002.pt").read_bytes()
    directory = data[-20_000:]  # names, places, sizes: less than a hundredth of the file, and most of its pitfalls
    seen = 0
    for spoilt in [*damaged(data, 10, 50), *(data[:-20_000] + end for end in damaged(directory, 10, 60))]:
        (tmp_path / "spoilt.pt").write_bytes(spoilt)
        try:
            _, checkpoint = load_checkpoint("spoilt.pt")
        except ValueError as e:
            assert str(e).startswith("spoilt.pt is damaged, or no checkpoint of train_gpt2.py: ") and "\n" not in str(e)
            seen += 1
        else:  # a date, say, or the space between two records
            assert str(checkpoint) == str(whole)
            assert all(torch.equal(a, b) for a, b in zip(checkpoint["model"].values(), whole["model"].values()))
    assert seen > 60


@pytest.mark.parametrize("spoil", [lambda log: log[:40], lambda log: log.replace(b"train", b"tra\xffn"), lambda log: b"",
                                   lambda log: None])
def test_a_damaged_log_is_made_anew(capsys, tmp_path, spoil):
    train(capsys, checkpoint_interval=2)
    path = tmp_path / "log" / "log.txt"
    whole = path.read_bytes()
    os.remove("log/model_00006.pt")
    spoilt = spoil(whole)
    path.unlink() if spoilt is None else path.write_bytes(spoilt)
    main(TrainConfig(resume=True))
    assert path.read_bytes() == whole
    assert capsys.readouterr().err == "warning: log/log.txt isn't what was logged; the checkpoint has that\n"
    assert (tmp_path / "log" / "log.txt.damaged").read_bytes() == (spoilt or b"")


def test_a_damaged_checkpoint_is_passed_over_and_kept(capsys, tmp_path):
    model, _ = train(capsys, checkpoint_interval=2, max_steps=8)
    whole = open("log/log.txt").read()
    torn = {name: data[: len(data) // 3] for name in ("model_00006.pt", "model_00008.pt")
            if (data := (tmp_path / "log" / name).read_bytes())}
    for name, data in torn.items():
        (tmp_path / "log" / name).write_bytes(data)
    capsys.readouterr()
    resumed = main(TrainConfig(resume=True))
    out, err = capsys.readouterr()
    assert "going on from log/model_00004.pt: 4 of 8 updates are done\n" in out
    lines = err.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"warning: passed over: log/{name} is damaged")
                                   for line, name in zip(lines, ("model_00008.pt", "model_00006.pt")))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
    assert open("log/log.txt").read() == whole
    for name, data in torn.items():
        assert (tmp_path / "log" / (name + ".damaged")).read_bytes() == data
        load_checkpoint(f"log/{name}")


def test_the_plan(capsys):
    _, out = train(capsys, max_steps=12, checkpoint_interval=12)
    matrices = 50304 * 16 + 2 * 12 * 16 * 16  # lm_head, and two blocks
    flops = 12 * 64 * (6 * matrices + 12 * 2 * 16 * 16)
    size = os.path.getsize("log/model_00012.pt")
    found = re.search(r"plan: 12 updates = 768 tokens = (\S+) epochs = (\S+) FLOPs; memory: about (\S+) GB for each process, "
                      r"(\S+) of them for the micro-batch; disk: up to (\S+) GB of checkpoints\n", out).groups()
    assert found[1] == f"{flops:.2e}" and float(found[4]) == pytest.approx(4 * size / 1e9, abs=0.06)
    assert float(found[0]) == pytest.approx(768 / (5283 // 64 * 64), abs=0.01)


def test_when_it_will_end_is_said_after_ten_steps(capsys):
    capsys.readouterr()
    main(TrainConfig(data="text.txt", model="laptop", batch_size=2, seq_len=16, total_batch_size=64, max_steps=12,
                     dtype="float32", device="cpu", eval_interval=0, sample_interval=0, checkpoint_interval=0))
    assert re.search(r"step +9 \| .*\nat this pace the updates end in 0 minutes\nstep +10", capsys.readouterr().out)


def test_a_disk_too_small(capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 30_000_000))
    with pytest.raises(SystemExit) as end:
        train(capsys, checkpoint_interval=2)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and "| loss" not in out and os.listdir("log") == []
    assert err == ("train_gpt2.py: --log_dir log: its disk has 0.03 GB free, and the checkpoints will take 0.04 GB; make room, "
                   "or lower --keep_checkpoints\n")
    train(capsys, checkpoint_interval=2, keep_checkpoints=1)


def test_a_full_disk_is_one_line_and_older_checkpoints_are_whole(tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    (tmp_path / "log").mkdir()
    (tmp_path / "probe.py").write_text(
        "import shutil, train_gpt2\n"
        "train_gpt2.SIZES['laptop'] = dict(n_layer=2, n_head=2, n_embd=16)\n"
        "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(0, 0, 10**12)  # others fill the disk later\n"
        "train_gpt2.main(train_gpt2.parse_flags())\n")
    flags = ("--data text.txt --batch_size 2 --seq_len 16 --total_batch_size 64 --max_steps 6 --device cpu --dtype float32 "
             "--sample_interval 0 --eval_interval 0 --checkpoint_interval 2 --log_dir small/log")
    command = (f"mkdir small && mount -t tmpfs -o size=30m none small && {sys.executable} probe.py {flags}; echo $?; "
               f"cp -r small/log/* log; ls log; {sys.executable} -c \"import torch; torch.load('log/model_00004.pt')\"")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                          env=dict(os.environ, PYTHONPATH=os.path.dirname(INPUT)))
    assert done.stderr == "probe.py: --log_dir small/log: No space left on device\n"
    assert done.stdout.split()[-5:] == ["2", "log.txt", "model_00000.pt", "model_00002.pt", "model_00004.pt"]
