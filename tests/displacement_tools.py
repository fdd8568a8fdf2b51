"""What the tests of the displacement certificate share: exact remainders, dense forms and ascent on a ratio."""

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from attnrobust.certify.displacement.base import MovingRows, ValueRows
from attnrobust.certify.displacement.bilinear import QueryKeyForm, value_logit_form
from attnrobust.certify.displacement.joint_form import JointProduct
from attnrobust.certify.displacement.remainder import RemainderMajorant
from attnrobust.goals import pool_weights
from attnrobust.numerics.chance import stream
from attnrobust.threats.moves import FrobeniusBall
from tests.cases import Case, case_named

SMALL_CASES = (
    "plain-h2-n3-d4", "single-token-biases", "concatenated", "biases", "scale-negative", "saturated",
    "saturated-concatenated-masses", "equal-tokens", "near-tie", "large-norms", "one-outlier", "causal-biases-strong",
    "padding", "finite-mask-masses", "masses-one-dominates", "narrow-width-1",
)  # fmt: skip
RARE = {"concatenated", "scale-negative", "near-tie", "large-norms", "one-outlier", "masses-one-dominates", "saturated"}
"""Those of them that differ from another one in size alone, or that the product of all certificates has, too: slow."""
RADII = (0.1, 1.5)


def clean_rows(name: str, *, pool: str | int = "all", tokens: tuple[int, ...] | None = None) -> MovingRows:
    """The clean rows of one case of the table."""
    case: Case = case_named(name)
    mass = None if case.tokens.uniform else case.tokens.mass
    weights = pool_weights(pool, case.tokens.mass)  # type: ignore[arg-type]
    movable = FrobeniusBall(tokens=tokens).movable(case.n)
    return MovingRows(ValueRows(case.attention, case.tokens.points, mass), weights, movable)


class ExactRows:
    """Every intermediate quantity of the proof at moved tokens, batched over moves (b, n, d)."""

    def __init__(self, rows: MovingRows, moves: Tensor) -> None:
        layer, points = rows.clean.layer, rows.clean.points
        self.deviation = rows.clean.values[:, None] - rows.clean.averages[:, :, None]  # (h, i, j, v)
        self.gamma = torch.einsum("bnd,hdv->bhnv", moves, rows.clean.w_v)
        shift = layer.scores(points + moves, rows.clean.mass) - layer.scores(points, rows.clean.mass)
        shift = torch.where(rows.clean.weight > 0, shift, torch.zeros_like(shift))
        self.u = shift - (rows.clean.weight * shift).sum(dim=-1, keepdim=True)
        alpha = torch.einsum("bnd,hdk->bhnk", moves, layer.w_q)
        beta = torch.einsum("bnd,hdk->bhnk", moves, layer.w_k)
        product = layer.factor * alpha @ beta.transpose(-1, -2)
        self.q = product - (rows.clean.weight * product).sum(dim=-1, keepdim=True)
        self.linear = self.u - torch.where(rows.clean.weight > 0, self.q, torch.zeros_like(self.q))
        self.first_order = rows.clean.weight @ self.gamma + torch.einsum(
            "hij,bhij,hijv->bhiv", rows.clean.weight, self.linear, self.deviation
        )
        after = layer.weights(points + moves, rows.clean.mass) @ (rows.clean.values + self.gamma)
        self.remainder = after - rows.clean.averages - self.first_order

    def pooled_norm(self, rows: MovingRows, per_head: Tensor) -> Tensor:
        """Norm of a stack (b, h, n, v): all rows, or the pooled row."""
        if rows.row_weights is not None:
            per_head = torch.einsum("bhnv,n->bhv", per_head, rows.row_weights)
        return per_head.flatten(1).norm(dim=1)


def partition_of(rows: MovingRows, exact: ExactRows) -> tuple[Tensor, Tensor]:
    """``w_j psi(u_j)`` and ``1 + P``."""
    u = exact.u.clamp_max(600.0)
    series = u.square() * (0.5 + u / 6.0 + u**2 / 24.0)
    psi = rows.clean.weight * torch.where(u.abs() < 1e-3, series, torch.expm1(u) - u)
    return psi, 1.0 + psi.sum(dim=-1, keepdim=True)


def curved_part(rows: MovingRows, exact: ExactRows) -> Tensor:
    """``E[psi vh] / (1 + P)``, with ``vh - a`` where a does not shrink."""
    psi, partition = partition_of(rows, exact)
    share = psi / partition
    curved = torch.einsum("bhij,hijv->bhiv", share, exact.deviation)
    return curved if rows.separate else curved - share.sum(dim=-1, keepdim=True) * exact.first_order


def moved_values(rows: MovingRows, exact: ExactRows) -> Tensor:
    """``E[(e^u - 1) gamma] / (1 + P)``."""
    partition = partition_of(rows, exact)[1]
    return (rows.clean.weight * torch.expm1(exact.u.clamp_max(600.0)) / partition) @ exact.gamma


def starts(rows: MovingRows, radius: float, *, count: int = 16, seed: int = 0) -> Tensor:
    """Moves on the sphere, half of them concentrated on one token."""
    n, d = rows.clean.points.shape
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(count, n, d, generator=generator, dtype=torch.float64)
    movable = rows.movable.nonzero().flatten()
    for index in range(1, count, 2):
        emphasis = torch.full((n, 1), 0.05, dtype=torch.float64)
        emphasis[movable[index // 2 % len(movable)]] = 1.0
        moves[index] *= emphasis
    moves = moves * rows.moves[:, None]
    return moves * radius / moves.flatten(1).norm(dim=1)[:, None, None]


def worst_ratio(
    rows: MovingRows,
    radius: float,
    ratio: Callable[[Tensor], Tensor],
    *,
    steps: int = 25,
    count: int = 16,
    seed: int = 0,
) -> float:
    """Largest ratio (b,) found by gradient ascent over moves of norm at most the radius, all iterates counted."""
    moves, worst = starts(rows, radius, count=count), 0.0
    inside = (torch.arange(count) % 4 == 3)[:, None, None]
    for step in range(steps):
        moves = moves.detach().requires_grad_()
        value = ratio(moves)
        worst = max(worst, float(value.detach().max()))
        (gradient,) = torch.autograd.grad(value.clamp_min(1e-300).log().sum(), moves)
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0) * rows.moves[:, None]
        length = gradient.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-300)
        moves = moves.detach() + radius * (0.4 if step < steps // 2 else 0.08) * gradient / length
        norm = moves.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-300)
        moves = torch.where(inside & (norm <= radius), moves, moves * radius / norm)
    return worst


def joint_product(rows: MovingRows, radius: float | None = None) -> JointProduct:
    """The certificate's product with deterministic eigenvalues; without radius, values are paired by the weights."""
    majorant = RemainderMajorant(rows)
    pair = value_logit_form(rows, seed=stream(0, "value-logit"))
    pair = pair if radius is None else pair.grown(majorant.forms(radius).paired)
    return JointProduct(rows, majorant, pair, QueryKeyForm(rows))


def dense_forms(rows: MovingRows, radius: float) -> list[Tensor]:
    """The symmetric matrices of the five forms at one radius."""
    product, (n, d) = joint_product(rows, radius), rows.clean.points.shape
    forms = product.majorant.forms(radius)
    unit = torch.eye(n * d, dtype=torch.float64).reshape(-1, n, d)
    return [
        torch.stack([product.apply(one, forms, factors)[0].reshape(-1) for one in unit])
        for factors in torch.eye(5, dtype=torch.float64)
    ]


def form_root(matrix: Tensor, moves: Tensor) -> Tensor:
    """``X(D)^{1/2}`` for a batch of moves."""
    flat = moves.flatten(1)
    return ((flat @ matrix) * flat).sum(dim=1).clamp_min(0.0).add(1e-300).sqrt()


SLACK = 1.0 + 1e-9  # rounding of the measured side only
SELECTIONS = [(name, None) for name in SMALL_CASES] + [("biases", (1,)), ("causal-biases-strong", (0, 4))]


def with_marks(options: Iterable[Sequence[object]]) -> list[ParameterSet]:
    """Parameters that begin with the name of a case; those of ``RARE`` run with the slow tests."""
    return [pytest.param(*values, marks=[pytest.mark.slow] if values[0] in RARE else []) for values in options]


selected = pytest.mark.parametrize(("name", "tokens"), with_marks(SELECTIONS))


def taking_turns(*pairs: tuple[tuple[object, ...], tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Every selection with two sets of options; the sets take turns, so that each option meets most rows."""
    return [(*selection, *some) for index, selection in enumerate(SELECTIONS) for some in pairs[index % len(pairs)]]


two_pools = pytest.mark.parametrize(
    ("name", "tokens", "pool"),
    with_marks(taking_turns((("all",), ("mean",)), (("mean",), (0,)), ((0,), ("all",)))),
)


def floor(rows: MovingRows) -> float:
    """Size of rounding in the measured quantities."""
    return 1e-13 * (1.0 + float(rows.clean.values.abs().max()) + float(rows.clean.keys.abs().max()))
