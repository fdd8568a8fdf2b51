"""One problem as ONNX and VNN-LIB, which other verifiers read."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust import __version__
from attnrobust.errors import InputError, UnsupportedThreatError
from attnrobust.goals import Margin
from attnrobust.interchange.box import DTYPES, Box, Precision, Side, box_of, named
from attnrobust.interchange.onnx_file import OPSET, onnx_bytes, onnx_version, run_onnx
from attnrobust.interchange.program import Program, Value
from attnrobust.interchange.translate import affine, longest, mean_row, weighted_rows, write_map
from attnrobust.interchange.vnnlib import VERSIONS, Version, vnnlib_text
from attnrobust.notebook import Shown
from attnrobust.problem import Problem, require_problem

ONNX_NAME, VNNLIB_NAME, JSON_NAME = "problem.onnx", "problem.vnnlib", "problem.json"


@dataclass(frozen=True, repr=False)
class ExportedProblem(Shown):
    """What was written, and what the answers of a verifier say about the threat's set.

    Args:
        directory: Where problem.onnx, problem.vnnlib and problem.json are.
        threat: Key of the threat.
        epsilon: The radius.
        goal: Key of the goal.
        label: The class that must stay.
        classes: Number of logits.
        n: Number of tokens.
        width: Token width.
        box: "inscribed" in the threat's set or "enclosing" it.
        exact: Whether the threat's set is a box itself, so that this one differs by the rounding of its bounds alone.
        half_width: Allowed move of one entry, before that rounding.
        sat: What the answer "sat" says.
        unsat: What the answer "unsat" says.
        precision: Of the network and its inputs.
        opset: Of ONNX.
        vnnlib_version: Of VNN-LIB.
        weights: How many floating-point constants the network has.
        rounded_weights: How many of them the precision changed; 0: the network is exactly that of the problem.
        largest_rounding: By which share of itself it changed one, at most.
        difference: Largest difference of a logit at the clean tokens, rounded to the precision, to that of the problem.
        problem: Digest of the problem.
        sha256: Digests of problem.onnx and problem.vnnlib.
        versions: Of attnrobust, onnx and torch.
        about: What else was said about the problem: model, layer, input, ...
    """

    directory: str
    threat: str
    epsilon: float
    goal: str
    label: int
    classes: int
    n: int
    width: int
    box: Side
    exact: bool
    half_width: float
    sat: str
    unsat: str
    precision: Precision
    opset: int
    vnnlib_version: Version
    weights: int
    rounded_weights: int
    largest_rounding: float
    difference: float
    problem: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """The three files."""
        onnx, vnnlib, told = (Path(self.directory) / name for name in (ONNX_NAME, VNNLIB_NAME, JSON_NAME))
        return onnx, vnnlib, told


def export_problem(
    problem: Problem,
    directory: str | Path,
    *,
    epsilon: float,
    box: Side | None = None,
    precision: Precision = "float32",
    vnnlib_version: Version = "1.0",
    overwrite: bool = False,
    about: Mapping[str, str] | None = None,
) -> ExportedProblem:
    """Write the question "does any move within the radius break the goal?" for other verifiers.

    ``problem.onnx`` maps the tokens X (1, n, d) to the logits Y (1, c) of the margin, ``problem.vnnlib`` asks for a
    point of a box at which a rival's logit is at least the label's, ``problem.json`` says what they are. A verifier's
    "sat" is such a point, "unsat" its absence; what that says about the threat's set depends on ``box``, and about the
    problem's own network on ``rounded_weights``. Masses of the clean tokens are constants of the network.

    Args:
        problem: Network, clean tokens, a threat on moved tokens and a ``Margin``.
        directory: Made where it is missing.
        epsilon: The radius, in the threat's distance.
        box: "inscribed" or "enclosing"; None only for ``per-token-linf``, whose set is a box (its bounds are rounded
            outward, so "unsat" is a certificate).
        precision: Of weights and inputs. "float32" is what most verifiers read; "float64" rounds nothing.
        vnnlib_version: "1.0" is what most verifiers read.
        overwrite: Replace files of an earlier export.
        about: Further facts for the comments and problem.json.

    Returns:
        What was written.

    Raises:
        UnsupportedThreatError: A goal that is no margin, or a threat without such a box.
        UnsupportedModelError: A network of which a part is not translated.
        InputError: onnx is not installed, files that are there, a box without numbers of the precision, or a precision
            in which the clean tokens have another class.
    """
    require_problem(problem)
    named("VNN-LIB version", vnnlib_version, VERSIONS)
    place = Path(directory)
    require_free(place, overwrite=overwrite)
    goal = _margin(problem)
    found = box_of(problem.moves, problem.clean.points, epsilon, side=box, precision=precision)
    program = program_of(problem, goal, found)
    classes, label = int(goal.weight.shape[0]), _label(problem)
    onnx = onnx_bytes(program, shape=(1, *problem.clean.points.shape), classes=classes, precision=precision)
    difference = _difference(problem, goal, run_onnx(onnx, problem.clean.points, precision), precision)
    count, worst = program.rounded(DTYPES[precision])
    told = ExportedProblem(
        str(place), problem.threat.key, float(epsilon), goal.key, label, classes, problem.clean.n, problem.clean.width,
        found.side, found.exact, found.half_width, found.sat, found.unsat, precision, OPSET,
        vnnlib_version, program.numbers, count, worst, difference, problem.digest, versions=_versions(),
        about=dict(about or {}),
    )  # fmt: skip
    text = vnnlib_text(
        found, label=label, rivals=problem.resolved.classes, classes=classes, precision=precision,
        version=vnnlib_version, comments=_comments(told, found),
    ).encode()  # fmt: skip
    return _write(told, onnx, text)


def program_of(problem: Problem, goal: Margin, box: Box) -> Program:
    """The operators from the tokens X to the logits Y."""
    program = Program()
    clean, most = problem.clean, torch.maximum(box.lower.abs(), box.upper.abs())
    out = write_map(program, problem.network, Value("X", clean.n, clean.width, longest(most)), mass=problem.mass)
    weights = problem.resolved.weights
    assert weights is not None  # noqa: S101 - a margin pools; narrows the type
    equal = out.rows > 1 and bool((weights == 1.0 / out.rows).all())
    pooled = mean_row(program, out) if equal else weighted_rows(program, out, weights)
    logits = affine(program, pooled, goal.weight.T.contiguous(), goal.bias)
    program.apply("Reshape", logits.name, (1, logits.width), to="Y")
    return program


def _margin(problem: Problem) -> Margin:
    if type(problem.goal) is not Margin:
        raise UnsupportedThreatError(
            f"the goal {problem.goal.key!r} bounds an l2 norm of the output, which linear constraints (VNN-LIB) cannot "
            "say; ask for a margin: a readout (--readout), or of a whole model --goal decision or nearest"
        )
    return problem.goal


def _label(problem: Problem) -> int:
    assert problem.resolved.label is not None  # noqa: S101 - a margin has a label; narrows the type
    return problem.resolved.label


def _difference(problem: Problem, goal: Margin, found: Float[Tensor, "c"], precision: Precision) -> float:
    """The largest difference to the problem's logits; refuses a file of which the clean tokens have another class."""
    resolved = problem.resolved
    wanted = goal.logits(resolved.clean).cpu()
    label = _label(problem)
    if not bool((found[label] > found[list(resolved.classes)]).all()):
        raise InputError(
            f"rounded to {precision} the clean tokens are no longer of class {label}; take the precision float64"
        )
    return float((found - wanted).abs().max())


def _comments(told: ExportedProblem, box: Box) -> list[str]:
    """What the file says about itself, one line each, in ASCII for any reader."""
    same = "exactly those of the problem"
    if told.rounded_weights:
        same = f"{told.rounded_weights} of {told.weights} rounded, by at most {told.largest_rounding:.2g} of themselves"
    lines = [
        f"attnrobust {told.versions['attnrobust']}: threat {told.threat}, radius {told.epsilon!r}",
        f"goal: {told.goal}, label {told.label} of {told.classes} classes",
        *(f"{name}: {value}" for name, value in told.about.items()),
        f"box: {box.side}, half-width {box.half_width!r}; it {box.place}",
        f"sat: {box.sat}",
        f"unsat: {box.unsat}",
        f"network: {ONNX_NAME}, {told.precision}, weights {same}",
        f"problem: {told.problem}",
    ]
    return [" ".join(line.split()).encode("ascii", "backslashreplace").decode() for line in lines]


def _versions() -> dict[str, str]:
    return {"attnrobust": __version__, "onnx": onnx_version(), "torch": str(torch.__version__)}


def require_free(place: Path, *, overwrite: bool) -> None:
    """Refuse a place that cannot take the files, or has them already.

    Raises:
        InputError: With the cure.
    """
    if place.exists() and not place.is_dir():
        raise InputError(f"{place} is no directory; choose another place")
    there = [name for name in (ONNX_NAME, VNNLIB_NAME, JSON_NAME) if (place / name).exists()]
    if there and not overwrite:
        raise InputError(f"{place} has {there[0]} already; choose another --out, or replace it by --overwrite")


def _write(told: ExportedProblem, onnx: bytes, text: bytes) -> ExportedProblem:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in ((ONNX_NAME, onnx), (VNNLIB_NAME, text))}
    full = replace(told, sha256=digests)
    contents = (onnx, text, (json.dumps(full.to_dict(), indent=2) + "\n").encode())
    try:
        Path(told.directory).mkdir(parents=True, exist_ok=True)
        for path, content in zip(full.paths, contents, strict=True):
            path.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"cannot write to {told.directory}: {error.strerror or error}; choose another --out"
        ) from error
    return full
