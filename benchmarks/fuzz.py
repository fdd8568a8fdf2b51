"""A fuzz of the public functions and of the command line that counts outcomes; no traceback and no lost row may remain.

    python -m benchmarks.fuzz --calls 2000 --seed 0 --out fuzz.json
    python -m benchmarks.fuzz --first 2000 --calls 500 --out fuzz.json      # goes on: numbers in the file are skipped
    python -m benchmarks.fuzz --first 1234 --calls 1                        # one call again, with its message

Call i is a function of the seed and i alone. Four of five go to the Python functions, with arguments of right and
wrong types, shapes, dtypes, scales and names; the others to the command line, with damaged files, hostile names, odd
encodings and random options. Attacks get one restart of two steps. Outcomes: "clean error" (an error of this package in
one line; exit code 2 with its line on stderr), "right answer" (the invariants hold: bounds in order, radii no NaN, a
row per input, JSON that parses), "traceback" (any other exception or warning, exit code 70), "lost row", "unsound". The
exit code is 1 where one of the last three occurs.
"""

import argparse
import json
import os
import random
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

SETTINGS = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}
"""Read once by the numerical libraries, so they are set before the first import of them."""
FAULTS = ("traceback", "lost row", "unsound")
COMMANDS_EVERY = 5


@dataclass(frozen=True)
class Outcome:
    """What came of one call.

    Args:
        call: Its number.
        target: What was called.
        outcome: One of those in the docstring of the module.
        message: The error, or what is wrong with the answer.
        where: Place of a traceback in the package.
        seconds: Wall time.
    """

    call: int
    target: str
    outcome: str
    message: str = ""
    where: str = ""
    seconds: float = 0.0


def judged(number: int, target: str, call: Callable[[], str | None]) -> Outcome:
    """Make a call, which answers None or what is wrong with its answer (its outcome, a colon, the reason)."""
    from attnrobust.errors import AttnRobustError, SoundnessError

    begin = time.perf_counter()

    def told(outcome: str, message: str = "", where: str = "") -> Outcome:
        return Outcome(number, target, outcome, message[:400], where, round(time.perf_counter() - begin, 3))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrong = call()
    except SoundnessError as error:
        return told("unsound", str(error))
    except AttnRobustError as error:
        text = str(error)
        return told("clean error" if text and "\n" not in text else "traceback", text, _place(error))
    except Exception as error:  # noqa: BLE001 - the outcome that is counted
        return told("traceback", f"{type(error).__name__}: {error}", _place(error))
    if wrong is None:
        return told("right answer")
    outcome, _, reason = wrong.partition(": ")
    return told(outcome, reason)


def _place(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "attnrobust/" in f.filename]
    return f"{frames[-1].filename.rpartition('attnrobust/')[2]}:{frames[-1].lineno}" if frames else ""


def one(number: int, seed: int) -> Outcome:
    """The call of this number."""
    from benchmarks.fuzz_commands import command_call
    from benchmarks.fuzz_functions import function_call
    from benchmarks.fuzz_values import Values

    values = Values(random.Random(f"{seed}/{number}"))
    target, call = command_call(values) if number % COMMANDS_EVERY == 0 else function_call(values)
    return judged(number, target, call)


def fuzz(first: int, calls: int, seed: int, out: Path | None = None) -> list[Outcome]:
    """Make the calls of a range; those that the file already holds are taken from it."""
    os.environ.update(SETTINGS)
    import torch

    torch.set_num_threads(1)
    found = _read(out, seed)
    for number in range(first, first + calls):
        if number not in found:
            found[number] = one(number, seed)
            if out is not None and number % 100 == 0:
                _write(out, seed, found)
    if out is not None:
        _write(out, seed, found)
    return [found[number] for number in range(first, first + calls)]


def _read(out: Path | None, seed: int) -> dict[int, Outcome]:
    if out is None or not out.exists():
        return {}
    kept = json.loads(out.read_text(encoding="utf-8"))
    if kept["seed"] != seed:
        raise SystemExit(f"{out} holds calls of seed {kept['seed']}; choose another file")
    return {row["call"]: Outcome(**row) for row in kept["calls"]}


def _write(out: Path, seed: int, found: dict[int, Outcome]) -> None:
    rows = [asdict(found[number]) for number in sorted(found)]
    counts = dict(Counter(outcome.outcome for outcome in found.values()))
    out.write_text(json.dumps({"seed": seed, "counts": counts, "calls": rows}, indent=0), encoding="utf-8")


def summary(outcomes: list[Outcome]) -> str:
    """Counts, and the faults grouped by what they say with numbers left out."""
    lines = [f"{count:6d} {name}" for name, count in Counter(o.outcome for o in outcomes).most_common()]
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for o in outcomes:
        if o.outcome in FAULTS:
            groups.setdefault((o.outcome, o.where, re.sub(r"[-\d.e+]+", "#", o.message)[:60]), []).append(o)
    for (outcome, where, _), those in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"{len(those):4d}x {outcome} {where} [{those[0].target}, calls {[o.call for o in those[:3]]}]")
        lines.append(f"      {those[0].message[:240]}")
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    outcomes = fuzz(options.first, options.calls, options.seed, options.out)
    print(summary(outcomes))
    if options.calls == 1:
        print(outcomes[0])
    raise SystemExit(any(o.outcome in FAULTS for o in outcomes))


if __name__ == "__main__":
    main()
