"""play.ipynb runs from its first cell to its last, without internet."""
import nbformat
import offline
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
    text, pictures = execute(notebook, ROOT)
    print(text)
    assert pictures == 4
    assert "every token the same: True" in text
    assert text.count("> Hello, I'm a language model,") == 4
    growth = {}
    for line in text.splitlines():
        if line.startswith("after 12 blocks, "):
            way, width = line.split(": ")
            growth[way] = float(width)
    assert growth["after 12 blocks, not scaled"] > 2 * growth["after 12 blocks, scaled"]
