"""Calls of the command line in this process, on files that may be damaged, and what must hold of what they print."""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml

from benchmarks.fuzz_values import CERTIFICATES, THREATS, WRONG_TEXTS, Values

ENCODINGS = ("utf-8", "utf-8", "cp1252", "ascii", "utf-16", "cp932")
WIDTH = 4
LAYER = (2, WIDTH, 3)
KEYS = (
    "x1", "x10", "[/INST] [bold]", "[link=x]y[/]", "😀", ":smile:", "日本語", "עברית", "a b", "../up", "a/b", "a\nb",
    "\u202eright", "e\u0301", "\x1b[31m", "\ufeffbom", "k" * 300, "-q", "--json", "\U0010ffff", "\x7f", "nul",
)  # fmt: skip
LINES = (
    "a text", "", "   ", "[/INST] [bold]", "😀 😀", "日本語 العربية עברית ไทย", "\ufeff", "\x0c", "\u2028", "a\rb",
    "\x00", "\U0001f9ff" * 20, "x" * 4000, "<script>", "\u0300", "\t", "{{7*7}}", "-1",
)  # fmt: skip
CONFIG_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x", "1%", [], [None], [[]], {}, {"a": 1},
    "frobenius", ["frobenius", "per-token"], {"tolerance": []}, [{"readout": 3}], {"method": "no"}, "😀",
    "\x00", "cuda", "meta",
)  # fmt: skip
CONFIG_KEYS = (
    "model", "layers", "texts", "tokens", "threats", "goals", "certificates", "attack", "seed", "device", "threads",
    "output", "execution", "sede", "attack.method", "attack.restarts", "attack.seconds", "attack.epsilon",
    "execution.engine", "execution.timeout", "execution.part_rows", "execution.part_seconds", "goals.tolerance",
)  # fmt: skip


def command_call(values: Values) -> tuple[str, Callable[[], str | None]]:
    """One of the commands, by name, and the call."""
    name = values.pick(tuple(COMMANDS))
    return f"cli {name}", lambda: _in_a_directory(COMMANDS[name], values)


def _in_a_directory(command: "Command", v: Values) -> str | None:
    from attnrobust.attacks import AttackBudget
    from attnrobust.runs.config import AttackConfig

    before = Path.cwd()
    cheap = mock.patch.object(AttackConfig, "budget", return_value=AttackBudget(restarts=1, steps=2, rounds=1))
    with tempfile.TemporaryDirectory() as place, cheap:
        os.chdir(place)
        try:
            return command(v)
        finally:
            os.chdir(before)


Command = Callable[[Values], str | None]

# ---- files -----------------------------------------------------------------------------------------------------------


def write_files(v: Values) -> int | None:
    """Write model, tokens, readout and texts; the number of inputs, None where a file is damaged."""
    with np.errstate(all="ignore"):
        return _write_files(v)


def _write_files(v: Values) -> int | None:
    weights = {name: v.numpy.normal(size=LAYER) * (v.scale if v.rarely(0.2) else 1.0) for name in ("w_q", "w_k", "w_v")}
    keys = v.random.sample(KEYS, v.pick((1, 2, 3))) if v.rarely(0.5) else ["x1", "x2"][: v.pick((1, 2))]
    inputs = {key: v.numpy.normal(size=(v.pick((1, 2, 3)), WIDTH)) * (v.scale if v.rarely() else 1.0) for key in keys}
    if v.wrong():
        weights[v.pick(("w_o", "mask", "nonsense", "b_q", "kind", "heads"))] = v.numpy.normal(size=(2, 3))
    if v.wrong():
        weights.pop(v.pick(("w_q", "w_k", "w_v")))
    if v.wrong():
        inputs[v.pick(("y", "x1"))] = np.asarray(
            v.pick((0.0, [1.0], [["a"]], [[1, 2, 3, 4]], [[np.nan] * 4], [[1j] * 4]))
        )
    np.savez("readout.npz", weight=v.numpy.normal(size=(3, 6)), bias=np.zeros(3))
    _save("layer", weights)
    _save("x", inputs)
    Path("t.txt").write_bytes(
        "\n".join(v.pick(LINES) for _ in range(4)).encode(v.pick(("utf-8", "utf-8-sig", "utf-16")))
    )
    if v.rarely(0.25):
        _damage(v, Path(v.pick(("layer.npz", "x.npz", "x.safetensors", "layer.safetensors", "t.txt", "readout.npz"))))
        return None
    return len(inputs)


def _save(name: str, arrays: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    with contextlib.suppress(ValueError, OSError, TypeError):  # a key that no archive takes leaves no file
        np.savez(f"{name}.npz", **arrays)
    with contextlib.suppress(Exception):
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, f"{name}.safetensors")


def _damage(v: Values, path: Path) -> None:
    content = bytearray(path.read_bytes()) if path.exists() else bytearray(b"x")
    kind = v.random.randrange(6)
    if kind == 0:
        content = content[: v.random.randrange(len(content) + 1)]
    elif kind == 1 and content:
        for _ in range(v.pick((1, 5, 50))):
            content[v.random.randrange(len(content))] ^= 1 << v.random.randrange(8)
    elif kind == 2:
        content = bytearray(v.random.randbytes(200))
    elif kind == 3:
        content += v.random.randbytes(40)
    path.unlink(missing_ok=True)
    if kind == 4:
        path.mkdir()
    elif kind < 4:
        path.write_bytes(content)


# ---- a command and its verdict ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def captured(encoding: str) -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """Stdout and stderr as files of this encoding."""
    raw = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(one, encoding=encoding) for one in raw]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield raw
        for stream in streams:
            stream.flush()
    for stream in streams:
        stream.detach()


def said(v: Values, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, called as the console script calls it."""
    from attnrobust.cli import run
    from attnrobust.cli.output import print_without_failing

    encoding = v.pick(ENCODINGS)
    # no NUL in arguments; bytes that are no UTF-8 arrive as the surrogates dc80 to dcff
    texts = [str(argument).replace("\x00", "").replace("\ud800", "\udcff") for argument in arguments]
    with captured(encoding) as raw:
        print_without_failing()
        code = run(texts)
        sys.stdout.flush()
    return (code, *(one.getvalue().decode(encoding, errors="replace") for one in raw))


PROGRESS = r"\[\d+/\d+\] "


def verdict(code: int, err: str) -> str | None:
    """What is wrong with the end of a command; None if it ended as it should."""
    lines = [line for line in err.split("\n") if line and not re.match(PROGRESS, line)]
    if code not in (0, 1, 2, 3) or "Traceback" in err:
        return f"traceback: exit {code}: {' | '.join(lines[-8:])}"
    if code == 3:
        return f"unsound: {err}"
    if code == 2 and not (lines and all(line.startswith("attnrobust: ") for line in lines)):
        return f"traceback: exit 2 without its line: {err[-300:]!r}"
    if code == 2 and len(lines) > 1 and "no input could be computed" not in err:
        return f"traceback: exit 2 in {len(lines)} lines: {err[-300:]!r}"
    return f"clean error: {lines[-1]}" if code == 2 else None


def options(v: Values, *names: str) -> list[Any]:
    """Some of the options, with right and wrong values."""
    chosen: list[Any] = []
    for name in names:
        if v.rarely(0.25):
            right = OPTIONS[name]
            chosen += [name] if right is None else [name, v.pick(WRONG_OPTIONS) if v.wrong() else v.pick(right)]
    return chosen


WRONG_OPTIONS = (*WRONG_TEXTS, -1, 0, "nan", "inf", "1e400", "x.npz", "/", "none", 10**30, "1,2", "--json", "-")
OPTIONS: dict[str, Any] = {
    "--layer": ("attention", "att*", "*"), "--tolerance": ("10%", "0.1", "1e-6%"), "--readout": ("readout.npz",),
    "--pool": ("mean", "row:0", "all"), "--label": (0, 1), "--threat": THREATS, "--seed": (0, -1, 2**62),
    "--device": ("cpu",), "--methods": CERTIFICATES, "--method": ("default", "token-moving", "mass-splitting"),
    "--epsilon": (0.1, 1e3), "--out": ("out", "deep/er", "x.npz", "/proc/none", "/dev/null/x", "."),
    "--overwrite": None,
    "--fail-under": (0, 0.1, 1e9), "-q": None, "--radius": (2.0, 1e3), "--n": (2, 5), "--search": (0, 1),
    "--json": None, "--workers": (0,), "--shard": ("1/2", "2/2"), "--no-heads": None, "--order": (1, 2, "inf"),
    "--min-certified": (0.0, 1e-9), "--max-gap": (10.0,), "--quantile": (0.0, 0.5), "--junit": ("j.xml", "/proc/x"),
    "--csv": ("r.csv", "/proc/x"), "--jsonl": ("r.jsonl",), "--epsilons": ("0.1,1", "0.1"), "--steps": (1,),
    "--restarts": (1,), "--budget": ("token-moving steps=1",), "--attacks": ("token-moving",),
}  # fmt: skip


def _sources(v: Values) -> list[Any]:
    suffix = v.pick((".npz", ".safetensors"))
    model = v.pick(("nowhere.npz", "minilmm", "", ".", "x.npz", "t.txt")) if v.wrong() else f"layer{suffix}"
    inputs = ["--texts", "t.txt"] if v.rarely(0.05) else ["--tokens", f"x{v.pick(('.npz', '.safetensors'))}"]
    return [model, *([] if v.wrong() else inputs)]


GOAL = ("--layer", "--tolerance", "--readout", "--pool", "--label", "--threat", "--seed", "--device")


def call_rows(name: str, *own: str) -> Command:
    """certify, attack or compare: a row per input."""

    def call(v: Values) -> str | None:
        inputs = write_files(v)
        cheap = ["--methods", v.pick(CERTIFICATES[:4])] if name != "attack" else []
        as_json = ["--json"] if v.rarely(0.7) else []
        code, out, err = said(v, name, *_sources(v), *cheap, *options(v, *GOAL, *own, "-q"), *as_json)
        return verdict(code, err) or _rows_are_right(code, out, inputs, as_json=bool(as_json), err=err)

    return call


def _rows_are_right(code: int, out: str, inputs: int | None, *, as_json: bool, err: str) -> str | None:
    rows = _parsed(out) if as_json else None
    if isinstance(rows, str):
        return rows
    if rows is not None and code in (0, 1) and inputs is not None and len(rows) != inputs:
        return f"lost row: {inputs} inputs, {len(rows)} rows; {err[-200:]}"
    for row in rows or ():
        certified, attacked = row.get("certified_radius"), row.get("attack_radius")
        both = certified is not None and attacked is not None and row["status"] == "found"
        if both and certified > attacked * (1 + 1e-9):
            return f"unsound: {row}"
    return None


def _parsed(out: str) -> list[dict[str, Any]] | str:
    try:
        return [json.loads(line) for line in out.splitlines()]
    except ValueError as error:
        return f"traceback: no JSON: {error}"


def call_json(name: str, *own: str) -> Command:
    """A command that prints tables or JSON."""

    def call(v: Values) -> str | None:
        write_files(v)
        as_json = ["--json"] if v.rarely(0.6) else []
        sources = _sources(v)[:1] if name == "list-layers" else _sources(v)
        cheap = ["--search", v.pick((0, 1))] if name == "bounds" else []
        code, out, err = said(v, name, *sources, *cheap, *options(v, *own), *as_json)
        rows = _parsed(out) if as_json and code == 0 else None
        return verdict(code, err) or (rows if isinstance(rows, str) else None)

    return call


def call_bench(v: Values) -> str | None:
    write_files(v)
    own = options(v, *GOAL, "--epsilons", "--budget", "--workers")
    given = ["bench", *_sources(v), "--attacks", v.text(("token-moving", "token-moving,token-moving", "default"))]
    return verdict(*said(v, *given, "--restarts", 1, "--steps", 2, "-q", *own)[::2])


def call_run(v: Values) -> str | None:
    """A run from a configuration, and what reads its rows."""
    inputs = write_files(v)
    config: dict[str, Any] = {
        "model": "layer.npz", "tokens": "x.npz", "threats": [v.pick(THREATS[:5])],
        "goals": ["10%", "1%"][: v.pick((1, 2))], "certificates": ["castin2024-derived"],
        "attack": {"restarts": 1, "steps": 2}, "output": "out",
    }  # fmt: skip
    while v.rarely(0.4):
        key, value = v.pick(CONFIG_KEYS).partition(".")[::2], v.pick(CONFIG_VALUES)
        config[key[0]] = {key[1]: value} if key[1] else value
    text = yaml.safe_dump(config, allow_unicode=True)
    if v.wrong():
        text = v.pick(
            (text[: len(text) // 2], "[]", "- a", "3", "", "a: b: c", "\t", "&a [*a]", "!!python/name:x", text + text)
        )
    Path("c.yaml").write_bytes(text.encode(v.pick(("utf-8", "utf-8", "utf-16", "cp1252")), errors="replace"))
    if v.rarely(0.2):
        return verdict(*said(v, "config", "c.yaml", *options(v, *GOAL[5:]))[::2])
    code, _, err = said(v, "run", "c.yaml", "-q", *options(v, "--threat", "--seed", "--fail-under"))
    wrong = verdict(code, err)
    if wrong is not None or not Path("out").is_dir():
        return wrong
    goals = config.get("goals")
    plain = code in (0, 1) and inputs is not None and isinstance(goals, list) and "err" not in err
    return _reread(v, err if plain else None)


def _reread(v: Values, err: str | None) -> str | None:
    """Export, report and check of a run whose files may be damaged meanwhile."""
    files = [path for path in Path("out").rglob("*") if path.is_file()]
    damaged = v.rarely(0.3) and bool(files)
    if damaged:
        _damage(v, v.pick(sorted(files)))
    code, _, said_err = said(v, "export", "out", "--csv", "r.csv", "--jsonl", "r.jsonl")
    wrong = verdict(code, said_err)
    if wrong is None and code == 0 and not damaged and err is not None:
        rows = Path("r.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        if f"{len(rows)} of {len(rows)}" not in err:
            return f"lost row: {len(rows)} exported; {err}"
    wrong = wrong or verdict(
        *said(v, "check", "out", *options(v, "--min-certified", "--max-gap", "--quantile", "--junit"))[::2]
    )
    wrong = wrong or verdict(*said(v, "resume", "out", "-q")[::2])
    return wrong or (verdict(*said(v, "report", "out")[::2]) if v.rarely(0.3) else None)


def call_texts(v: Values) -> str | None:
    """Every line with text is an input."""
    from attnrobust.models.capture import read_texts

    lines = [v.pick(LINES) for _ in range(5)]
    Path("t.txt").write_bytes(
        "\n".join(lines).encode(v.pick(("utf-8", "utf-8-sig", "utf-16", "latin-1")), errors="replace")
    )
    found = read_texts("t.txt")
    return None if len({text.id for text in found}) == len(found) else "lost row: two texts with one identifier"


def call_nonsense(v: Values) -> str | None:
    """Words in any order."""
    words = (*COMMANDS, *OPTIONS, *WRONG_OPTIONS, "--help", "--version", "layer.npz", "x.npz", "--tokens")
    write_files(v)
    code, _, err = said(v, *(v.pick(words) for _ in range(v.pick((0, 1, 2, 3, 5)))))
    return None if code == 2 and not err else verdict(code, err)


COMMANDS: dict[str, Command] = {
    "certify": call_rows("certify", "--out", "--overwrite", "--fail-under"),
    "attack": call_rows("attack", "--method", "--epsilon", "--out", "--fail-under"),
    "compare": call_rows("compare", "--method", "--out", "--overwrite", "--fail-under"),
    "bounds": call_json("bounds", "--layer", "--threat", "--seed", "--device", "--radius", "--epsilon", "--search"),
    "scan": call_json("scan", "--tolerance", "--threat", "--methods", "--no-heads", "--out", "--workers"),
    "fixed-point": call_json("fixed-point", "--layer", "--radius", "--order", "--tolerance", "--device"),
    "list-layers": call_json("list-layers"),
    "bench": call_bench,
    "run": call_run,
    "read_texts": call_texts,
    "nonsense": call_nonsense,
}
