"""Data has the same bytes in every clone, whatever git does to the ends of lines on that system."""
import shutil

from conftest import ROOT, git

LINES = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
DATA = ["input.txt", "assets/a_log.txt", "tests/examples.jsonl"]


def test_data_keeps_its_bytes_where_git_changes_the_ends_of_lines(repository, tmp_path):
    shutil.copy(ROOT / ".gitattributes", repository)
    for name in [*DATA, "notes.txt"]:
        path = repository / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(LINES)
    git("add", ".", cwd=repository)
    git("commit", "-q", "-m", "four texts", cwd=repository)

    clone = tmp_path / "clone"
    git("clone", "-q", "-c", "core.autocrlf=true", str(repository), str(clone))
    for name in DATA:
        assert (clone / name).read_bytes() == LINES
    assert (clone / "notes.txt").read_bytes() == LINES.replace(b"\n", b"\r\n")  # as on Windows
