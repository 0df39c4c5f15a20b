"""The benchmark runs; how fast things are, it is no test's business to say."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_quick():
    done = subprocess.run([sys.executable, "tests/bench.py", "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = dict((name, float(ratio)) for ratio, name in re.findall(r"^ +(\d+\.\d\d)  (\w+)  ", done.stdout, re.M))
    assert list(rows) == ["step", "hellaswag", "sample", "tokens", "start", "memory", "save"]
    assert 0 < rows["start"] < 10 and 0 < rows["save"] < 100 and rows["step"] < 1
