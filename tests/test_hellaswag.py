"""hellaswag.py: downloads from a server that has faults, scores against Hugging Face's model."""
import functools
import hashlib
import io
import os
import re
import runpy
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import offline
import pytest
import torch
from conftest import EXAMPLES, ROOT, damaged

import fineweb
import hellaswag
import train_gpt2
from fineweb import gpt2_encoding

N = 50  # as many of EXAMPLES are scored
FILE = b'{"ind": 24, "ctx": "A man"}\n' * 1000
SHA256 = hashlib.sha256(FILE).hexdigest()


# -------------------------------------------------------------------------------------------------
# The file


class Server(BaseHTTPRequestHandler):
    """Answers one request after another as the list `behaviours` says."""

    def do_GET(self):
        behaviour = self.server.behaviours.pop(0)
        if isinstance(behaviour, int):
            self.send_error(behaviour)
            return
        body = self.server.body
        if behaviour == "portal":
            body = b"<html>Please sign in</html>"
        self.send_response(200)
        if "no length" not in behaviour:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        if "cut" not in behaviour:
            self.wfile.write(body[half:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """Return a server on loopback. Set its behaviours and its body; its url is there."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.behaviours = []
    server.body = FILE
    server.url = f"http://127.0.0.1:{server.server_port}/val.jsonl"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("behaviour", ["good", "no length"])
def test_download(server, tmp_path, behaviour):
    server.behaviours = [behaviour]
    path = tmp_path / "val.jsonl"
    hellaswag.download(str(path), server.url, SHA256)
    assert path.read_bytes() == FILE and os.listdir(tmp_path) == ["val.jsonl"]
    hellaswag.download(str(path), server.url, SHA256)  # it is there: nobody is asked


@pytest.mark.parametrize("behaviour, problem", [
    (404, "404"), (503, "503"), ("cut", ""), ("cut, no length", ""), ("portal", ""),
])
def test_a_download_that_fails(server, tmp_path, fails, behaviour, problem):
    server.behaviours = [behaviour]
    path = str(tmp_path / "val.jsonl")
    message = fails(hellaswag.download, path, server.url, SHA256)
    for part in (problem, server.url, path, "--hellaswag_interval 0"):
        assert part in message
    assert os.listdir(tmp_path) == []


def test_no_server(tmp_path, fails):
    url = "http://127.0.0.1:9/val.jsonl"
    message = fails(hellaswag.download, str(tmp_path / "val.jsonl"), url)
    assert url in message and "refused" in message


def test_a_download_that_cannot_be_saved_leaves_nothing(server, tmp_path, fails, monkeypatch):
    def no_room(descriptor):
        raise OSError(28, "No space left on device")

    server.behaviours = ["good"]
    monkeypatch.setattr(fineweb.os, "fsync", no_room)
    path = str(tmp_path / "val.jsonl")
    message = fails(hellaswag.download, path, server.url, SHA256)
    assert path in message and "No space left" in message
    assert os.listdir(tmp_path) == []


PROBE = """
import functools, multiprocessing, os, sys
import hellaswag, torch.distributed as dist

replace, together = os.replace, multiprocessing.Barrier(3)

def replace_together(*paths):
    together.wait(60)
    replace(*paths)

os.replace = replace_together
url, sha256, store = sys.argv[1:]
hellaswag.download = functools.partial(hellaswag.download, url=url, sha256=sha256)
children = []
for rank, local_rank in enumerate((0, 1, 0, 0)):
    child = os.fork()
    if child == 0:
        os.environ["LOCAL_RANK"] = str(local_rank)
        dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=4)
        os._exit(len(hellaswag.load_examples(1024)))
    children.append(child)
for child in children:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that torch is imported only once")
def test_machines_that_share_a_folder_download_at_once(server, tmp_path):
    """Three machines share a folder. The first has two processes, of which one downloads."""
    with open(EXAMPLES, "rb") as f:
        server.body = b"".join(f.readlines()[:12])
    server.behaviours = ["good", "good", "good"]
    folder = tmp_path / "shared"
    folder.mkdir()
    sha256 = hashlib.sha256(server.body).hexdigest()
    command = [sys.executable, "-c", PROBE, server.url, sha256, str(tmp_path / "store")]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=100)
    assert done.stdout.split() == ["12"] * 4, done.stderr
    assert os.listdir(folder) == [hellaswag.PATH]
    assert (folder / hellaswag.PATH).read_bytes() == server.body
    assert server.behaviours == []


def test_a_damaged_file_is_refused_or_can_be_read(tmp_path):
    with open(EXAMPLES, "rb") as f:
        data = f.read()
    path = tmp_path / "val.jsonl"
    refused = 0
    for spoilt in damaged(data, 10, 50):
        path.write_bytes(spoilt)
        try:
            hellaswag.read_examples(str(path))
        except fineweb.UserError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > 10


def test_examples():
    examples = hellaswag.read_examples(EXAMPLES)
    assert len(examples) == 200
    assert {example["label"] for example in examples} == {0, 1, 2, 3}


@pytest.mark.parametrize("line", [
    '{"ctx": "a"',
    "[1]",
    "\xff",
    "",
    '{"endings": ["b", "c", "d", "e"], "label": 0}',
    '{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}',
    '{"ctx": "a", "endings": "bcde", "label": 0}',
    '{"ctx": "a", "endings": ["b", "c", "d", "e"]}',
    '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}',
    '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": [0]}',
    '{"ctx": "a", "endings": ["b", "c", "d", ""], "label": 1}',
])
def test_a_line_that_is_no_example(tmp_path, fails, line):
    good = '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 3}\n'
    (tmp_path / "a.jsonl").write_text(good + line + "\n" + good, encoding="latin-1")
    assert "a.jsonl, line 2" in fails(hellaswag.read_examples, str(tmp_path / "a.jsonl"))


# -------------------------------------------------------------------------------------------------
# From text to tokens


def test_the_rows_at_the_top_of_the_file():
    endings = ["then wipes his face.", "gets up and walks towards the camera.",
               "lifts a shoe to his mouth.", "starts playing an acoustic guitar."]
    example = dict(ctx="A young man sits on a bed. the man", endings=endings, label=3)
    for text in [example["ctx"], *endings]:
        assert f'"{text}"' in hellaswag.__doc__
    rendered = hellaswag.render(example)
    tokens, mask = rendered.tokens, rendered.mask
    assert tokens.shape == mask.shape == (4, 18)
    assert tokens.dtype == mask.dtype == torch.int64
    shown = re.findall(r"^    (tokens|mask) +([\d ]+)$", hellaswag.__doc__, re.M)
    assert [(name, [int(n) for n in numbers.split()]) for name, numbers in shown] == [
        ("tokens", tokens[0].tolist()), ("mask", mask[0].tolist()),
        ("tokens", tokens[1].tolist()), ("mask", mask[1].tolist()),
    ]


def test_a_row_is_the_context_and_an_ending():
    endings = ["He runs.", "He stops and looks around for a while.", "No.", "Yes."]
    rendered = hellaswag.render(dict(ctx="A man walks.", endings=endings, label=1))
    assert rendered.label == 1
    assert rendered.mask.sum(dim=1).tolist() == [3, 9, 2, 2]
    encoding = gpt2_encoding()
    for tokens, mask, ending in zip(rendered.tokens, rendered.mask, endings):
        ending_tokens = tokens[mask == 1].tolist()
        length = 4 + len(ending_tokens)
        assert encoding.decode(ending_tokens) == " " + ending
        assert encoding.decode(tokens[:length].tolist()) == "A man walks. " + ending
        assert tokens[length:].sum() == 0


# -------------------------------------------------------------------------------------------------
# From tokens to answers


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Return a folder with a small random GPT-2 in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("stand-in")
    offline.save_random_gpt2(folder, n_layer=2, n_head=2, n_embd=32, n_positions=256)
    return str(folder)


@pytest.fixture(scope="module")
def model(model_folder):
    return train_gpt2.GPT.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def rendered():
    """Return the first N examples, rendered."""
    return hellaswag.render_all(hellaswag.read_examples(EXAMPLES)[:N], 1024)


@pytest.fixture(scope="module")
def our_losses(model, rendered):
    """Return the mean loss per token of each ending: (N, 4)."""
    return hellaswag.ending_losses(model, rendered)


@pytest.fixture(scope="module")
def their_losses(model_folder):
    """Return the losses by Hugging Face's GPT-2, which reads one row at a time: (3, N, 4).

    They are those of whole endings, by token and by character.
    """
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(model_folder).eval()
    encoding = gpt2_encoding()
    result = torch.empty(3, N, 4)
    for number, example in enumerate(hellaswag.read_examples(EXAMPLES)[:N]):
        context = encoding.encode_ordinary(example["ctx"])
        for row, ending in enumerate(example["endings"]):
            tokens = encoding.encode_ordinary(" " + ending)
            n = len(tokens)
            with torch.no_grad():
                output = theirs(torch.tensor([context + tokens]), logits_to_keep=n + 1)
            log_probabilities = output.logits[0, :-1].log_softmax(dim=-1)  # (n, vocab_size)
            cost = -sum(float(log_probabilities[i, token]) for i, token in enumerate(tokens))
            result[:, number, row] = torch.tensor([cost, cost / n, cost / len(ending)])
    return result


def test_every_loss_is_hugging_faces(model, our_losses, their_losses, rendered):
    whole, by_token, _ = their_losses
    assert our_losses.dtype == torch.float32
    assert torch.allclose(our_losses, by_token, rtol=1e-6, atol=1e-4)
    for number in range(0, N, 10):
        with torch.no_grad():
            sums = hellaswag.score(model, rendered[number].tokens, rendered[number].mask)
        assert sums.shape == (4,)
        assert torch.allclose(sums, whole[number], rtol=1e-6, atol=1e-4)


def test_padding_counts_for_nothing(model, rendered, our_losses):
    tokens, mask = hellaswag.stack(rendered[:8])
    assert tokens.shape == mask.shape == (32, max(x.tokens.shape[1] for x in rendered[:8]))
    more = torch.zeros(32, 50, dtype=torch.int64)
    with torch.no_grad():
        losses = hellaswag.score(model, torch.cat((tokens, more), dim=1),
                                 torch.cat((mask, more), dim=1))
    assert losses.shape == (32,)
    means = (losses / mask.sum(dim=1)).view(8, 4)
    assert torch.allclose(means, our_losses[:8], rtol=1e-6, atol=1e-5)


def test_what_else_is_in_a_batch_changes_nothing(model, rendered, our_losses):
    for number in (0, 33, N - 1):
        alone = hellaswag.ending_losses(model, [rendered[number]])
        assert torch.allclose(alone[0], our_losses[number], rtol=1e-6, atol=1e-5)
    backwards = hellaswag.ending_losses(model, rendered[::-1])
    assert torch.allclose(backwards.flip(0), our_losses, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tokens_at_once", [1, 2**11, 2**12])
def test_batches(rendered, tokens_at_once):
    batches = hellaswag.make_batches(rendered, tokens_at_once)
    together = [number for numbers in batches for number in numbers]
    assert sorted(together) == list(range(N))
    lengths = [rendered[number].tokens.shape[1] for number in together]
    assert lengths == sorted(lengths, reverse=True)  # if memory is short, it shows at once
    for numbers in batches:
        tokens, _ = hellaswag.stack([rendered[number] for number in numbers])
        assert tokens.numel() <= tokens_at_once or len(numbers) == 1
    assert len(batches) < N or tokens_at_once == 1


def test_lm_head_is_applied_only_where_an_ending_is_predicted(model, rendered):
    sizes = []

    def note(module, inputs, output):
        sizes.append(output.shape)

    handle = model.lm_head.register_forward_hook(note)
    try:
        hellaswag.ending_losses(model, rendered[:12])
    finally:
        handle.remove()
    ending_tokens = sum(int(example.mask.sum()) for example in rendered[:12])
    assert sum(size[0] for size in sizes) == ending_tokens


def test_an_example_that_is_too_long(rendered, fails):
    examples = hellaswag.read_examples(EXAMPLES)[:N]
    longest = max(example.tokens.shape[1] for example in rendered)
    assert len(hellaswag.render_all(examples, longest)) == N
    message = fails(hellaswag.render_all, examples, longest - 1)
    assert str(longest) in message and "--hellaswag_interval 0" in message


def test_under_autocast_the_losses_are_summed_in_float32(model, rendered, our_losses):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        means = hellaswag.ending_losses(model, rendered[:1])
    exact = our_losses[:1]
    assert means.dtype == torch.float32 and not torch.equal(means, exact)
    assert ((means - exact) / exact).abs().max() < 0.01
    assert not torch.equal(means, means.bfloat16().float())  # finer than bfloat16


def right_by_hugging_face(losses, start=0, end=None, step=1):
    """Return how many of the examples, start:end:step of them, are right by losses, (N, 4)."""
    labels = [example["label"] for example in hellaswag.read_examples(EXAMPLES)[:N]]
    right = 0
    for label, row in list(zip(labels, losses.tolist()))[start:end:step]:
        right += row.index(min(row)) == label
    return right


def test_the_accuracy_is_hugging_faces(model, rendered, their_losses):
    right = hellaswag.count_right(model, rendered)
    assert isinstance(right, int)
    assert right == right_by_hugging_face(their_losses[1])
    whole, by_token, by_character = their_losses.argmin(dim=2).tolist()
    assert whole != by_token != by_character != whole  # three different questions


def test_the_processes_share_the_examples(model, rendered, their_losses, monkeypatch):
    brought = []

    def all_reduce(count):
        brought.append(int(count))
        count += 10  # the others'

    monkeypatch.setattr(hellaswag.dist, "all_reduce", all_reduce)
    for rank in range(3):
        right = hellaswag.count_right(model, rendered, rank, world=3)
        assert brought[rank] == right_by_hugging_face(their_losses[1], start=rank, step=3)
        assert right == brought[rank] + 10


# -------------------------------------------------------------------------------------------------
# The program


def test_the_program(model_folder, capsys, their_losses, monkeypatch):
    folder, name = os.path.split(model_folder)
    monkeypatch.setenv("HOME", folder)
    hellaswag.main(["-m", f"~/{name}", "-d", "cpu", "--data", EXAMPLES, "--limit", "24"])
    out, err = capsys.readouterr()
    assert f"{model_folder}, 24 examples, accuracy by\n" in out
    assert err == ""  # no bar, since this is no terminal
    found = re.findall(r"^  (.*\S) +(\d\.\d{4}) \+- (\d\.\d{4})$", out, re.M)
    ways = ["total loss", "mean loss per token", "mean loss per character"]
    assert [name for name, _, _ in found] == ways
    for (_, accuracy, error), losses in zip(found, their_losses):
        p = right_by_hugging_face(losses, end=24) / 24
        assert float(accuracy) == pytest.approx(p, abs=1e-4)
        assert float(error) == pytest.approx((p * (1 - p) / 23) ** 0.5, abs=1e-4)

    answers = their_losses[1, :5].argmin(dim=1).tolist()
    for example, answer in zip(hellaswag.read_examples(EXAMPLES)[:5], answers):
        assert example["ctx"] in out
        for i, ending in enumerate(example["endings"]):
            marks = ("*" if i == answer else " ") + ("+" if i == example["label"] else " ")
            line = rf"^  {re.escape(marks)} \d+\.\d{{4}}  {re.escape(ending)}$"
            assert re.search(line, out, re.M)


@pytest.mark.parametrize("flags, named", [
    ("--limit 0", ["--limit 0"]),
    ("--limit x", ["--limit", "x"]),
    ("-m gpt3 -d cpu --data " + EXAMPLES, ["--model gpt3", "gpt2"]),
    ("-d cpu --data no.jsonl", ["no.jsonl", "No such file"]),
    ("-d cpu --data ~/home.jsonl", ["{folder}/home.jsonl", "No such file"]),
    ("-d cpu --data empty.jsonl", ["empty.jsonl"]),
    ("-d cpu --data bad.jsonl", ["bad.jsonl, line 1"]),
    ("-d gpu", ["gpu", "cpu"]),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, fails, flags, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text("<html>\n")
    message = fails(hellaswag.main, flags.split())
    for word in named:
        assert word.format(folder=tmp_path) in message


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch, fails, server):
    monkeypatch.chdir(tmp_path)
    server.behaviours = [404]
    download = functools.partial(hellaswag.download, url=server.url)
    monkeypatch.setattr(hellaswag, "download", download)
    message = fails(hellaswag.main, ["-d", "cpu"])
    assert "404" in message and hellaswag.PATH in message


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate"),
])
def test_too_little_memory_is_one_line(model_folder, monkeypatch, fails, error):
    def score(*args):
        raise error

    monkeypatch.setattr(hellaswag, "score", score)
    flags = ["-m", model_folder, "-d", "cpu", "--data", EXAMPLES]
    assert "--model" in fails(hellaswag.main, flags)


def test_a_score_on_a_cpu_repeats(model_folder, capsys):
    outputs = []
    for _ in range(2):
        hellaswag.main(["-m", model_folder, "-d", "cpu", "--data", EXAMPLES, "--limit", "5"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_letter_that_the_output_cannot_show_is_replaced(model_folder, tmp_path, monkeypatch):
    line = '{"ctx": "\u4f60\u597d", "endings": ["b", "c", "d", "e"], "label": 3}\n'
    (tmp_path / "a.jsonl").write_text(line, encoding="utf-8")
    flags = ["-m", model_folder, "-d", "cpu", "--data", str(tmp_path / "a.jsonl")]
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="")
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", *flags])
    monkeypatch.setattr(sys, "stdout", output)
    runpy.run_path(str(ROOT / "hellaswag.py"), run_name="__main__")
    assert b"\n??\n" in output.buffer.getvalue()
