"""OpenAI's weights, by way of Hugging Face: the same numbers come out, and go in again."""
import os
import shutil

import offline
import pytest
import torch

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


def test_gpt2_by_its_name(monkeypatch):
    from huggingface_hub import constants
    from transformers import GPT2LMHeadModel

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(offline.stand_ins()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ours = GPT.from_pretrained("gpt2")
    difference = largest_difference(ours, GPT2LMHeadModel.from_pretrained("gpt2"))
    print(f"gpt2: largest difference to Hugging Face's logits: {difference:.1e}")
    assert difference < 1e-4


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


def test_what_is_no_gpt2_is_refused(folder, tmp_path):
    with pytest.raises(OSError) as error:
        GPT.from_pretrained("gpt2-huge")
    for name in ("gpt2-huge", *train_gpt2.OPENAI_SIZES):
        assert name in str(error.value)
    with pytest.raises(OSError):
        GPT.from_pretrained(str(tmp_path))  # an empty folder
    shutil.copytree(folder, tmp_path / "relu")
    config = tmp_path / "relu" / "config.json"
    config.write_text(config.read_text().replace("gelu_new", "relu"))
    with pytest.raises(ValueError, match="activation_function.*relu.*gelu_new"):
        GPT.from_pretrained(str(tmp_path / "relu"))


def test_a_damaged_file_is_named(folder, tmp_path):
    cut = shutil.copytree(folder, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(OSError, match="model.safetensors"):
        GPT.from_pretrained(str(cut))


def test_missing_weights_are_not_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    partial = shutil.copytree(folder, tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing.*h\.1\.mlp\.c_fc\.bias"):
        GPT.from_pretrained(str(partial))
    config = partial / "config.json"
    config.write_text(config.read_text().replace('"n_positions": 64', '"n_positions": 32'))
    weights["transformer.h.1.mlp.c_fc.bias"] = torch.zeros(128)
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mismatched.*wpe\.weight"):
        GPT.from_pretrained(str(partial))


def test_an_exported_model_is_the_same_for_both(train, tmp_path):
    from transformers import GPT2LMHeadModel

    model, _ = train(max_steps=1, checkpoint_interval=1)
    train_gpt2.export({}, "exported")
    files = os.listdir("exported")
    assert {"config.json", "model.safetensors"} <= set(files)
    theirs = GPT2LMHeadModel.from_pretrained("exported")
    again = load_model("exported")
    assert theirs.config.vocab_size == again.config.vocab_size == 50257  # the padding is gone
    assert again.config.n_layer == model.config.n_layer
    with torch.no_grad():
        logits = model(IDX)[0][:, :, :50257]
        assert torch.equal(again(IDX)[0], logits)
        assert torch.allclose(theirs(IDX).logits, logits, atol=1e-5)
    # a second export, of the first one
    train_gpt2.export(dict(init_from="exported"), "exported again")
    for name, weight in load_model("exported again").state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def test_an_export_that_cannot_be_written(train, fails, tmp_path):
    train(max_steps=1, checkpoint_interval=1)
    (tmp_path / "file").write_text("")
    message = fails(train_gpt2.export, {}, "file")
    assert "--export file" in message
    message = fails(train_gpt2.export, dict(log_dir="nothing"), "exported")
    assert "nothing" in message
    assert not os.path.exists("exported")
