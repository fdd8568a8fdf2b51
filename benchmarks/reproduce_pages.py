"""Makes the pages docs/reproduce/NAME.md, with their figures, from directories that ``attnrobust reproduce`` wrote.

python benchmarks/reproduce_pages.py DIR [DIR ...]
"""

import io
import json
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent.parent / "docs" / "reproduce"
COLOURS = 48
"""Of the figures; curves on white need no more, and the files stay small."""


def page(directory: Path) -> None:
    """One page and its figure."""
    name = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["experiment"]
    text = (directory / "summary.md").read_text(encoding="utf-8").replace("(figure.png)", f"({name}.png)")
    text = text.replace("![figure]", f"![{name}]")
    (DOCS / f"{name}.md").write_text(text, encoding="utf-8")
    picture = Image.open(directory / "figure.png").convert("RGB").quantize(COLOURS)
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    (DOCS / f"{name}.png").write_bytes(buffer.getvalue())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        page(Path(argument))
