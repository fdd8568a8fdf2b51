"""README, docs and docstrings say what is true: links lead somewhere, examples run, named commands exist."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from attnrobust.cli import app
from attnrobust.status import Kind, Status
from benchmarks.network_agreement import PAGE, families

ROOT = Path(__file__).parent.parent
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as web views of Markdown make them."""
    text = FENCE.sub("", page.read_text())
    titles = (re.sub(r"[`*]", "", line.lstrip("#")).strip() for line in text.splitlines() if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{shown(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{shown(page)}: no heading for {link}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - {"index.md"}
    assert pages - set(LINK.findall(index)) == set()


def test_the_page_of_agreement_is_current() -> None:
    """It names every model that is read, and no difference above what is allowed."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[0] for line in cells] == list(families()), (
        "make the page again: python -m benchmarks.network_agreement"
    )
    numbers = [float(text) for line in cells for text in line[1:] if text[0].isdigit()]
    assert len(numbers) >= len(cells)
    assert max(numbers) < 1e-10
    assert {line[3] for line in cells} == {"refused", "-"}


def test_the_glossary_has_every_status_and_kind_and_the_help_names_it() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    assert [word for word in (*Status, *Kind) if f"`{word}`" not in text] == []
    assert "docs/glossary.md" in str(get_command(app).epilog)


def test_the_page_from_python_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(block, "python.md", "exec"), {})  # noqa: S102 - our own page


def test_the_readme_example_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})  # noqa: S102 - our own page


def test_the_readme_table_has_every_command() -> None:
    table = (ROOT / "README.md").read_text().split("| command | does |", 1)[1].split("\n\n", 1)[0]
    first_cells = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    listed = {words.split()[0] for words in re.findall(r"`([^`]+)`", first_cells)}
    assert listed == set(get_command(app).commands)  # type: ignore[attr-defined]


def test_the_changelog_has_a_soundness_heading() -> None:
    assert "### Soundness" in (ROOT / "CHANGELOG.md").read_text()


FILES = [path for path in sorted((ROOT / "attnrobust").rglob("*.py")) if ">>> " in path.read_text()]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
