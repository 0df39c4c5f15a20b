"""OpenAI's weights, by way of Hugging Face: the same numbers come out."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import offline
import pytest
import torch

from train_gpt2 import GPT

IDX = torch.arange(7, 7 + 24).view(2, 12) * 1009 % 50257  # (2, 12), arbitrary ids


def test_importing_runs_nothing_and_is_light(tmp_path):
    code = "import sys, train_gpt2; print([m for m in ('transformers', 'datasets') if m in sys.modules])"
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("[]\n", "", [])


def largest_difference(ours, theirs):
    with torch.no_grad():
        return (ours(IDX)[0] - theirs(IDX).logits).abs().max().item()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder in Hugging Face's format with a small random GPT-2."""
    folder = tmp_path_factory.mktemp("small")
    offline.save_random_gpt2(folder, n_layer=2, n_head=2, n_embd=32, n_positions=64)
    return str(folder)


def test_gpt2_by_its_name(monkeypatch):
    from huggingface_hub import constants
    from transformers import GPT2LMHeadModel

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(offline.stand_ins()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    difference = largest_difference(GPT.from_pretrained("gpt2"), GPT2LMHeadModel.from_pretrained("gpt2"))
    print(f"gpt2: largest difference to Hugging Face's logits: {difference:.1e}")
    assert difference < 1e-4


def test_every_tensor_counts(small):
    from transformers import GPT2LMHeadModel

    ours, theirs = GPT.from_pretrained(small), GPT2LMHeadModel.from_pretrained(small)
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


def test_what_is_no_gpt2_is_refused(small, tmp_path):
    with pytest.raises(OSError, match="'gpt2-huge' is neither a folder nor one of gpt2, gpt2-medium"):
        GPT.from_pretrained("gpt2-huge")
    with pytest.raises(OSError):
        GPT.from_pretrained(str(tmp_path))  # an empty folder
    shutil.copytree(small, tmp_path / "relu")
    config = tmp_path / "relu" / "config.json"
    config.write_text(config.read_text().replace("gelu_new", "relu"))
    with pytest.raises(ValueError, match="its activation_function is relu, and GPT-2's is gelu_new"):
        GPT.from_pretrained(str(tmp_path / "relu"))


def test_a_damaged_file_is_named(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(OSError, match="its model.safetensors is damaged"):
        GPT.from_pretrained(str(folder))


def test_missing_weights_are_not_made_up(small, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(small, tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys, such as .*h.1.mlp.c_fc.bias"):
        GPT.from_pretrained(str(folder))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"n_positions": 64', '"n_positions": 32'))
    save_file(weights | {"transformer.h.1.mlp.c_fc.bias": torch.zeros(128)}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ValueError, match="mismatched_keys, such as .*wpe.weight"):
        GPT.from_pretrained(str(folder))
