"""Radii by depth: in the model's order, relative to the tokens there."""

from dataclasses import replace

import pytest

from attnrobust.runs.depths import depth_profile
from attnrobust.runs.rows import MOVE_AT, Row
from tests.runs.storage.test_files import FULL


def whole(depth: str, attack: float | None, certified: float, norm: float = 10.0, **changes: object) -> Row:
    """A row about a whole model."""
    made = replace(
        FULL, layer=depth, goal="decision", goal_scope=f"the model's own decision{MOVE_AT}{depth}", input_norm=norm,
        attack_radius=attack, certified_radius=certified, gap=None,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_depths_are_in_the_order_of_the_model() -> None:
    rows = [whole(name, 1.0, 0.1) for name in ("block:10", "block:2", "embeddings", "input")]
    profile = depth_profile([*rows, FULL])  # a row about a layer has no depth
    assert [d.depth for d in profile] == ["input", "embeddings", "block:2", "block:10"]


def test_radii_are_shares_of_the_norm_of_the_tokens() -> None:
    rows = [whole("block:1", 1.0, 0.1), whole("block:1", 4.0, 0.0, norm=20.0), whole("block:1", None, 0.5)]
    (found,) = depth_profile(rows)
    assert (found.rows, found.found) == (3, 2)
    assert found.attacks == pytest.approx((0.1, 0.15, 0.2))
    assert found.certified == pytest.approx((0.0, 0.01, 0.05))
    assert found.attack_radius == 2.5
    assert found.input_norm == 10.0


def test_nothing_found_is_nothing() -> None:
    (found,) = depth_profile([whole("embeddings", None, 0.0)])
    assert found.attacks is None
    assert found.certified == (0.0, 0.0, 0.0)
    assert depth_profile([FULL]) == ()
