"""hellaswag.py: the download from a server on loopback that has faults, and the scores against Hugging Face's model."""
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import offline
import pytest
import torch
from conftest import damaged

import hellaswag
from train_gpt2 import GPT, gpt2_encoding

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = os.path.join(os.path.dirname(__file__), "hellaswag.jsonl")  # 200 in HellaSwag's format, of input.txt's lines
FILE = b"".join(b'{"ind": %d}\n' % i for i in range(10_042))


@pytest.fixture(autouse=True)
def hellaswag_py(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hellaswag.py"])


class Server(BaseHTTPRequestHandler):
    """Answers one request after another as the list `behaviours` says."""

    def do_GET(self):
        behaviour = self.server.behaviours.pop(0)
        self.server.ranges.append(self.headers["Range"])
        if isinstance(behaviour, int):
            return self.send_error(behaviour)
        first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        body = b"<html>Please sign in</html>" if behaviour == "portal" else FILE
        threading.Event().wait(behaviour == "slow")  # a second; the tests' time.sleep doesn't wait
        if behaviour in ("whole", "portal"):  # no ranges here
            first = 0
        self.send_response(200 if behaviour in ("whole", "portal") else 206)
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        self.wfile.write(body[first : len(body) // 2 if behaviour == "cut" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Return a function that downloads from a server with the behaviours given; it returns the ranges asked for."""
    monkeypatch.setattr(hellaswag.time, "sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def fetch(*behaviours):
        server.behaviours, server.ranges = list(behaviours), []
        hellaswag.download(str(tmp_path / "val.jsonl"), fetch.url)
        return server.ranges
    fetch.server, fetch.url = server, f"http://127.0.0.1:{server.server_port}/val.jsonl"
    yield fetch
    server.shutdown()


@pytest.mark.parametrize("behaviours, ranges", [
    (["good"], [0]),
    ([503, 429, "good"], [0, 0, 0]),
    (["cut", "good"], [0, len(FILE) // 2]),  # what came is kept
    (["cut", 503, "cut", "good"], [0, len(FILE) // 2, len(FILE) // 2, len(FILE) // 2]),
    (["cut", "whole"], [0, len(FILE) // 2]),
])
def test_download(fetch, tmp_path, behaviours, ranges):
    assert fetch(*behaviours) == [f"bytes={first}-" for first in ranges]
    assert (tmp_path / "val.jsonl").read_bytes() == FILE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val.jsonl", "val.jsonl.sha256"]
    assert fetch() == []  # it is there


@pytest.mark.parametrize("behaviours, problem", [
    ([404], "HTTP status 404; download it by hand"),
    ([503] * 5, "HTTP status 503; download it by hand"),
    (["portal"], "sent 1 lines, where HellaSwag has 10,042: something else answered"),
    (["cut"] + [503] * 4, "HTTP status 503; download it by hand"),
])
def test_a_download_that_fails(fetch, tmp_path, behaviours, problem):
    with pytest.raises(OSError, match=problem):
        fetch(*behaviours)
    assert not (tmp_path / "val.jsonl").exists()
    kept = [FILE[: len(FILE) // 2]] if "cut" in behaviours else []
    assert [path.read_bytes() for path in tmp_path.iterdir()] == kept


def test_machines_that_share_a_folder_download_once(fetch, tmp_path, monkeypatch):
    with open(EXAMPLES, "rb") as f:
        monkeypatch.setitem(globals(), "FILE", b"".join(f.readlines()[:12]))
    fetch.server.behaviours, fetch.server.ranges = ["slow", "slow"], []
    (tmp_path / "probe.py").write_text(f"""
import hellaswag, train_gpt2
hellaswag.EXAMPLES, hellaswag.download.__defaults__ = 12, (hellaswag.PATH, "{fetch.url}")
train_gpt2.SIZES["laptop"] = dict(n_layer=1, n_head=2, n_embd=16)
train_gpt2.main(train_gpt2.parse_flags())
""")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    processes = []
    for name in ("own", "shared", "shared"):  # a torchrun each, as on three machines
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=3", "--nproc_per_node=1", "--rdzv_id=x",
                   "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "../probe.py", "--data", f"{ROOT}/input.txt",
                   "--device", "cpu", "--total_batch_size", "960", "--max_steps", "1", "--eval_interval", "0",
                   "--sample_interval", "0", "--checkpoint_interval", "0", "--hellaswag_interval", "1"]
        processes.append(subprocess.Popen(command, cwd=tmp_path / name, env=dict(os.environ, PYTHONPATH=str(ROOT)),
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        outs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:  # where one fails, the others would wait for it
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], outs
    assert "".join(outs).count("of 12 right") == 2 and "".join(outs).count("| loss: ") == 1
    assert fetch.server.ranges == ["bytes=0-"] * 2


def test_a_part_of_something_else_is_not_gone_on_with(fetch, tmp_path):
    (tmp_path / "val.jsonl.part").write_bytes(FILE + b"more")
    with pytest.raises(OSError, match="10,043 lines"):
        fetch(416)
    assert fetch("good") == ["bytes=0-"]


def test_a_whole_file_that_lacks_only_its_name(fetch, tmp_path):
    (tmp_path / "val.jsonl.part").write_bytes(FILE)
    assert fetch(416) == [f"bytes={len(FILE)}-"]
    assert (tmp_path / "val.jsonl").read_bytes() == FILE


def test_no_damage_of_the_file_goes_unseen(fetch, tmp_path, monkeypatch):
    fetch("good")
    with open(EXAMPLES, "rb") as f:
        monkeypatch.setattr(hellaswag, "EXAMPLES", 200)
        monkeypatch.setitem(globals(), "FILE", f.read())
    for path in tmp_path.iterdir():
        path.unlink()
    fetch("good")
    path = tmp_path / "val.jsonl"
    assert len(hellaswag.read_examples(str(path))) == 200
    for spoilt in damaged(FILE, 10, 50):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: its sha256 isn't the one in {path}.sha256")):
            hellaswag.read_examples(str(path))
    (tmp_path / "val.jsonl.sha256").unlink()  # a file that came by hand has no sum: what isn't an example shows all the same
    for spoilt in damaged(FILE, 10, 50):
        path.write_bytes(spoilt)
        try:
            hellaswag.read_examples(str(path))
        except ValueError as e:
            assert str(e).startswith(f"{path}, line ") or str(e) == f"{path} is empty"


def test_no_server(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(hellaswag.time, "sleep", waits.append)
    path = str(tmp_path / "val.jsonl")
    with pytest.raises(OSError, match=f"refused; download it by hand, by whatever way there is, and save it as {path}"):
        hellaswag.download(path, "http://127.0.0.1:9/val.jsonl")
    assert waits == [1, 2, 4, 8]


def test_examples():
    examples = hellaswag.read_examples(EXAMPLES)
    assert len(examples) == 200 and {example["label"] for example in examples} == {0, 1, 2, 3}


@pytest.mark.parametrize("line", ['{"ctx": "a"', "[1]", '{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}',
                                  '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}',
                                  '{"ctx": "a", "endings": ["b", "c", "d", ""], "label": 1}'])
def test_a_line_that_is_no_example(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 3}\n' + line)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not an example of HellaSwag"):
        hellaswag.read_examples(str(tmp_path / "a.jsonl"))


@pytest.fixture(scope="module")
def model_and_theirs(tmp_path_factory):
    """Return one random GPT-2 twice: ours, and Hugging Face's GPT2LMHeadModel."""
    from transformers import GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("stand-in")
    offline.save_random_gpt2(folder, n_layer=2, n_head=2, n_embd=32, n_positions=256)
    return GPT.from_pretrained(str(folder)), GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def our_costs(model_and_theirs):
    """Return hellaswag.costs of all examples: (200, 3, 4)."""
    return hellaswag.costs(model_and_theirs[0], gpt2_encoding(), hellaswag.read_examples(EXAMPLES))


@pytest.fixture(scope="module")
def their_losses(model_and_theirs):
    """Return [(loss of each token of each ending, characters of each ending), ...] by Hugging Face, a row at a time."""
    enc, result = gpt2_encoding(), []
    for example in hellaswag.read_examples(EXAMPLES):
        rows = []
        for ending in example["endings"]:
            context, tokens = enc.encode_ordinary(example["ctx"]), enc.encode_ordinary(" " + ending)
            with torch.no_grad():
                output = model_and_theirs[1](torch.tensor([context + tokens]), logits_to_keep=len(tokens) + 1)
            logits = output.logits[0, :-1]  # (n, vocab_size), of the n tokens of the ending
            rows.append((-logits.log_softmax(-1))[range(len(tokens)), tokens].tolist())
        result.append((rows, [len(ending) for ending in example["endings"]]))
    return result


def test_every_loss_is_hugging_faces(our_costs, their_losses):
    assert len(our_costs) == 200
    for cost, (rows, characters) in zip(our_costs, their_losses, strict=True):
        expected = torch.tensor([[sum(row), sum(row) / len(row), sum(row) / n] for row, n in zip(rows, characters)]).T
        assert torch.allclose(cost, expected, rtol=1e-6, atol=1e-4)  # (3, 4)


def test_padding_counts_for_nothing(model_and_theirs):
    endings = ["He runs.", "He stops and looks around for a while.", "No.", "Yes."]
    example = dict(ctx="A man walks.", endings=endings, label=0)
    tokens, mask = hellaswag.render(example, gpt2_encoding())
    assert tokens.shape == mask.shape == (4, 4 + 9)
    assert mask.sum(1).tolist() == [3, 9, 2, 2] and mask[:, :4].sum() == 0
    assert gpt2_encoding().decode(tokens[1].tolist()) == "A man walks. He stops and looks around for a while."


def test_all_endings_stand_in_one_row_after_their_context():
    endings = ["He runs.", "He stops and looks around for a while.", "No.", "Yes."]
    example = dict(ctx="A man walks.", endings=endings, label=0)
    tokens, pos, part = hellaswag.pack(*hellaswag.render(example, gpt2_encoding()))
    assert part.tolist() == [0] * 4 + [1] * 3 + [2] * 9 + [3] * 2 + [4] * 2
    assert pos.tolist() == [*range(4), *range(4, 7), *range(4, 13), 4, 5, 4, 5]
    assert gpt2_encoding().decode(tokens.tolist()) == "A man walks. " + " ".join(endings)


def test_under_autocast_the_logits_are_summed_in_float32(model_and_theirs):
    examples = hellaswag.read_examples(EXAMPLES)[:1]
    exact = hellaswag.costs(model_and_theirs[0], gpt2_encoding(), examples)[:, 0]
    sums = hellaswag.costs(model_and_theirs[0], gpt2_encoding(), examples, "bfloat16")[:, 0]
    assert sums.dtype == torch.float32 and not torch.equal(sums, exact)
    assert ((sums - exact) / exact).abs().max() < 0.01
    assert not torch.equal(sums, sums.bfloat16().float())  # finer than what bfloat16 can tell apart


def right_by_hugging_face(their_losses, n):
    """Return how many of the first n examples are right: [by sum, by token, by character]."""
    right = [0, 0, 0]
    for example, (rows, characters) in list(zip(hellaswag.read_examples(EXAMPLES), their_losses))[:n]:
        for way, divisors in enumerate(([1] * 4, [len(row) for row in rows], characters)):
            costs = [sum(row) / divisor for row, divisor in zip(rows, divisors)]
            right[way] += costs.index(min(costs)) == example["label"]
    return right


def test_the_three_accuracies_are_hugging_faces(monkeypatch, model_and_theirs, our_costs, their_losses):
    monkeypatch.setattr(hellaswag, "costs", lambda *args, **kwargs: our_costs)  # don't compute them again
    right = hellaswag.count_right(model_and_theirs[0], gpt2_encoding(), hellaswag.read_examples(EXAMPLES))
    assert right == right_by_hugging_face(their_losses, 200)
    assert len(set(right)) == 3  # three different questions


def test_the_program(tmp_path, capsys, their_losses):
    offline.save_random_gpt2(tmp_path / "model", n_layer=2, n_head=2, n_embd=32, n_positions=256)
    hellaswag.main(["-m", str(tmp_path / "model"), "-d", "cpu", "--data", EXAMPLES, "--limit", "20"])
    out, err = capsys.readouterr()
    assert "model, 20 examples, accuracy by\n" in out and "20/20" in err  # the bar
    found = re.findall(r"^  (.*\S) +(\d\.\d{4}) \+- (\d\.\d{4})$", out, re.M)
    ways = ["the whole ending's loss", "its mean loss a token", "its mean loss a character"]
    assert [name for name, _, _ in found] == ways
    for (_, p, error), right in zip(found, right_by_hugging_face(their_losses, 20)):
        assert float(p) == right / 20
        assert float(error) == pytest.approx((right / 20 * (1 - right / 20) / 19) ** 0.5, abs=1e-4)
    for example in hellaswag.read_examples(EXAMPLES)[:5]:
        assert example["ctx"] in out and all(ending in out for ending in example["endings"])


@pytest.mark.parametrize("flags, line", [
    ("--limit 0", "--limit 0 is not a number above 0"),
    ("-m gpt3 --data " + EXAMPLES, "'gpt3' is neither a folder nor one of gpt2, "),
    ("--data no.jsonl", "[Errno 2] No such file or directory: 'no.jsonl'"),
    ("--data empty.jsonl", "empty.jsonl is empty"),
    ("--data bad.jsonl", "bad.jsonl, line 1: not an example of HellaSwag"),
    ("-d gpu", "--device gpu is none of "),
])
def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch, capsys, flags, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text("<html>\n")
    with pytest.raises(SystemExit) as end:
        hellaswag.main(flags.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith(f"hellaswag.py: {line}")


def test_a_score_on_a_cpu_repeats(tmp_path, capsys):
    offline.save_random_gpt2(tmp_path / "model", n_layer=1, n_head=2, n_embd=32, n_positions=256)
    outputs = []
    for _ in range(2):
        hellaswag.main(["-m", str(tmp_path / "model"), "-d", "cpu", "--data", EXAMPLES, "--limit", "5"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
