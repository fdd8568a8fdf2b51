"""What users hand in, in a process of its own, without the argument checks that ``tests.conftest`` installs."""

import subprocess
import sys
from pathlib import Path

import pytest

PLAIN = Path(__file__).parent / "plain"


@pytest.mark.parametrize("name", sorted(path.stem for path in PLAIN.glob("*_cases.py")))
def test_without_shape_checks(name: str) -> None:
    options = ("-q", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(PLAIN / f"{name}.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=PLAIN.parent.parent,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
