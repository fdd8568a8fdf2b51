"""Whoever listens hears what begins, and nobody else."""

from attnrobust.runs.activity import Activity, listening, now


def test_a_listener_hears_within_its_block_alone() -> None:
    heard: list[Activity] = []
    now("a", "layer", "before")
    with listening(heard.append):
        now("a", "layer", "attack token-moving")
    now("a", "layer", "after")
    assert [activity.what for activity in heard] == ["attack token-moving"]
    assert heard[0].seconds >= 0
