"""The benchmark runs; how fast things are, it is no test's business to say."""
import re
import subprocess
import sys

from conftest import ROOT

ROWS = ["step", "hellaswag", "sample", "memory", "save"]  # the others only start programs


def test_quick():
    done = subprocess.run([sys.executable, "tests/bench.py", "--quick", *ROWS], cwd=ROOT,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = {}
    for ratio, name in re.findall(r"^ +(\d+\.\d\d)  (\w+)  ", done.stdout, re.M):
        rows[name] = float(ratio)
    assert list(rows) == ROWS
    rungs = re.findall(r"^ +0\.\d\d  ([a-zA-Z ,]+)$", done.stdout, re.M)
    assert rungs == [
        "not compiled, AdamW as PyTorch has it", "AdamW fused",
        "the C library keeps freed memory",
    ]
    shares = re.findall(r"^ +(\d+\.\d)%  of the step's time: ", done.stdout, re.M)
    assert len(shares) == 7
    assert abs(sum(map(float, shares)) - 100) < 0.5
    assert 0 < rows["save"] < 100
    assert rows["step"] < 1
