"""Names of the field that are called differently here: each leads to a name that exists."""

import pytest

from attnrobust.attacks.registry import ATTACKS, attack_named
from attnrobust.certify.registry import METHODS, ON_REQUEST, method_named
from attnrobust.errors import UnknownNameError
from attnrobust.meanings import MEANINGS, meant
from attnrobust.runs.reading import NETWORK_GOALS, require_goal_options
from attnrobust.threats.parse import KEYS, parse_threat

EXISTING = {
    "threat": KEYS,
    "attack": [method.name for method in ATTACKS],
    "certificate": [method.name for method in (*METHODS, *ON_REQUEST)],
    "goal": NETWORK_GOALS,
}


@pytest.mark.parametrize("kind", MEANINGS)
def test_every_meaning_exists_and_no_word_has_two(kind: str) -> None:
    assert set(MEANINGS[kind]) <= set(EXISTING[kind])
    words = [word for listed in MEANINGS[kind].values() for word in listed.split()]
    assert len(words) == len(set(words))


def test_what_is_meant_comes_first() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown threat 'l2'; did you mean frobenius\? nearest: frobenius"):
        parse_threat("l2")
    with pytest.raises(UnknownNameError, match="did you mean token-moving"):
        attack_named("pgd")
    with pytest.raises(UnknownNameError, match="did you mean displacement"):
        method_named("crown")
    with pytest.raises(UnknownNameError, match="did you mean decision"):
        require_goal_options(tolerance=None, readout=None, pool=None, label=None, goal="Label")


def test_a_word_without_a_meaning_is_left_to_the_alphabet() -> None:
    assert meant("threat", "frobenios") is None
    with pytest.raises(UnknownNameError, match="unknown threat 'frobenios'; nearest: frobenius"):
        parse_threat("frobenios")
