"""Certified radii of single tokens: those of the single-token threats, below what attacks find."""

from dataclasses import replace

import pytest
import torch

from attnrobust.attacks import AttackBudget, token_radii
from attnrobust.certify import certify
from attnrobust.certify.token_radii import LONGEST, certified_token_radii
from attnrobust.errors import InputError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall
from attnrobust.tokens import TokenMeasure


def random_problem(goal: Goal, *, n: int = 4, d: int = 3) -> Problem:
    torch.manual_seed(0)
    w_q, w_k, w_v = torch.randn(3, 1, d, d, dtype=torch.float64)
    layer = Attention(w_q=w_q, w_k=w_k, w_v=w_v)
    return Problem(layer, TokenMeasure(torch.randn(n, d, dtype=torch.float64)), FrobeniusBall(), goal)


READOUT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("goal", "method", "tokens"),
    [(Displacement(0.1, relative=True), "displacement", (0, 2)), (Margin(READOUT), "margin-one-token", (1,))],
)
def test_each_radius_is_that_of_its_own_threat_and_below_the_attack(
    goal: Goal, method: str, tokens: tuple[int, ...]
) -> None:
    problem = random_problem(goal)
    found = certified_token_radii(problem, tokens=tokens)
    attacked = token_radii(problem, tokens=tokens, budget=AttackBudget(restarts=2, steps=20))
    for place, one, attack in zip(tokens, found, attacked, strict=True):
        assert one is not None
        single = replace(problem, threat=FrobeniusBall(tokens=(place,)))
        assert (one.problem, one.method) == (single.digest, method)
        alone = certify(single, methods=method).best
        assert alone is not None
        assert one.radius == pytest.approx(alone.radius, rel=5e-3)
        assert 0.0 < one.radius <= attack.radius


def test_the_smallest_of_all_tokens_is_the_radius_of_any_token() -> None:
    problem = random_problem(Displacement(0.1, relative=True))
    radii = [one.radius for one in certified_token_radii(problem) if one is not None]
    best = certify(replace(problem, threat=AnyToken()), methods="displacement").best
    assert best is not None
    assert len(set(radii)) == problem.clean.n
    assert min(radii) == pytest.approx(best.radius, rel=5e-3)


def test_random_events_of_all_tokens_share_one_probability() -> None:
    """301 columns are beyond what is decomposed, so the eigenvalue bounds are probabilistic."""
    torch.manual_seed(1)
    d = 301
    w_q, w_k, w_v = torch.randn(3, 1, d, 4, dtype=torch.float64) / d**0.5
    layer = Attention(w_q=w_q, w_k=w_k, w_v=w_v)
    clean = TokenMeasure(torch.randn(2, d, dtype=torch.float64))
    found = certified_token_radii(Problem(layer, clean, FrobeniusBall(), Displacement(0.1, relative=True)))
    failures = {one.failure_probability for one in found if one is not None}
    assert len(failures) == 1
    assert 0.0 < failures.pop() <= 1e-9


def test_none_where_no_certificate_speaks_about_one_token() -> None:
    problem = random_problem(Displacement(0.1, relative=True))
    assert certified_token_radii(problem, methods=("margin-one-token",)) == (None,) * problem.clean.n
    long = random_problem(Displacement(0.1, relative=True), n=LONGEST + 1)
    assert certified_token_radii(long, tokens=(1,)) == (None,)
    with pytest.raises(InputError, match="token 9 does not exist"):
        certified_token_radii(problem, tokens=(9,))
