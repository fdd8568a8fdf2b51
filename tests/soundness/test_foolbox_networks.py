"""foolbox's attacks on the decision of a whole model."""

import pytest

from attnrobust.attacks import AttackBudget, attack
from attnrobust.models.networks.reading import ReadNetwork
from attnrobust.models.read_network import read_network
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.moves import FrobeniusBall
from tests.assertions import assert_at_most
from tests.models.networks.models import HEADS, inputs_of

pytest.importorskip("foolbox")
BUDGET = AttackBudget(restarts=4, steps=20, rounds=2)


@pytest.fixture(scope="module")
def network() -> ReadNetwork:
    return read_network(HEADS["distilbert sequence"](), inputs_of("distilbert sequence"), at="block:1")


@pytest.mark.parametrize(("name", "share"), [("L2FastGradient", 1.3), ("DDN", 1.02), ("L2PGD", 1.05)])
def test_they_flip_the_models_decision(network: ReadNetwork, name: str, share: float) -> None:
    graph, goal = network.decision()
    problem = Problem(graph, network.input.measure, FrobeniusBall(), goal)
    own = attack(problem, budget=BUDGET)
    result = attack(
        problem, method=f"foolbox:{name}Attack" if name.endswith("Gradient") else f"foolbox:{name}", budget=BUDGET
    )
    assert result.status is Status.FOUND
    assert network.confirm(result).agrees
    assert_at_most(own.radius, result.radius * 1.001)
    assert_at_most(result.radius, own.radius * share)
