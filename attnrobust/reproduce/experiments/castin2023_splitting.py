"""Splitting the mass of a token against moving it: on which inputs, by how much, and at which sizes."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify.closed_form.castin2024_mean_field import mean_field_constant
from attnrobust.errors import InputError
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.lipschitz.splitting import splitting_rates
from attnrobust.problem import Problem
from attnrobust.reports.curves import Curve, Panel
from attnrobust.reproduce.experiment import Experiment, Part, Row, Setting, Verdict, column
from attnrobust.threats.measures import CouplingBall
from attnrobust.tokens import TokenMeasure

RATE, FINITE, SAMPLE = "derivative", "finite", "random layers"
CHOSEN = 3
"""Random layers that are attacked: those that gain most."""


def parts(setting: Setting) -> list[Part]:
    """The family without bound, random layers, and attacks of both at growing sizes."""
    sizes = setting.pick((0.1,), (0.001, 0.01, 0.1, 0.3, 1.0), (0.0001, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
    drawn = setting.pick(20, 400, 20_000)
    restarts, steps = setting.pick((2, 10), (4, 60), (16, 200))
    budget: Row = {"sizes": str(sizes), "restarts": restarts, "steps": steps}
    seed = setting.seed
    return [
        Part(name="family", config=budget, compute=partial(_family, sizes, restarts, steps, seed)),
        Part(name="random", config={"drawn": drawn, **budget}, compute=partial(_random, drawn, sizes, restarts, steps,
             seed)),
    ]  # fmt: skip


def family(e: float) -> tuple[Attention, TokenMeasure]:
    """Two tokens of width 2 with weights 1/2 everywhere: moving has the rate e, splitting ``sqrt(1 + e^2)``."""
    skew = torch.tensor([[0.0, 1.0 / e], [-1.0 / e, 0.0]], dtype=torch.float64)
    first = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    layer = Attention(w_q=skew[None], w_k=torch.eye(2)[None], w_v=first[None], scale=1.0)
    return layer, TokenMeasure(torch.tensor([[-e, 1.0], [e, -1.0]], dtype=torch.float64))


def _family(sizes: Sequence[float], restarts: int, steps: int, seed: int) -> list[Row]:
    rows: list[Row] = []
    for e in (0.5, 0.1, 0.01):
        layer, clean = family(e)
        rows.append(_rates(layer, clean, "family", e))
        if e >= 0.1:
            rows += [_attacked(layer, clean, "family", e, size, restarts, steps, seed) for size in sizes]
    return rows


def _random(drawn: int, sizes: Sequence[float], restarts: int, steps: int, seed: int) -> list[Row]:
    """Layers of width 1 and 2 on two or three tokens; scores up to about 10."""
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Row, Attention, TokenMeasure]] = []
    for number in range(drawn):
        layer, clean = _draw(generator)
        found.append((_rates(layer, clean, SAMPLE, float(number)), layer, clean))
    rows = [row for row, _, _ in found]
    best = sorted(found, key=lambda one: -float(one[0]["gain"] or 0.0))[:CHOSEN]
    for row, layer, clean in best:
        case = float(row["case"] or 0.0)
        rows += [_attacked(layer, clean, SAMPLE, case, size, restarts, steps, seed) for size in sizes]
    return rows


def _draw(generator: torch.Generator) -> tuple[Attention, TokenMeasure]:
    def normal(*shape: int) -> Float[Tensor, "..."]:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width, n = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 3), (2, 4)))
    layer = Attention(w_q=normal(1, width, width), w_k=normal(1, width, width), w_v=normal(1, width, width), scale=1.0)
    return layer, TokenMeasure(2.0 * normal(n, width))


def _rates(layer: Attention, clean: TokenMeasure, source: str, case: float) -> Row:
    rates = splitting_rates(layer, clean)
    upper = mean_field_constant(layer, _radius(clean)).value
    return {
        "source": source, "kind": RATE, "case": case, "n": clean.n, "width": clean.width, "size": 0.0,
        "moving": rates.moving.value, "splitting": rates.best_splitting.value, "gain": rates.gain,
        "upper": upper if math.isfinite(upper) else None,
    }  # fmt: skip


def _radius(clean: TokenMeasure) -> float:
    return float(torch.linalg.vector_norm(clean.points, dim=-1).max()) * (1.0 + 1e-15)


def _attacked(
    layer: Attention, clean: TokenMeasure, source: str, case: float, size: float, restarts: int, steps: int, seed: int
) -> Row:
    """W_2 of the outputs over the coupling cost, moving alone and with splits, in the ball of twice the radius."""
    domain = 2.0 * _radius(clean)
    problem = Problem(layer, clean, CouplingBall(2, domain_radius=domain), Displacement(1.0))
    budget = AttackBudget(restarts=restarts, steps=steps, rounds=1)
    row: Row = {"source": source, "kind": FINITE, "case": case, "n": clean.n, "width": clean.width, "size": size}
    try:
        found = attack(problem, epsilon=size, seed=seed, budget=budget)
    except InputError:
        return row
    per_size = (1.0 - 1e-9) / (math.sqrt(clean.n) * size)  # usage is sqrt(n) W_2; rounding of both distances
    upper = mean_field_constant(layer, domain).value
    moving, splitting = found.moving_radius * per_size, found.usage * per_size
    return row | {
        "moving": moving, "splitting": splitting, "gain": splitting / moving,
        "atoms": 0 if found.atoms is None else len(found.atoms.mass), "upper": upper if math.isfinite(upper) else None,
    }  # fmt: skip


# ---- what is shown -------------------------------------------------------------------------------------------------


def panels(rows: Sequence[Row]) -> list[Panel]:
    """The family, the random layers, and finite sizes."""
    e = column(rows, "case", source="family", kind=RATE)
    sample = {"source": SAMPLE, "kind": RATE}
    moving, splitting = column(rows, "moving", **sample), column(rows, "splitting", **sample)
    span = [min(moving), max(moving)]
    finite = [
        Curve(
            label=f"{source} {case:g}",
            x=column(rows, "size", source=source, case=case, kind=FINITE),
            y=column(rows, "gain", source=source, case=case, kind=FINITE),
        )
        for source, case in _cases(rows)
    ]
    return [
        Panel(
            title="the family: small displacements",
            x="e",
            y="rate in W_2",
            curves=[
                Curve(label="moving", x=e, y=column(rows, "moving", source="family", kind=RATE)),
                Curve(label="splitting", x=e, y=column(rows, "splitting", source="family", kind=RATE)),
            ],
        ),
        Panel(
            title=f"{len(moving)} random layers: small displacements",
            x="rate of moving",
            y="rate of splitting",
            curves=[
                Curve(label="", x=moving, y=[max(v, 1e-6) for v in splitting], style="."),
                Curve(label="equal", x=span, y=span, style="-", colour=7),
            ],
        ),
        Panel(
            title="splits over moves at finite sizes (attacks)", x="coupling cost", y="gain of splitting", curves=finite
        ),
    ]


def _cases(rows: Sequence[Row]) -> list[tuple[str, float]]:
    return list(dict.fromkeys((str(r["source"]), float(r["case"] or 0.0)) for r in rows if r["kind"] == FINITE))


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Whether splitting can be stronger, how often, and at which sizes."""
    gains = column(rows, "gain", source=SAMPLE, kind=RATE)
    better = sum(gain > 1.0 + 1e-9 for gain in gains)
    law = {e: math.sqrt(1.0 + e * e) / e for e in column(rows, "case", source="family", kind=RATE)}
    exact = all(
        abs(gain / law[e] - 1.0) < 1e-6
        for e, gain in zip(law, column(rows, "gain", source="family", kind=RATE), strict=True)
    )
    sizes = sorted(set(column(rows, "size", kind=FINITE)))
    far = {size: max(column(rows, "gain", kind=FINITE, size=size), default=1.0) for size in sizes}
    return [
        Verdict(
            claim="splitting mass can change the output more than moving tokens",
            paper="yes, on some inputs",
            ours=f"{better} of {len(gains)} random layers, at most {max(gains):.3g} times; all of the family",
            agrees=max(law.values()) > 1.0 and exact,
            reason="it takes a token with much attention on itself, whose value and key effect cancels that as query",
        ),
        Verdict(
            claim="the gain can be as large as one likes",
            paper="no statement known to us",
            ours="sqrt(1 + e^2) / e on the family: " + ", ".join(f"{gain:.4g} at e = {e:g}" for e, gain in law.items()),
            agrees=exact,
            reason="exact derivatives agree with the formula; this family is ours",
        ),
        Verdict(
            claim="the gain holds for finite displacements",
            paper="local statement",
            ours="largest gain of an attack: " + ", ".join(f"{gain:.3g} at {size:g}" for size, gain in far.items()),
            agrees=far[sizes[0]] > 1.0 if far else None,
            reason="more than the derivative says: in W_2 a small part of the mass may travel far at little cost; "
            "there it may take the attention of the other tokens",
        ),
    ]


EXPERIMENT = Experiment(
    name="castin2023-splitting",
    paper="Castin, Ablin, Peyre, arXiv 2312.14820, first version (2023)",
    statement="mass splitting against moving: which inputs, how much, small and large displacements",
    minutes=(1, 60),
    parts=parts,
    panels=panels,
    verdicts=verdicts,
    sides=(("moving", "upper"), ("splitting", "upper")),
)
