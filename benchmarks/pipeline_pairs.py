"""Rows a minute of ``run`` and seconds an input of ``bounds`` on MiniLM: this checkout against another one.

    git worktree add ../before v1.0
    python -m benchmarks.pipeline_pairs --before ../before            # run: 40 rows with the default certificates
    python -m benchmarks.pipeline_pairs --before ../before --what bounds

Two processes, one per checkout and one thread each, answer the same row one after the other. Seconds are those of the
process (CPU); loading the libraries and the model is not in them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYERS = tuple(f"encoder.layer.{number}.attention" for number in (0, 1, 2, 3, 5))
SENTENCES = 8
Answer = dict[str, Any]


# ---- one checkout --------------------------------------------------------------------------------------------------


def serve(what: str) -> int:
    """Answer one row for every line of the input, with the code of the present directory."""
    import torch

    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports for more than a second
    rows = {"run": _rows, "bounds": _tables}[what]()
    next(rows)  # loads and imports
    for _ in sys.stdin:
        start = time.process_time()
        answer = next(rows)
        print(json.dumps({**answer, "seconds": time.process_time() - start}), flush=True)
    return 0


def _rows() -> Iterator[Answer]:
    """As ``run --layer ... --texts FILE --tolerance 10%`` computes them; a first one is not counted."""
    from attnrobust.demo import demo_sentences
    from attnrobust.runs.config import make_config
    from attnrobust.runs.run import rows_in_memory
    from attnrobust.runs.work import Workbench

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "texts.txt"
        file.write_text("".join(f"{line}\n" for line in demo_sentences()[:SENTENCES]), encoding="utf-8")
        bench = Workbench(make_config({"model": "minilm", "layers": LAYERS, "texts": str(file), "goals": ["10%"]}))
        bench.refuse_hopeless()
        yield {"first": next(iter(rows_in_memory(bench))).status}
        for row in rows_in_memory(bench):
            yield {
                "key": f"{row.layer} {row.input_id}", "n": row.n, "certified": row.certified_radius,
                "attack": row.attack_radius, "status": str(row.status),
            }  # fmt: skip


def _tables() -> Iterator[Answer]:
    """As ``bounds`` computes them, of sentences of seven tokens; a first one is not counted."""
    from attnrobust.lipschitz.table import bounds_table
    from attnrobust.models.model import load_model
    from attnrobust.runs.inputs import read_inputs

    model, warm = load_model("minilm"), False
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "texts.txt"
        file.write_text("The cat sat on mats\nA quick fox jumps high\n", encoding="utf-8")
        for layer in (LAYERS[0], *LAYERS):
            for one in read_inputs(model, layer, texts=file, tokens=None)[: None if warm else 1]:
                table = bounds_table(model.layer(layer), one.measure)
                values = {f"{row.quantity} {row.name}": row.value for row in table.bounds}
                yield {"key": f"{layer} {one.id}", "n": table.n, "values": values}
            warm = True


# ---- both ----------------------------------------------------------------------------------------------------------


class Checkout:
    """A process that answers with the code of one directory."""

    def __init__(self, root: Path, what: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", "--what", what],
            cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def answer(self) -> Answer:
        """The next row."""
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: PT018 - pipes
        self.process.stdin.write("next\n")
        self.process.stdin.flush()
        found: Answer = json.loads(self.process.stdout.readline())
        return found


def compare(what: str, before: Path, rows: int) -> int:
    """Measure both sides row by row and print the table."""
    old, new = Checkout(before.resolve(), what), Checkout(ROOT, what)
    pairs = []
    print(
        "| row | n | s before | s after | x | " + ("certified after / before | gap |" if what == "run" else "bounds |")
    )
    print("|---" * (7 if what == "run" else 6) + "|")
    for _ in range(rows):
        pair = old.answer(), new.answer()
        pairs.append(pair)
        a, b = pair
        last = _radii(a, b) if what == "run" else f"{_differing(a, b)} differ |"
        print(
            f"| {b['key']} | {b['n']} | {a['seconds']:.2f} | {b['seconds']:.2f} | {a['seconds'] / b['seconds']:.1f} "
            f"| {last}",
            flush=True,
        )
    seconds = [statistics.mean(side["seconds"] for side in sides) for sides in zip(*pairs, strict=True)]
    print(f"{rows} of {what}: {seconds[0]:.2f} s -> {seconds[1]:.2f} s each, "
          f"{60 / seconds[0]:.0f} -> {60 / seconds[1]:.0f} a minute")  # fmt: skip
    if what == "run":
        ratios = [b["certified"] / a["certified"] for a, b in pairs]
        print(f"certified radius after / before: smallest {min(ratios):.4f}, median {statistics.median(ratios):.4f}")
    return 0


def _radii(a: Answer, b: Answer) -> str:
    return f"{b['certified'] / a['certified']:.4f} | {b['attack'] / b['certified']:.2f} |"


def _differing(a: Answer, b: Answer) -> str:
    """Bounds that moved by more than a share of 1e-3, of all."""
    moved = [k for k, v in a["values"].items() if abs(b["values"].get(k, float("inf")) - v) > 1e-3 * abs(v)]
    return f"{len(moved)} of {len(a['values'])}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--what", choices=("run", "bounds"), default="run")
    parser.add_argument("--rows", type=int, help="default 40 rows of run, 10 tables of bounds; at most that many")
    args = parser.parse_args()
    if args.serve:
        return serve(args.what)
    if args.before is None:
        parser.error("--before DIRECTORY is needed")
    most = {"run": SENTENCES * len(LAYERS), "bounds": 2 * len(LAYERS)}[args.what]
    return compare(args.what, args.before, min(args.rows or most, most))


if __name__ == "__main__":
    raise SystemExit(main())
