"""hellaswag.py: downloads from a server that has faults."""
import hashlib
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import EXAMPLES, damaged

import fineweb
import hellaswag
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
    for part in (problem, server.url, path):
        assert part in message
    assert os.listdir(tmp_path) == []


def test_no_server(tmp_path, fails):
    url = "http://127.0.0.1:9/val.jsonl"
    message = fails(hellaswag.download, str(tmp_path / "val.jsonl"), url)
    assert url in message and "refused" in message


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


@pytest.fixture(scope="module")
def rendered():
    """Return the first N examples, rendered."""
    return hellaswag.render_all(hellaswag.read_examples(EXAMPLES)[:N], 1024)


def test_an_example_that_is_too_long(rendered, fails):
    examples = hellaswag.read_examples(EXAMPLES)[:N]
    longest = max(example.tokens.shape[1] for example in rendered)
    assert len(hellaswag.render_all(examples, longest)) == N
    message = fails(hellaswag.render_all, examples, longest - 1)
    assert str(longest) in message
