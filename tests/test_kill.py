"""Runs that are killed, as by a power cut, and go on: in the end nothing shows of it.

    python tests/test_kill.py 50    # so many kills at random moments, a fifth as many within a save
"""
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from conftest import SHAPE, forkserver  # noqa: E402

context = forkserver()
FLAGS = (
    "--data text.txt --no-compile --model laptop --batch_size 2 --seq_len 16 "
    "--total_batch_size 64 --max_steps 16 --max_lr 1e-2 --warmup_steps 2 --dtype float32 "
    "--device cpu --eval_interval 4 --val_tokens 200 --sample_interval 0 --checkpoint_interval 4"
)


def train(folder, flags, slow=0.1):
    """Be a process that trains a small model in folder, `slow` seconds longer in each save."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open("out.txt", "a", buffering=1)
    import train_gpt2

    save = train_gpt2.torch.save  # slower, so that a kill can fall into it

    def save_slowly(state, f):
        save(state, f)
        size = f.tell()
        f.truncate(size // 2)  # as far as it might have come
        f.flush()
        time.sleep(slow)
        f.seek(0)
        save(state, f)

    train_gpt2.torch.save = save_slowly
    train_gpt2.MODEL_SIZES["laptop"] = SHAPE
    given, options = train_gpt2.parse_flags((FLAGS + flags).split())
    train_gpt2.fineweb.run_program(lambda: train_gpt2.launch(given, options.resume))


def start(folder, flags=""):
    process = context.Process(target=train, args=(str(folder), flags))
    process.start()
    return process


def finish(process):
    process.join(100)
    assert process.exitcode == 0, process.exitcode


def result(folder):
    """Return what a finished run leaves: its log, the bytes of its weights, AdamW's averages."""
    checkpoint = torch.load(folder / "log" / "model_00016.pt")
    tensors = list(checkpoint["model"].values())
    for state in checkpoint["optimizer"]["state"].values():
        tensors += state.values()
    return [(folder / "log" / "log.txt").read_bytes()] + [t.numpy().tobytes() for t in tensors]


def make_folder(folder):
    folder.mkdir()
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:20_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


def checkpoints(folder):
    return list((folder / "log").glob("model_*.pt"))


def moment(folder):
    """Return what a run that was just killed in folder was at."""
    if list((folder / "log").glob("*.pt.tmp")):
        return "a save"
    return "a step" if checkpoints(folder) else "the beginning"


def kill_and_go_on(folder, seconds=None):
    """Start a run in folder, kill it, and let it end; return where it was. "its end": it had ended.

    It is killed after so many seconds, or with None within a save.
    """
    shutil.rmtree(folder / "log", ignore_errors=True)
    process = start(folder)
    if seconds is None:
        wanted = random.randrange(1, 4)  # the save of this number
        before = folder / "log" / f"model_{4 * wanted - 4:05d}.pt"
        unfinished = folder / "log" / "model.pt.tmp"
        while not (before.exists() and unfinished.exists()):
            assert process.is_alive()
            time.sleep(0.001)
        seconds = random.uniform(0, 0.1)
    time.sleep(seconds)
    process.kill()
    process.join()
    found = moment(folder) if process.exitcode == -signal.SIGKILL else "its end"
    finish(start(folder, " --resume"))
    return found


def unbroken(folder):
    """Return (what a run in folder leaves, how long it took in seconds)."""
    begin = time.monotonic()
    finish(start(folder))
    return result(folder), time.monotonic() - begin


def test_kill_it_anywhere(tmp_path):
    random.seed(0)
    unbroken(make_folder(tmp_path / "whole"))  # the first one waits for the imports
    whole, seconds = unbroken(tmp_path / "whole")
    folder = make_folder(tmp_path / "killed")
    found = []
    for part in range(3):  # of the run's time, so that its beginning and its end are met too
        found.append(kill_and_go_on(folder, random.uniform(part, part + 1) / 3 * seconds))
        assert result(folder) == whole, found
    assert set(found) != {"its end"}


def test_kill_it_while_it_saves(tmp_path):
    random.seed(0)
    whole, _ = unbroken(make_folder(tmp_path / "whole"))
    folder = make_folder(tmp_path / "killed")
    for _ in range(2):
        assert kill_and_go_on(folder) == "a save"
        assert result(folder) == whole
        assert not list((folder / "log").glob("*.tmp"))


def test_a_second_run_in_the_folder_does_the_first_no_harm(tmp_path):
    whole, _ = unbroken(make_folder(tmp_path / "whole"))
    folder = make_folder(tmp_path / "shared")
    first = start(folder)
    while not (folder / "log" / "model_00004.pt").exists():
        assert first.is_alive()
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # it is there, and does nothing
    before = (folder / "out.txt").read_text()
    for flags in ("", " --resume"):
        second = start(folder, flags)
        second.join(100)
        assert second.exitcode == 2
    os.kill(first.pid, signal.SIGCONT)
    finish(first)
    refused = [line for line in (folder / "out.txt").read_text().splitlines()
               if "--log_dir log: " in line]
    assert len(refused) == 2 and "--log_dir" not in before
    assert result(folder) == whole


if __name__ == "__main__":
    kills = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        unbroken(make_folder(Path(name, "whole")))
        whole, seconds = unbroken(Path(name, "whole"))
        killed = make_folder(Path(name, "killed"))
        for kind, times in (("random moments", kills), ("saves", kills // 5)):
            equal = 0
            found = []
            for _ in range(times):
                wait = random.uniform(0, seconds) if kind == "random moments" else None
                found.append(kill_and_go_on(killed, wait))
                equal += result(killed) == whole
            counts = ", ".join(f"{found.count(place)} in {place}" for place in sorted(set(found)))
            print(f"{times} kills at {kind} ({counts}): {equal} of {times} ended with the "
                  "unbroken run's log and weights")
