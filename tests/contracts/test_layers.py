"""What every layer specification owes: it says which parts of its formula are in use, new ones by their own names."""

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from attnrobust.layers.attention import Attention
from attnrobust.layers.features import features_of
from attnrobust.layers.head_bias import HeadBias
from attnrobust.layers.network import Network, Residual
from attnrobust.layers.rotary import Rotary
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from tests.contracts.questions import LAYERS, attention, specifications


@dataclass(frozen=True, eq=False)
class Capped(Attention):
    """A field that came later."""

    cap: float | None = None
    delay: int = 0
    power: float = 2.0


@dataclass(frozen=True, eq=False)
class Gated(SigmoidAttention):
    """The same for another layer."""

    gate: torch.Tensor | None = None


def test_every_class_is_in_the_table() -> None:
    assert {Attention, *specifications()} == set(LAYERS), "add the layer to tests/contracts/questions.py"


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_feature(kind: type) -> None:
    assert set(kind.feature_names) == {field.name for field in fields(kind)}  # type: ignore[attr-defined]
    assert isinstance(features_of(LAYERS[kind]()), frozenset)


@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_the_plain_layer_has_no_optional_part(kind: type) -> None:
    assert features_of(LAYERS[kind]()) <= {"activation"}


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        ({"b_q": torch.zeros(1, 2)}, "bias"),
        ({"b_k": torch.zeros(1, 2)}, "bias"),
        ({"b_v": torch.zeros(1, 2)}, "bias"),
        ({"b_o": torch.zeros(2)}, "bias"),
        ({"w_o": torch.ones(1, 2, 2)}, "out_projection"),
        ({"scale": 0.3}, "scale"),
        ({"mask": torch.zeros(3, 3)}, "mask"),
        ({"causal": True}, "causal"),
        ({"window_left": 0}, "window"),
        ({"window_right": 2}, "window"),
        ({"rotary": Rotary(torch.ones(1))}, "rotary"),
        ({"head_bias": HeadBias(slopes=torch.ones(1))}, "head_bias"),
    ],
)
def test_optional_parts_of_attention_are_features(changes: dict[str, Any], feature: str) -> None:
    assert attention(**changes).features == {feature}
    assert Network((Residual(attention(**changes)), attention())).features == {feature}


def test_fields_that_came_later_are_features_of_their_own_names() -> None:
    assert attention(Capped).features == {"power"}  # a default that is part of the formula is not "nothing"
    assert attention(Capped, cap=5.0, delay=3).features == {"power", "cap", "delay"}
    gated = Gated(**{name: getattr(attention(), name) for name in ("w_q", "w_k", "w_v")})
    assert gated.features == frozenset()
    assert replace(gated, gate=torch.ones(1)).features == {"gate"}


def test_a_map_that_states_nothing_has_a_feature_that_nothing_knows() -> None:
    class Own:
        """A map of someone else."""

    assert features_of(Own()) == {"Own"}
