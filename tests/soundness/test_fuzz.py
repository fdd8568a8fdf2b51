"""Calls with right and wrong arguments end in a right answer or in an error of one line.

In a process of its own: here the import hook would refuse wrong types before the package does, as no user sees it.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIRST, CALLS = 10_000, 60


def test_no_traceback_and_no_lost_row(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "benchmarks.fuzz", "--first", str(FIRST), "--calls", str(CALLS), "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = Counter(call["outcome"] for call in json.loads(out.read_text(encoding="utf-8"))["calls"])
    assert set(counts) == {"clean error", "right answer"}  # both kinds of arguments are drawn
    assert counts.total() == CALLS
