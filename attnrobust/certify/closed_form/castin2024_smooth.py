"""Lipschitz bounds of dot-product attention for tokens in a ball (Castin, Ablin, Peyre 2024; and a sharper one)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.claims import BALL_REGION, PAGE, Asked, Claim, Quantity, input_of, refuted
from attnrobust.certify.method import ATTENTION_FEATURES, CertificateMethod
from attnrobust.certify.shared.change import Change, ChangeBound, smallest
from attnrobust.certify.shared.head_sizes import HeadSizes, ValueView, output_norms, value_views
from attnrobust.certify.shared.reach import Reach, RowSums, attention_of, visible_tokens
from attnrobust.errors import InputError
from attnrobust.goals import Displacement
from attnrobust.layers.attention import Attention
from attnrobust.numerics.rounding import FORMULA
from attnrobust.numerics.sides import Upper, round_up
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure

REFERENCE = "Castin, Ablin, Peyre, How smooth is attention?, ICML 2024 (arXiv 2312.14820)"


@dataclass(frozen=True, eq=False)
class _Layer:
    """What both bounds need; ``radius0`` is the largest norm of a clean token."""

    sizes: HeadSizes
    views: tuple[ValueView, ...]
    rows: RowSums
    n: int
    radius0: float

    @classmethod
    def of(cls, problem: Problem) -> "_Layer":
        layer, points = attention_of(problem), problem.clean.points
        visible = visible_tokens(layer, problem.clean.n)
        return cls(
            sizes=HeadSizes.of(layer, points, visible),
            views=value_views(layer, points, visible, problem.resolved),
            rows=RowSums(problem.resolved.weights, Reach.of(problem, visible)),
            n=problem.clean.n,
            radius0=float(torch.linalg.vector_norm(points, dim=-1).max()),
        )

    def slopes(self, radius: float) -> tuple[Float[Tensor, "h"], Float[Tensor, "h"]]:
        """Query and key constants on tokens of norm <= radius: ``||B|| R^2`` and ``R (||B|| R + |offset|)``."""
        bilinear = self.sizes.bilinear * radius
        return bilinear * radius, radius * (bilinear + self.sizes.offset)


def _reported_slope(layer: _Layer, radius: float) -> Float[Tensor, "c"]:
    query, key = layer.slopes(radius)
    heads = (3.0 * (query**2 + 4 * layer.n * key**2 + layer.n)).sqrt()
    pooled = 1.0 if layer.rows.pool is None else float(torch.linalg.vector_norm(layer.rows.pool))
    return smallest([pooled * layer.rows.reach.frobenius * view.total(view.norms * heads) for view in layer.views])


def _derived_slope(layer: _Layer, radius: float) -> Float[Tensor, "c"]:
    rows = layer.rows
    query, key = layer.slopes(radius)
    each = query.new_ones(layer.n)
    heads = rows.reach.attended * (1.0 + key) * rows.steady(each) + query * rows.moved(each)
    return smallest([view.total(view.norms * heads) for view in layer.views])


def _change(layer: _Layer, slope: Callable[[_Layer, float], Float[Tensor, "c"]]) -> Change:
    """Slope on the ball that holds every token of the threat's set, times the size."""
    return lambda size: size * slope(layer, layer.radius0 + layer.rows.reach.token * size)


class CastinReported(CertificateMethod):
    """The sqrt(n) bound of Castin et al. on the ball, in the form reported from the paper.

    One head, tokens of norm at most R: ``Lip <= sqrt(3) ||w_v|| (a^2 + 4 n a_c^2 + n)^{1/2}`` in Frobenius norms, with
    ``a = ||B|| R^2``, ``a_c = R (||B|| R + |scale w_k b_q|)``; without query bias ``a_c = a``, the reported form.
    Heads: the smaller of the sum and the stacked form. Valid for every mask and all token masses.
    """

    name = "castin2024-reported"
    reference = f"{REFERENCE}; form reported from the paper, bias extension derived"
    region = "all tokens in the centred ball of the clean radius plus the threat's reach"
    layers = (Attention,)
    features = ATTENTION_FEATURES

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        return ChangeBound(problem, _change(_Layer.of(problem), _reported_slope))


class CastinDerived(CertificateMethod):
    """The ball bound with each term bounded sharply.

    One head: ``Lip <= ||w_v|| [ sqrt(n) (1 + a_c) + a ]`` in Frobenius norms; one row, a mean of rows and the largest
    token move have no sqrt(n): ``||w_v|| (1 + a_c + a)``. Never larger than the reported form where both hold.
    """

    name = "castin2024-derived"
    reference = "derived (docs/certificates-literature.md, section 2), after Castin et al. 2024"
    region = CastinReported.region
    layers = (Attention,)
    features = ATTENTION_FEATURES

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        return ChangeBound(problem, _change(_Layer.of(problem), _derived_slope))


def ball_constant(
    attention: Attention,
    n: int,
    radius: float,
    *,
    form: str = "derived",
    threat: MoveThreat | None = None,
    pool: str = "all",
) -> Upper:
    """Lipschitz constant on ``{all n tokens of norm <= radius}``: output change per unit of the threat's distance.

    Args:
        attention: The layer.
        n: Token count.
        radius: R, the ball's radius around 0.
        form: "derived" or "reported".
        threat: Norm of the input; None means Frobenius over all tokens.
        pool: "all" (Frobenius norm of the output) or "mean".

    Returns:
        An upper bound, valid for all token masses.

    Raises:
        InputError: A radius that is negative or a form that does not exist.
    """
    if form not in ("derived", "reported") or not radius >= 0 or pool not in ("all", "mean"):
        raise InputError("give a radius >= 0, form 'derived' or 'reported', and pool 'all' or 'mean'")
    clean = TokenMeasure(torch.zeros(n, attention.width, dtype=torch.float64, device=attention.device))
    goal = Displacement(1.0, pool="mean" if pool == "mean" else "all")
    layer = _Layer.of(Problem(attention, clean, threat or FrobeniusBall(), goal))
    slope = _derived_slope if form == "derived" else _reported_slope
    return Upper(round_up(float(slope(layer, radius)), relative=FORMULA))


def large_radius_limit(attention: Attention, points: Float[Tensor, "n d"]) -> Upper:
    """Upper bound of ``lim ||D_{sX} f||_2`` as s -> infinity, for tokens whose rows of scores have one largest entry.

    Attention becomes hard: every row attends to its best key alone, covariances vanish, and the limit is at most
    ``||M|| sqrt(max_j #{i : j is the best key of i})`` per head. Without query bias only; it is a limit, not a bound at
    any finite s, where the norm may be far larger.

    Args:
        attention: The layer, without query bias.
        points: Token directions X (n, d).

    Raises:
        InputError: A query bias, or a row whose two best keys tie.

    References:
        Castin, Ablin, Peyre 2024 (large-radius regime); proof in docs/certificates-literature.md, section 2.
    """
    if bool((attention.key_offset != 0).any()):
        raise InputError("the large-radius limit is for layers without query bias")
    zero = torch.zeros_like(points)
    visible = torch.isfinite(attention.scores(zero))
    scores = torch.einsum("nd,hde,me->hnm", points, attention.bilinear, points).masked_fill(~visible, -torch.inf)
    best = scores.topk(min(2, scores.shape[-1]), dim=-1).values
    if scores.shape[-1] > 1 and bool((best[..., 0] - best[..., 1] <= 1e-9 * best[..., 0].abs()).any()):
        raise InputError("two keys tie for a query; the limit is for tokens in general position")
    chosen = torch.nn.functional.one_hot(scores.argmax(dim=-1), scores.shape[-1])
    heads = chosen.sum(dim=-2).amax(dim=-1).to(points.dtype).sqrt()
    return Upper(round_up(float((output_norms(attention) * heads).sum()), relative=FORMULA))


def _ball(quantity: Quantity, form: str, reference: str, condition: str = "") -> Claim:
    # of one row and of the mean: the formula is the same
    pool, threat = "all" if quantity is Quantity.BALL else "mean", FrobeniusBall()
    return Claim(
        name=f"castin2024-{form}",
        quantity=quantity,
        layer=Attention,
        region=BALL_REGION,
        conditions=f"dot-product attention; every mask, query bias, all masses{condition}",
        reference=reference,
        value=partial(_constant, form=form, pool=pool, threat=PerTokenBall() if quantity is Quantity.TOKEN else threat),
    )


def _constant(layer: Attention, asked: Asked, *, form: str, pool: str, threat: MoveThreat) -> Upper:
    return ball_constant(layer, asked.n, asked.radius, form=form, pool=pool, threat=threat)


CLAIMS = (
    *(_ball(quantity, "reported", CastinReported.reference) for quantity in (Quantity.BALL, Quantity.MEAN)),
    *(_ball(quantity, "derived", f"derived ({PAGE}, section 2)") for quantity in (Quantity.BALL, Quantity.MEAN)),
    _ball(Quantity.TOKEN, "derived", f"derived ({PAGE}, section 2)", "; no n in it"),
    Claim(
        name="castin2024-large-radius",
        quantity=Quantity.LIMIT,
        layer=Attention,
        region="the ray through X",
        conditions="no query bias; every query has one best key",
        reference=f"{REFERENCE}; proof in {PAGE}, section 2",
        value=lambda layer, asked: large_radius_limit(layer, input_of(asked).points),
    ),
    refuted(
        "castin2024-code-estimate",
        Quantity.LOCAL,
        Attention,
        f"not a bound: it gives 1.414 where the norm is 100.01 ({PAGE}, section 11)",
    ),
    refuted(
        "kim2021-unbounded",
        Quantity.BALL,
        Attention,
        "dot-product attention is not Lipschitz on all of space (Kim et al. 2021)",
    ),
)
