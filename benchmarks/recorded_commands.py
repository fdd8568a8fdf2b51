"""What the commands print as JSON for a tiny layer, its inputs and one sentence; times and paths are left out."""

import contextlib
import io
import json
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SENTENCE = "Rain fell all night."
PLACE = "DIR"

NPZ = ("layer.npz", "--tokens", "x.npz")
FAST = ("--restarts", "2", "--steps", "10")
MEASURE = "measure-ball,measure-local"

COMMANDS: dict[str, tuple[str, ...]] = {
    "list-layers": ("list-layers", "layer.npz", "--json"),
    "compare": ("compare", *NPZ, "--json", "-q"),
    "compare/per-token": ("compare", *NPZ, "--json", "-q", "--threat", "per-token-linf", "--tolerance", "0.2"),
    "compare/readout": ("compare", *NPZ, "--json", "-q", "--readout", "readout.npz", "--pool", "mean"),
    "compare/any-token row": ("compare", *NPZ, "--json", "-q", "--threat", "any-token", "--pool", "row:0"),
    "compare/missing token": ("compare", *NPZ, "--json", "-q", "--threat", "token:2"),
    "compare/copies": ("compare", *NPZ, "--json", "-q", "--threat", "copies:1", "--tolerance", "5"),
    "compare/wasserstein:inf": ("compare", *NPZ, "--json", "-q", "--threat", "wasserstein:inf", "--pool", "mean"),
    "certify": ("certify", *NPZ, "--json", "-q", "--tolerance", "1%"),
    "certify/named": ("certify", *NPZ, "--json", "-q", "--methods", "castin2024-derived,displacement", "--seed", "5"),
    "certify/wasserstein:2": (
        *("certify", *NPZ, "--json", "-q", "--threat", "wasserstein:2:within:6.0"),
        *("--methods", MEASURE, "--pool", "mean"),
    ),
    "certify/label": ("certify", *NPZ, "--json", "-q", "--readout", "readout.npz", "--label", "0", "--fail-under", "1"),
    "attack": ("attack", *NPZ, "--json", "-q"),
    "attack/fixed size": ("attack", *NPZ, "--json", "-q", "--epsilon", "0.1", "--threat", "per-token"),
    "attack/foolbox": ("attack", *NPZ, "--json", "-q", "--method", "foolbox:DDN"),
    "attack/coupling:inf": ("attack", *NPZ, "--json", "-q", "--threat", "coupling:inf", "--epsilon", "0.1"),
    "attack/refused": ("attack", *NPZ, "--json", "-q", "--threat", "copies:1", "--method", "mass-splitting"),
    "bounds": ("bounds", *NPZ, "--radius", "1", "--search", "3", "--json"),
    "bounds/ball of the tokens": ("bounds", *NPZ, "--search", "3", "--json"),
    "bounds/no ascent": ("bounds", *NPZ, "--search", "0", "--threat", "any-token", "--epsilon", "0.3", "--json"),
    "bounds/no input": ("bounds", "layer.npz", "--radius", "2", "--n", "4", "--search", "3", "--json"),
    "scan": ("scan", *NPZ, "--out", "scan", "--json", "-q"),
    "bench": ("bench", *NPZ, "--attacks", "token-moving,foolbox:L2PGD", *FAST, "--out", "bench", "--json", "-q"),
    "run": (
        *("run", "--model", *NPZ, "--threat", "frobenius", "--threat", "any-token", "--tolerance", "10%"),
        *("--tolerance", "0.2", "--out", "run", "-q"),
    ),
    "minilm": ("compare", "minilm", "--layer", "encoder.layer.2.attention", "--texts", "texts.txt", "--json", "-q"),
}
"""Every command line, with files by their names in the working directory."""

EXPORT = ("export", "run", "--jsonl", "run.jsonl")


def write_files(place: Path) -> None:
    """A layer with two heads, two inputs, a readout and a sentence."""
    random = np.random.default_rng(20)
    w_q, w_k, w_v = 0.6 * random.normal(size=(3, 2, 4, 3))
    np.savez(place / "layer.npz", w_q=w_q, w_k=w_k, w_v=w_v)
    np.savez(place / "x.npz", a=random.normal(size=(2, 4)), b=random.normal(size=(3, 4)))
    np.savez(place / "readout.npz", weight=random.normal(size=(3, 6)), bias=0.1 * random.normal(size=3))
    (place / "texts.txt").write_text(SENTENCE + "\n", encoding="utf-8")


def called(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``python -m attnrobust`` in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["attnrobust", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("attnrobust", run_name="__main__", alter_sys=True)
        code: Any = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    return int(code), out.getvalue(), err.getvalue()


def cleaned(value: Any, place: str) -> Any:
    """The value without times, and with the working directory by a fixed name."""
    if isinstance(value, dict):
        return {key: cleaned(entry, place) for key, entry in value.items() if not key.startswith("seconds")}
    if isinstance(value, list):
        return [cleaned(entry, place) for entry in value]
    return value.replace(place, PLACE) if isinstance(value, str) else value


def command_record(arguments: Sequence[str], place: str) -> dict[str, Any]:
    """Exit code, JSON rows and the lines on stderr of one command."""
    code, out, err = called(arguments)
    rows = [json.loads(line) for line in out.splitlines()] if "--json" in arguments else []
    return {"code": code, "rows": cleaned(rows, place), "message": err.replace(place, PLACE).splitlines()}


def command_records(match: str = "") -> dict[str, Any]:
    """What every command says whose name holds the text."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        place = str(Path(folder).resolve())
        write_files(Path(folder))
        for name, arguments in COMMANDS.items():
            if match in name:
                found[name] = command_record(arguments, place)
        if "run" in found:
            found["run"]["export"] = command_record(EXPORT, place)["code"]
            lines = Path("run.jsonl").read_text(encoding="utf-8").splitlines()
            found["run"]["rows"] = cleaned([json.loads(line) for line in lines], place)
    return found
