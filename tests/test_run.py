"""What a run does beside training: evaluations, the log, checkpoints, and going on from them."""
import errno
import gc
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
from conftest import EXAMPLES, ROOT, SHAPE, SMALL, damaged, flags, losses, val_losses
from filelock import FileLock

import fineweb
import hellaswag
import train_gpt2
from fineweb import UserError, gpt2_encoding
from train_gpt2 import GPT, GPTConfig, evaluate, launch, load_checkpoint

LOG = Path("log/log.txt")


def text_tokens():
    """Return the tokens of text.txt: (those to train on, those to validate on)."""
    tokens = gpt2_encoding().encode_ordinary(Path("text.txt").read_text(encoding="utf-8"))
    split = len(tokens) * 9 // 10
    return np.array(tokens[:split]), np.array(tokens[split:])


def take_examples(n):
    """Put n of HellaSwag's examples where a run looks for them; return them as a run reads them."""
    lines = Path(EXAMPLES).read_text(encoding="utf-8").splitlines(keepends=True)
    Path("hellaswag_val.jsonl").write_text("".join(lines[:n]), encoding="utf-8")
    return hellaswag.load_examples(1024)


def same(model, other):
    """Tell whether two models have the same weights, to the last bit."""
    pairs = zip(model.parameters(), other.parameters())
    return all(torch.equal(a, b) for a, b in pairs)


def files(folder):
    """Return the names in folder, sorted, without the lock."""
    return sorted(name for name in os.listdir(folder) if name != ".lock")


def spoil(path):
    """Flip a bit in the middle of a file."""
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 1
    Path(path).write_bytes(data)


# -----------------------------------------------------------------------------
# Evaluations


@pytest.mark.parametrize("B, T", [(1, 16), (3, 16), (4, 8)])
def test_validation_loss_is_that_of_every_token_once(B, T):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, block_size=16, vocab_size=100))
    tokens = np.random.default_rng(0).integers(100, size=103).astype(np.uint16)
    total = 0.0
    for start in range(0, 102, T):  # 102 to predict: no multiple of T
        row = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))
        with torch.no_grad():
            logits, _ = model(row[None, :-1])
        logprobs = logits[0].log_softmax(-1)
        total -= logprobs.gather(1, row[1:, None]).sum().item()
    assert evaluate(model, tokens, B, T) == pytest.approx(total / 102, abs=1e-5)


def test_validation_on_less_than_a_row():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, block_size=16))
    tokens = np.array([464, 3290, 318], dtype=np.uint16)
    _, loss = model(torch.tensor([[464, 3290]]), torch.tensor([[3290, 318]]))
    assert evaluate(model, tokens, 2, 16) == pytest.approx(loss.item(), abs=1e-6)


def test_bits_per_byte_and_the_log(train):
    model, out = train(eval_interval=4)
    pattern = r"^step +(\d+) \| val loss: (\d+\.\d{6}) \| bits per byte: (\d+\.\d{4})$"
    found = re.findall(pattern, out, re.M)
    assert [int(step) for step, _, _ in found] == [0, 4, 6]  # and after the last update
    _, val = text_tokens()
    size = len(gpt2_encoding().decode_bytes(val[1:].tolist()))
    assert size > 1500
    for _, loss, bits in found:
        expected = float(loss) / math.log(2) * (len(val) - 1) / size
        assert float(bits) == pytest.approx(expected, abs=1e-4)
    assert float(found[2][1]) == pytest.approx(evaluate(model, val, 7, 16), abs=1e-5)
    assert float(found[2][1]) < float(found[0][1]) - 0.2

    printed = re.findall(r"^step +(\d+) \| (val )?loss: (\d+\.\d{6})", out, re.M)
    lines = [f"{step} {'val' if val else 'train'} {loss}\n" for step, val, loss in printed]
    assert LOG.read_text() == "".join(lines)
    assert len(lines) == 6 + 3


def test_end_of_text_has_no_bytes(train):
    os.mkdir("shards")
    document = [50256, 464, 3290, 50256, 464, 3797]  # The dog, The cat
    for number in range(2):
        fineweb.write_shard("shards", number, np.array(document * 50, dtype=np.uint16))
    _, out = train(data="shards", eval_interval=1, max_steps=1)
    loss, bits = re.search(r"val loss: (\S+) \| bits per byte: (\S+)", out).groups()
    size = 50 * len("The dogThe cat")
    assert float(bits) == pytest.approx(float(loss) / math.log(2) * 299 / size, abs=1e-4)


def test_a_validation_shard_without_text_has_no_bits_per_byte(train):
    os.mkdir("shards")
    fineweb.write_shard("shards", 0, np.full(100, 50256, dtype=np.uint16))
    fineweb.write_shard("shards", 1, np.arange(500, dtype=np.uint16))
    _, out = train(data="shards", eval_interval=1, max_steps=1)
    assert len(val_losses(out)) == 2 and "bits per byte" not in out


def test_a_validation_shard_of_one_token_is_refused(train, fails):
    os.mkdir("shards")
    fineweb.write_shard("shards", 0, np.array([50256], dtype=np.uint16))
    fineweb.write_shard("shards", 1, np.arange(500, dtype=np.uint16))
    assert "--data shards" in fails(train, data="shards")


def test_val_tokens_limits_the_measurement(train):
    model, out = train(eval_interval=6, val_tokens=50)
    _, val = text_tokens()
    assert val_losses(out)[-1] == f"{evaluate(model, val[:51], 2, 16):.6f}"


def test_evaluations_change_nothing(train):
    examples = take_examples(20)
    shape = dict(seq_len=256, total_batch_size=512)
    model, out = train(**shape)
    intervals = dict(eval_interval=1, sample_interval=4, hellaswag_interval=4)
    other, with_all = train(**shape, **intervals)
    assert same(model, other)
    assert losses(with_all) == losses(out) and len(losses(out)) == 6
    assert len(val_losses(with_all)) == 7

    texts = train_gpt2.sample(model, "Hello, I'm a language model,")
    assert len(set(texts)) == 4
    assert with_all.endswith("".join(f"> {text}\n" for text in texts))
    assert with_all.count("\n> Hello, I'm a language model,") == 12  # at 0, 4 and 6

    pattern = r"^step +(\d+) \| HellaSwag: (\d+) of 20 right = (\d\.\d{4})$"
    found = re.findall(pattern, with_all, re.M)
    assert [int(step) for step, _, _ in found] == [0, 4, 6]
    right = hellaswag.count_right(model, examples)
    assert found[2] == ("6", str(right), f"{right / 20:.4f}")
    assert f"\n6 hella {right / 20:.6f}\n" in LOG.read_text()


def test_hellaswag_that_cannot_be_had_ends_the_run_before_it_begins(train, fails, monkeypatch):
    def urlopen(*args, **kwargs):
        raise OSError("no way there")
    monkeypatch.setattr(hellaswag.urllib.request, "urlopen", urlopen)
    message = fails(train, hellaswag_interval=4)
    assert "--hellaswag_interval 0" in message and "no way there" in message
    assert not LOG.exists()


def test_hellaswag_that_is_too_long_for_the_model(train, fails):
    take_examples(20)
    message = fails(train, hellaswag_interval=4)  # the model reads seq_len tokens
    assert "--hellaswag_interval 0" in message and "reads 16" in message
    assert not LOG.exists()


# -----------------------------------------------------------------------------
# The folder


def test_an_earlier_run_is_put_aside_and_nothing_else(train):
    os.makedirs("log/mine")
    others = ["mine", "model_best.pt", "notes.txt"]
    for name in others[1:]:
        Path("log", name).write_text(name)
    for seed in (1, 2, 3):
        _, out = train(seed=seed, max_steps=1, checkpoint_interval=1)
    assert "log.2" in out
    ours = ["log.txt", "model_00000.pt", "model_00001.pt"]
    assert files("log") == sorted(["log.1", "log.2", *others, *ours])
    assert files("log/log.1") == files("log/log.2") == ours
    logs = [Path(folder, "log.txt").read_text() for folder in ("log/log.1", "log/log.2", "log")]
    assert len(set(logs)) == 3
    assert load_checkpoint("log/log.1/model_00001.pt")["train_config"]["seed"] == 1


def test_the_folder_may_be_the_one_we_are_in(train):
    for seed in (1, 2):
        train(seed=seed, max_steps=1, checkpoint_interval=1, log_dir=".")
    ours = ["log.txt", "model_00000.pt", "model_00001.pt"]
    assert files(".") == sorted(["log.1", "text.txt", *ours]) and files("log.1") == ours


def test_a_log_folder_that_cannot_be_written(train, fails):
    assert "--log_dir text.txt/log" in fails(train, log_dir="text.txt/log")


def test_a_folder_in_which_a_run_is_at_work_is_refused(train, fails):
    train(checkpoint_interval=3)
    before = {name: Path("log", name).read_bytes() for name in files("log")}
    with FileLock("log/.lock"):
        for resume in (False, True):
            assert "--log_dir log" in fails(train, resume=resume)
    assert {name: Path("log", name).read_bytes() for name in files("log")} == before


@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_is_a_warning(train, capsys, monkeypatch, code):
    import fcntl

    def flock(*args):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    monkeypatch.setattr(fcntl, "flock", flock)
    launch(SMALL | dict(max_steps=1))
    out, err = capsys.readouterr()
    assert len(losses(out)) == 1
    assert [line.startswith("warning: log ") for line in err.splitlines()] == [True]


def test_a_run_that_ended_by_an_error_holds_nothing(train, fails, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def crashes(*args):
        raise ZeroDivisionError
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "get_lr", crashes)
        with pytest.raises(ZeroDivisionError) as error:  # which keeps all that launch() had
            train()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    train(max_steps=1)
    assert error.value is not None


# -----------------------------------------------------------------------------
# The log


def test_a_log_that_cannot_be_written_is_one_warning(train, capsys, monkeypatch):
    get_lr = train_gpt2.get_lr

    def spoils(step, cfg):
        if step == 1:
            os.remove(LOG)
            os.mkdir(LOG)  # a folder has its name now
        return get_lr(step, cfg)
    monkeypatch.setattr(train_gpt2, "get_lr", spoils)
    launch(SMALL | dict(max_steps=3, eval_interval=1))
    out, err = capsys.readouterr()
    assert len(losses(out)) == 3
    warnings = [line for line in err.splitlines() if "log.txt" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: ")


def test_a_log_that_is_removed_or_spoilt_is_written_on(train):
    model, _ = train(checkpoint_interval=3)
    whole = LOG.read_bytes()
    os.remove("log/model_00006.pt")
    LOG.write_bytes(whole + b"\xff\xfe\n7 tra")
    resumed, _ = train(resume=True)
    assert LOG.read_bytes() == whole and same(model, resumed)
    os.remove("log/model_00006.pt")
    os.remove(LOG)
    train(resume=True)
    assert LOG.read_bytes() == b"".join(whole.splitlines(keepends=True)[3:])


# -----------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_needs_nothing_of_ours(train):
    model, out = train(checkpoint_interval=4)
    names = ["log.txt", "model_00000.pt", "model_00004.pt", "model_00006.pt"]
    assert files("log") == names  # the last one too
    assert "step     6 | saved log/model_00006.pt\n" in out
    checkpoint = torch.load("log/model_00006.pt", weights_only=True)
    assert checkpoint["step"] == 6
    assert checkpoint["model_config"] == train_gpt2.asdict(model.config)
    assert list(checkpoint["model"]) == list(model.state_dict())
    loaded = train_gpt2.model_of(load_checkpoint("log/model_00006.pt"))
    assert loaded.config == model.config and same(loaded, model)


def test_a_run_and_hellaswag_start_from_a_checkpoint(train, capsys):
    model, _ = train(checkpoint_interval=6)
    settings = {name: value for name, value in SMALL.items() if name != "model"}
    for name in ("log/model_00006.pt", "log"):
        launch(settings | dict(init_from=name, log_dir="log2", max_steps=1, eval_interval=1))
        _, val = text_tokens()
        assert val_losses(capsys.readouterr().out)[0] == f"{evaluate(model, val, 2, 16):.6f}"

    model, _ = train(checkpoint_interval=6, seq_len=256, total_batch_size=512, max_steps=1)
    hellaswag.main(["-m", "log/model_00001.pt", "--data", EXAMPLES, "--limit", "20", "-d", "cpu"])
    shown = re.findall(r"mean loss per token +(\d\.\d{4}) \+-", capsys.readouterr().out)
    right = hellaswag.count_right(model, take_examples(20))
    assert shown == [f"{right / 20:.4f}"]


def test_a_file_that_is_no_checkpoint_is_one_line(train, fails, capsys):
    train(checkpoint_interval=6, max_steps=1)
    whole = Path("log/model_00001.pt").read_bytes()
    for name, data in dict(cut=whole[: len(whole) // 2], empty=b"", text=b"To be").items():
        Path(f"{name}.pt").write_bytes(data)
    Path("flipped.pt").write_bytes(whole)
    spoil("flipped.pt")
    config = dict(n_layer=1, n_head=1, n_embd=8)
    nano = dict(model={}, optimizer={}, model_args=config, iter_num=1, best_val_loss=1.0, config={})
    torch.save(nano, "nano.pt")
    torch.save(dict(model={}, config=GPTConfig()), "pickled.pt")  # build-nanogpt's
    settings = {name: value for name, value in SMALL.items() if name != "model"}
    for name in ("cut", "empty", "text", "flipped", "nano", "pickled", "gone"):
        path = f"{name}.pt"
        message = fails(launch, settings | dict(init_from=path, log_dir="log2"))
        assert path in message
        assert "\x1b" not in message
        if name in ("nano", "pickled"):
            assert "another program" in message
    assert "flipped.pt" in fails(hellaswag.main, ["-m", "flipped.pt", "--data", EXAMPLES])
    assert files("log2") == []


def test_no_damage_of_a_checkpoint_goes_unseen(train):
    train(checkpoint_interval=2, max_steps=2)
    whole = load_checkpoint("log/model_00002.pt")
    data = Path("log/model_00002.pt").read_bytes()
    # The end has names, places and sizes: a hundredth of the file, and most of its pitfalls.
    body, end = data[:-20_000], data[-20_000:]
    seen = 0
    for spoilt in [*damaged(data, 5, 20), *(body + part for part in damaged(end, 5, 30))]:
        Path("spoilt.pt").write_bytes(spoilt)
        try:
            checkpoint = load_checkpoint("spoilt.pt")
        except UserError as error:
            assert "\n" not in str(error)
            seen += 1
        else:  # a date, say, or the space between two records
            assert str(checkpoint) == str(whole)
            pairs = zip(checkpoint["model"].values(), whole["model"].values())
            assert all(torch.equal(a, b) for a, b in pairs)
    assert seen > 30


def test_the_newest_checkpoints_are_kept_and_every_so_manieth(train, monkeypatch):
    monkeypatch.setattr(train_gpt2, "KEPT_FOR_GOOD", 2)
    train(checkpoint_interval=1, max_steps=7, keep_checkpoints=2)
    kept = [2, 4, 6, 7]
    assert files("log") == ["log.txt", *(f"model_0000{step}.pt" for step in kept)]


def test_a_checkpoint_every_so_many_minutes(train):
    train(checkpoint_minutes=1e-9, max_steps=3, keep_checkpoints=9)
    assert files("log") == ["log.txt", *(f"model_0000{step}.pt" for step in range(4))]


@pytest.mark.parametrize("minutes, saved", [(30.0, ["model_00000.pt", "model_00006.pt"]), (0.0, [])])
def test_the_end_is_saved_unless_saving_is_off(train, minutes, saved):
    train(checkpoint_interval=0, checkpoint_minutes=minutes)
    assert files("log") == ["log.txt", *saved]


def fail_to_save(monkeypatch, saves):
    """Have the disk fail at the saves of these numbers. The first save is number 0."""
    fsync = os.fsync
    number = -1

    def fails(fd):
        nonlocal number
        if os.fstat(fd).st_size > 10**6:  # log.txt is smaller
            number += 1
            if number in saves:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)
    monkeypatch.setattr(os, "fsync", fails)


def test_a_save_that_fails_is_a_warning_and_the_next_one_tries_again(train, capsys, monkeypatch):
    fail_to_save(monkeypatch, {1})  # at step 2
    launch(SMALL | dict(checkpoint_interval=2))
    out, err = capsys.readouterr()
    assert [line.startswith("warning: ") for line in err.splitlines()] == [True]
    assert "model_00002.pt" in err and os.strerror(errno.EIO) in err
    assert len(losses(out)) == 6
    assert files("log") == ["log.txt", "model_00000.pt", "model_00004.pt", "model_00006.pt"]
    load_checkpoint("log/model_00004.pt")


@pytest.mark.parametrize("first", [0, 3])  # at the beginning; at the end
def test_a_save_that_must_work_is_tried_three_times(train, fails, monkeypatch, first):
    step = 2 * first
    with monkeypatch.context() as patch:
        fail_to_save(patch, {first, first + 1})
        train(checkpoint_interval=2)
    assert train_gpt2.find_checkpoints("log")[0] == 6
    fail_to_save(monkeypatch, {first, first + 1, first + 2})
    message = fails(train, checkpoint_interval=2)
    assert "--log_dir log" in message and f"model_{step:05d}.pt" in message
    assert LOG.exists() == (step > 0)
    assert not list(Path("log").glob("*.tmp"))


def test_a_full_disk_is_one_line_and_older_checkpoints_are_whole(small, tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    Path("kept").mkdir()
    Path("probe.py").write_text(
        "import train_gpt2\n"
        f"train_gpt2.MODEL_SIZES['laptop'] = {SHAPE}\n"
        "train_gpt2.fineweb.run_program(train_gpt2.command)\n"
    )
    words = " ".join(flags(checkpoint_interval=2, log_dir="disk/log"))
    command = (f"mkdir disk && mount -t tmpfs -o size=30m none disk && "
               f"{sys.executable} probe.py {words}; echo status $?; cp disk/log/* kept")
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(["unshare", "-rm", "sh", "-c", command], env=env, capture_output=True,
                          text=True, timeout=100)
    *warnings, line = done.stderr.splitlines()
    assert len(warnings) == 3  # it was tried three times
    assert "status 2" in done.stdout and "Traceback" not in done.stderr
    assert line.startswith("probe.py: --log_dir disk/log") and os.strerror(errno.ENOSPC) in line
    assert all(line.startswith("warning: ") for line in warnings)
    found = [name for name in files("kept") if name.endswith(".pt")]
    assert found == ["model_00000.pt", "model_00002.pt", "model_00004.pt"]
    for name in found:
        load_checkpoint(f"kept/{name}")


# -----------------------------------------------------------------------------
# Going on

EVERYTHING = dict(
    eval_interval=3, sample_interval=10, checkpoint_interval=1, keep_checkpoints=100,
    val_tokens=200,
)


def state_of(checkpoint):
    """Return the optimizer's tensors and the scaler's numbers."""
    tensors = []
    for state in checkpoint["optimizer"]["state"].values():
        tensors += [value.flatten() for value in state.values()]
    return torch.cat(tensors), checkpoint["scaler"], checkpoint["step"]


def resume_each(train, settings, steps):
    """Train, then go on from the checkpoints of steps, as if the run had stopped there.

    All has to end the same. Returns the whole run's (model, text).
    """
    model, whole = train(**EVERYTHING | settings)
    shutil.copytree("log", "whole")
    newest = train_gpt2.find_checkpoints("whole")[0]
    last = torch.load(f"whole/model_{newest:05d}.pt")
    for k in steps:
        shutil.rmtree("log")
        shutil.copytree("whole", "log")  # its log is longer than it was at step k
        for number in train_gpt2.find_checkpoints("log"):
            if number > k:
                os.remove(f"log/model_{number:05d}.pt")
        resumed, out = train(resume=True)
        assert LOG.read_text() == Path("whole/log.txt").read_text()
        assert same(model, resumed)
        saved = f"step {k:5d} | saved log/model_{k:05d}.pt\n"
        assert "those of the checkpoint." in out
        _, begin, rest = out.partition(f"Going on after {k} of {newest} updates.\n")
        assert begin and rest.removeprefix(saved) == whole.split(saved)[1]  # losses, samples
        again = torch.load(f"log/model_{newest:05d}.pt")
        assert torch.equal(state_of(again)[0], state_of(last)[0])
        assert state_of(again)[1:] == state_of(last)[1:]
    return model, whole


@pytest.mark.parametrize("shuffle", [False, True])
def test_resume_over_shards(train, shuffle):
    documents = [fineweb.tokenize(text) for text in hub.make_documents(12)]
    tokens = np.concatenate(documents)
    os.mkdir("shards")
    for number, start in enumerate(range(0, len(tokens), 300)):
        fineweb.write_shard("shards", number, tokens[start : start + 300])
    arrays, _ = train_gpt2.load_data("shards")
    loader = train_gpt2.DataLoaderLite(arrays, 2, 16)
    epoch, more = divmod(loader.rows_per_epoch, 4)  # in updates
    assert 6 < epoch < 20 and more > 0
    settings = dict(data="shards", shuffle=shuffle, max_steps=epoch + 4)
    # A shard has 18 rows, which are 4.5 updates. So these are stops in a shard's middle, after the
    # update that crosses its end, and before the one that crosses the epoch's.
    resume_each(train, settings, [2, 5, epoch])


def test_resume_compiled_and_nothing_compiles_again(train, compiler):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, _ = train(compile=True, **EVERYTHING | dict(max_steps=5, sample_interval=2))
    # the trial, and the model
    assert counters["stats"]["unique_graphs"] == 2 and not counters["recompiles"]
    log = LOG.read_text()
    for number in (4, 5):
        os.remove(f"log/model_{number:05d}.pt")
    resumed, out = train(resume=True)
    assert "Going on after 3 of 5 updates." in out
    assert LOG.read_text() == log and same(model, resumed)


def test_resume_with_float16_and_an_overflow(train, monkeypatch):
    with monkeypatch.context() as patch:
        plant(patch, [2], "gradient")
        _, whole = train(dtype="float16", seq_len=4, total_batch_size=16, **EVERYTHING)
    before, after = (load_checkpoint(f"log/model_0000{step}.pt") for step in (2, 3))
    assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2
    unchanged = [torch.equal(before["model"][name], after["model"][name])
                 for name in before["model"]]
    assert all(unchanged)
    assert len(losses(whole)) == 6

    last = load_checkpoint("log/model_00006.pt")
    log = LOG.read_text()
    for number in (4, 5, 6):
        os.remove(f"log/model_0000{number}.pt")
    train(resume=True)  # just after the overflow
    again = load_checkpoint("log/model_00006.pt")
    assert LOG.read_text() == log
    assert torch.equal(state_of(again)[0], state_of(last)[0])
    assert state_of(again)[1:] == state_of(last)[1:]


def crash(function, *args, **kwargs):
    """Call a function that raises ZeroDivisionError, and leave nothing of it behind."""
    try:
        function(*args, **kwargs)
    except ZeroDivisionError:
        gc.collect()
        return
    pytest.fail("it did not crash")


@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_a_crash_in_an_evaluation_loses_nothing(train, monkeypatch, name):
    settings = dict(eval_interval=2, sample_interval=2, checkpoint_interval=2)
    model, whole = train(**settings)
    log = LOG.read_text()
    function = getattr(train_gpt2, name)
    calls = 0

    def crashes(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:  # at step 4
            raise ZeroDivisionError
        return function(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, name, crashes)
        crash(train, **settings)
    assert train_gpt2.find_checkpoints("log") == [4, 2, 0]
    resumed, out = train(resume=True)
    assert same(model, resumed) and LOG.read_text() == log  # each evaluation once
    assert len(losses(out)) == 2


def test_flags_win_over_the_checkpoint(train):
    train(checkpoint_interval=1, keep_checkpoints=9, seed=7, weight_decay=0.5)
    assert len(files("log")) == 8
    # What is given counts, and be it the default.
    words = "--resume --max_steps 8 --eval_interval 8 --keep_checkpoints 3".split()
    given, options = train_gpt2.parse_flags(words)
    _, out = train(resume=options.resume, **given)
    assert len(losses(out)) == 2 and len(val_losses(out)) == 1
    kept = ["log.txt", "model_00006.pt", "model_00007.pt", "model_00008.pt"]
    assert files("log") == kept
    checkpoint = load_checkpoint("log/model_00008.pt")
    config = checkpoint["train_config"]
    assert config["keep_checkpoints"] == 3 and config["seed"] == 7
    assert checkpoint["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    train(resume=True, max_steps=9, weight_decay=0.25)
    checkpoint = load_checkpoint("log/model_00009.pt")
    assert checkpoint["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


def test_what_the_machine_decides_is_decided_anew(small):
    machine = ("batch_size", "device", "dtype", "compile")
    settings = {name: value for name, value in SMALL.items() if name not in machine}
    launch(settings | dict(checkpoint_interval=1, max_steps=1, total_batch_size=256))
    config = load_checkpoint("log/model_00001.pt")["train_config"]
    assert [config[name] for name in machine] == [None] * 4


def test_the_folder_and_the_device_are_those_of_now(train, capsys):
    train(checkpoint_interval=6, timeout_minutes=3.0)
    os.rename("log", "renamed")
    launch(dict(log_dir="renamed", max_steps=8), resume=True)
    config = load_checkpoint("renamed/model_00008.pt")["train_config"]
    assert config["log_dir"] == "renamed" and config["timeout_minutes"] == 10.0
    assert config["device"] is None and not os.path.exists("log")


def test_what_a_run_was_begun_with_stays(train, fails):
    train(checkpoint_interval=6)
    before = files("log")
    assert "--model gpt2" in fails(train, resume=True, model="gpt2")
    assert "--init_from gpt2" in fails(train, resume=True, init_from="gpt2")
    for name, value in dict(seq_len=8, total_batch_size=128, seed=5, shuffle=False).items():
        assert f"--{name} {value}" in fails(train, resume=True, **{name: value})
    text = Path("text.txt").read_text(encoding="utf-8")
    Path("other.txt").write_text(text + " more", encoding="utf-8")
    assert "--data other.txt" in fails(train, resume=True, data="other.txt")
    Path("text.txt").write_text(text[::-1], encoding="utf-8")
    message = fails(train, resume=True, max_steps=8)
    assert "--data text.txt" in message and "--resume" in message
    assert files("log") == before
    Path("same.txt").write_text(text, encoding="utf-8")
    train(resume=True, data="same.txt", max_steps=8)


def test_shards_that_were_made_anew_are_other_data(train, fails):
    def make_shards(seed):
        shutil.rmtree("shards", ignore_errors=True)
        os.mkdir("shards")
        random = np.random.default_rng(seed)
        for number in range(2):
            tokens = random.integers(50257, size=500).astype(np.uint16)
            fineweb.write_shard("shards", number, tokens)
    make_shards(1)
    train(data="shards", checkpoint_interval=6)
    make_shards(2)
    assert "--data shards" in fails(train, resume=True, max_steps=8)
    make_shards(1)
    train(resume=True, max_steps=8)


def test_resume_begins_where_there_is_no_checkpoint(train):
    os.mkdir("log")
    LOG.write_text("0 train 1.0\n")  # of an earlier run
    launch(SMALL | dict(checkpoint_interval=6, max_steps=6), resume=True)
    assert files("log") == ["log.1", "log.txt", "model_00000.pt", "model_00006.pt"]
    assert Path("log/log.1/log.txt").read_text() == "0 train 1.0\n"


def test_resume_where_all_checkpoints_are_damaged(train, fails):
    train(checkpoint_interval=6)
    for number in (0, 6):
        spoil(f"log/model_{number:05d}.pt")
    before = {name: Path("log", name).read_bytes() for name in files("log")}
    assert "log" in fails(train, resume=True)
    assert {name: Path("log", name).read_bytes() for name in files("log")} == before


def test_a_checkpoint_of_another_version_is_refused(train, fails):
    train(checkpoint_interval=6)
    for number in (0, 6):
        checkpoint = load_checkpoint(f"log/model_{number:05d}.pt")
        checkpoint["train_config"]["of_the_future"] = 1
        torch.save(checkpoint, f"log/model_{number:05d}.pt")
    assert "another version" in fails(launch, dict(max_steps=8), resume=True)
    train_gpt2.load_model("log", "--init_from")  # its weights can be used


def test_a_damaged_checkpoint_is_passed_over(train, capsys):
    model, _ = train(checkpoint_interval=2, max_steps=8)
    log = LOG.read_text()
    for name in ("model_00006.pt", "model_00008.pt"):
        data = Path("log", name).read_bytes()
        Path("log", name).write_bytes(data[: len(data) // 3])
    capsys.readouterr()
    resumed = launch({}, resume=True)
    out, err = capsys.readouterr()
    assert "Going on after 4 of 8 updates" in out
    lines = err.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    assert ["model_00008.pt" in line for line in lines] == [True, False]
    assert ["model_00006.pt" in line for line in lines] == [False, True]
    assert same(model, resumed) and LOG.read_text() == log
    for name in ("model_00006.pt", "model_00008.pt"):
        load_checkpoint(f"log/{name}")


def test_a_run_lets_go_of_the_checkpoint_that_it_came_from(train, monkeypatch):
    train(checkpoint_interval=6)
    load, fetch = train_gpt2.load_checkpoint, train_gpt2.fetch_batch
    weights = []
    alive = []

    def load_checkpoint(path):
        checkpoint = load(path)
        weights.append(weakref.ref(checkpoint["model"]["lm_head.weight"]))
        return checkpoint

    def fetch_batch(*args):
        alive.append(weights[0]() is not None)
        return fetch(*args)
    monkeypatch.setattr(train_gpt2, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(train_gpt2, "fetch_batch", fetch_batch)
    train(resume=True, **SMALL | dict(max_steps=7))
    assert alive == [False] * 3


# -----------------------------------------------------------------------------
# Numbers that go bad


def plant(monkeypatch, steps, way):
    """Spoil the first of the two micro-batches of these steps: its loss, or its gradient alone."""
    forward = GPT.forward
    bad = {2 * step for step in steps}
    call = -1

    def spoilt(self, idx, targets=None):
        nonlocal call
        logits, loss = forward(self, idx, targets)
        if not torch.is_grad_enabled():
            return logits, loss
        call += 1
        if call in bad and way == "loss":
            loss = loss * math.nan
        elif call in bad:
            loss = loss + (0 * loss).sqrt()  # 0, and its slope is not
        return logits, loss
    monkeypatch.setattr(GPT, "forward", spoilt)


@pytest.mark.parametrize("way", ["loss", "gradient"])
def test_a_number_gone_bad_never_reaches_the_weights(train, capsys, monkeypatch, way):
    plant(monkeypatch, [2, 4], way)
    launch(SMALL | dict(checkpoint_interval=1, keep_checkpoints=9))
    out = capsys.readouterr().out
    assert re.findall(r"^step +(\d+) \| skipped: .* 1 in a row", out, re.M) == ["2", "4"]
    assert re.findall(r"^step +(\d+) .* norm: nan", out, re.M) == ["2", "4"]
    assert ("2 train nan\n" in LOG.read_text()) == (way == "loss")
    saved = [load_checkpoint(f"log/model_0000{number}.pt") for number in range(1, 7)]
    for step in range(1, 6):
        a, b = saved[step - 1], saved[step]  # before and after the step
        unchanged = [torch.equal(a["model"][name], b["model"][name]) for name in a["model"]]
        unchanged.append(torch.equal(state_of(a)[0], state_of(b)[0]))
        assert all(unchanged) if step in (2, 4) else not any(unchanged)


def test_bad_numbers_that_go_on_end_the_run_and_the_good_weights_are_saved(
        train, fails, monkeypatch):
    plant(monkeypatch, [0, 2, 3, 4, 5, 6], "loss")
    message = fails(train, checkpoint_interval=100, max_steps=20)
    assert "step 6" in message and "--max_lr" in message
    bad = [int(step) for step in re.findall(r"(\d+) train nan", LOG.read_text())]
    assert bad == [0, 2, 3, 4, 5, 6]
    assert train_gpt2.find_checkpoints("log") == [7, 0]
    saved = train_gpt2.model_of(load_checkpoint("log/model_00007.pt"))
    assert all(torch.isfinite(p).all() for p in saved.parameters())
    begun = train_gpt2.model_of(load_checkpoint("log/model_00000.pt"))
    assert not same(saved, begun)


@pytest.mark.parametrize("bad, updates", [(15, 18), (100, 17)])
def test_float16_may_halve_its_scale_often_at_the_start(
        small, capsys, fails, monkeypatch, bad, updates):
    plant(monkeypatch, range(bad), "gradient")
    settings = SMALL | dict(dtype="float16", seq_len=4, total_batch_size=16, max_steps=18,
                            checkpoint_interval=100)
    if bad == 15:
        launch(settings)
    else:
        message = fails(launch, settings)  # 2**16, halved 16 times, is 1
        assert f"step {updates - 1}" in message
    assert capsys.readouterr().out.count("skipped") == min(bad, updates)
    assert train_gpt2.find_checkpoints("log") == [updates, 0]
