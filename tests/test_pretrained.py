"""OpenAI's weights, by way of Hugging Face: the same numbers come out, and go in again."""
import shutil

import offline
import pytest
import torch

from train_gpt2 import GPT

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
