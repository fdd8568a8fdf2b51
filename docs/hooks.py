"""Hook of the documentation site: the README, which lies outside docs, becomes a page that links lead to."""

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\]\((?:\.\./)+README\.md(#[^)]*)?\)")
_README = Path(__file__).resolve().parent.parent / "README.md"


def on_files(files: Any, config: Any) -> Any:
    """The README is a page of the site, its links into docs made relative to that folder."""
    from mkdocs.structure.files import File, InclusionLevel

    text = _README.read_text(encoding="utf-8").replace("](docs/", "](")
    text = re.sub(r"\[([^\]]*)\]\((?:CONTRIBUTING\.md|CHANGELOG\.md|CITATION\.cff)\)", r"`\1`", text)
    files.append(File.generated(config, "readme.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to ../README.md become links to that page."""
    up = "../" * page.file.src_uri.count("/")
    return _LINK.sub(lambda found: f"]({up}readme.md{found.group(1) or ''})", markdown)
