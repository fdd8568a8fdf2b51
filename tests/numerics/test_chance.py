"""One failure probability per input: shares that sum to it, streams that differ, a union over everything random."""

import math
from functools import partial

import pytest
import torch

from attnrobust.certify import certify
from attnrobust.certify.displacement import bound as displacement
from attnrobust.certify.margin import trust_region
from attnrobust.certify.margin.all_tokens import proof
from attnrobust.certify.shared import first_order
from attnrobust.errors import InputError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.numerics import lanczos
from attnrobust.numerics.chance import ROW_FAILURE, Chance, stream, union_bound
from attnrobust.numerics.linear_map import largest_eigenvalue_upper
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from tests.cases import case_named

READOUT = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("events", "expected"), [(1, 1), (40, 64), (5000, 64), (300, 1)])
def test_shares_never_exceed_the_total(events: int, expected: int) -> None:
    chance = Chance(3, "test", 1e-9, expected)
    for _ in range(events):
        chance.spend(chance.next_event()[0])
    assert 0.0 < chance.spent <= 1e-9
    assert len({chance.next_event()[1] for _ in range(500)}) == 500


def test_streams_differ_in_every_label() -> None:
    labels: list[tuple[int, *tuple[int | str, ...]]] = [
        (0, "a", 1),
        (0, "a", 2),
        (0, "b", 1),
        (1, "a", 1),
        (0, "a1"),
        (0, "a", "1"),
    ]
    assert len({stream(seed, *rest) for seed, *rest in labels}) == len(labels)
    assert all(0 <= stream(s) < 2**63 for s in range(20))


def test_a_union_is_a_sum_and_at_most_one() -> None:
    assert union_bound([1e-10] * 3) == pytest.approx(3e-10)
    assert union_bound([0.7, 0.7]) == 1.0
    assert union_bound([]) == 0.0


@pytest.mark.parametrize(("total", "expected"), [(0.0, 1), (1.0, 1), (math.nan, 1), (0.5, 0)])
def test_a_chance_that_is_none_is_refused(total: float, expected: int) -> None:
    with pytest.raises(InputError, match="failure probability"):
        Chance(0, "test", total, expected)


@pytest.mark.parametrize(
    ("threat", "goal"),
    [
        (FrobeniusBall(), Displacement(0.3)),
        (PerTokenBall(), Displacement(0.3)),
        (AnyToken(), Displacement(0.3)),
        (FrobeniusBall(), Margin(READOUT)),
    ],
    ids=["frobenius", "per-token", "any-token", "margin"],
)
def test_a_row_fails_with_at_most_its_share_and_uses_no_start_twice(
    threat: MoveThreat, goal: Goal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every decomposition switched off, so that all norms and eigenvalues are bounded at random."""
    starts: list[int] = []
    draw = lanczos._uniform_direction  # every random start is drawn here

    def counted(size: int, seed: int, device: torch.device) -> torch.Tensor:
        starts.append(seed)
        return draw(size, seed, device)

    monkeypatch.setattr(lanczos, "_uniform_direction", counted)
    monkeypatch.setattr(displacement, "DENSE_LIMIT", 0)
    monkeypatch.setattr(first_order, "DENSE_LIMIT", 0)
    monkeypatch.setattr(proof, "DECOMPOSE_LIMIT", 0)
    monkeypatch.setattr(proof, "CHOLESKY_LIMIT", 0)
    monkeypatch.setattr(trust_region, "largest_eigenvalue_upper", partial(largest_eigenvalue_upper, dense_limit=0))
    case = case_named("plain-h1-n2-d2" if isinstance(goal, Margin) else "plain-h2-n3-d4")
    report = certify(Problem(case.attention, case.tokens, threat, goal))
    random = [c for c in report.certificates if c.kind is Kind.PROBABILISTIC]
    assert random, "nothing was random"
    assert sum(c.failure_probability for c in random) <= report.failure_probability <= ROW_FAILURE
    assert len(set(starts)) == len(starts)
