"""The page and the plot of ``benchmarks/network_tightness.py``.

python benchmarks/network_tightness_page.py rows.jsonl       # docs/network-tightness.md, docs/network-tightness.png
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
LEVELS = (("cross", "beyond"), ("third", "cross_third", "further"), ("lifted",))
LEAD = """# Tightness of the certificate of whole networks

gap = smallest attack radius / certified radius of `network-composite-large` on parts of all-MiniLM-L6-v2; 1 would be
perfect. The text is the beginning of "My grandmother kept every letter in a biscuit tin" that has n tokens with [CLS]
and [SEP]; all tokens at the first block's input move within one Frobenius ball.

* `states, p %`: the output of the last block moves by p % of its norm. `decision`: which of three anchor sentences is
  nearest to the mean of the output.
* linear: the share of the budget that the exact first order uses at the certified radius.
* metrics: `one-metric` measures a remainder in the metric of its port only, `own-metrics` in that of the node as well
  ([section 2](network-composite.md)). A star: before lemmas 9 and 10.
* Seconds are wall time on a shared machine with two cores and several jobs at once: a rough size, no more.

Made from stored rows; each is one line of `benchmarks/network_tightness.py` with its blocks, tokens and directions:

```console
$ python benchmarks/network_tightness.py --out FILE --blocks 0:1 --tokens 8 --sketch 64 --tolerances 1% 10%
$ python benchmarks/network_tightness_page.py docs/network-tightness.jsonl
```

![gap against depth](network-tightness.png)
"""
BINDS = """
## What binds

At 1.05 times the certified radius, per row: every target with the bound of its second order R2 and of what the best
level leaves beside it, R', both in the target's metric. Where R' is larger than R2 the bound is far from the truth: the
true R' is a small part of R2 at these radii. `readout` is the largest class, or the displacement; the second order of a
decision is exact and counted as 0 there.

| row | target | R2 | R' |
|---|---|---|---|
"""


def main() -> None:
    """Write page and plot."""
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    lines = [
        "",
        "| blocks | n | goal | directions | metrics | attack | certified | gap | linear | preparation | search |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|", *map(_line, rows)]
    text = LEAD + "\n".join(lines) + "\n" + BINDS + "\n".join(line for row in rows for line in _binding(row)) + "\n"
    (DOCS / "network-tightness.md").write_text(text, encoding="utf-8")
    _plot(rows)


def _name(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Blocks, tokens, goal, directions, metrics."""
    _, blocks, tokens, sketch, *rest, _, goal = row["key"].split()
    shown = goal if goal == "decision" else f"states, {goal.rstrip('%')} %"
    return blocks, tokens[2:], shown, sketch[2:], rest[0] if rest else "one-metric*"


def _line(row: dict[str, Any]) -> str:
    linear = f"{row['linear']:.0%}" if "linear" in row else "-"
    found = f"{row['attack']:.3g} | {row['certified']:.3g} | {row['gap']:.3g} | {linear}"
    return f"| {' | '.join(_name(row))} | {found} | {row['prepared_s']:.0f} s | {row['search_s']:.0f} s |"


def _binding(row: dict[str, Any]) -> Iterator[str]:
    blocks, tokens, goal, *_ = _name(row)
    parts = dict(row["parts"])
    parts["readout"] = max(parts["readout"], key=_left)
    for target, found in sorted(parts.items(), key=lambda item: item[0] == "readout"):
        yield f"| {blocks}, n = {tokens}, {goal} | {target} | {found['second']:.2g} | {_left(found):.2g} |"


def _left(parts: dict[str, float]) -> float:
    return min(math.fsum(parts[name] for name in level) for level in LEVELS if all(name in parts for name in level))


def _plot(rows: list[dict[str, Any]]) -> None:
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        blocks, tokens, goal, *_ = _name(row)
        first, last = map(int, blocks.split(":"))
        line = lines.setdefault(f"{goal}, n = {tokens}", {})
        line[last - first] = min(row["gap"], line.get(last - first, math.inf))
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, points in sorted(lines.items()):
        axis.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=name)
    axis.set(xlabel="blocks", ylabel="attack / certified radius", yscale="log")
    axis.legend(frameon=False)
    figure.savefig(DOCS / "network-tightness.png", dpi=120)


if __name__ == "__main__":
    main()
