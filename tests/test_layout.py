"""How the three files are laid out: what imports what, and what a reader can take in."""
import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# An arrow points from a file to those that it may import at its top.
ARROWS = {
    "fineweb": set(),
    "hellaswag": {"fineweb"},
    "train_gpt2": {"fineweb", "hellaswag"},
}
FILES = [f"{name}.py" for name in ARROWS]


def parse(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def outside_functions(node):
    """Yield the nodes that run when a file is imported: all but the insides of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield child
            yield from outside_functions(child)


def imported(nodes):
    """Return the names of the packages that these nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", ARROWS)
def test_imports_point_one_way(name):
    tree = parse(f"{name}.py")
    at_the_top = imported(outside_functions(tree))
    assert at_the_top & ARROWS.keys() <= ARROWS[name]
    assert not at_the_top & {"datasets", "transformers"}
    if name == "fineweb":
        assert "torch" not in imported(ast.walk(tree))  # its workers are spawned


@pytest.mark.parametrize("name, absent", [
    ("fineweb", ["torch", "datasets", "transformers", "pyarrow"]),
    ("train_gpt2", ["datasets", "transformers", "pyarrow"]),
])
def test_importing_runs_nothing_and_is_light(tmp_path, name, absent):
    code = f"import sys, {name}; print([m for m in {absent} if m in sys.modules])"
    env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_no_function_is_too_long(file):
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            limit = 140 if node.name == "main" else 70  # it holds the loop
            assert lines <= limit, f"{node.name}, line {node.lineno}, has {lines} lines"
