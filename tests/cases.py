"""One table of problems that every test draws on: small layers with inputs, named after what is hard in them."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure


@dataclass(frozen=True, eq=False)
class Case:
    """One layer and one input.

    Args:
        name: Unique; says what is hard about it.
        attention: The layer.
        tokens: The input.
        constant: Whether the output does not depend on the tokens at all (W_v = 0), so that no attack can exist.
    """

    name: str
    attention: Attention
    tokens: TokenMeasure
    constant: bool = False

    @property
    def n(self) -> int:
        return self.tokens.n

    def __repr__(self) -> str:
        return f"Case({self.name})"


class _Draw:
    """Seeded Gaussian tensors in float64, one stream per case, so that a new case never changes an old one."""

    def __init__(self, name: str) -> None:
        self._generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % (2**62))

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def mass(self, n: int, *, spread: float = 1.0) -> Tensor:
        return torch.softmax(self(n, scale=spread), dim=0)


def _attention(
    draw: _Draw,
    *,
    heads: int = 2,
    width: int = 4,
    key: int = 3,
    value: int = 3,
    out: int | None = 4,
    biases: bool = False,
    strength: float = 1.0,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Attention:
    """A random layer whose scores have size about ``strength`` on tokens of unit variance."""
    into = strength**0.5 / math.sqrt(width)
    return Attention(
        w_q=draw(heads, width, key, scale=into),
        w_k=draw(heads, width, key, scale=into),
        w_v=draw(heads, width, value, scale=1 / math.sqrt(width)),
        b_q=draw(heads, key, scale=0.5) if biases else None,
        b_k=draw(heads, key, scale=0.5) if biases else None,
        b_v=draw(heads, value, scale=0.5) if biases else None,
        w_o=None if out is None else draw(heads, value, out, scale=1 / math.sqrt(heads * value)),
        b_o=draw(out, scale=0.5) if biases and out is not None else None,
        scale=scale,
        mask=mask,
        causal=causal,
    )


def _padding(n: int, hidden: int) -> Tensor:
    """Mask that hides the last tokens from every query, as a padded batch does."""
    mask = torch.zeros(n, n, dtype=torch.float64)
    mask[:, n - hidden :] = -math.inf
    return mask


def _band(n: int, reach: int) -> Tensor:
    """Mask of local attention: query i sees the keys within ``reach``."""
    index = torch.arange(n)
    far = (index[:, None] - index[None, :]).abs() > reach
    return torch.zeros(n, n, dtype=torch.float64).masked_fill(far, -math.inf)


def _zero(attention: Attention, *names: str) -> Attention:
    zeros: dict[str, Any] = {name: torch.zeros_like(getattr(attention, name)) for name in names}
    return replace(attention, **zeros)


def _build() -> Iterator[Case]:
    def case(name: str, attention: Attention, points: Tensor, mass: Tensor | None = None, **flags: bool) -> Case:
        tokens = TokenMeasure(points) if mass is None else TokenMeasure(points, mass)
        return Case(name, attention, tokens, **flags)

    # Plain layers over heads, widths and lengths.
    sizes = ((1, 2, 2), (1, 5, 4), (2, 3, 4), (3, 8, 6), (4, 16, 8), (8, 12, 8), (12, 6, 12), (2, 32, 4))
    for heads, n, width in sizes:
        draw = _Draw(name := f"plain-h{heads}-n{n}-d{width}")
        yield case(name, _attention(draw, heads=heads, width=width), draw(n, width))

    # One token: the layer is affine, whatever the scores.
    draw = _Draw(name := "single-token")
    yield case(name, _attention(draw, heads=3), draw(1, 4))
    draw = _Draw(name := "single-token-biases")
    yield case(name, _attention(draw, biases=True), draw(1, 4))

    # Widths that do not agree with each other; heads concatenated.
    draw = _Draw(name := "key-wider-than-value")
    yield case(name, _attention(draw, key=7, value=2, out=3), draw(6, 4))
    draw = _Draw(name := "value-wider-than-key")
    yield case(name, _attention(draw, key=1, value=6, out=5), draw(6, 4))
    draw = _Draw(name := "concatenated")
    yield case(name, _attention(draw, heads=3, out=None), draw(7, 4))
    draw = _Draw(name := "concatenated-biases-one-head")
    yield case(name, _attention(draw, heads=1, out=None, biases=True), draw(4, 4))
    draw = _Draw(name := "narrow-width-1")
    yield case(name, _attention(draw, heads=1, width=1, key=1, value=1, out=1), draw(5, 1))
    draw = _Draw(name := "wide-tokens")
    yield case(name, _attention(draw, width=24, key=4, value=4, out=8), draw(4, 24))

    # Biases and own scales.
    draw = _Draw(name := "biases")
    yield case(name, _attention(draw, biases=True), draw(6, 4))
    draw = _Draw(name := "biases-12-heads")
    yield case(name, _attention(draw, heads=12, width=12, key=2, value=2, out=12, biases=True), draw(9, 12))
    draw = _Draw(name := "scale-1")
    yield case(name, _attention(draw, scale=1.0), draw(6, 4))
    draw = _Draw(name := "scale-negative")
    yield case(name, _attention(draw, scale=-0.7, biases=True), draw(5, 4))

    # Saturated and tied softmax.
    draw = _Draw(name := "saturated")
    yield case(name, _attention(draw, strength=60.0), draw(6, 4))
    draw = _Draw(name := "saturated-concatenated-masses")
    yield case(name, _attention(draw, strength=40.0, out=None), draw(5, 4), draw.mass(5))
    draw = _Draw(name := "equal-tokens")
    yield case(name, _attention(draw, biases=True), draw(1, 4).expand(5, 4).clone())
    draw = _Draw(name := "two-clusters")
    yield case(name, _attention(draw), torch.cat([draw(1, 4).expand(4, 4), draw(1, 4).expand(3, 4)]))
    draw = _Draw(name := "near-tie")
    yield case(name, _attention(draw, strength=30.0), draw(1, 4).expand(6, 4) + draw(6, 4, scale=1e-4))
    draw = _Draw(name := "large-norms")
    yield case(name, _attention(draw, strength=0.01), draw(6, 4, scale=50.0))
    draw = _Draw(name := "tiny-norms")
    yield case(name, _attention(draw, biases=True), draw(6, 4, scale=1e-3))
    draw = _Draw(name := "one-outlier")
    yield case(name, _attention(draw), torch.cat([draw(5, 4), draw(1, 4, scale=20.0)]))
    draw = _Draw(name := "common-offset")
    yield case(name, _attention(draw), draw(1, 4, scale=5.0) + draw(7, 4, scale=0.3))

    # Degenerate weights.
    draw = _Draw(name := "uniform-w_q-zero")
    yield case(name, _zero(_attention(draw), "w_q"), draw(6, 4))
    draw = _Draw(name := "uniform-w_q-zero-masses")
    yield case(name, _zero(_attention(draw, biases=True), "w_q", "b_q"), draw(6, 4), draw.mass(6))
    draw = _Draw(name := "key-offset-only-w_q-zero")
    yield case(name, _zero(_attention(draw, biases=True), "w_q"), draw(6, 4))
    draw = _Draw(name := "constant-w_v-zero")
    yield case(name, _zero(_attention(draw, biases=True), "w_v"), draw(5, 4), constant=True)
    draw = _Draw(name := "low-rank")
    yield case(name, _attention(draw, heads=4, width=8, key=1, value=1, out=8), draw(6, 8))
    draw = _Draw(name := "tied-query-key")
    tied = _attention(draw, strength=3.0)
    yield case(name, Attention(w_q=tied.w_q, w_k=tied.w_q, w_v=tied.w_v, w_o=tied.w_o), draw(6, 4))

    # Masks.
    draw = _Draw(name := "causal")
    yield case(name, _attention(draw, causal=True), draw(7, 4))
    draw = _Draw(name := "causal-biases-strong")
    yield case(name, _attention(draw, causal=True, biases=True, strength=10.0), draw(10, 4))
    draw = _Draw(name := "causal-masses")
    yield case(name, _attention(draw, causal=True), draw(5, 4), draw.mass(5))
    draw = _Draw(name := "padding")
    yield case(name, _attention(draw, mask=_padding(8, 3), biases=True), draw(8, 4))
    draw = _Draw(name := "padding-all-but-one")
    yield case(name, _attention(draw, mask=_padding(5, 4)), draw(5, 4))
    draw = _Draw(name := "padding-causal")
    yield case(name, _attention(draw, mask=_padding(6, 2), causal=True), draw(6, 4))
    draw = _Draw(name := "finite-mask")
    yield case(name, _attention(draw, mask=draw(6, 6, scale=2.0)), draw(6, 4))
    draw = _Draw(name := "finite-mask-masses")
    yield case(name, _attention(draw, mask=draw(6, 6, scale=2.0), biases=True), draw(6, 4), draw.mass(6))
    draw = _Draw(name := "soft-padding")
    yield case(name, _attention(draw, mask=_padding(6, 2).clamp_min(-20.0)), draw(6, 4))
    draw = _Draw(name := "band")
    yield case(name, _attention(draw, mask=_band(9, 2)), draw(9, 4))
    draw = _Draw(name := "self-only")
    yield case(name, _attention(draw, mask=_band(4, 0)), draw(4, 4))

    # Masses.
    draw = _Draw(name := "masses")
    yield case(name, _attention(draw), draw(7, 4), draw.mass(7))
    draw = _Draw(name := "masses-one-dominates")
    yield case(name, _attention(draw, biases=True), draw(6, 4), draw.mass(6, spread=4.0))
    draw = _Draw(name := "masses-long")
    yield case(name, _attention(draw, heads=4, width=8, key=2, value=2, out=8), draw(24, 8), draw.mass(24))


TELLING = (
    "plain-h1-n5-d4",  # one head
    "plain-h12-n6-d12",  # many heads
    "single-token-biases",  # n = 1
    "key-wider-than-value",  # widths that differ
    "concatenated-biases-one-head",  # no output projection
    "scale-negative",  # own scale, biases
    "saturated-concatenated-masses",  # a softmax without slope
    "equal-tokens",
    "large-norms",
    "tiny-norms",
    "constant-w_v-zero",
    "causal-masses",
    "padding",  # keys that nobody sees
    "finite-mask-masses",
)


LARGE = 8
"""Cases with more tokens take too long for a default run of every certificate against every attack."""


@cache
def _all_cases() -> tuple[Case, ...]:
    built = tuple(_build())
    names = [case.name for case in built]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise AssertionError(f"case names repeat: {sorted(repeated)}")
    return built


def cases(*, max_n: int | None = None) -> tuple[Case, ...]:
    """Every case (or those of at most ``max_n`` tokens), always in the same order."""
    return tuple(case for case in _all_cases() if max_n is None or case.n <= max_n)


def telling_cases() -> tuple[Case, ...]:
    """A case for each thing that sets an algebraic claim apart; ``cases()`` is for what tries to break a bound."""
    return tuple(case_named(name) for name in TELLING)


def telling_first(chosen: Iterable[Case]) -> list[Any]:
    """Parameters of a test that takes seconds a case: the telling ones of at most 8 tokens by default, others slow."""
    usual = {case.name for case in telling_cases() if case.n <= LARGE}
    return [pytest.param(c, id=c.name, marks=[] if c.name in usual else [pytest.mark.slow]) for c in chosen]


def case_named(name: str) -> Case:
    """One case by its name."""
    return next(case for case in _all_cases() if case.name == name)


def threats(case: Case) -> tuple[MoveThreat, ...]:
    """One threat of every shape at this case's length: whole, subset, one known token, any token; each token norm."""
    last = case.n - 1
    some = tuple(sorted({0, case.n // 2}))
    return (
        FrobeniusBall(),
        FrobeniusBall(tokens=(last,)),
        FrobeniusBall(tokens=some),
        PerTokenBall(),
        PerTokenBall(norm="linf"),
        PerTokenBall(norm="l1", tokens=some),
        AnyToken(),
        AnyToken(tokens=some),
    )


def goals(case: Case) -> tuple[Goal, ...]:
    """One goal of every shape that holds at the clean input: displacements and margins, pooled each way."""
    draw = _Draw("goal-" + case.name)
    output = case.attention(case.tokens.points, None if case.tokens.uniform else case.tokens.mass)
    row = case.n - 1
    listed: list[Goal] = [
        Displacement(0.1),
        Displacement(0.05, pool="mean"),
        Displacement(0.2, pool=row),
        Margin(weight=draw(2, output.shape[-1]), bias=draw(2), pool="mean"),
        Margin(weight=draw(4, output.shape[-1]), pool=row),
    ]
    if bool(torch.linalg.vector_norm(output) > 0):
        listed.insert(1, Displacement(0.01, relative=True))
    return tuple(listed)


def problems(case: Case, *, every_pair: bool = False) -> Iterator[Problem]:
    """Threats and goals of a case combined.

    By default every threat and every goal occurs at least once and the pairing changes from case to case (about eight
    problems a case); ``every_pair`` gives the full product.
    """
    all_threats, all_goals = threats(case), goals(case)
    if every_pair:
        for threat in all_threats:
            for goal in all_goals:
                yield Problem(case.attention, case.tokens, threat, goal)
        return
    shift = [c.name for c in _all_cases()].index(case.name)
    for index, threat in enumerate(all_threats):
        yield Problem(case.attention, case.tokens, threat, all_goals[(index + shift) % len(all_goals)])
