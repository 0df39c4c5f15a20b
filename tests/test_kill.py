"""Runs that are killed, as by a power cut, and go on: in the end nothing shows of it.

    python tests/test_kill.py 50    # so many kills at random moments, and a fifth as many within a save
"""
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
context = multiprocessing.get_context("forkserver")  # a process that has imported torch, and forks those that train
context.set_forkserver_preload(["train_gpt2", "torch._dynamo"])  # which AdamW would import
FLAGS = "--data text.txt --no-compile --model laptop --batch_size 2 --seq_len 16 --total_batch_size 64 --max_steps 16 --max_lr 1e-2 " \
        "--warmup_steps 2 --dtype float32 --device cpu --eval_interval 4 --val_tokens 200 --sample_interval 0 " \
        "--checkpoint_interval 4"


def train(folder, flags, slow=0.1):
    """Be a process that trains a small model in folder, and takes `slow` seconds more in the midst of each save."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open("out.txt", "a", buffering=1)
    import train_gpt2

    save = train_gpt2.torch.save

    def save_slowly(state, f):
        save(state, f)
        size = f.tell()
        f.truncate(size // 2)  # as far as it might have come
        f.flush()
        time.sleep(slow)
        f.seek(0)
        save(state, f)

    train_gpt2.torch.save = save_slowly
    train_gpt2.SIZES["laptop"] = dict(n_layer=2, n_head=2, n_embd=16)
    train_gpt2.main(train_gpt2.parse_flags((FLAGS + flags).split()))


def start(folder, flags=""):
    process = context.Process(target=train, args=(str(folder), flags))
    process.start()
    return process


def finish(process):
    process.join(100)
    assert process.exitcode == 0, process.exitcode


def result(folder):
    """Return what a finished run leaves: its log, and the bytes of its weights and of AdamW's averages."""
    checkpoint = torch.load(folder / "log" / "model_00016.pt")
    tensors = [*checkpoint["model"].values(), *(t for s in checkpoint["optimizer"]["state"].values() for t in s.values())]
    return [(folder / "log" / "log.txt").read_bytes()] + [t.numpy().tobytes() for t in tensors]


def make_folder(folder):
    folder.mkdir()
    (folder / "text.txt").write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return folder


def state(folder):
    """Return what a run that was just killed in folder was at."""
    names = os.listdir(folder / "log") if (folder / "log").exists() else []
    if any(name.endswith(".pt.tmp") for name in names):
        return "a save"
    return "a step" if any(name.endswith(".pt") for name in names) else "the beginning"


def kill_and_go_on(folder, seconds=None):
    """Start a run in folder, kill it after so many seconds, or within a save, and let it end; return where it was."""
    shutil.rmtree(folder / "log", ignore_errors=True)
    process = start(folder)
    if seconds is None:
        wanted = random.randrange(1, 4)  # the save of this number
        while not (folder / "log" / f"model_{4 * wanted:05d}.pt.tmp").exists():
            assert process.is_alive()
            time.sleep(0.001)
        seconds = random.uniform(0, 0.1)
    time.sleep(seconds)
    process.kill()
    process.join()
    found = state(folder)
    finish(start(folder, " --resume" if (folder / "log" / "log.txt").exists() else ""))
    return found


def unbroken(folder):
    """Return (what a run in folder leaves, how long it took in seconds)."""
    begin = time.monotonic()
    finish(start(folder))
    return result(folder), time.monotonic() - begin


def test_kill_it_anywhere(tmp_path):
    random.seed(0)
    whole, _ = unbroken(make_folder(tmp_path / "whole"))
    whole, seconds = unbroken(tmp_path / "whole")  # the first one waited for the imports
    folder = make_folder(tmp_path / "killed")
    found = []
    for part in range(5):  # of the run's time, so that its beginning and its end are met too
        found.append(kill_and_go_on(folder, random.uniform(part, part + 1) / 5 * seconds))
        assert result(folder) == whole, found
    assert len(set(found)) > 1, found


def test_kill_it_while_it_saves(tmp_path):
    random.seed(0)
    whole, _ = unbroken(make_folder(tmp_path / "whole"))
    folder = make_folder(tmp_path / "killed")
    for _ in range(3):
        assert kill_and_go_on(folder) == "a save"
        assert result(folder) == whole
        assert not [name for name in os.listdir(folder / "log") if name.endswith((".tmp", ".damaged"))]


if __name__ == "__main__":
    kills = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = unbroken(make_folder(Path(folder, "whole")))
        whole, seconds = unbroken(Path(folder, "whole"))
        killed = make_folder(Path(folder, "killed"))
        for kind, times in (("random moments", kills), ("saves", kills // 5)):
            equal, found = 0, []
            for _ in range(times):
                found.append(kill_and_go_on(killed, random.uniform(0, seconds) if kind == "random moments" else None))
                equal += result(killed) == whole
            counts = ", ".join(f"{found.count(place)} in {place}" for place in sorted(set(found)))
            print(f"{times} kills at {kind} ({counts}): {equal} of {times} ended with the unbroken run's log and weights")
