"""Token subsets: integers and masks are taken for what they are, everything else is refused in one line."""

import numpy as np
import pytest
import torch

from attnrobust.errors import InputError
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall
from tests.assertions import refused

SAME = (
    (1, 3),
    [3, 1, 1],
    range(1, 4, 2),
    {1, 3},
    np.array([1, 3]),
    np.array([3, 1], dtype=np.uint8),
    torch.tensor([1, 3]),
    (np.int64(1), torch.tensor(3)),
    (False, True, False, True),
    np.array([False, True, False, True]),
    torch.tensor([False, True, False, True]),
)


@pytest.mark.parametrize("tokens", SAME, ids=repr)
@pytest.mark.parametrize("kind", [FrobeniusBall, PerTokenBall, AnyToken])
def test_every_spelling_of_a_subset_names_the_same_tokens(kind: type, tokens: object) -> None:
    threat = kind(tokens=tokens)
    assert threat == kind(tokens=(1, 3))
    assert threat.key == kind(tokens=(1, 3)).key
    assert hash(threat) == hash(kind(tokens=(1, 3)))
    assert threat.movable(4).tolist() == [False, True, False, True]


@pytest.mark.parametrize("tokens", [2, np.int32(2), torch.tensor(2), np.array(2)])
def test_one_integer_is_one_token(tokens: object) -> None:
    assert FrobeniusBall(tokens=tokens) == FrobeniusBall(tokens=(2,))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [(True, False), np.array([True, False]), torch.tensor([True, False])])
def test_a_mask_moves_the_tokens_that_it_marks(tokens: object) -> None:
    assert FrobeniusBall(tokens=tokens).movable(2).tolist() == [True, False]  # type: ignore[arg-type]


def test_a_mask_of_another_length_is_refused() -> None:
    with refused(InputError, "mask has 2 entries", "3 tokens"):
        FrobeniusBall(tokens=(True, False)).movable(3)


@pytest.mark.parametrize(
    "tokens",
    [
        (1.5,), (1.0,), ("1",), "1", "all", 1.0, True, (True, 1), (None,), object(), torch.tensor([1.0]),
        torch.tensor(True), np.array([0.5]), np.array([[0, 1]]), np.array(["1"]), ((0, 1),), (), (-1,),
        (False, False), b"1",
    ],
    ids=repr,
)  # fmt: skip
def test_everything_else_is_refused(tokens: object) -> None:
    with refused(InputError, "token"):
        FrobeniusBall(tokens=tokens)  # type: ignore[arg-type]


def test_a_token_that_does_not_exist_is_refused() -> None:
    with refused(InputError, "token 4 does not exist", "0 to 3"):
        FrobeniusBall(tokens=torch.tensor([4])).movable(4)  # type: ignore[arg-type]
