"""What the public functions beside ``compare``, ``certify`` and ``attack`` return, and foolbox's attacks one by one."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import torch

import attnrobust as ar
from benchmarks.recorded_answers import attack_record, fingerprint, number, recorded
from benchmarks.recorded_layers import OTHERS, Draw, attention, gauss, margin
from benchmarks.recorded_questions import SMALL

FOOLBOX = (
    "L1PGD", "L2PGD", "LinfPGD", "L1AdamPGD", "L2AdamPGD", "LinfAdamPGD", "L2BasicIterative", "LinfBasicIterative",
    "L2AdamBasicIterative", "L2MomentumIterativeFastGradientMethod", "L2FastGradient", "LinfFastGradient",
    "SparseL1Descent", "L2AdditiveGaussianNoise", "L2RepeatedAdditiveUniformNoise", "LinfRepeatedAdditiveUniformNoise",
    "DDN", "L1FMN", "LInfFMN", "L2DeepFool", "LinfDeepFool", "L2CarliniWagner", "EAD", "L2BrendelBethge", "NoSuch",
)  # fmt: skip
"""Attacks of foolbox by their names here; the last two are refused."""


def function_records(match: str = "") -> dict[str, Any]:
    """The public functions beside ``compare``, ``certify`` and ``attack``; those whose name holds the text."""
    works = {**_foolbox(), **_batches(), **_bounds(), **_searches()}
    return {name: recorded(work) for name, work in works.items() if match in name}


def _foolbox() -> dict[str, Callable[[], Any]]:
    draw = Draw("foolbox")
    layer = attention(draw, heads=2, d=3)
    clean = ar.TokenMeasure(draw(3, 3))
    budget = ar.AttackBudget(restarts=1, steps=8)
    displaced = ar.Problem(layer, clean, ar.FrobeniusBall(), ar.Displacement(0.1, relative=True))
    read = ar.Problem(layer, clean, ar.PerTokenBall("linf"), margin(layer, "foolbox"))

    def work(name: str, problem: ar.Problem, epsilon: float | None) -> Callable[[], Any]:
        return lambda: attack_record(ar.attack(problem, method=f"foolbox:{name}", epsilon=epsilon, budget=budget))

    found = {f"foolbox/{name}": work(name, displaced, None) for name in FOOLBOX}
    found |= {f"foolbox/{name}/margin": work(name, read, None) for name in ("LinfPGD", "DDN", "LInfFMN", "L2PGD")}
    return found | {
        f"foolbox/{name}/fixed size": work(name, displaced, 0.1) for name in ("L2PGD", "DDN", "L2FastGradient")
    }


def _batches() -> dict[str, Callable[[], Any]]:
    draw = Draw("batches")
    layer = attention(draw, heads=2)
    goal = ar.Displacement(0.1, relative=True)
    problems = [ar.Problem(layer, ar.TokenMeasure(draw(n, 4)), ar.FrobeniusBall(), goal) for n in (3, 3, 2, 3, 1)]

    def many(**options: Any) -> Any:
        return [attack_record(result) for result in ar.attack_many(problems, budget=SMALL, **options)]

    def tokens(**options: Any) -> Any:
        return [attack_record(result) for result in ar.token_radii(problems[0], budget=SMALL, **options)]

    return {
        "attack_many": many,
        "attack_many/batches of two": lambda: many(batch_size=2, seed=3),
        "attack_many/fixed size": lambda: many(epsilon=0.1),
        "token_radii": tokens,
        "token_radii/some": lambda: tokens(tokens=(0, 2), seed=1),
        "token_radii/fixed size": lambda: tokens(epsilon=0.1),
    }


def _layers() -> dict[str, ar.TokenMap]:
    draw = Draw("bounds")
    layers: dict[str, ar.TokenMap] = {
        "attention": attention(draw, heads=2, d=3, biases=True),
        "one head": attention(draw, d=3, k=2, v=2, out=None),
        "causal": attention(draw, heads=2, d=3, causal=True),
    }
    layers |= {kind: build(draw, 2, 3) for kind, build in OTHERS.items()}
    layers["cosine one head"] = OTHERS["cosine"](draw, 1, 3)
    hint = typing.get_type_hints(ar.KernelAttention)["constants"]
    constants: Any = next(kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind))
    known = constants(diameter=12.0, oscillation=72.0, query_slope=12.0, key_slope=12.0)
    layers["kernel with constants"] = ar.KernelAttention(gauss, "gauss", draw(3, 2), known)
    return layers


def _bounds() -> dict[str, Callable[[], Any]]:
    draw = Draw("bounds input")
    clean = ar.TokenMeasure(draw(3, 3))
    weighed = ar.TokenMeasure(clean.points, draw.mass(3))

    def work(layer: ar.TokenMap, measure: ar.TokenMeasure | None, **options: Any) -> Callable[[], Any]:
        return lambda: ar.bounds_table(layer, measure, search=4, **options).as_dict()

    found = {f"bounds_table/{name}": work(layer, clean) for name, layer in _layers().items()}
    layer = _layers()["attention"]
    found["bounds_table/masses"] = work(layer, weighed)
    found["bounds_table/no input"] = work(layer, None, n=5, radius=1.5)
    found["bounds_table/per-token"] = work(layer, clean, threat=ar.PerTokenBall(), epsilon=0.2, radius=4.0)
    return found


def _searches() -> dict[str, Callable[[], Any]]:
    layers = _layers()
    center = torch.zeros(3, 3, dtype=torch.float64)

    def search(kind: str, **options: Any) -> Callable[[], Any]:
        def work() -> Any:
            found = ar.lipschitz_search(layers[kind], center, 1.5, restarts=2, steps=8, **options)
            where = (fingerprint(found.tokens.points), fingerprint(found.tokens.mass))
            values = {"start": found.start, "evaluations": found.evaluations, "point": list(where)}
            return number("lower", found.lower.value) | values

        return work

    found = {f"lipschitz_search/{kind}": search(kind) for kind in ("attention", "l2", "sigmoid")}
    found["lipschitz_search/masses"] = search("one head", masses="free")
    found["lipschitz_search/max-token"] = search("one head", norm="max-token", planted=False, seed=2)
    found["lipschitz_search/linf"] = search("one head", norm="linf", threat=ar.FrobeniusBall())
    return found
