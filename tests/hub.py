"""A Hugging Face hub on loopback, of one data set, for `datasets` and its real code.

HF_ENDPOINT=http://127.0.0.1:PORT. It has what load_dataset asks for: the data set's README with its
configurations, the revision, lists of files, and the files, whole or in ranges.
"""
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "HuggingFaceFW/fineweb-edu"
README = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""
SHA = "0123456789abcdef0123456789abcdef01234567"


def make_documents(count=2000):
    """Return documents of all lengths, from none to 3,000 characters, cut from input.txt."""
    text = (Path(__file__).parent.parent / "input.txt").read_text(encoding="utf-8")
    documents = []
    for i in range(count):
        start = 997 * i * i % (len(text) - 3000)
        length = 7919 * i % (3001 if i % 8 == 0 else 601)
        documents.append(text[start : start + length])
    return documents


def make_parquet(folder, documents, files=3):
    """Write documents into folder as the sample, in parquet files, and one that isn't in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sample = folder / "sample" / "10BT"
    other = folder / "data" / "CC-MAIN-2024-10"
    sample.mkdir(parents=True)
    other.mkdir(parents=True)
    table = pa.table({"text": ["not in the sample"], "id": ["x"]})
    pq.write_table(table, other / "000_00000.parquet")
    for i in range(files):
        part = documents[len(documents) * i // files : len(documents) * (i + 1) // files]
        table = pa.table({"text": part, "id": [f"{i}-{n}" for n in range(len(part))]})
        pq.write_table(table, sample / f"{i:03d}_00000.parquet", row_group_size=100)


def describe(entry, folder):
    """Return what the hub says of a file or a folder."""
    kind = "directory" if entry.is_dir() else "file"
    path = entry.relative_to(folder).as_posix()
    return dict(type=kind, oid=entry.name, path=path, size=entry.stat().st_size)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        folder = self.server.folder
        if match := re.fullmatch(f"/api/datasets/{NAME}/tree/[^/]+/?(.*)", path):
            listed = folder / match[1]
            entries = listed.rglob("*") if "recursive=true" in self.path else listed.iterdir()
            answer = [describe(entry, folder) for entry in sorted(entries)]
            self.send(json.dumps(answer).encode())
        elif path.startswith(f"/api/datasets/{NAME}"):
            answer = dict(id=NAME, sha=SHA, siblings=[], tags=[], private=False, downloads=0)
            self.send(json.dumps(answer).encode())
        elif match := re.fullmatch(f"/datasets/{NAME}/resolve/[^/]+/(.*)", path):
            self.send_file(match[1])
        else:
            self.send(b"", status=404, error="RepoNotFound")

    do_HEAD = do_GET

    def send_file(self, name):
        file = self.server.folder / name
        etag = name.replace("/", "-")
        fault = None
        if self.command == "GET" and name.endswith(".parquet") and self.server.faults:
            fault = self.server.faults.pop(0)
        if name == "README.md":
            self.send(README, etag=etag)
        elif file.is_file():
            self.send(file.read_bytes(), etag=etag, cut=fault == "cut")
        else:
            self.send(b"", status=404, error="EntryNotFound")

    def send(self, body, status=200, etag="x", error=None, cut=False):
        total = len(body)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            first = int(wanted[1])
            last = min(int(wanted[2] or total - 1), total - 1)
            status = 206
            body = body[first : last + 1]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection |= cut

    def log_message(self, *args):
        pass


def environment(folder, faults=()):
    """Serve the documents from folder, an empty one.

    Returns the environment in which `datasets` finds them.
    faults: what befalls the first requests for parquet files, one after another: "cut" (the
    connection ends after half of the answer).
    """
    make_parquet(folder / "hub", make_documents())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder = folder / "hub"
    server.faults = faults
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    # Without USE_TORCH `datasets` imports torch for a stream, and doesn't use it.
    settings = dict(HF_ENDPOINT=address, HF_HOME=str(folder / "cache"), USE_TORCH="0")
    return os.environ | settings
