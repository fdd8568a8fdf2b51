"""Duplicated tokens: the exact effect of copies at rest, and certificates for copies that also move (derived)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.measures.questions import OUTWARD_MASS, copies_of, reads_all_rows, row_of
from attnrobust.certify.method import ATTENTION_FEATURES, CertificateMethod, PreparedBound
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.head_sizes import HeadSizes, ValueView, value_views
from attnrobust.certify.shared.reach import Reach, RowSums, attention_of, visible_tokens
from attnrobust.errors import UnsupportedThreatError
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.copies import Copies
from attnrobust.threats.moves import PerTokenBall

MOST_CHOICES = 20_000
"""Choices of copies that are evaluated one by one; each costs one forward pass."""
NUMBERS_AT_ONCE = 2**24


@dataclass(frozen=True)
class WorstCopies:
    """The strongest choice of copies without any move, exact up to rounding.

    Args:
        extra: Extra copies of every token.
        usage: Used share of the goal's budget; >= 1 is a violation by copies alone.
    """

    extra: tuple[int, ...]
    usage: float


def worst_copies(problem: Problem, *, copies: int = 1) -> WorstCopies:
    """The exact effect of duplicating tokens, at most ``copies`` in all: the worst choice by complete enumeration.

    A copy adds its token's mass. For one copy of token j the weights become ``(1 + m) P_ij / (1 + m P_ij)`` with m = 1,
    so each head's row moves by ``P_ij / (1 + P_ij) (v_j - o_i)`` and no bound is needed.

    Args:
        problem: Layer, input and goal; the threat is not used.
        copies: Most extra copies in all, >= 1.

    Returns:
        The worst choice (no copies at all where every choice only helps) and the budget it uses.

    Raises:
        UnsupportedThreatError: More choices than can be enumerated, or another layer.
        InputError: copies < 1.
    """
    asked = Problem(problem.network, problem.clean, Copies(copies), problem.goal)
    reason = MeasureCopies().refuses(asked)
    if reason is not None:
        raise UnsupportedThreatError(f"copies: {reason}")
    best = WorstCopies((0,) * problem.clean.n, 0.0)
    for extra, changes in _enumerate(asked):
        used = (changes / problem.resolved.violated_at).amax(dim=-1)
        top = int(used.argmax())
        if float(used[top]) > best.usage:
            best = WorstCopies(tuple(int(e) for e in extra[top]), float(used[top]))
    return best


class MeasureCopies(CertificateMethod):
    """Copies of tokens, then every atom moves within the copies' own threat: exact at rest, a bound for the moves.

    ``change <= max over all choices of copies (exact) + moves``; a moved row is within
    ``||M|| |h| + D_v [ tanh((|beta_i| + ||B|| |h|) pair / 4) + D_k |h_i| / 4 ]`` of where it was, whatever the masses.
    """

    name = "measure-copies"
    reference = "derived (docs/measure-certificates.md, section 6)"
    region = "every choice of at most the given number of copies, every atom within the threat's set"

    layers = (Attention,)
    features = ATTENTION_FEATURES
    threats = (Copies,)
    outward = OUTWARD_MASS

    def refuses_more(self, problem: Problem) -> str | None:
        if copies_of(problem).order == "strict" and attention_of(problem).causal:
            return (
                "copies inserted behind their parents shift the rows of a causal layer; use order 'tied', where all "
                "copies of a token share its position"
            )
        return None

    def prepare(self, problem: Problem, *, seed: int) -> PreparedBound:
        rest = torch.zeros_like(problem.resolved.budgets)
        for _, changes in _enumerate(problem):
            rest = torch.maximum(rest, changes.amax(dim=0))
        moves = _Moves.of(problem, attention_of(problem))

        def change(size: float) -> Tensor:
            return rest + moves.change(size)

        return ChangeBound(problem, change)


@dataclass(frozen=True, eq=False)
class _Moves:
    """What moves within the threat do to atoms with any masses."""

    sizes: HeadSizes
    views: tuple[ValueView, ...]
    rows: RowSums
    averaged: tuple[Float[Tensor, "n"], int] | None  # masses and copies, where the goal is the mean of all atoms

    @classmethod
    def of(cls, problem: Problem, layer: Attention) -> "_Moves":
        threat, clean = copies_of(problem), problem.clean
        moves = threat.moves
        visible = visible_tokens(layer, clean.n)
        movable = moves.movable(clean.n).to(clean.points.device)
        token = moves.token_factor(clean.n, clean.width)
        frobenius = moves.frobenius_factor(clean.n, clean.width)
        seen = bool((movable & visible).any())
        # Two copies of one token may move apart, so that pairs count even where a single token moves.
        apart = 2.0 * token if isinstance(moves, PerTokenBall) else min(2.0 * token, 2.0**0.5 * frobenius)
        reach = Reach(frobenius, token, token if seen else 0.0, apart if seen else 0.0, movable)
        mean = not reads_all_rows(problem) and row_of(problem) is None
        return cls(
            sizes=HeadSizes.of(layer, clean.points, visible),
            views=value_views(layer, clean.points, visible, problem.resolved),
            rows=RowSums(problem.resolved.weights, reach),
            averaged=(clean.mass, threat.copies) if mean else None,
        )

    def change(self, size: float) -> Float[Tensor, "c"]:
        """Upper bound of the goal's changes by moves of this size."""
        return smallest([view.total(self._head_change(view, size)) for view in self.views])

    def _head_change(self, view: ValueView, size: float) -> Float[Tensor, "c h"]:
        reach = self.rows.reach
        gradient = self.sizes.key_gradient + self.sizes.bilinear[:, None] * (reach.token * size) * reach.movable
        key = torch.tanh(0.25 * reach.pair * size * gradient)  # (h, n)
        each = torch.ones_like(key[0])
        value, diameter = view.norms * (reach.attended * size), view.diameters
        query = 0.25 * self.sizes.query_diameter * size
        if self.averaged is None:
            steady = value * self.rows.steady(each) + diameter * self.rows.steady(key)
            return steady + diameter * query * self.rows.moved(each)
        mass, copies = self.averaged
        own = key + query[:, None] * (reach.token * reach.movable)
        # With masses (1 + r_j) m_j / sum a mean is a ratio of linear functions of r: largest with all copies on one.
        shifted = (own @ mass)[:, None] + copies * mass * own
        return value + diameter * torch.maximum(own @ mass, (shifted / (1.0 + copies * mass)).amax(dim=-1))


def _enumerate(problem: Problem) -> Iterator[tuple[Float[Tensor, "k n"], Float[Tensor, "k c"]]]:
    """Every choice of copies in batches, with the change of the goal at rest."""
    threat, n = copies_of(problem), problem.clean.n
    choices = math.comb(n + threat.copies, threat.copies) - 1
    if choices > MOST_CHOICES:
        raise UnsupportedThreatError(
            f"{threat.copies} copies of {n} tokens are {choices} choices, more than the {MOST_CHOICES} that are "
            "enumerated; ask for fewer copies, or for a Wasserstein ball that holds them"
        )
    together = max(1, NUMBERS_AT_ONCE // (n * n * int(getattr(problem.network, "heads", 1))))
    batch: list[tuple[int, ...]] = []
    for size in range(1, threat.copies + 1):
        for chosen in combinations_with_replacement(range(n), size):
            batch.append(chosen)
            if len(batch) == together:
                yield _at_rest(problem, batch)
                batch = []
    if batch:
        yield _at_rest(problem, batch)


def _at_rest(problem: Problem, batch: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Changes of the goal when nothing but the masses changes."""
    goal, clean = problem.resolved, problem.clean
    extra = torch.stack([torch.bincount(torch.tensor(chosen), minlength=clean.n) for chosen in batch])
    extra = extra.to(clean.points)
    mass = (1.0 + extra) * clean.mass
    mass = mass / mass.sum(dim=-1, keepdim=True)
    with torch.no_grad():
        output = problem.network(clean.points.expand(len(batch), -1, -1), mass)
        if reads_all_rows(problem) or row_of(problem) is not None:
            return extra, goal.changes(output)
        difference = (mass[:, None, :] @ output)[:, 0] - goal.clean
        if goal.functionals is None:
            length: Tensor = torch.linalg.vector_norm(difference, dim=-1)
            return extra, length[:, None]
        return extra, -difference @ goal.functionals.T
