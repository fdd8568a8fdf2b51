"""Contraction of infinitely deep weight-shared attention in W_1, and inputs that are not what was specified."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.vuckovic2020_measures import general_kernel_constant, misspecified_input
from attnrobust.layers.attention import Attention
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.kernel import KernelAttention, KernelConstants
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.lipschitz.contraction import contraction
from attnrobust.lipschitz.fixed_point import fixed_point
from attnrobust.numerics.sides import round_down, round_up
from attnrobust.numerics.transport import wasserstein
from attnrobust.reports.curves import Curve, Panel
from attnrobust.reproduce.experiment import Experiment, Part, Row, Setting, Verdict, column, groups
from attnrobust.tokens import TokenMeasure

WIDTH, RADIUS = 4, 1.0
DEPTH, EDIT = "depth", "wrong input"
DOT, L2, LAPLACE = "dot product", "L2", "exp(-distance)"
SHRINK = {0.2: "weak scores", 1.0: "strong scores"}
EDITS = ("noise", "one token replaced", "one token dropped", "one token copied", "unequal masses")
LOWEST = 1e-13
"""Distances below are rounding."""


def parts(setting: Setting) -> list[Part]:
    """Stacks of one layer, and wrong inputs of every kind."""
    depth = setting.pick(4, 24, 60)
    tokens, trials = setting.pick((4, 2), (12, 20), (64, 200))
    seed = setting.seed
    return [
        *(
            Part(name=f"depth-{place}", config={"layer": name, "depth": depth, "tokens": tokens},
                 compute=partial(_depth, name, depth, tokens, seed))
            for place, name in enumerate((DOT, L2))
        ),
        *(
            Part(name=f"edits-{place}", config={"layer": name, "tokens": tokens, "trials": trials},
                 compute=partial(_edits, name, tokens, trials, seed))
            for place, name in enumerate((DOT, L2, LAPLACE))
        ),
    ]  # fmt: skip


def _layer(name: str, strength: float, seed: int) -> Attention | L2Attention | KernelAttention:
    """Random weights; value weights scaled so that outputs stay in the ball."""
    generator = torch.Generator().manual_seed(seed)
    w_q, w_k, w_v = (_norm_one(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)) for _ in range(3))
    if name == DOT:
        return Attention(w_q=strength * w_q[None], w_k=w_k[None], w_v=w_v[None], scale=1.0)
    if name == L2:
        return L2Attention(w_q=strength**0.5 * w_q[None], w_v=w_v[None], scale=1.0)
    slope = strength
    constants = KernelConstants(diameter=2 * RADIUS, oscillation=2 * RADIUS * slope, query_slope=slope, key_slope=slope)
    return KernelAttention(lambda x, y: -slope * torch.cdist(x, y), f"laplace-{slope:g}", w_v, constants)


def _norm_one(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    scaled: Tensor = matrix / (torch.linalg.matrix_norm(matrix, 2) * (1.0 + 1e-12))
    return scaled


def _measure(n: int, generator: torch.Generator, *, equal: bool = True) -> TokenMeasure:
    """Tokens in the ball, some of them near its border."""
    drawn = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    reach = torch.rand(n, 1, generator=generator, dtype=torch.float64) ** 0.25 * (RADIUS * (1.0 - 1e-12))
    points = drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True) * reach
    return TokenMeasure(points) if equal else TokenMeasure(points, _masses(n, generator))


def _masses(n: int, generator: torch.Generator) -> Float[Tensor, "n"]:
    return torch.softmax(2.0 * torch.randn(n, generator=generator, dtype=torch.float64), dim=0)


def _apply(layer: TokenMap, tokens: TokenMeasure) -> TokenMeasure:
    return TokenMeasure(layer(tokens.points, None if tokens.uniform else tokens.mass), tokens.mass)


# ---- depth ---------------------------------------------------------------------------------------------------------


def _depth(name: str, depth: int, n: int, seed: int) -> list[Row]:
    """Two inputs of other lengths and masses go through the same layer again and again; value weights times 0.4."""
    rows: list[Row] = []
    for strength, label in SHRINK.items():
        layer = _scaled(_layer(name, strength, seed), 0.4)
        generator = torch.Generator().manual_seed(seed)
        first, second = _measure(n, generator), _measure(n + 3, generator, equal=False)
        known = contraction(layer, radius=RADIUS, order=1)
        rate = known.rate.value
        about: Row = {"part": DEPTH, "layer": name, "scores": label, "rate": rate, "proved": str(known.proved)}
        start = wasserstein(first, second, order=1).upper.value
        rows.append(about | {"k": 0, "found": round_down(start, relative=1e-12), "upper": start})
        for k in range(1, depth + 1):
            first, second = _apply(layer, first), _apply(layer, second)
            distance = wasserstein(first, second, order=1).lower.value
            rounding = LOWEST / max(1.0 - rate, 0.1)  # of the iterates
            upper = round_up(rate**k * start, relative=1e-9) + rounding
            rows.append(about | {"k": k, "found": distance, "upper": upper if known.proved else None})
        if known.proved:
            end = fixed_point(layer, first, radius=RADIUS, order=1)
            rows[-1] = rows[-1] | {"fixed_point_norm": float(torch.linalg.vector_norm(end.tokens[0]))}
    return rows


def _scaled(layer: TokenMap, factor: float) -> TokenMap:
    return replace(layer, w_v=factor * layer.w_v)  # type: ignore[type-var, attr-defined]


# ---- wrong inputs --------------------------------------------------------------------------------------------------


def _edits(name: str, n: int, trials: int, seed: int) -> list[Row]:
    rows: list[Row] = []
    for strength, label in SHRINK.items():
        layer = _layer(name, strength, seed)
        generator = torch.Generator().manual_seed(seed)
        for trial in range(trials):
            meant = _measure(n, generator)
            for kind in EDITS:
                about: Row = {"part": EDIT, "layer": name, "scores": label, "edit": kind, "trial": trial}
                given = _edit(meant, kind, 10.0 ** -(trial % 4), generator)
                rows.append(about | _edited(layer, meant, given))
    return rows


def _edit(meant: TokenMeasure, kind: str, size: float, generator: torch.Generator) -> TokenMeasure:
    points = meant.points.clone()
    if kind == "noise":
        moved = points + size * torch.randn(points.shape, generator=generator, dtype=torch.float64)
        norms = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        return TokenMeasure(moved * (RADIUS * (1.0 - 1e-12) / norms).clamp_max(1.0))
    if kind == "one token replaced":
        points[0] = _measure(1, generator).points[0]
        return TokenMeasure(points)
    if kind == "one token dropped":
        return TokenMeasure(points[1:])
    if kind == "one token copied":
        return TokenMeasure(torch.cat([points, points[:1]]))
    return TokenMeasure(points, _masses(meant.n, generator))


def _edited(layer: TokenMap, meant: TokenMeasure, given: TokenMeasure) -> Row:
    """W_1 of inputs and outputs, and the change at the first token of the meant input as the query."""
    bound = misspecified_input(layer, meant, given, radius=RADIUS)
    found = wasserstein(_apply(layer, meant), _apply(layer, given), order=1).lower.value
    query = meant.points[:1]
    row = float(torch.linalg.vector_norm(_at(layer, query, meant) - _at(layer, query, given)))
    rounding = 1e-14
    return {
        "distance": bound.distance.value, "rate": general_kernel_constant(layer, RADIUS).value,
        "found": max(found - rounding, 0.0), "upper": bound.outputs.value,
        "row_found": max(row - rounding, 0.0), "row_upper": bound.row.value,
    }  # fmt: skip


def _at(layer: TokenMap, query: Float[Tensor, "1 d"], context: TokenMeasure) -> Float[Tensor, "e"]:
    """The output at a query that is no token of its context: it gets a mass that vanishes."""
    mass = torch.cat([torch.tensor([1e-300], dtype=torch.float64), context.mass])
    return layer(torch.cat([query, context.points]), mass)[0]


# ---- what is shown -------------------------------------------------------------------------------------------------


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Distances against depth; bounds against measured changes."""
    deep, edits = [r for r in rows if r["part"] == DEPTH], [r for r in rows if r["part"] == EDIT]
    curves = []
    for colour, (name, label) in enumerate((name, label) for name in (DOT, L2) for label in SHRINK.values()):
        where = {"layer": name, "scores": label}
        found = [max(value, LOWEST) for value in column(deep, "found", **where)]
        k, upper = column(deep, "k", **where), column(deep, "upper", **where)
        curves.append(Curve(label=f"{name}, {label}", x=k, y=found, style=".-", colour=colour))
        if len(upper) > 1:
            curves.append(Curve(label="its bound", x=k, y=upper, style="--", colour=colour))
    return [
        Panel(title="two inputs through one layer, again and again", x="layers", y="W_1", curves=curves, log_x=False),
        *(
            Panel(
                title=title,
                x="measured",
                y="bound",
                curves=[
                    *(
                        Curve(label=str(kind), x=[max(v, LOWEST) for v in column(edits, found, edit=kind)],
                              y=column(edits, upper, edit=kind), style=".")
                        for kind in groups(edits, "edit")
                    ),
                    _diagonal([max(v, LOWEST) for v in column(edits, found)]),
                ],
            )
            for title, found, upper in (
                ("wrong input: W_1 of the outputs", "found", "upper"),
                ("wrong input: output at one query", "row_found", "row_upper"),
            )
        ),
    ]  # fmt: skip


def _diagonal(values: Sequence[float]) -> Curve:
    ends = [min(values), max(values)]
    return Curve(label="equal", x=ends, y=ends, style="-", colour=7)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Contraction and wrong inputs."""
    deep = [row for row in rows if row["part"] == DEPTH]
    proved = [row for row in deep if row["proved"] == "True"]
    cases = {(str(r["layer"]), str(r["scores"])): (float(r["rate"] or math.inf), str(r["proved"])) for r in deep}
    last = {key: column(deep, "found", layer=key[0], scores=key[1])[-1] for key in cases}
    edits = [row for row in rows if row["part"] == EDIT]
    ratios = {label: min(_ratios(edits, label), default=math.nan) for label in SHRINK.values()}
    return [
        Verdict(
            claim="a stack of one layer contracts token measures in W_1",
            paper="yes, where the constant is below 1",
            ours="; ".join(
                f"{name}, {label}: rate at most {cases[name, label][0]:.3g}"
                f"{'' if cases[name, label][1] == 'True' else ' (nothing proved)'}, W_1 at the end {value:.1e}"
                for (name, label), value in last.items()
            ),
            agrees=len(proved) > 0 and all(float(r["found"] or 0) <= float(r["upper"] or 0) for r in proved),
            reason="the measured distance falls faster than the proved rate; layers without a proof contract too here",
        ),
        Verdict(
            claim="a wrong input changes the output by at most the constant times W_1",
            paper="a bound of this kind",
            ours=", ".join(f"{label}: smallest bound over measured {ratio:.3g}" for label, ratio in ratios.items()),
            agrees=all(float(r["found"] or 0) <= float(r["upper"] or 0) for r in edits),
            reason="random edits are not the worst case; the constant has e^(2 a), which only light far tokens reach",
        ),
    ]


def _ratios(rows: Sequence[Row], label: str) -> list[float]:
    pairs = [(float(r["upper"] or 0.0), float(r["found"] or 0.0)) for r in rows if r["scores"] == label]
    return [upper / found for upper, found in pairs if found > 0]


EXPERIMENT = Experiment(
    name="vuckovic2020",
    paper="Vuckovic, Baratin, Tachet des Combes, arXiv 2007.02876 and 2102.05628",
    statement="infinitely deep weight-shared attention contracts in W_1; wrong inputs: bound against measured",
    minutes=(0.5, 10),
    parts=parts,
    panels=panels,
    verdicts=verdicts,
    sides=(("found", "upper"), ("row_found", "row_upper")),
)
