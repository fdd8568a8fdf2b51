"""Calls of the public functions with the values of ``fuzz_values``, and what must hold of their answers."""

import math
from collections.abc import Callable
from typing import Any

import torch

import attnrobust as ar
from attnrobust.layers.variants.kernel import KernelConstants
from benchmarks.fuzz_values import CERTIFICATES, THREATS, Values

Call = Callable[[], str | None]
ROUNDING = 1e-9
WIDTH = 3


def function_call(values: Values) -> tuple[str, Call]:
    """One of the public functions, by name, and the call."""
    name, call = values.pick(tuple(CALLS.items()))
    return name, lambda: call(values)


# ---- what the functions take -----------------------------------------------------------------------------------------


def tokens(v: Values) -> Any:
    """Token vectors, a measure of them, or something wrong."""
    n = v.pick((1, 1, 2, 3, 4))
    points = v.array(n, WIDTH)
    if v.rarely():
        points = v.pick((torch.zeros(n, WIDTH), torch.ones(n, WIDTH) * v.scale, torch.eye(n, WIDTH)))
    if v.rarely(0.4):
        return points
    return ar.TokenMeasure(points, masses(v, n)) if v.rarely(0.5) else ar.TokenMeasure(points)


def masses(v: Values, n: int) -> Any:
    """Masses of n tokens."""
    if v.wrong():
        return v.array(n)
    raw = torch.tensor(v.numpy.uniform(0.1, 1.0, size=n)) ** v.pick((1, 1, 20, 300))
    return raw / raw.sum()


def attention(v: Values) -> Any:
    """Dot-product attention."""
    h, k, e = v.pick((1, 2)), v.pick((1, 2)), v.pick((1, 3))
    optional = {"b_q": (h, k), "b_k": (h, k), "b_v": (h, k), "w_o": (h, k, e)}
    extra = {name: v.array(*shape, scale=1.0) for name, shape in optional.items() if v.rarely(0.15)}
    if v.rarely(0.1):
        extra["b_o"] = v.array(e if "w_o" in extra else h * k, scale=1.0)
    if v.rarely(0.1):
        extra["scale"] = v.number((1.0, 0.5, 0.0, -1.0, 1e30))
    if v.rarely(0.1):
        extra["mask"] = v.array(2, 2, scale=1.0)
    extra |= {"causal": v.pick((True, 1, "yes", None)) if v.wrong() else True} if v.rarely(0.15) else {}
    return ar.Attention(v.array(h, WIDTH, k), v.array(h, WIDTH, k, scale=1.0), v.array(h, WIDTH, k), **extra)


def layer(v: Values) -> Any:
    """Any layer."""
    if v.rarely(0.6):
        return attention(v)
    if v.wrong():
        return v.pick((None, "attention", object(), torch.nn.Linear(WIDTH, WIDTH)))
    h, k = v.pick((1, 2)), v.pick((1, 2))
    q, key, val = (v.array(h, WIDTH, k, scale=1.0) for _ in range(3))
    return v.pick((
        lambda: ar.L2Attention(q, val, scale=v.number((None, 1.0))),
        lambda: ar.CosineAttention(q, key, val, tau=v.number((1.0, 5)), eps=v.number((1e-2, 1e-30))),
        lambda: ar.SigmoidAttention(q, key, val, shift=v.number((0.0, -3.0, 1e6))),
        lambda: ar.LipschitzNormAttention(q, key, val),
        lambda: ar.KernelAttention(
            score=lambda x, y: x @ y.mT, key="product", w_v=v.array(WIDTH, WIDTH, scale=1.0),
            constants=None if v.rarely(0.5) else KernelConstants(
                **{name: v.number((1.0, 10.0)) for name in ("diameter", "oscillation", "query_slope", "key_slope")}
            ),
        ),
    ))()  # fmt: skip


def subset(v: Values) -> Any:
    """Which tokens may move."""
    if v.wrong():
        return v.pick(((), (0, 99), -1, "0", [True, 1], 1.5, {0}, torch.tensor([0.0]), torch.tensor([[0]]), [None], {}))
    return v.pick((None, None, (0,), 0, [0], torch.tensor([0]), {0}))


def threat(v: Values) -> Any:
    """A threat, or its spelling."""
    if v.rarely(0.5):
        return v.text(THREATS)
    order = v.number((1, 2, math.inf))
    domain = v.number((None, 50.0))
    return v.pick((
        lambda: ar.FrobeniusBall(subset(v)),
        lambda: ar.PerTokenBall(v.text(("l2", "linf", "l1")), subset(v)),
        ar.AnyToken,
        lambda: ar.CouplingBall(order, domain_radius=domain, tokens=subset(v)),
        lambda: ar.WassersteinBall(order, domain_radius=domain, tokens=subset(v)),
        lambda: ar.Copies(v.number((1, 2))),
    ))()  # fmt: skip


def goal(v: Values) -> Any:
    """A goal, or a tolerance."""
    if v.rarely(0.4):
        return v.text(("10%", "1%", "0.1", "1e-3"))
    if v.rarely(0.5):
        pool = v.text(("all", "mean", 0))
        return ar.Displacement(v.number((0.1, 0.01, 1e-9)), relative=v.rarely(0.5), pool=pool)
    classes = v.pick((2, 3))
    bias = v.array(classes, scale=1.0) if v.rarely() else None
    label = v.number((None, 0, 1))
    return ar.Margin(v.array(classes, v.pick((1, 2, 2, 3)), scale=1.0), bias, v.text(("mean", 0)), label)


def problem(v: Values) -> Any:
    """A question."""
    if v.rarely(0.1 * (v.wild > 0)):
        return v.pick((None, "problem", 3, object(), (attention(v), [[1.0] * WIDTH])))
    return ar.Problem(layer(v), tokens(v), threat(v), goal(v))


def budget(v: Values) -> Any:
    """A cheap budget."""
    if v.wrong():
        if v.rarely(0.3):
            return v.pick(NOTHINGS)
        return ar.AttackBudget(
            restarts=v.number((1, 2)), steps=v.number((1, 2)), rounds=1,
            queries=v.number((None, 1, 50)), seconds=v.number((None, 1.0)), memory_bytes=v.number((1 << 20, 1)),
        )  # fmt: skip
    return ar.AttackBudget(restarts=1, steps=2, rounds=1)


NOTHINGS = ("cheap", 3, {}, [], object(), {"restarts": 1})


def methods(v: Values) -> Any:
    """Names of certificates."""
    if v.wrong():
        return v.pick(
            ("castin2024", (), [1], "", ["displacement", None], 5, object(), "frobenius", {"displacement": 1})
        )
    return v.pick(("castin2024-derived", v.pick(CERTIFICATES), [v.pick(CERTIFICATES), v.pick(CERTIFICATES)]))


def seed(v: Values) -> Any:
    """A seed."""
    return v.number((0, 1, -1, 2**62))


# ---- what must hold --------------------------------------------------------------------------------------------------


def attack_is_right(result: Any) -> str | None:
    """A violation has a radius and a used budget, an attack without one has none."""
    found = result.status is ar.Status.FOUND
    if found and not 0.0 <= result.radius < math.inf:
        return f"unsound: the radius of a violation is {result.radius}"
    if found and not result.usage >= 1.0 - ROUNDING:
        return f"unsound: a violation uses {result.usage} of the budget"
    if "\n" in result.note:
        return f"traceback: a note of several lines: {result.note}"
    if result.status is ar.Status.ERROR and not result.note:
        return "traceback: an error without a note"
    return None


def report_is_right(found: Any) -> str | None:
    """Radii are >= 0, reasons are one line."""
    for certificate in found.certificates:
        if not certificate.radius >= 0.0:
            return f"unsound: {certificate.method} certifies {certificate.radius}"
    for skipped in found.skipped:
        if not skipped.reason or "\n" in skipped.reason:
            return f"traceback: {skipped.method} gives the reason {skipped.reason!r}"
    return None


# ---- the calls -------------------------------------------------------------------------------------------------------


def call_measure(v: Values) -> str | None:
    n = v.pick((1, 2, 3))
    measure = ar.TokenMeasure(v.array(n, WIDTH), masses(v, n) if v.rarely(0.7) else None)
    good = bool(torch.isfinite(measure.points).all()) and abs(float(measure.mass.sum()) - 1.0) < ROUNDING
    return None if good and len(measure.digest()) == 64 else "unsound: a measure that is none"


def call_perturbed(v: Values) -> str | None:
    clean = ar.TokenMeasure(torch.ones(2, WIDTH))
    parent = v.array(3) if v.wrong() else v.pick((torch.tensor([0, 1, 1]), [0, 1, 1], torch.tensor([0, 1, 7])))
    atoms = ar.PerturbedTokens(v.array(3, WIDTH), masses(v, 3), parent)
    asked = threat(v)
    if isinstance(asked, ar.CouplingBall | ar.WassersteinBall):
        distance = asked.distance(clean, atoms)
        return None if distance >= 0 else f"unsound: distance {distance}"
    atoms.displacement(clean)
    return None


def call_layer(v: Values) -> str | None:
    made = layer(v)
    if not isinstance(made, ar.TokenMap):
        return None
    out = made(torch.ones(2, WIDTH, dtype=torch.float64), None)
    return None if out.shape[0] == 2 and len(made.digest) == 64 else "unsound: another number of rows"


def call_threat(v: Values) -> str | None:
    made = threat(v)
    made = made if isinstance(made, ar.Threat) else ar.Problem(attention(v), tokens(v), made, "10%").threat
    again = ar.parse_threat(made.key)
    made.check(ar.TokenMeasure(torch.ones(3, WIDTH)))
    return None if again.key == made.key else f"unsound: {made.key} is read as {again.key}"


def call_goal(v: Values) -> str | None:
    made = goal(v)
    return None if isinstance(made, str) or (made.key and made.digest) else "unsound: a goal without a name"


def call_problem(v: Values) -> str | None:
    made = problem(v)
    return None if not isinstance(made, ar.Problem) or len(made.digest) == 64 else "unsound: no digest"


def call_certify(v: Values) -> str | None:
    return report_is_right(ar.certify(problem(v), methods=methods(v), seed=seed(v)))


def call_attack(v: Values) -> str | None:
    name = v.text(("default", "default", "token-moving", "mass-splitting", "token-duplication"))
    epsilon = v.number((None, None, 0.1, 1e3))
    return attack_is_right(ar.attack(problem(v), method=name, epsilon=epsilon, seed=seed(v), budget=budget(v)))


def call_attack_many(v: Values) -> str | None:
    asked = [problem(v) for _ in range(v.pick((0, 1, 2, 3)))]
    made = v.pick((asked, tuple(asked), iter(asked))) if v.wrong() else asked
    results = ar.attack_many(made, seed=seed(v), budget=budget(v), batch_size=v.number((1, 16)))
    if len(results) != len(asked):
        return f"lost row: {len(asked)} problems, {len(results)} rows"
    return next(filter(None, map(attack_is_right, results)), None)


def call_compare(v: Values) -> str | None:
    found = ar.compare(problem(v), seed=seed(v), methods=methods(v), budget=budget(v))
    if not found.gap >= 1.0 - ROUNDING:
        return f"unsound: gap {found.gap}"
    return attack_is_right(found.attack) or report_is_right(found.certification)


def call_token_radii(v: Values) -> str | None:
    asked, chosen = problem(v), v.number((None, None, (0,), [0, 0]))
    results = ar.token_radii(asked, tokens=chosen, epsilon=v.number((None, 0.5)), seed=seed(v), budget=budget(v))
    wanted = asked.clean.n if chosen is None else len(set(chosen)) if isinstance(chosen, list | tuple) else 1
    if len(results) != wanted:
        return f"lost row: {wanted} tokens, {len(results)} rows"
    return next(filter(None, map(attack_is_right, results)), None)


def call_bounds(v: Values) -> str | None:
    clean = ar.TokenMeasure(v.array(2, WIDTH)) if v.rarely(0.5) else v.pick((None, v.array(2, WIDTH)))
    asked = v.pick((None, ar.FrobeniusBall(), ar.PerTokenBall()))
    asked = threat(v) if v.wrong() else asked
    table = ar.bounds_table(
        layer(v), clean, n=v.number((None, 2, 5)), radius=v.number((None, 2.0)), epsilon=v.number((None, 0.1)),
        threat=asked, seed=seed(v), search=v.number((0, 0, 1)),
    )  # fmt: skip
    wrong = [row.name for row in (*table.bounds, *table.lower_bounds) if not row.value >= 0]
    return f"unsound: {wrong}" if wrong else None


def call_search(v: Values) -> str | None:
    found = ar.lipschitz_search(
        layer(v), v.array(2, WIDTH), v.number((0.1, 10.0)),
        threat=threat(v) if v.wrong() else None, masses=v.text(("equal", "free")), norm=v.text(("l2", "linf")),
        restarts=v.number((1,)), steps=v.number((1, 2)), seed=seed(v),
    )  # fmt: skip
    return None if found.lower.value >= 0 else f"unsound: {found.lower}"


def call_fixed_point(v: Values) -> str | None:
    asked, order, radius = layer(v), v.number((1, 2, math.inf)), v.number((1.0, 100.0))
    known = ar.contraction(asked, radius=radius, order=order)
    known.iterations(v.number((1e-9, 0.1)))
    ar.fixed_point(asked, tokens(v), radius=radius, order=order, tolerance=v.number((1e-6, 1e-2)))
    return None


CALLS = {
    "TokenMeasure": call_measure,
    "PerturbedTokens": call_perturbed,
    "layer": call_layer,
    "threat": call_threat,
    "goal": call_goal,
    "Problem": call_problem,
    "certify": call_certify,
    "attack": call_attack,
    "attack_many": call_attack_many,
    "compare": call_compare,
    "token_radii": call_token_radii,
    "bounds_table": call_bounds,
    "lipschitz_search": call_search,
    "fixed_point": call_fixed_point,
}
