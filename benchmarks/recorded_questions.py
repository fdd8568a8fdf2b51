"""The problems of the recorded set: small layers and inputs, built through the public names of the package alone.

Every tensor comes from a generator that is seeded by the name of what it belongs to, so a problem that is added or
left out changes no other one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

import attnrobust as ar
from benchmarks.recorded_layers import OTHERS, Draw, Mixing, attention, from_torch_module, margin, sigmoid

AnyThreat = ar.Threat | ar.CouplingBall | ar.WassersteinBall | ar.Copies
SMALL = ar.AttackBudget(restarts=3, steps=15, rounds=2)
FULL = ar.AttackBudget()
SHARED = ar.FrobeniusBall()


@dataclass(frozen=True, eq=False)
class Question:
    """One problem and how it is asked.

    Args:
        name: Unique.
        layer: The layer.
        clean: The input.
        threat: What may happen to it.
        goal: What must stay true.
        moves: What moves beside copies (``Copies`` alone reads it).
        extra: Certificates on request, beside all that apply.
        epsilon: A fixed budget that is attacked as well.
        budget: What the attack may cost.
        seed: Seed of the run.
    """

    name: str
    layer: ar.TokenMap
    clean: ar.TokenMeasure
    threat: AnyThreat
    goal: ar.Goal
    moves: ar.Threat = SHARED
    extra: tuple[str, ...] = ()
    epsilon: float | None = None
    budget: ar.AttackBudget = SMALL
    seed: int = 0


# ---- goals and threats -----------------------------------------------------------------------------------------------

ALL = ar.Displacement(0.1, relative=True)
MEAN = ar.Displacement(0.1, relative=True, pool="mean")
ROW = ar.Displacement(0.2, pool=0)

MOVED: tuple[ar.Threat, ...] = (
    ar.FrobeniusBall(),
    ar.FrobeniusBall(tokens=(0, 2)),
    ar.FrobeniusBall(tokens=(1,)),
    ar.PerTokenBall(),
    ar.PerTokenBall("linf"),
    ar.PerTokenBall("l1"),
    ar.PerTokenBall(tokens=(0, 1)),
    ar.AnyToken(),
    ar.AnyToken(tokens=(0, 2)),
)


def _input(draw: Draw, n: int, d: int, *, masses: bool = False, scale: float = 1.0) -> ar.TokenMeasure:
    points = draw(n, d, scale=scale)
    return ar.TokenMeasure(points, draw.mass(n)) if masses else ar.TokenMeasure(points)


# ---- the set ---------------------------------------------------------------------------------------------------------


def _threats() -> Iterator[Question]:
    """Every threat on moved tokens under both kinds of goal."""
    draw = Draw("threats")
    layer, clean = attention(draw), _input(draw, 3, 4)
    two, narrow = attention(draw, d=3, k=2, v=2, out=3), _input(draw, 3, 3)
    for threat in MOVED:
        yield Question(f"one head/{threat.key}/displacement", layer, clean, threat, ALL)
        yield Question(f"one head/{threat.key}/margin", two, narrow, threat, margin(two, "threats", classes=2))


def _goals() -> Iterator[Question]:
    """Several heads under every goal."""
    draw = Draw("goals")
    layer, clean = attention(draw, heads=3, d=6), _input(draw, 4, 6)
    displaced: dict[str, ar.Goal] = {
        "absolute": ar.Displacement(0.2),
        "mean": MEAN,
        "row": ar.Displacement(0.3, relative=True, pool=1),
    }
    for threat in (MOVED[0], MOVED[2], MOVED[3], MOVED[7]):
        for name, goal in displaced.items():
            yield Question(f"heads/{threat.key}/displacement {name}", layer, clean, threat, goal)
    small, few = attention(draw, heads=2, d=3, k=2, v=2, out=3), _input(draw, 3, 3)
    for threat in (MOVED[0], MOVED[1], MOVED[2], MOVED[3], MOVED[4], MOVED[7]):
        for classes, pool in ((3, 1), (2, 0)):
            goal = margin(small, f"goals {classes}", classes=classes, pool=pool)
            yield Question(f"heads/{threat.key}/margin row {classes} classes", small, few, threat, goal)


def _inputs() -> Iterator[tuple[str, ar.Attention, ar.TokenMeasure]]:
    """Layers and inputs, each with one thing that is hard."""
    hidden = torch.zeros(4, 4, dtype=torch.float64)
    hidden[:, 3] = -math.inf
    index = torch.arange(4)
    far = (index[:, None] - index[None]).abs() > 1
    band = torch.zeros(4, 4, dtype=torch.float64).masked_fill(far, -math.inf)
    draw = Draw("biases")
    yield "biases", attention(draw, heads=2, biases=True), _input(draw, 3, 4)
    draw = Draw("padding")
    yield "padding", attention(draw, mask=hidden), _input(draw, 4, 4)
    draw = Draw("band")
    yield "band", attention(draw, heads=2, mask=band), _input(draw, 4, 4)
    draw = Draw("additive")
    yield "additive mask", attention(draw, mask=draw(4, 4)), _input(draw, 4, 4)
    draw = Draw("causal")
    yield "causal", attention(draw, heads=2, causal=True), _input(draw, 4, 4)
    draw = Draw("masses")
    yield "masses", attention(draw, heads=2), _input(draw, 4, 4, masses=True)
    draw = Draw("masses causal")
    yield "masses causal biases", attention(draw, biases=True, causal=True), _input(draw, 3, 4, masses=True)
    draw = Draw("single")
    yield "one token", attention(draw, heads=2), _input(draw, 1, 4)
    draw = Draw("single biases")
    yield "one token biases", attention(draw, biases=True), _input(draw, 1, 4)
    draw = Draw("equal")
    yield "equal tokens", attention(draw), ar.TokenMeasure(draw(1, 4).expand(3, 4))
    draw = Draw("saturated")
    yield "saturated", attention(draw, strength=300.0), _input(draw, 3, 4)
    draw = Draw("concatenated")
    yield "concatenated heads", attention(draw, heads=2, out=None), _input(draw, 3, 4)
    draw = Draw("clusters")
    centers = 2.0 * draw(2, 4)
    yield "clusters", attention(draw), ar.TokenMeasure(centers[torch.arange(4) % 2] + draw(4, 4, scale=1e-2))
    draw = Draw("long")
    yield "eight tokens of width 16", attention(draw, heads=4, d=16, k=4, v=4, out=16), _input(draw, 8, 16)
    draw = Draw("huge")
    yield "huge tokens", attention(draw, strength=1e-4), _input(draw, 3, 4, scale=100.0)
    draw = Draw("narrow")
    yield "width 2", attention(draw, d=2, k=2, v=2, out=2), _input(draw, 2, 2)


def _attention() -> Iterator[Question]:
    for place, (name, layer, clean) in enumerate(_inputs()):
        yield Question(f"{name}/frobenius/displacement", layer, clean, ar.FrobeniusBall(), ALL)
        goal = margin(layer, name)
        yield Question(f"{name}/frobenius/margin", layer, clean, ar.FrobeniusBall(), goal)
        if place % 2:
            threat = ar.AnyToken() if place % 4 == 1 else ar.PerTokenBall()
            yield Question(f"{name}/{threat.key}/margin row", layer, clean, threat, replace(goal, pool=0))


def _corners() -> Iterator[Question]:
    """Extreme tolerances, no attack, wrong labels, other seeds, full budgets, fixed sizes."""
    draw = Draw("corners")
    layer, clean, ball = attention(draw, heads=2), _input(draw, 3, 4), ar.FrobeniusBall()
    for tolerance in (1e-6, 1e-2, 1.0, 30.0):
        yield Question(f"tolerance {tolerance:g}", layer, clean, ball, ar.Displacement(tolerance, relative=True))
    readout = margin(layer, "corners")
    values = [float(x) for x in readout.logits(layer(clean.points).mean(dim=0))]
    yield Question("wrong label", layer, clean, ball, replace(readout, label=values.index(min(values))))
    yield Question("given label", layer, clean, ball, replace(readout, label=values.index(max(values))))
    constant = replace(layer, w_v=torch.zeros_like(layer.w_v))
    yield Question("constant layer", constant, clean, ball, ar.Displacement(0.1))
    yield Question("seed 7", layer, clean, ball, ALL, seed=7)
    goals: tuple[ar.Goal, ...] = (ALL, readout)
    for goal in goals:
        for threat in (ball, ar.PerTokenBall("linf"), ar.AnyToken()):
            name = f"fixed size and full budget/{threat.key}/{goal.key.split()[0]}"
            yield Question(name, layer, clean, threat, goal, epsilon=0.05, budget=FULL)
    module = from_torch_module(Draw("module"))
    tokens = _input(Draw("module input"), 4, 8)
    yield Question("torch module/frobenius", module, tokens, ball, ALL, epsilon=0.1)
    yield Question("torch module/per-token", module, tokens, ar.PerTokenBall(), margin(module, "module"))
    own = Mixing(draw(4, 3, scale=0.5))
    yield Question("own map/frobenius", own, clean, ball, ALL)
    yield Question("own map/any-token", own, clean, ar.AnyToken(), margin(own, "own"))


def _others() -> Iterator[Question]:
    """The other kinds of layer."""
    for kind, build in OTHERS.items():
        draw = Draw(kind)
        one, two, clean = build(draw, 1, 3), build(draw, 2, 3), _input(draw, 3, 3)
        weighed = _input(draw, 3, 3, masses=True)
        yield Question(f"{kind}/frobenius/displacement", two, clean, ar.FrobeniusBall(), ALL, epsilon=0.1)
        yield Question(f"{kind}/frobenius/margin", one, clean, ar.FrobeniusBall(), margin(one, kind, classes=2))
        yield Question(f"{kind}/per-token-linf/displacement mean", one, clean, ar.PerTokenBall("linf"), MEAN)
        yield Question(f"{kind}/per-token/margin row", two, clean, ar.PerTokenBall(), margin(two, kind, pool=1))
        yield Question(f"{kind}/any-token/displacement row", two, clean, ar.AnyToken(), ROW)
        yield Question(f"{kind}/token:1/margin", two, clean, ar.FrobeniusBall(tokens=(1,)), margin(two, kind))
        yield Question(f"{kind}/masses/displacement", two, weighed, ar.FrobeniusBall(), ALL)


def _conic() -> Iterator[Question]:
    """Programs that are small enough for the certificate on request."""
    draw = Draw("conic")
    layer, clean = attention(draw, d=2, k=2, v=2, out=2), _input(draw, 2, 2)
    for threat in (ar.FrobeniusBall(), ar.PerTokenBall(), ar.FrobeniusBall(tokens=(0,))):
        goal = margin(layer, "conic", classes=2, pool=0)
        yield Question(f"conic/{threat.key}", layer, clean, threat, goal, extra=("conic-margin",))
    goal = margin(layer, "conic mean", classes=2)
    yield Question("conic/any-token/mean", layer, clean, ar.AnyToken(), goal, extra=("conic-margin",))


def _measures() -> Iterator[Question]:
    """Balls of token measures."""
    draw = Draw("measures")
    layer, clean = attention(draw, heads=2, d=3, k=2, v=2, out=2, strength=0.3), _input(draw, 3, 3)
    room = 1.5 * float(torch.linalg.vector_norm(clean.points, dim=-1).max())
    whole, mean, ball = ar.Displacement(0.3), ar.Displacement(0.2, pool="mean"), (ar.CouplingBall, ar.WassersteinBall)
    readout = margin(layer, "measures")
    for kind in ball:
        for order in (1, 2, math.inf):
            threat = kind(order, domain_radius=None if math.isinf(order) else room)
            for name, goal in (("whole", whole), ("mean", mean), ("margin", readout)):
                yield Question(f"measure/{kind(order).key}/{name}", layer, clean, threat, goal)
        yield Question(f"measure/{kind(math.inf).key}:within", layer, clean, kind(math.inf, domain_radius=room), mean)
        yield Question(f"measure/{kind(2).key} without domain", layer, clean, kind(2), mean)
    weighed = _input(draw, 3, 3, masses=True)
    for order, goal in ((1, mean), (2, whole), (math.inf, readout)):
        threat = ar.WassersteinBall(order, domain_radius=2.0 * room)
        yield Question(f"measure/masses/{ar.WassersteinBall(order).key}", layer, weighed, threat, goal)
    row = ar.Displacement(0.2, pool=0)
    masked = attention(draw, d=3, k=2, v=2, out=2, mask=draw(3, 3), strength=0.3)
    causal = attention(draw, d=3, k=2, v=2, out=2, causal=True, strength=0.3)
    single = _input(draw, 1, 3)
    yield Question("measure/row/coupling:inf", layer, clean, ar.CouplingBall(math.inf), row)
    yield Question("measure/row/wasserstein:inf", layer, clean, ar.WassersteinBall(math.inf), row)
    yield Question("measure/mask/coupling:inf", masked, clean, ar.CouplingBall(math.inf), whole)
    yield Question("measure/causal/coupling:inf", causal, clean, ar.CouplingBall(math.inf), mean)
    yield Question("measure/causal/coupling:2", causal, clean, ar.CouplingBall(2, domain_radius=room), mean)
    yield Question("measure/one token/wasserstein:inf", layer, single, ar.WassersteinBall(math.inf), mean)
    gates = sigmoid(Draw("measures sigmoid"), 2, 3)
    for threat in (ar.WassersteinBall(2, domain_radius=room), ar.CouplingBall(math.inf)):
        yield Question(f"measure/sigmoid/{threat.name}", gates, clean, threat, mean)


def _copies() -> Iterator[Question]:
    draw = Draw("copies")
    layer, clean = attention(draw, heads=2, d=3, k=2, v=2, out=2, strength=0.3), _input(draw, 3, 3)
    readout = margin(layer, "copies")
    goals = {
        "whole": ar.Displacement(2.0),
        "mean": ar.Displacement(1.0, pool="mean"),
        "row": ar.Displacement(1.5, pool=0),
    }
    for copies in (1, 2):
        for name, goal in goals.items():
            yield Question(f"copies:{copies}/{name}", layer, clean, ar.Copies(copies), goal)
        yield Question(f"copies:{copies}/margin", layer, clean, ar.Copies(copies), readout)
    causal = attention(draw, d=3, k=2, v=2, out=2, causal=True, strength=0.3)
    yield Question("copies:1/causal", causal, clean, ar.Copies(1), goals["whole"])
    yield Question("copies:1/causal strict", causal, clean, ar.Copies(1, order="strict"), goals["whole"])
    yield Question("copies:1/strict", layer, clean, ar.Copies(1, order="strict"), goals["mean"])
    yield Question("copies:1/per-token", layer, clean, ar.Copies(1), goals["mean"], moves=ar.PerTokenBall())
    weighed = _input(draw, 3, 3, masses=True)
    yield Question("copies:1/masses", layer, weighed, ar.Copies(1), goals["whole"])


PARTS = (_threats, _goals, _attention, _corners, _others, _conic, _measures, _copies)


def questions() -> tuple[Question, ...]:
    """The whole set, in order."""
    found = tuple(question for part in PARTS for question in part())
    names = [question.name for question in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two problems have the name {twice[0]!r}")
    return found
