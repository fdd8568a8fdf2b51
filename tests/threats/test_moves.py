import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnrobust.errors import InputError, UnknownNameError
from attnrobust.threats.moves import AnyToken, FrobeniusBall, PerTokenBall
from attnrobust.threats.parse import parse_move_threat
from tests.assertions import assert_close, assert_same_bits, refused, shapes_unchecked

DELTA = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-6.0, 8.0]], dtype=torch.float64)  # row norms 5, 0, 10


@pytest.mark.parametrize(
    ("text", "threat"),
    [
        ("frobenius", FrobeniusBall()),
        ("token:3", FrobeniusBall(tokens=(3,))),
        ("tokens:1,4", FrobeniusBall(tokens=(1, 4))),
        ("tokens:4,1,4", FrobeniusBall(tokens=(1, 4))),
        ("tokens:7", FrobeniusBall(tokens=(7,))),
        ("per-token", PerTokenBall()),
        ("per-token:0,2", PerTokenBall(tokens=(0, 2))),
        ("per-token-linf", PerTokenBall(norm="linf")),
        ("per-token-linf:5", PerTokenBall(norm="linf", tokens=(5,))),
        ("per-token-l1", PerTokenBall(norm="l1")),
        ("any-token", AnyToken()),
        ("any-token:0,9", AnyToken(tokens=(0, 9))),
        ("frobenius:0,9", FrobeniusBall(tokens=(0, 9))),
    ],
)
def test_parse(text: str, threat: object) -> None:
    assert parse_move_threat(text) == threat


@given(
    tokens=st.none() | st.sets(st.integers(0, 99), min_size=1, max_size=5).map(tuple),
    kind=st.sampled_from(["frobenius", "l2", "linf", "l1", "any"]),
)
def test_parse_reads_every_key_back(tokens: tuple[int, ...] | None, kind: str) -> None:
    made = {
        "frobenius": FrobeniusBall(tokens=tokens),
        "l2": PerTokenBall(tokens=tokens),
        "linf": PerTokenBall(norm="linf", tokens=tokens),
        "l1": PerTokenBall(norm="l1", tokens=tokens),
        "any": AnyToken(tokens=tokens),
    }[kind]
    assert parse_move_threat(made.key) == made


@pytest.mark.parametrize(
    "text", ["", "frobenus", "per_token", "l2", "any", "per-token-l3", "tokens", "Frobenius", " token:1"]
)
def test_unknown_names_list_the_nearest(text: str) -> None:
    with refused(InputError):
        parse_move_threat(text)


def test_a_misspelt_threat_names_the_right_one() -> None:
    with refused(UnknownNameError, "frobenus", "frobenius"):
        parse_move_threat("frobenus")


@pytest.mark.parametrize(
    "text", ["token:", "token", "tokens:1,,2", "token:1,2", "token:x", "token:-1", "per-token:1.5", "tokens:1 2"]
)
def test_broken_token_lists_are_named(text: str) -> None:
    with refused(InputError, text, "token:3"):
        parse_move_threat(text)


def test_an_empty_list_is_not_read_as_every_token() -> None:
    for text in ("per-token:", "any-token:", "frobenius:"):
        with refused(InputError, "token"):
            parse_move_threat(text)


@pytest.mark.parametrize("kind", [FrobeniusBall, PerTokenBall, AnyToken])
def test_token_lists_are_checked(kind: type[FrobeniusBall] | type[PerTokenBall] | type[AnyToken]) -> None:
    with refused(InputError, "empty"):
        kind(tokens=())
    with refused(InputError, "-2"):
        kind(tokens=(3, -2))
    assert kind(tokens=(3, 1, 3)) == kind(tokens=(1, 3))
    with refused(InputError, "token 3", "0 to 2"):
        kind(tokens=(1, 3)).movable(3)
    with refused(InputError, "token 3"):
        kind(tokens=(1, 3)).distance(DELTA)
    with refused(InputError, "token 3"):
        kind(tokens=(1, 3)).project(DELTA, 1.0)


def test_unknown_token_norm() -> None:
    with shapes_unchecked(), refused(UnknownNameError, "l3", "l2"):
        PerTokenBall(norm="l3")  # type: ignore[arg-type]


def test_distances_by_hand() -> None:
    expected = {
        "frobenius": math.sqrt(125),
        "tokens:0,2": math.sqrt(125),
        "token:2": math.inf,
        "per-token": 10,
        "per-token-linf": 8,
        "per-token-l1": 14,
        "per-token-l1:0,2": 14,
        "any-token": math.inf,
    }
    assert {key: float(parse_move_threat(key).distance(DELTA)) for key in expected} == pytest.approx(
        expected, rel=1e-15
    )
    one = DELTA.clone()
    one[0] = 0
    assert float(AnyToken().distance(one)) == 10
    assert float(AnyToken(tokens=(0, 2)).distance(one)) == 10
    assert float(AnyToken(tokens=(0, 1)).distance(one)) == math.inf
    assert float(FrobeniusBall(tokens=(2,)).distance(one)) == 10


def test_dual_norms_by_hand() -> None:
    expected = {
        "frobenius": math.sqrt(125),
        "token:0": 5,
        "per-token": 15,
        "per-token-linf": 7 + 14,
        "per-token-l1": 4 + 8,
        "any-token": 10,
        "any-token:0,1": 5,
    }
    assert {key: float(parse_move_threat(key).dual_norm(DELTA)) for key in expected} == pytest.approx(
        expected, rel=1e-15
    )


def test_factors_by_hand() -> None:
    factors = {
        "frobenius": (1, 1),
        "per-token": (math.sqrt(6), 1),
        "per-token:1,2": (math.sqrt(2), 1),
        "per-token-linf": (math.sqrt(24), 2),
        "per-token-l1": (math.sqrt(6), 1),
        "any-token": (1, 1),
    }
    for key, (frobenius, token) in factors.items():
        threat = parse_move_threat(key)
        assert threat.frobenius_factor(6, 4) == pytest.approx(frobenius, rel=1e-15)
        assert threat.token_factor(6, 4) == pytest.approx(token, rel=1e-15)


def test_any_token_keeps_the_row_that_saves_most() -> None:
    """Norms 5 and 10, epsilon 2: keeping row 2 costs 5^2 + 8^2, keeping row 0 costs 3^2 + 10^2."""
    assert_close(AnyToken().project(DELTA, 2.0), torch.tensor([[0, 0], [0, 0], [-1.2, 1.6]]).double(), rtol=1e-7)
    kept = AnyToken(tokens=(0, 1)).project(DELTA, 100.0)
    assert_same_bits(kept, DELTA * torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64))


def test_any_token_refuses_two_moved_tokens_however_small() -> None:
    delta = torch.zeros(3, 2, dtype=torch.float64)
    delta[1, 0] = 1.0
    assert float(AnyToken().distance(delta)) == 1.0
    delta[2, 1] = 1e-300
    assert float(AnyToken().distance(delta)) == math.inf


@pytest.mark.parametrize("tokens", [None, (0, 2)])
def test_any_token_is_the_union_of_its_branches(tokens: tuple[int, ...] | None) -> None:
    threat = AnyToken(tokens=tokens)
    branches = threat.branches(3)
    assert [branch.key for branch in branches] == [f"token:{i}" for i in (tokens or (0, 1, 2))]
    gradient = torch.randn(50, 3, 2, dtype=torch.float64)
    each = torch.stack([branch.dual_norm(gradient) for branch in branches])
    assert_close(threat.dual_norm(gradient), each.amax(dim=0), rtol=1e-15)


@given(seed=st.integers(0, 10_000), epsilon=st.floats(1e-3, 10), width=st.integers(1, 6))
def test_l1_projection_is_a_soft_threshold(seed: int, epsilon: float, width: int) -> None:
    """The only minimiser: one threshold for the whole row, found here by bisection on it."""
    row = torch.randn(1, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    low, high = 0.0, float(row.abs().max())
    if float(row.abs().sum()) > epsilon:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if float((row.abs() - middle).clamp_min(0).sum()) > epsilon else (low, middle)
    expected = row.sign() * (row.abs() - low).clamp_min(0)
    assert_close(PerTokenBall(norm="l1").project(row, epsilon), expected, rtol=1e-12, atol=1e-15)


def test_tiny_and_huge_perturbations_keep_their_direction() -> None:
    for size in (1e-150, 1e150):
        for key in ("frobenius", "per-token", "per-token-linf", "per-token-l1", "any-token"):
            threat = parse_move_threat(key)
            delta = size * DELTA * torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
            back = threat.project(delta, size)
            assert_close(threat.distance(back) / size, torch.ones((), dtype=torch.float64), rtol=1e-14, what=key)


def test_single_precision_stays_single() -> None:
    for key in ("frobenius", "per-token", "per-token-linf", "per-token-l1", "any-token"):
        threat = parse_move_threat(key)
        single = DELTA.float()
        assert threat.project(single, 0.5).dtype == torch.float32
        assert threat.distance(single).dtype == torch.float32
