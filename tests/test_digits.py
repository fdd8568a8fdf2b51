"""The small vision transformers of the tests learn, are read, and are attacked as decisions."""

import pytest
import torch

from attnrobust.attacks import AttackBudget, attack
from attnrobust.models.read_network import read_network
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.moves import FrobeniusBall
from tests.digits import SMALL, TRAINED, Recipe, accuracy, images, trained


@pytest.mark.parametrize("recipe", [SMALL[0], *(pytest.param(r, marks=pytest.mark.slow) for r in SMALL[1:])])
def test_a_trained_vision_transformer_and_its_decision(recipe: Recipe) -> None:
    model, (pixels, _) = trained(recipe), images()
    assert accuracy(model) > 0.8
    image = {"pixel_values": pixels[TRAINED : TRAINED + 1]}
    read = read_network(model, image)
    assert read.info.blocks == recipe.blocks
    network, goal = read.decision()
    with torch.no_grad():
        assert goal.resolve(network(read.input.measure.points), network.output_mass(None, 1)).label == int(
            model(**image).logits.argmax()
        )
    problem = Problem(network, read.input.measure, FrobeniusBall(), goal)
    found = attack(problem, budget=AttackBudget(restarts=1, steps=10))
    assert found.status is Status.FOUND
    assert read.confirm(found).agrees
