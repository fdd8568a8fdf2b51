"""Executes the notebooks of docs/notebooks and stores them with their outputs: python -m benchmarks.notebooks

Needs nbclient and ipykernel. Times are left out, so that a second run changes little.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
LONGEST = 600
"""Seconds of one cell."""


def execute(path: Path) -> None:
    """Run every cell in a fresh kernel, in the folder of the repository, and write the outputs into the file."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=LONGEST, record_timing=False, resources={"metadata": {"path": str(FOLDER.parent.parent)}}
    )
    client.execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, path)


def main() -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        execute(path)
        sys.stdout.write(f"{path.name}: {path.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
