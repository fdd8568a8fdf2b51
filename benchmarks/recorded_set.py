"""A record of numbers, to show that a change of the code changes none of them.

    python -m benchmarks.recorded_set record before.json
    python -m benchmarks.recorded_set record after.json       # with the changed code
    python -m benchmarks.recorded_set compare before.json after.json
    python -m benchmarks.recorded_set record part.json --match "one head"        # a part of it

The record holds, to the last bit, what the package says to about 190 small problems (every kind of layer, threat, goal
and certificate), what its other functions return, and the JSON of the commands. Only public names are used, so a record
can be made before and after the package's modules move. Records compare on one machine with the same libraries: another
processor or BLAS rounds differently, and an attack may then end elsewhere.

An attack draws its starts from the problem's digest: where digests change, attack radii may change with them, while
certified radii may not. ``compare`` marks such entries.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.recorded_compare import Difference, differences, matching, summary

SETTINGS = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}
"""Read once by the numerical libraries, so they are set before the first import of them."""

LIBRARIES = ("torch", "numpy", "scipy", "cvxpy", "foolbox", "transformers", "POT", "python-flint")


def record(path: Path, match: str = "") -> None:
    """Write what the package says now, of the entries whose name holds the text."""
    os.environ.update(SETTINGS)
    import torch

    from benchmarks.recorded_answers import coverage, problem_records
    from benchmarks.recorded_commands import command_records
    from benchmarks.recorded_functions import function_records

    torch.set_num_threads(1)
    values: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    makers = {"problems": problem_records, "functions": function_records, "commands": command_records}
    for section, make in makers.items():
        start = time.perf_counter()
        values[section] = make(match)
        seconds[section] = round(time.perf_counter() - start, 1)
        print(f"{len(values[section])} {section} in {seconds[section]:.0f} s", file=sys.stderr, flush=True)
    about = {"seconds": seconds, "certificates": coverage(values["problems"]), **_machine()}
    path.write_text(json.dumps({"about": about, **values}, indent=1) + "\n", encoding="utf-8")
    for name, count in about["certificates"].items():
        print(f"  {name}: a positive radius on {count} problems", file=sys.stderr)


def _machine() -> dict[str, Any]:
    versions = {name: _version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "machine": platform.processor() or platform.machine(), **versions}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def compare(old: dict[str, Any], new: dict[str, Any], *, ignored: frozenset[str], match: str = "") -> int:
    """Print every difference of a kind that counts, of the entries whose name holds the text; 1 if there is one."""
    for name in ("python", "machine", *LIBRARIES):
        if old["about"].get(name) != new["about"].get(name):
            print(f"note: {name} was {old['about'].get(name)}, is {new['about'].get(name)}")
    old, new = matching(old, match), matching(new, match)
    every = list(differences(old, new))
    renamed = {d.entry for d in every if d.kind == "digest"}
    found = [d for d in every if d.kind not in ignored]
    for difference in found:
        print(f"{difference}{_mark(difference, renamed)}")
    print("\n".join(summary(found, old)))
    for kind in sorted(ignored):
        count = sum(d.kind == kind for d in every)
        if count:
            print(f"  not counted: {count} x {kind}")
    return int(bool(found))


def _mark(difference: Difference, renamed: set[tuple[str, ...]]) -> str:
    return " [its digest differs]" if difference.entry in renamed and difference.kind != "digest" else ""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recorded_set", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("record", help="write what the package says now")
    making.add_argument("out", type=Path)
    making.add_argument("--match", default="", metavar="TEXT", help="only what has the text in its name")
    comparing = commands.add_parser("compare", help="list what differs; exit code 1 if anything does")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--digests", action="store_true", help="compare digests of problems too")
    comparing.add_argument("--match", default="", metavar="TEXT", help="only what has the text in its name")
    comparing.add_argument("--no-words", action="store_true", help="leave reasons, messages and references out")
    comparing.add_argument("--no-added", action="store_true", help="leave out what only the new record has")
    options = parser.parse_args()
    if options.command == "record":
        record(options.out, options.match)
        return 0
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (options.old, options.new))
    counted = {"digest": options.digests, "words": not options.no_words, "added": not options.no_added}
    ignored = frozenset(kind for kind, counts in counted.items() if not counts)
    return compare(old, new, ignored=ignored, match=options.match)


if __name__ == "__main__":
    raise SystemExit(main())
