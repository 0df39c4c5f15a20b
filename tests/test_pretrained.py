"""OpenAI's weights, by way of Hugging Face: the same numbers come out, and go in again."""
import json
import os
import shutil
import sys
from pathlib import Path

import offline
import pytest
import torch

import fineweb
import train_gpt2
from train_gpt2 import GPT, load_model

IDX = torch.arange(7, 7 + 24).view(2, 12) * 1009 % 50257  # (2, 12), arbitrary ids


def largest_difference(ours, theirs):
    with torch.no_grad():
        return (ours(IDX)[0] - theirs(IDX).logits).abs().max().item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in Hugging Face's format with a small random GPT-2."""
    folder = tmp_path_factory.mktemp("small")
    offline.save_random_gpt2(folder, n_layer=2, n_head=2, n_embd=32, n_positions=64)
    return str(folder)


def test_gpt2_by_its_name(folder, monkeypatch, tmp_path):
    from huggingface_hub import constants
    from transformers import GPT2LMHeadModel

    # as Hugging Face's cache keeps what it has downloaded
    shutil.copytree(folder, tmp_path / "models--gpt2" / "snapshots" / "stand-in")
    (tmp_path / "models--gpt2" / "refs").mkdir()
    (tmp_path / "models--gpt2" / "refs" / "main").write_text("stand-in")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ours = GPT.from_pretrained("gpt2")
    difference = largest_difference(ours, GPT2LMHeadModel.from_pretrained("gpt2"))
    print(f"gpt2: largest difference to Hugging Face's logits: {difference:.1e}")
    assert difference < 1e-5


def test_every_tensor_counts(folder):
    from transformers import GPT2LMHeadModel

    ours = GPT.from_pretrained(folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    assert largest_difference(ours, theirs) < 1e-4
    torch.manual_seed(1)
    fresh = dict(GPT(ours.config).named_parameters())
    for name, p in ours.named_parameters():
        copied = p.detach().clone()
        p.data.copy_(fresh[name])  # as if it had not been copied
        assert largest_difference(ours, theirs) > 1e-4, f"{name} could be left out unnoticed"
        p.data.copy_(copied)
        if p.dim() == 2 and p.shape[0] == p.shape[1]:
            p.data.copy_(copied.t())  # as if a square one had not been transposed
            assert largest_difference(ours, theirs) > 1e-4, f"{name} could be transposed unnoticed"
            p.data.copy_(copied)


@pytest.fixture
def copy(folder, tmp_path, monkeypatch):
    """A copy of the folder, to be changed."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(folder, "copy"))


def change_config(folder, **settings):
    """Let folder's config.json have these settings."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(fails, folder):
    """Return what is said when folder is loaded."""
    message = fails(load_model, str(folder), "--init_from")
    assert f"--init_from {folder}" in message
    return message


def test_where_there_is_no_gpt2(fails, tmp_path):
    message = fails(load_model, "gpt2-huge", "--model")
    for name in ("--model gpt2-huge", *train_gpt2.OPENAI_SIZES):
        assert name in message
    refused(fails, tmp_path)  # an empty folder


@pytest.mark.parametrize("name, value", [
    ("model_type", "bert"),
    ("vocab_size", 50258),
    ("activation_function", "relu"),
    ("layer_norm_epsilon", 1e-6),
    ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True),
    ("tie_word_embeddings", False),
    ("n_inner", 64),
])
def test_what_computes_something_else_is_refused(fails, copy, name, value):
    change_config(copy, **{name: value})
    message = refused(fails, copy)
    assert name in message and str(value) in message


def test_the_width_of_the_mlp_may_be_written_out(copy):
    change_config(copy, n_inner=128)
    assert load_model(str(copy), "--init_from").config.n_embd == 32


def test_the_vocabulary_has_to_be_gpt2s(fails, copy):
    path = copy / "vocab.json"
    vocabulary = json.loads((fineweb.tokenizer_folder() / "encoder.json").read_text())
    path.write_text(json.dumps(vocabulary, indent=1, sort_keys=True))  # the same in other bytes
    load_model(str(copy), "--init_from")
    words = ("hello", "there")
    vocabulary |= {words[0]: vocabulary[words[1]], words[1]: vocabulary[words[0]]}
    path.write_text(json.dumps(vocabulary))
    assert "vocab.json" in refused(fails, copy)
    path.write_text("{")
    refused(fails, copy)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_damaged_file_is_one_line(fails, copy, name):
    from safetensors.torch import load_file

    whole = copy / "model.safetensors"
    if name == "pytorch_model.bin":  # the older format
        torch.save(load_file(whole), copy / name)
        whole.unlink()
    load_model(str(copy), "--init_from")
    data = (copy / name).read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"\0" * 1000):
        (copy / name).write_bytes(damaged)
        refused(fails, copy)


def test_missing_weights_are_not_made_up(fails, copy):
    from safetensors.torch import load_file, save_file

    path = copy / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    assert "h.1.mlp.c_fc.bias" in refused(fails, copy)
    weights["transformer.h.1.mlp.c_fc.bias"] = torch.zeros(128)
    save_file(weights, path, metadata={"format": "pt"})
    load_model(str(copy), "--init_from")
    change_config(copy, n_positions=32)
    assert "wpe.weight" in refused(fails, copy)


def test_an_exported_model_is_the_same_for_both(train, monkeypatch, tmp_path):
    from transformers import GPT2LMHeadModel, GPT2Tokenizer

    model, _ = train(max_steps=1, checkpoint_interval=1)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--export=~/exported"])
    train_gpt2.command()
    theirs = GPT2LMHeadModel.from_pretrained("exported")
    again = load_model("exported", "--init_from")
    assert theirs.config.vocab_size == again.config.vocab_size == 50257  # the padding is gone
    assert theirs.config.n_positions == again.config.block_size == model.config.block_size
    with torch.no_grad():
        logits = model(IDX)[0][:, :, :50257]
        assert torch.equal(again(IDX)[0], logits)
        assert torch.allclose(theirs(IDX).logits, logits, atol=1e-5)
    text = "naïve café 東京 \n x=1; don't <|endoftext|>"
    tokens = fineweb.gpt2_encoding().encode(text, allowed_special="all")
    assert GPT2Tokenizer.from_pretrained("exported").encode(text) == tokens
    # a second export, of the first one
    train_gpt2.export(dict(init_from="exported"), "exported again")
    for name, weight in load_model("exported again", "--init_from").state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def test_an_export_that_cannot_be_written(folder, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for place in ("file", "file/folder"):
        assert f"--export {place}" in fails(train_gpt2.export, dict(init_from=folder), place)
    message = fails(train_gpt2.export, dict(log_dir="nothing"), "exported")
    assert "--log_dir nothing" in message
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size there")
@pytest.mark.parametrize("limit", [10, 100_000])  # the config, the weights
def test_an_export_to_a_full_disk(folder, fails, tmp_path, limit):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a write beyond it is an error
    try:
        message = fails(train_gpt2.export, dict(init_from=folder), str(tmp_path / "exported"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"--export {tmp_path / 'exported'}" in message
