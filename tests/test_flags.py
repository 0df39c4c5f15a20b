"""The command line: what is asked for is done."""
import os
import sys
from dataclasses import fields

import pytest
from conftest import flags

import train_gpt2
from train_gpt2 import TrainConfig, parse_flags


@pytest.fixture
def start(monkeypatch):
    """Return a function that does what `python train_gpt2.py WORDS` does, in this process."""
    def start(words):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *words])
        train_gpt2.command()
    return start


def test_every_setting_is_a_flag():
    assert parse_flags([]) == {}
    words = "--max_lr 1e-3 --batch_size 8 --no-compile --dtype float32"
    given = parse_flags(words.split())
    assert given == dict(max_lr=1e-3, batch_size=8, compile=False, dtype="float32")
    no_default = dict(device="cpu", dtype="bfloat16", batch_size=3)
    for field in fields(TrainConfig):
        value = no_default.get(field.name, field.default)
        words = [f"--{field.name}", str(value)]
        if field.type is bool:
            value = True
            words = [f"--{field.name}"]
        assert parse_flags(words) == {field.name: value}


def test_help_explains_each_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse_flags(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(TrainConfig):
        assert f"--{field.name}" in text
        assert f"{field.metadata['meaning']} [" in text
        if field.default is not None:
            assert f"{field.metadata['meaning']} [{field.default}]" in text
        for choice in field.metadata["choices"] or ():
            assert choice in text
def test_flags_reach_the_run(small, start, capsys):
    start(flags(max_steps=3, max_lr=2e-3))
    out = capsys.readouterr().out
    assert out.count("| loss: ") == 3 and "lr 2.0000e-03" in out
    assert "2 micro-batches of 2 x 16 tokens" in out


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    given = parse_flags(["--data=~/a.txt"])
    assert os.path.normpath(given["data"]) == str(tmp_path / "a.txt")
