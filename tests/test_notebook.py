"""play.ipynb runs from its first cell to its last, without internet."""
from pathlib import Path

import nbformat
import offline
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def test_play(monkeypatch):
    for name, value in offline.environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    print(text)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert "every token the same: True" in text
    assert text.count("> Hello, I'm a language model,") == 4
    growth = dict(line.split(": ") for line in text.splitlines() if line.startswith("after 12 blocks, "))
    scaled, unscaled = (float(growth[f"after 12 blocks, {way}"]) for way in ("scaled", "not scaled"))
    assert unscaled > 2 * scaled
    assert "four micro-batches, added: 3.0000" in text and "four micro-batches, divided: 0.0000" in text
