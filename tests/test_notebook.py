"""play.ipynb runs from its first cell to its last, without internet."""
import nbformat
import offline
import pytest
from conftest import ROOT
from nbclient import NotebookClient


def execute(notebook, folder):
    """Run the notebook's cells in folder. Return (the text they print, how many pictures)."""
    resources = dict(metadata=dict(path=str(folder)))
    NotebookClient(notebook, timeout=120, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return text, pictures


def test_play(monkeypatch):
    for name, value in offline.environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code[:-3]:  # they need a download, so their outputs would be a stand-in's
        assert not cell.outputs
    for cell in code[-3:]:
        assert cell.outputs
    text, pictures = execute(notebook, ROOT)
    print(text)
    assert pictures == 5
    assert "every token the same: True" in text
    assert text.count("> Hello, I'm a language model,") == 4
    growth = {}
    for line in text.splitlines():
        if line.startswith("after 12 blocks, "):
            way, width = line.split(": ")
            growth[way] = float(width)
    assert growth["after 12 blocks, not scaled"] > 2 * growth["after 12 blocks, scaled"]
    assert "best validation loss" in text
    assert "four micro-batches, added: 3.0000" in text
    assert "four micro-batches, divided: 0.0000" in text


@pytest.mark.parametrize("log, printed", [
    ("0 val 11\n0 hella 0.2400\n0 train 10.9\n1 train 9\n1 val 12\n1 hella 0.31\n",
     "best HellaSwag 0.3100"),
    ("0 train 10.9\n", ""),
])
def test_the_curves_of_any_log(tmp_path, log, printed):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text(log)
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    notebook.cells = notebook.cells[-1:]
    text, pictures = execute(notebook, tmp_path)
    assert printed in text
    assert pictures == 1
