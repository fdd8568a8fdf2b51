"""The documentation site: every page is in its navigation, every public name in its API reference, and it builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import attnrobust

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def in_navigation(entry: object) -> list[str]:
    """The pages of one entry of the navigation, in their order."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in in_navigation(part)]  # type: ignore[attr-defined]


def test_the_navigation_has_every_page_once_and_nothing_else() -> None:
    pages = in_navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(pages) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_api_reference_has_every_public_name_once() -> None:
    text = "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    found = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    homes = attnrobust._HOME
    assert sorted(found) == sorted(f"{homes[name]}.{name}" for name in attnrobust.__all__ if name != "__version__")


def test_nothing_of_the_site_is_fetched() -> None:
    theme = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]
    assert theme["font"] is False


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'id="attnrobust.comparison.compare"' in (tmp_path / "site" / "api" / "answers.html").read_text()
