"""hellaswag.py: downloads from a server that has faults, scores against Hugging Face's model."""
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
from conftest import ROOT, damaged

import hellaswag
import train_gpt2
from fineweb import gpt2_encoding

EXAMPLES = str(ROOT / "tests" / "hellaswag.jsonl")  # 200, made of input.txt's lines
N = 100  # as many of them are scored
FILE = b"".join(b'{"ind": %d}\n' % i for i in range(10_042))


@pytest.fixture(autouse=True)
def hellaswag_py(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hellaswag.py"])


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
        if behaviour != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        if behaviour == "slow":
            threading.Event().wait(1)  # a second; the tests' time.sleep doesn't wait
        if behaviour != "cut":
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


@pytest.fixture
def waits(monkeypatch):
    """Return the list of the seconds that hellaswag.py would have waited."""
    seconds = []
    monkeypatch.setattr(hellaswag.time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize("behaviours, seconds", [
    (["good"], []),
    (["no length"], []),
    ([503, 429, "good"], [1, 2]),
    (["cut", "good"], [1]),
    (["cut", 500, "cut", 503, "good"], [1, 2, 4, 8]),
])
def test_download(server, waits, tmp_path, behaviours, seconds):
    server.behaviours = behaviours
    path = tmp_path / "val.jsonl"
    hellaswag.download(str(path), server.url)
    assert path.read_bytes() == FILE and waits == seconds and server.behaviours == []
    assert sorted(os.listdir(tmp_path)) == ["val.jsonl", "val.jsonl.sha256"]
    hellaswag.download(str(path), server.url)  # it is there: nobody is asked


@pytest.mark.parametrize("behaviours, tries, problem", [
    ([404, "good"], 1, "404"),  # the next answer would be the same
    ([503] * 5, 5, "503"),
    (["cut"] * 5, 5, "more expected"),
    (["portal", "good"], 1, "1 lines"),
])
def test_a_download_that_fails(server, waits, tmp_path, behaviours, tries, problem):
    server.behaviours = list(behaviours)
    path = str(tmp_path / "val.jsonl")
    with pytest.raises(OSError) as error:
        hellaswag.download(path, server.url)
    for part in (problem, server.url, "by hand", path):
        assert part in str(error.value)
    assert len(behaviours) - len(server.behaviours) == tries
    assert os.listdir(tmp_path) == []


def test_no_server(waits, tmp_path):
    url = "http://127.0.0.1:9/val.jsonl"
    with pytest.raises(OSError, match=f"{url}.*refused"):
        hellaswag.download(str(tmp_path / "val.jsonl"), url)
    assert waits == [1, 2, 4, 8]


def test_a_download_that_cannot_be_saved_leaves_nothing(server, tmp_path, monkeypatch):
    def no_room(*args):
        raise OSError(28, "No space left on device")

    server.behaviours = ["good"]
    monkeypatch.setattr(hellaswag.os, "replace", no_room)
    with pytest.raises(OSError, match="No space left"):
        hellaswag.download(str(tmp_path / "val.jsonl"), server.url)
    assert os.listdir(tmp_path) == []


PROBE = """
import os, sys
import hellaswag, torch.distributed as dist
from fineweb import gpt2_encoding

url, store = sys.argv[1:]
hellaswag.EXAMPLES = 12
hellaswag.download.__defaults__ = (hellaswag.PATH, url)
children = []
for rank, local_rank in enumerate((0, 1, 0, 0)):
    child = os.fork()
    if child == 0:
        os.environ["LOCAL_RANK"] = str(local_rank)
        dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=4)
        os._exit(len(hellaswag.load_examples(gpt2_encoding())))
    children.append(child)
for child in children:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that torch is imported only once")
def test_machines_that_share_a_folder_download_at_once(server, tmp_path):
    """Three machines share a folder. The first has two processes, of which one downloads."""
    with open(EXAMPLES, "rb") as f:
        server.body = b"".join(f.readlines()[:12])
    server.behaviours = ["slow", "slow", "slow"]
    folder = tmp_path / "shared"
    folder.mkdir()
    command = [sys.executable, "-c", PROBE, server.url, str(tmp_path / "store")]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=60)
    assert done.stdout.split() == ["12"] * 4, done.stderr
    assert sorted(os.listdir(folder)) == ["hellaswag_val.jsonl", "hellaswag_val.jsonl.sha256"]
    assert (folder / "hellaswag_val.jsonl").read_bytes() == server.body
    assert server.behaviours == []


def test_no_damage_of_the_file_goes_unseen(server, tmp_path, monkeypatch):
    with open(EXAMPLES, "rb") as f:
        server.body = f.read()
    server.behaviours = ["good"]
    monkeypatch.setattr(hellaswag, "EXAMPLES", 200)
    path = tmp_path / "val.jsonl"
    hellaswag.download(str(path), server.url)
    assert len(hellaswag.read_examples(str(path))) == 200
    for spoilt in damaged(server.body, 10, 50):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
            hellaswag.read_examples(str(path))

    # a file that came by hand has no checksum: what isn't an example shows all the same
    (tmp_path / "val.jsonl.sha256").unlink()
    for spoilt in damaged(server.body, 10, 50):
        path.write_bytes(spoilt)
        try:
            hellaswag.read_examples(str(path))
        except ValueError as error:
            assert str(error).startswith(str(path))


def test_examples():
    examples = hellaswag.read_examples(EXAMPLES)
    assert len(examples) == 200
    assert {example["label"] for example in examples} == {0, 1, 2, 3}


@pytest.mark.parametrize("line", [
    '{"ctx": "a"',
    "[1]",
    "\xff",
    '{"endings": ["b", "c", "d", "e"], "label": 0}',
    '{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}',
    '{"ctx": "a", "endings": "bcde", "label": 0}',
    '{"ctx": "a", "endings": ["b", "c", "d", "e"]}',
    '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}',
    '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": [0]}',
    '{"ctx": "a", "endings": ["b", "c", "d", ""], "label": 1}',
])
def test_a_line_that_is_no_example(tmp_path, line):
    good = '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 3}\n'
    (tmp_path / "a.jsonl").write_text(good + line, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        hellaswag.read_examples(str(tmp_path / "a.jsonl"))


# -------------------------------------------------------------------------------------------------
# From text to tokens


def test_the_rows_at_the_top_of_the_file():
    endings = ["then wipes his face.", "gets up and walks towards the camera.",
               "lifts a shoe to his mouth.", "starts playing an acoustic guitar."]
    example = dict(ctx="A young man sits on a bed. the man", endings=endings, label=3)
    for text in [example["ctx"], *endings]:
        assert f'"{text}"' in hellaswag.__doc__
    tokens, mask = hellaswag.render(example, gpt2_encoding())
    assert tokens.shape == mask.shape == (4, 18)
    assert tokens.dtype == mask.dtype == torch.int64
    shown = re.findall(r"^    (tokens|mask) +([\d ]+)$", hellaswag.__doc__, re.M)
    assert [(name, [int(n) for n in numbers.split()]) for name, numbers in shown] == [
        ("tokens", tokens[0].tolist()), ("mask", mask[0].tolist()),
        ("tokens", tokens[1].tolist()), ("mask", mask[1].tolist()),
    ]


def test_a_row_is_the_context_and_an_ending():
    endings = ["He runs.", "He stops and looks around for a while.", "No.", "Yes."]
    example = dict(ctx="A man walks.", endings=endings, label=1)
    encoding = gpt2_encoding()
    tokens, mask = hellaswag.render(example, encoding)
    assert mask.sum(dim=1).tolist() == [3, 9, 2, 2]
    for row, ending in enumerate(endings):
        ending_tokens = tokens[row][mask[row] == 1].tolist()
        length = 4 + len(ending_tokens)
        assert encoding.decode(ending_tokens) == " " + ending
        assert encoding.decode(tokens[row, :length].tolist()) == "A man walks. " + ending
        assert tokens[row, length:].sum() == 0
    (rendered,) = hellaswag.render_all([example], encoding)
    assert torch.equal(rendered.tokens, tokens) and torch.equal(rendered.mask, mask)
    assert rendered.label == 1 and rendered.characters == [8, 38, 3, 4]


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
    return hellaswag.render_all(hellaswag.read_examples(EXAMPLES)[:N], gpt2_encoding())


@pytest.fixture(scope="module")
def our_losses(model, rendered):
    """Return what all endings cost: (N, 3, 4)."""
    return hellaswag.ending_losses(model, rendered)


@pytest.fixture(scope="module")
def their_losses(model_folder):
    """Return the same by Hugging Face's GPT-2, which reads one row at a time: (N, 3, 4)."""
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(model_folder).eval()
    encoding = gpt2_encoding()
    result = torch.empty(N, 3, 4)
    for number, example in enumerate(hellaswag.read_examples(EXAMPLES)[:N]):
        context = encoding.encode_ordinary(example["ctx"])
        for row, ending in enumerate(example["endings"]):
            tokens = encoding.encode_ordinary(" " + ending)
            n = len(tokens)
            with torch.no_grad():
                output = theirs(torch.tensor([context + tokens]), logits_to_keep=n + 1)
            log_probabilities = output.logits[0, :-1].log_softmax(dim=-1)  # (n, vocab_size)
            cost = -sum(float(log_probabilities[i, token]) for i, token in enumerate(tokens))
            result[number, :, row] = torch.tensor([cost, cost / n, cost / len(ending)])
    return result


def test_every_loss_is_hugging_faces(our_losses, their_losses):
    assert our_losses.dtype == torch.float32
    assert torch.allclose(our_losses, their_losses, rtol=1e-6, atol=1e-4)


def test_padding_counts_for_nothing(model, rendered, our_losses):
    lengthened = []
    for example in rendered[:8]:
        tokens = torch.cat((example.tokens, torch.zeros(4, 50, dtype=torch.int64)), dim=1)
        mask = torch.cat((example.mask, torch.zeros(4, 50, dtype=torch.int64)), dim=1)
        lengthened.append(hellaswag.Rendered(tokens, mask, example.label, example.characters))
    losses = hellaswag.ending_losses(model, lengthened)
    assert torch.allclose(losses, our_losses[:8], rtol=1e-6, atol=1e-5)


def test_what_else_is_in_a_batch_changes_nothing(model, rendered, our_losses):
    for number in (0, 33, N - 1):
        alone = hellaswag.ending_losses(model, [rendered[number]])
        assert torch.allclose(alone[0], our_losses[number], rtol=1e-6, atol=1e-5)
    backwards = hellaswag.ending_losses(model, rendered[::-1])
    assert torch.allclose(backwards.flip(0), our_losses, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind, block_size", [("cpu", 1024), ("cuda", 1024), ("cuda", 90)])
def test_batches(model, rendered, monkeypatch, kind, block_size):
    monkeypatch.setattr(model.config, "block_size", block_size)
    batches = hellaswag.make_batches(rendered, model, torch.device(kind))
    together = [number for numbers, _ in batches for number in numbers]
    assert sorted(together) == list(range(N))
    for numbers, T in batches:
        longest = max(rendered[number].tokens.shape[1] for number in numbers)
        assert longest <= T <= block_size
        assert 4 * len(numbers) * T <= (2**11 if kind == "cpu" else 2**14)
    if block_size == 1024:
        shapes = {T for _, T in batches}
        assert shapes <= {64, 128, 192, 256} or kind == "cpu"


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


def test_an_example_that_is_too_long(model, rendered):
    tokens = torch.zeros(4, 257, dtype=torch.int64)
    long = hellaswag.Rendered(tokens, tokens, 0, [1] * 4)
    with pytest.raises(ValueError, match="257"):
        hellaswag.ending_losses(model, [rendered[0], long])


def test_under_autocast_the_logits_are_summed_in_float32(model, rendered, our_losses):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = hellaswag.ending_losses(model, rendered[:1])[:, 0]
    exact = our_losses[:1, 0]
    assert sums.dtype == torch.float32 and not torch.equal(sums, exact)
    assert ((sums - exact) / exact).abs().max() < 0.01
    assert not torch.equal(sums, sums.bfloat16().float())  # finer than what bfloat16 can tell apart


def right_by_hugging_face(their_losses, start=0, end=None, step=1):
    """Return how many of the examples are right: [by whole ending, by token, by character]."""
    labels = [example["label"] for example in hellaswag.read_examples(EXAMPLES)]
    right = [0, 0, 0]
    for label, losses in list(zip(labels, their_losses.tolist()))[start:end:step]:
        for way in range(3):
            right[way] += losses[way].index(min(losses[way])) == label
    return right


def test_the_three_accuracies_are_hugging_faces(model, rendered, their_losses):
    right = hellaswag.count_right(model, rendered)
    assert right == right_by_hugging_face(their_losses)
    whole, by_token, by_character = their_losses.argmin(dim=2).T.tolist()
    assert whole != by_token != by_character != whole  # three different questions


class Reduce:
    """Stands for dist.all_reduce: keeps what a process brings, adds what `others` bring."""

    def __init__(self, others):
        self.others = others

    def __call__(self, counts):
        self.brought = counts.tolist()
        counts += torch.tensor(self.others)


def test_the_processes_share_the_examples(model, rendered, their_losses, monkeypatch):
    reduce = Reduce([10, 20, 30, 0])
    monkeypatch.setattr(hellaswag.dist, "all_reduce", reduce)
    for rank in range(3):
        right = hellaswag.count_right(model, rendered, rank, world=3)
        mine = right_by_hugging_face(their_losses, start=rank, step=3)
        assert reduce.brought == [*mine, 0]
        assert right == [mine[0] + 10, mine[1] + 20, mine[2] + 30]
    assert hellaswag.count_right(model, rendered[:2], rank=2, world=3) == [10, 20, 30]  # has none


def test_a_request_to_stop_is_heeded_within_a_batch(model, rendered, monkeypatch):
    batches, questions = [], []
    whole_score = hellaswag.score

    def score(*args):
        batches.append(len(questions))
        return whole_score(*args)

    def stop_at_third_question():
        questions.append(len(batches))
        return len(questions) == 3

    monkeypatch.setattr(hellaswag, "score", score)
    assert hellaswag.count_right(model, rendered, should_stop=stop_at_third_question) is None
    assert batches == [1, 2] and questions == [0, 1, 2]
    right = hellaswag.count_right(model, rendered, should_stop=lambda: False)
    assert right is not None


@pytest.mark.parametrize("i_stop, others", [(True, 0), (False, 1), (True, 1)])
def test_all_processes_break_off_if_one_does(model, rendered, monkeypatch, i_stop, others):
    reduce = Reduce([1, 1, 1, others])
    monkeypatch.setattr(hellaswag.dist, "all_reduce", reduce)
    examples = rendered[:6]
    assert hellaswag.count_right(model, examples, 0, 2, should_stop=lambda: i_stop) is None
    assert reduce.brought[3] == i_stop


# -------------------------------------------------------------------------------------------------
# The program


def test_the_program(model_folder, capsys, their_losses):
    hellaswag.main(["-m", model_folder, "-d", "cpu", "--data", EXAMPLES, "--limit", "20"])
    out, err = capsys.readouterr()
    assert f"{model_folder}, 20 examples, accuracy by\n" in out
    assert err == ""  # no bar, since this is no terminal
    found = re.findall(r"^  (.*\S) +(\d\.\d{4}) \+- (\d\.\d{4})$", out, re.M)
    ways = ["total loss", "mean loss per token", "mean loss per character"]
    assert [name for name, _, _ in found] == ways
    for (_, accuracy, error), right in zip(found, right_by_hugging_face(their_losses, end=20)):
        p = right / 20
        assert float(accuracy) == p
        assert float(error) == pytest.approx((p * (1 - p) / 19) ** 0.5, abs=1e-4)

    answers = their_losses[:5, 1].argmin(dim=1).tolist()
    for example, answer in zip(hellaswag.read_examples(EXAMPLES)[:5], answers):
        assert example["ctx"] in out
        for i, ending in enumerate(example["endings"]):
            marks = ("*" if i == answer else " ") + ("+" if i == example["label"] else " ")
            line = rf"^  {re.escape(marks)} \d+\.\d{{4}}  {re.escape(ending)}$"
            assert re.search(line, out, re.M)


@pytest.mark.parametrize("flags, named", [
    ("--limit 0", ["--limit 0"]),
    ("--limit x", ["--limit", "x"]),
    ("-m gpt3 --data " + EXAMPLES, ["gpt3", "gpt2"]),
    ("--data no.jsonl", ["no.jsonl", "No such file"]),
    ("--data empty.jsonl", ["empty.jsonl"]),
    ("--data bad.jsonl", ["bad.jsonl, line 1"]),
    ("-d gpu", ["gpu", "cpu"]),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text("<html>\n")
    with pytest.raises(SystemExit) as end:
        hellaswag.main(flags.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("hellaswag.py: ")
    for word in named:
        assert word in err


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch, capsys, server):
    monkeypatch.chdir(tmp_path)
    server.behaviours = [404]
    monkeypatch.setattr(hellaswag.download, "__defaults__", (hellaswag.PATH, server.url))
    with pytest.raises(SystemExit) as end:
        hellaswag.main(["-d", "cpu"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert "404" in err and "by hand" in err and hellaswag.PATH in err


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
