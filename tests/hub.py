"""A Hugging Face hub on loopback, of one data set, for `datasets` and its real code: HF_ENDPOINT=http://127.0.0.1:PORT.

It has what load_dataset asks for: the data set's README with its configurations, the revision, lists of files, and the
files, whole or in ranges.
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
    starts = [997 * i * i % (len(text) - 3000) for i in range(count)]
    return [text[start : start + 7919 * i % (3001 if i % 8 == 0 else 601)] for i, start in enumerate(starts)]


def make_parquet(folder, documents, files=3):
    """Write documents as parquet files into folder, as the sample, and one more that isn't in it; return folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sample, other = folder / "sample" / "10BT", folder / "data" / "CC-MAIN-2024-10"
    sample.mkdir(parents=True)
    other.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["not in the sample"], "id": ["x"]}), other / "000_00000.parquet")
    for i in range(files):
        part = documents[len(documents) * i // files : len(documents) * (i + 1) // files]
        table = pa.table({"text": part, "id": [f"{i}-{n}" for n in range(len(part))]})
        pq.write_table(table, sample / f"{i:03d}_00000.parquet", row_group_size=100)
    return folder


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    newest = SHA  # the revision that is called main; there are files at SHA alone
    down = "nothing"  # the file for which there is no answer
    refuses_token = False  # answer every request with 401, as the hub does for a stale HF_TOKEN

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        folder = self.server.folder
        if self.refuses_token:
            self.send(b"", status=401)
        elif path.endswith(self.down):
            self.close_connection = True
        elif self.newest != SHA and re.search(f"/(tree|resolve)/(main|{self.newest})/", path):
            self.send(b"", status=404, error="EntryNotFound")
        elif match := re.fullmatch(f"/api/datasets/{NAME}/tree/[^/]+/?(.*)", path):
            entries = (folder / match[1]).rglob("*") if "recursive=true" in self.path else (folder / match[1]).iterdir()
            self.send(json.dumps([dict(type="directory" if entry.is_dir() else "file", oid=entry.name,
                                       path=entry.relative_to(folder).as_posix(), size=entry.stat().st_size)
                                  for entry in sorted(entries)]).encode())
        elif path.startswith(f"/api/datasets/{NAME}"):
            sha = SHA if path.endswith(SHA) else self.newest
            self.send(json.dumps(dict(id=NAME, sha=sha, siblings=[], tags=[], private=False, downloads=0)).encode())
        elif match := re.fullmatch(f"/datasets/{NAME}/resolve/[^/]+/(.*)", path):
            file = folder / match[1]
            if self.command == "GET" and match[1].endswith(".parquet") and self.server.faults:
                fault = self.server.faults.pop(0)
                if fault == "503":
                    return self.send(b"", status=503)
                if fault == "gone":
                    self.close_connection = True
                    return
                if fault == "cut":
                    return self.send(file.read_bytes(), etag=match[1].replace("/", "-"), cut=True)
            if match[1] == "README.md" or file.is_file():
                self.send(README if match[1] == "README.md" else file.read_bytes(), etag=match[1].replace("/", "-"))
            else:
                self.send(b"", status=404, error="EntryNotFound")
        else:
            self.send(b"", status=404, error="RepoNotFound")

    do_HEAD = do_GET

    def send(self, body, status=200, etag="x", error=None, cut=False):
        total = len(body)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            first, last = int(wanted[1]), min(int(wanted[2] or total - 1), total - 1)
            status, body = 206, body[first : last + 1]
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
    """Serve the documents from folder, an empty one; return the environment in which `datasets` finds them."""
    address = serve(make_parquet(folder / "hub", make_documents()), faults)
    return dict(os.environ, HF_ENDPOINT=address, HF_HOME=str(folder / "cache"))


def serve(folder, faults=()):
    """Serve the files of folder in a thread of this process; return the address.

    faults: what befalls the first requests for parquet files, one after another: 503, gone (no answer),
    cut (after half), or none. A list may be changed meanwhile.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.faults = folder, faults
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
