"""Every Lipschitz upper bound as a claim that either gives a value or says why it does not apply."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from attnrobust.certify import METHODS, CertificateMethod
from attnrobust.certify.closed_form import castin2024_mean_field as measures
from attnrobust.certify.closed_form import castin2024_smooth as ball
from attnrobust.certify.closed_form import cosine_lipschitz as cosine
from attnrobust.certify.closed_form import dasoulas2021_lipschitznorm as lipschitznorm
from attnrobust.certify.closed_form import kim2021_l2 as kim
from attnrobust.certify.closed_form import sigmoid_ball as sigmoid
from attnrobust.errors import InputError
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.kernel import KernelAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.lipschitz.at_an_input import diameter_norm_upper, local_norm_upper, softmax_norm_upper
from attnrobust.lipschitz.question import Question, derivative
from attnrobust.lipschitz.records import Quantity
from attnrobust.numerics.linear_map import largest_singular_value_upper, scale_rows, scale_tokens
from attnrobust.numerics.sides import Upper, round_up
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure

PAGE = "docs/certificates-literature.md"
BALL_REGION = "all n tokens of norm <= R"
MEASURES_REGION = "token measures on the ball of radius R"
SPACE_REGION = "all of space"
AT_X = "the input X alone"
LAYER = {
    Attention: "dot-product attention",
    L2Attention: "L2 attention",
    CosineAttention: "scaled cosine attention",
    SigmoidAttention: "sigmoid attention",
    LipschitzNormAttention: "LipschitzNorm attention",
    KernelAttention: "kernel attention with stated constants",
}
ORDERS = ((Quantity.W1, 1.0), (Quantity.W2, 2.0), (Quantity.W_INF, math.inf))
SATURATED = 1e3
"""Size, in units at which the spread of L2 attention reaches its global limit, that stands for all of space."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A bound that may apply.

    Args:
        name: Short name.
        quantity: What is bounded.
        region: On what set.
        conditions: When it holds.
        reference: Paper and form, or "derived" with the place of the proof.
        value: Gives the bound; InputError says why it does not apply.
        kind: How far it is proved, where nothing random is behind the value.
    """

    name: str
    quantity: Quantity
    region: str
    conditions: str
    reference: str
    value: Callable[[Question], Upper]
    kind: Kind = Kind.FLOAT64


def claims(question: Question) -> Iterator[Claim]:
    """Every claim, whatever the layer."""
    yield from _dot_product_ball()
    yield from _other_layers()
    yield from _measures()
    yield from _local(question)
    yield from (_finite(method) for method in METHODS if any(issubclass(t, MoveThreat) for t in method.threats))


# ---- dot-product attention on a ball -------------------------------------------------------------------------------


def _dot_product_ball() -> Iterator[Claim]:
    any_mask = "dot-product attention; every mask, query bias, all masses"
    for form, source in (
        ("reported", f"{ball.REFERENCE}; form reported from the paper, bias extension derived"),
        ("derived", f"derived ({PAGE}, section 2)"),
    ):
        for quantity, pool in ((Quantity.BALL, "all"), (Quantity.MEAN, "mean")):
            yield Claim(
                name=f"castin2024-{form}",
                quantity=quantity,
                region=BALL_REGION,
                conditions=any_mask,
                reference=source,
                value=partial(_ball, form=form, pool=pool, threat=FrobeniusBall()),
            )
    yield Claim(
        name="castin2024-derived",
        quantity=Quantity.TOKEN,
        region=BALL_REGION,
        conditions=any_mask + "; no n in it",
        reference=f"derived ({PAGE}, section 2)",
        # of one row and of the mean: the formula is the same
        value=partial(_ball, form="derived", pool="mean", threat=PerTokenBall()),
    )
    yield Claim(
        name="castin2024-large-radius",
        quantity=Quantity.LIMIT,
        region="the ray through X",
        conditions="no query bias; every query has one best key",
        reference=f"{ball.REFERENCE}; proof in {PAGE}, section 2",
        value=lambda q: ball.large_radius_limit(_layer(q, Attention), _clean(q).points),
    )
    yield _never(
        "castin2024-code-estimate", Attention, "not a bound: it gives 1.414 where the norm is 100.01", Quantity.LOCAL
    )
    yield _never(
        "kim2021-unbounded", Attention, "dot-product attention is not Lipschitz on all of space", Quantity.BALL
    )


def _ball(question: Question, *, form: str, pool: str, threat: MoveThreat) -> Upper:
    layer = _layer(question, Attention)
    return ball.ball_constant(layer, question.n, question.radius, form=form, pool=pool, threat=threat)


# ---- layers that are Lipschitz on all of space ---------------------------------------------------------------------


def _other_layers() -> Iterator[Claim]:
    for method, layer, region in (
        (kim.KimL2(), L2Attention, SPACE_REGION),
        (cosine.CosineLipschitz(), CosineAttention, SPACE_REGION),
        (lipschitznorm.LipschitzNormGlobal(), LipschitzNormAttention, SPACE_REGION),
        (sigmoid.SigmoidBall(), SigmoidAttention, BALL_REGION),
    ):
        for quantity in (Quantity.BALL, Quantity.MEAN, Quantity.TOKEN):
            yield Claim(
                name=method.name,
                quantity=quantity,
                region=region,
                conditions=f"{LAYER[layer]}; equal masses",
                reference=method.reference,
                value=partial(_constant, method=method, layer=layer, quantity=quantity),
            )
    for quantity, norm in ((Quantity.BALL, "l2"), (Quantity.ENTRY, "linf")):
        yield Claim(
            name="kim2021-l2-reported",
            quantity=quantity,
            region=SPACE_REGION,
            conditions="L2 attention; equal masses" + ("; exponent repaired" if norm == "l2" else ""),
            reference=f"{kim.REFERENCE}; form reported from the paper",
            value=lambda q, norm=norm: kim.reported_constant(_layer(q, L2Attention), q.n, norm=norm),  # type: ignore[misc]
        )
    yield _never(
        "kim2021-l2-printed-exponent", L2Attention, "not a bound: it gives 682.8 where the norm is 10^4", Quantity.BALL
    )
    for form in ("nair", "lipsformer"):
        yield Claim(
            name=f"cosine-reported-{form}",
            quantity=Quantity.BALL,
            region=SPACE_REGION,
            conditions="scaled cosine attention, one head without output projection",
            reference="Nair 2025 (arXiv 2510.23012), Theorem 2, which also states the form of Qi et al. 2023",
            value=lambda q, form=form: cosine.reported_constant(_layer(q, CosineAttention), q.n, form=form),  # type: ignore[misc]
        )


def _constant(question: Question, *, method: CertificateMethod, layer: type, quantity: Quantity) -> Upper:
    """A certificate's slope where it is the same for every input: of its usage at one size around any input."""
    network: TokenMap = _layer(question, layer)
    size, points = 1.0, torch.ones(question.n, network.width, dtype=torch.float64, device=question.device)
    if isinstance(network, SigmoidAttention):  # a ball around 0 of radius R
        size, points = question.radius, torch.zeros_like(points)
    if isinstance(network, L2Attention):
        slopes = network.factor**0.5 * torch.linalg.matrix_norm(network.w_q, 2)
        spread = max(kim.spread_bound(question.n - 1.0), 1.0)
        size = SATURATED * math.sqrt(spread) / float(slopes[slopes > 0].min()) if bool((slopes > 0).any()) else 1.0
    threat: MoveThreat = PerTokenBall() if quantity is Quantity.TOKEN else FrobeniusBall()
    pool = {Quantity.BALL: "all", Quantity.MEAN: "mean"}.get(quantity, 0)
    problem = Problem(network, TokenMeasure(points), threat, Displacement(1.0, pool=pool))  # type: ignore[arg-type]
    return _per_size(method.prepare(problem, seed=question.seed).usage(size), size)


# ---- token measures ------------------------------------------------------------------------------------------------


def _measures() -> Iterator[Claim]:
    for quantity, order in ORDERS:
        for form, source in (
            ("reported", f"{ball.REFERENCE}; form reported from the paper"),
            ("derived", f"derived ({PAGE}, section 9)"),
        ):
            yield Claim(
                name=f"castin2024-measures-{form}",
                quantity=quantity,
                region=MEASURES_REGION,
                conditions="dot-product attention without mask; moving, splitting, duplication, any masses",
                reference=source,
                value=partial(_mean_field, order=order, form=form),
            )
        yield Claim(
            name="sigmoid-measures",
            quantity=quantity,
            region=MEASURES_REGION,
            conditions="sigmoid attention; any masses; no exponential",
            reference=f"derived ({PAGE}, section 14)",
            value=lambda q: sigmoid.mean_field_constant(_layer(q, SigmoidAttention), q.radius),
        )
        yield Claim(
            name="kernel-measures",
            quantity=quantity,
            region="token measures on the set E of the kernel's constants",
            conditions="kernel attention; as true as the constants that were stated",
            reference=f"derived ({PAGE}, section 9), in place of Vuckovic et al. 2020 (arXiv 2007.02876)",
            value=partial(_kernel, order=order),
        )
    yield Claim(
        name="castin2024-measures-causal",
        quantity=Quantity.D2,
        region=MEASURES_REGION + ", equal position marginals",
        conditions="causal dot-product attention without additive mask",
        reference=f"derived ({PAGE}, section 10)",
        value=lambda q: measures.masked_constant(_layer(q, Attention), q.radius),
    )


def _mean_field(question: Question, *, order: float, form: str) -> Upper:
    return measures.mean_field_constant(_layer(question, Attention), question.radius, order=order, form=form)


def _kernel(question: Question, *, order: float) -> Upper:
    return measures.kernel_constant(_layer(question, KernelAttention), order=order)


# ---- at the input and around it ------------------------------------------------------------------------------------


def _local(question: Question) -> Iterator[Claim]:
    yield Claim(
        name="singular-value",
        quantity=Quantity.LOCAL,
        region=AT_X,
        conditions="every differentiable layer",
        reference="decomposition or Lanczos bound (docs/spectral-norms.md)",
        value=lambda q: largest_singular_value_upper(derivative(q.network, _clean(q)), seed=q.seed),
    )
    for name, bound, section in (
        ("covariances", local_norm_upper, 6),
        ("softmax-norm", softmax_norm_upper, 7),
        ("diameter", diameter_norm_upper, 7),
    ):
        yield Claim(
            name=f"local-{name}",
            quantity=Quantity.LOCAL,
            region=AT_X,
            conditions="dot-product attention; every mask, all masses",
            reference=f"derived ({PAGE}, section {section})",
            value=lambda q, bound=bound: bound(_jacobian(q)),  # type: ignore[misc]
        )
    if question.clean is None or question.clean.uniform:
        return
    yield Claim(
        name="singular-value",
        quantity=Quantity.LOCAL_MASS,
        region=AT_X,
        conditions="every differentiable layer",
        reference="decomposition or Lanczos bound (docs/spectral-norms.md)",
        value=_weighted,
    )
    yield Claim(
        name="local-covariances",
        quantity=Quantity.LOCAL_MASS,
        region=AT_X,
        conditions="dot-product attention; every mask",
        reference=f"derived ({PAGE}, section 6)",
        value=lambda q: local_norm_upper(_jacobian(q), mass=_clean(q).mass),
    )


def _weighted(question: Question) -> Upper:
    clean = _clean(question)
    root = clean.mass.sqrt()
    linear = scale_rows(scale_tokens(derivative(question.network, clean), 1.0 / root), root)
    return largest_singular_value_upper(linear, seed=question.seed)


def _jacobian(question: Question) -> AttentionJacobian:
    layer, clean = _layer(question, Attention), _clean(question)
    return AttentionJacobian(layer, clean.points, None if clean.uniform else clean.mass)


def _finite(method: CertificateMethod) -> Claim:
    return Claim(
        name=method.name,
        quantity=Quantity.FINITE,
        region=method.region,
        conditions="moves of at most epsilon around X",
        reference=method.reference,
        value=partial(_usage, method=method),
        kind=method.kind,
    )


def _usage(question: Question, *, method: CertificateMethod) -> Upper:
    _clean(question)
    reason = method.refuses(question.problem)
    if reason is not None:
        raise InputError(reason)
    assert question.epsilon is not None  # noqa: S101 - there is one where there is an input
    bound = method.prepare(question.problem, seed=question.seed)
    upper = _per_size(bound.usage(question.epsilon), question.epsilon)
    return Upper(upper.value, bound.failure_probability)


# ---- shared --------------------------------------------------------------------------------------------------------

L = TypeVar("L")


def _layer(question: Question, kind: type[L]) -> L:
    if not isinstance(question.network, kind):
        raise InputError(f"it speaks about {LAYER[kind]}, not {type(question.network).__name__}")
    return question.network


def _clean(question: Question) -> TokenMeasure:
    if question.clean is None:
        raise InputError("it needs an input X; give tokens or texts")
    return question.clean


def _never(name: str, layer: type, why: str, quantity: Quantity) -> Claim:
    def refuse(question: Question) -> Upper:
        _layer(question, layer)
        raise InputError(f"{why} ({PAGE}, section 11)" if "not a bound" in why else f"{why} (Kim et al. 2021)")

    return Claim(name=name, quantity=quantity, region="", conditions="", reference="", value=refuse)


def _per_size(usage: Upper, size: float) -> Upper:
    return Upper(round_up(usage.value / size), usage.failure_probability)
