"""The page and the plot of the tightness benchmark.

    python -m benchmarks.tightness_page --out results       # docs/tightness.md, docs/tightness.png

Reads what ``benchmarks/tightness.py run`` wrote; suites that were not run are missing in the page, by name.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tightness import SUITES, best, gap, rows_of

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARKS = "osD^vP*X<>"  # told apart without colour

Rows = list[dict]
Key = Callable[[dict], float]

LEAD = """# Tightness of the certificates

gap = attack radius / best certified radius; 1 would be perfect. One attack (default budget, seed 0) stands against all
certificates of a row. Every certificate that applies is run; a row holds all of them.

* `d16`, `d64`: one head of that width, weights N(0, 1/d), standard normal tokens, seeds 0 to 2.
* `minilm0` to `minilm5`: the attention layers of all-MiniLM-L6-v2 at the tokens of three passages of English prose
  (`benchmarks/passages.txt`). The margin is taken behind the output projection, the displacement in front of it.
* margin: nearest centroid of the mean output row, this input's own against another input's.
* displacement: Frobenius norm of the output's change, as a share of the output's norm.
* threats: `frobenius` moves all tokens within one ball, `one` a known token, `any-token` any single one, `per-token`
  every token in its own l2 ball, `per-token-linf` in its own cube.

Made by

```console
$ for suite in {suites}; do python -m benchmarks.tightness run --suite $suite --out results; done
$ python -m benchmarks.tightness_page --out results
```

Seconds are process time of the best certificate with its whole radius search, on one thread. Memory is the peak of the
process; about 500 MiB are the model and its library.

![Median gap of every certificate against tolerance and number of tokens](tightness.png)
"""


@dataclass(frozen=True)
class Setting:
    """One line of the first table: which rows it holds."""

    name: str
    sources: tuple[str, ...]
    threat: str
    goal: str
    lengths: tuple[int, ...]

    def holds(self, row: dict) -> bool:
        return (
            row["source"] in self.sources
            and (row["threat"], row["goal"]) == (self.threat, self.goal)
            and row["n"] in self.lengths
        )


MINILM = tuple(f"minilm{layer}" for layer in range(6))
SMALL, LONGER, ALL = (4, 8, 16, 32), (8, 16, 32, 64), (8, 16, 32, 64, 128)
SETTINGS = (
    *(
        Setting(f"margin, {threat}, one head d = {source[1:]}, n = 4 to 32", (source,), threat, "margin", SMALL)
        for threat in ("frobenius", "one", "any-token", "per-token", "per-token-linf")
        for source in ("d16", "d64")
    ),
    Setting("margin, frobenius, MiniLM layer 0, n = 8 to 64", MINILM[:1], "frobenius", "margin", LONGER),
    Setting("margin, frobenius, MiniLM layers 1 to 5, n = 8 to 64", MINILM[1:], "frobenius", "margin", LONGER),
    Setting("margin, frobenius, MiniLM layers 0 to 5, n = 128", MINILM, "frobenius", "margin", (128,)),
    *(
        Setting(f"margin, {threat}, MiniLM layers 0 to 5, n = 16", MINILM, threat, "margin", (16,))
        for threat in ("one", "any-token", "per-token", "per-token-linf")
    ),
    *(
        Setting(f"displacement {label}, frobenius, MiniLM layers 0 to 5, n = {n}", MINILM, "frobenius", goal, lengths)
        for n, lengths in (("16, 64", (16, 64)), ("8 to 128", ALL))
        for goal, label in (("0.01", "1 %"), ("0.1", "10 %"), ("1", "100 %"))
    ),
    *(
        Setting(f"displacement {label}, {threat}, MiniLM layers 0 to 5, n = 16", MINILM, threat, goal, (16,))
        for threat in ("one", "any-token", "per-token")
        for goal, label in (("0.01", "1 %"), ("0.1", "10 %"), ("1", "100 %"))
    ),
)


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if value < 1e3 else f"{value:.1e}"


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    text = [head, ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in text)


def _seconds(row: dict) -> float:
    return float(row["certificates"][best(row)[0]]["seconds"])


def _figures(rows: Rows) -> tuple[str, ...]:
    gaps, seconds = [gap(row) for row in rows], [_seconds(row) for row in rows]
    return (
        str(len(rows)), _number(statistics.median(gaps)), _number(max(gaps)),
        f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}",
    )  # fmt: skip


def settings_table(rows: Rows) -> str:
    """Medians over sources, lengths and seeds of each setting."""
    lines = []
    for setting in SETTINGS:
        chosen = [row for row in rows if setting.holds(row)]
        if chosen:
            lines.append((setting.name, *_figures(chosen)))
    return _table(("setting", "rows", "gap, median", "worst", "seconds, median", "worst"), lines)


def cases_table(rows: Rows) -> str:
    """Medians over the seeds of each case, best certificate, memory."""
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault((row["source"], row["threat"], row["goal"], row["n"]), []).append(row)
    lines = []
    for (source, threat, goal, n), part in sorted(groups.items()):
        attack = statistics.median(row["attack"] for row in part)
        certified = statistics.median(best(row)[1] for row in part)
        names = ", ".join(sorted({best(row)[0] for row in part}))
        peak = max(row["peak_mib"] or math.nan for row in part)
        lines.append(
            (source, threat, goal, str(n), f"{attack:.4g}", f"{certified:.4g}", *_figures(part), names, f"{peak:.0f}")
        )
    head = (
        "source", "threat", "goal", "n", "attack", "certified", "rows", "gap, median", "worst", "s, median", "worst",
        "best certificate", "MiB",
    )  # fmt: skip
    return _table(head, lines)


def methods_table(rows: Rows) -> str:
    """Median gap of every certificate by setting."""
    methods = sorted({method for row in rows for method in row["certificates"]})
    lines = []
    for setting in SETTINGS:
        chosen = [row for row in rows if setting.holds(row)]
        if chosen:
            medians = (_median_gap(chosen, method) for method in methods)
            lines.append((setting.name, *("" if value is None else _number(value, 2) for value in medians)))
    return _table(("setting", *methods), lines)


def _median_gap(rows: Rows, method: str) -> float | None:
    gaps = [gap(row, method) for row in rows if method in row["certificates"]]
    return statistics.median(gaps) if gaps else None


def plot(rows: Rows, path: Path) -> None:
    """Median gap of every certificate: against the tolerance, and against the number of tokens for the margin."""
    rows = [row for row in rows if row["threat"] == "frobenius" and row["source"] in MINILM and row["n"] in ALL]
    methods = sorted({method for row in rows for method in row["certificates"]})
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(ncols=2, sharey=True)
    _lines(left, [row for row in rows if row["goal"] != "margin"], lambda row: 100 * float(row["goal"]), methods)
    _lines(right, [row for row in rows if row["goal"] == "margin"], lambda row: row["n"], methods)
    left.set(xlabel="tolerance, % of the output's norm", ylabel="gap = attack radius / certified radius, median")
    left.set_title("displacement, MiniLM layers 0 to 5, n = 8 to 128")
    right.set(xlabel="tokens n")
    right.set_title("centroid margin, MiniLM layers 0 to 5")
    handles = {
        label: line for axis in (left, right) for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)


def _lines(axis: Axes, rows: Rows, by: Key, methods: list[str]) -> None:
    xs = sorted({by(row) for row in rows})
    for number, (mark, method) in enumerate(zip(MARKS, methods, strict=False)):  # a method looks the same in all panels
        ys = [_median_gap([row for row in rows if by(row) == x], method) for x in xs]
        if any(y is not None for y in ys):
            values = [math.nan if y is None else y for y in ys]
            axis.plot(xs, values, marker=mark, color=f"C{number}", label=method)
    axis.set(xscale="log", yscale="log")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.grid(alpha=0.3)
    axis.set_xticks(xs, [f"{x:g}" for x in xs])
    axis.set_xticks([], minor=True)


def page(out: Path) -> str:
    """The Markdown page of the results in a folder."""
    suites = [suite for suite in SUITES if suite != "smoke"]
    rows = [row for suite in suites for row in rows_of(out / f"{suite}.jsonl")]
    missing = [
        f"{suite}: {len(cases) - done} of {len(cases)} rows"
        for suite, cases in SUITES.items()
        if suite != "smoke" and (done := len(rows_of(out / f"{suite}.jsonl"))) < len(cases)
    ]
    unsound = [row["key"] for row in rows if row["unsound"]]
    parts = [
        LEAD.format(suites=" ".join(suites)),
        f"{len(rows)} rows; attack inside a certified radius: {', '.join(unsound) if unsound else 'none'}.",
        *([f"Not run: {'; '.join(missing)}."] if missing else []),
        "## By setting",
        settings_table(rows),
        "## Median gap of every certificate",
        methods_table(rows),
        "## By case",
        "Medians over the seeds or passages.",
        cases_table(rows),
    ]
    plot(rows, DOCS / "tightness.png")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tightness-results"), help="folder of the results")
    (DOCS / "tightness.md").write_text(page(parser.parse_args().out), encoding="utf-8")
    print(f"written: {DOCS / 'tightness.md'}")


if __name__ == "__main__":
    main()
