"""Our attacks in a foolbox pipeline: raw, clipped and success mean what foolbox says, and the results are ours."""

import math

import pytest
import torch
from torch import Tensor

from attnrobust.attacks import AttackBudget, attack
from attnrobust.attacks.foolbox.attacks import (
    CopyCount,
    MassSplittingAttack,
    MeasureDistance,
    TokenDistance,
    TokenDuplicationAttack,
    TokenMovingAttack,
)
from attnrobust.attacks.foolbox.carrier import CarrierModel, from_carrier, to_carrier, used_slots
from attnrobust.attacks.foolbox.library import (
    Criterion,
    Misclassification,
    TargetedMisclassification,
    foolbox_model,
)
from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.numerics.transport import wasserstein
from attnrobust.problem import Problem
from attnrobust.results import Status
from attnrobust.threats.copies import Copies
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure
from tests.assertions import assert_at_most, assert_close, assert_same_bits, refused
from tests.attacks.test_token_moving import draw
from tests.cases import case_named

QUICK = AttackBudget(restarts=2, steps=10, rounds=2)
QUICKEST = AttackBudget(restarts=2, steps=5, rounds=1)
LAYER = case_named("plain-h2-n3-d4").attention
WEIGHT = draw(3, LAYER.out_width, seed=5)
INPUTS = tuple(draw(n, LAYER.width, seed=n) for n in (3, 5, 4))


def model(dtype_bounds: tuple[float, float] = (-math.inf, math.inf), layer: Attention = LAYER, pool: object = "mean"):  # type: ignore[no-untyped-def]
    return foolbox_model(CarrierModel(layer, WEIGHT, pool=pool).eval(), bounds=dtype_bounds)  # type: ignore[arg-type]


def labels_of(carrier: Tensor) -> Tensor:
    return model()(carrier).argmax(dim=1)


# ---- carriers ----------------------------------------------------------------------------------------------------


def test_carriers_hold_inputs_of_any_length() -> None:
    mass = torch.softmax(draw(4), dim=0)
    carrier = to_carrier([*INPUTS[:2], TokenMeasure(INPUTS[2], mass)], slots=7)
    assert carrier.shape == (3, 7, 5)
    assert used_slots(carrier) == [3, 5, 4]
    assert carrier[0, :, -1].tolist() == [1, 1, 1, 0, 0, 0, 0]
    for row, points in zip(carrier, INPUTS, strict=True):
        assert_same_bits(from_carrier(row).points, points)
    assert_close(from_carrier(carrier[2]).mass, mass, rtol=1e-15)
    with refused(InputError, "5 tokens", "4 slots"):
        to_carrier(INPUTS, slots=4)
    with refused(InputError, "widths"):
        to_carrier([draw(2, 3), draw(2, 4)])
    with refused(InputError, "no inputs"):
        to_carrier([])
    with refused(InputError, "after its tokens"):
        used_slots(carrier.flip(1))
    with refused(InputError, "no token"):
        from_carrier(torch.zeros(3, 4))
    with refused(InputError, "finite and >= 0"):
        from_carrier(-carrier[0])


def test_the_model_reads_carriers_as_the_layer_reads_tokens() -> None:
    carrier = to_carrier(INPUTS, slots=8)
    for pool in ("mean", 1):
        logits = model(pool=pool)(carrier)
        for row, points in zip(logits, INPUTS, strict=True):
            output = LAYER(points)
            pooled = output.mean(dim=0) if pool == "mean" else output[1]
            assert_close(row, WEIGHT @ pooled, rtol=1e-12)
    doubled = to_carrier(INPUTS[:1], slots=8)
    doubled[0, 3] = doubled[0, 1]  # a copy is mass on its parent
    heavier = to_carrier(INPUTS[:1], slots=8)
    heavier[0, 1, -1] = 2.0
    assert_close(model()(doubled), model()(heavier), rtol=1e-12)
    with refused(UnsupportedModelError, "mask"):
        CarrierModel(case_named("causal").attention, WEIGHT)
    with refused(InputError, "readout"):
        CarrierModel(LAYER, WEIGHT[:, :2])


def test_the_gradient_with_respect_to_an_empty_slots_mass_is_finite() -> None:
    carrier = to_carrier(INPUTS[:1], slots=5).requires_grad_(True)
    (gradient,) = torch.autograd.grad(CarrierModel(LAYER, WEIGHT)(carrier).sum(), carrier)
    assert bool(torch.isfinite(gradient).all())


# ---- token moving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [FrobeniusBall(), PerTokenBall(norm="linf"), AnyToken()], ids=lambda t: t.key)
def test_token_moving_finds_what_it_finds_alone(threat: MoveThreat) -> None:
    carrier = to_carrier(INPUTS, slots=6)
    labels = labels_of(carrier)
    ours = [attack(Problem(LAYER, TokenMeasure(x), threat, Margin(WEIGHT)), budget=QUICK).radius for x in INPUTS]
    mover = TokenMovingAttack(threat, budget=QUICK)
    epsilons = [0.5 * min(ours), 1.1 * sorted(ours)[1], 2.0 * max(ours), None]
    raw, clipped, success = mover(model(), carrier, Misclassification(labels), epsilons=epsilons)
    assert mover.statuses == (Status.FOUND,) * 3
    reached = TokenDistance(threat).between(carrier, raw[0])
    assert_close(reached, torch.tensor(ours, dtype=torch.float64), rtol=0.05)
    assert success[0].tolist() == [False] * 3
    assert success[2].all()
    assert success[3].all()
    for epsilon, points, won in zip(epsilons, clipped, success, strict=True):
        assert_same_bits(points[..., -1], carrier[..., -1])
        assert_same_bits(model()(points).argmax(dim=1) != labels, won)  # success is about clipped
        if epsilon is not None:
            distance = TokenDistance(threat).between(carrier, points)
            assert bool((distance <= epsilon).all())
            if isinstance(threat, FrobeniusBall):
                assert_same_bits(won, reached <= epsilon)


def test_targeted_attacks_reach_their_target() -> None:
    carrier = to_carrier(INPUTS)
    targets = (labels_of(carrier) + 1) % 3
    _, clipped, success = TokenMovingAttack(budget=QUICK)(
        model(), carrier, TargetedMisclassification(targets), epsilons=None
    )
    assert success.all()
    assert_same_bits(labels_of(clipped), targets)


def test_float32_pipelines_keep_their_dtype_and_their_success() -> None:
    carrier = to_carrier(INPUTS[:1], slots=4, dtype=torch.float32)
    labels = labels_of(carrier)
    for one in (TokenMovingAttack(budget=QUICKEST), MassSplittingAttack(budget=QUICKEST)):
        raw, clipped, success = one(model(), carrier, Misclassification(labels), epsilons=[None, 0.05])
        assert raw[0].dtype == torch.float32
        assert success[0].all(), type(one)
        assert bool((one.distance.between(carrier, clipped[1]) <= 0.05).all())  # type: ignore[attr-defined]
        assert not bool(success[1])


def test_bounds_hold_and_repeat_works() -> None:
    carrier = to_carrier(INPUTS)
    labels = labels_of(carrier)
    largest = float(carrier[..., :-1].abs().max())
    raw, _, _ = TokenMovingAttack(PerTokenBall(), budget=QUICK)(
        model((-largest, largest)), carrier, labels, epsilons=None
    )
    assert_at_most(float(raw[..., :-1].abs().max()), largest)
    _, _, success = TokenMovingAttack(budget=QUICK).repeat(2)(model(), carrier, labels, epsilons=[None, 1.0])
    assert success[0].all()


def test_inputs_do_not_depend_on_their_batch() -> None:
    carrier = to_carrier(INPUTS)
    labels = labels_of(carrier)
    together, _, _ = TokenMovingAttack(budget=QUICK)(model(), carrier, labels, epsilons=None)
    alone, _, _ = TokenMovingAttack(budget=QUICK)(model(), carrier[1:2], labels[1:2], epsilons=None)
    assert_same_bits(together[1:2], alone)


# ---- duplication -------------------------------------------------------------------------------------------------


def test_duplication_fills_slots_with_exact_copies() -> None:
    carrier = to_carrier(INPUTS, slots=9)
    labels = labels_of(carrier)
    copier = TokenDuplicationAttack()
    raw, clipped, success = copier(model(), carrier, labels, epsilons=[0.0, 1.0, 3.7])
    assert not success[0].any()
    assert_same_bits(clipped[0], carrier)
    for epsilon, found, points in zip((0.0, 1.0, 3.7), raw, clipped, strict=True):
        assert bool((CopyCount().between(carrier, found) <= epsilon).all())
        assert_same_bits(points, found)
        for row, clean in zip(found, INPUTS, strict=True):
            extra = from_carrier(row).points[len(clean) :]
            assert all(bool((clean == copy).all(dim=1).any()) for copy in extra)
    # One copy is the best of all: every other choice was tried here.
    for row, label, clean in zip(raw[1], labels, carrier, strict=True):
        leads = []
        for token in range(used_slots(clean[None])[0]):
            other = clean.clone()
            other[used_slots(clean[None])[0]] = clean[token]
            logits = model()(other[None])[0]
            leads.append(float(logits.masked_fill(torch.arange(3) == label, -math.inf).max() - logits[label]))
        logits = model()(row[None])[0]
        lead = float(logits.masked_fill(torch.arange(3) == label, -math.inf).max() - logits[label])
        assert lead == pytest.approx(max(leads), abs=1e-12)


def test_copies_beyond_epsilon_are_clipped_in_the_order_of_the_slots() -> None:
    carrier = to_carrier(INPUTS[:1], slots=7)
    more = carrier.clone()
    more[0, 3:6] = more[0, [0, 1, 1]]
    clipped = CopyCount().clip(carrier, more, 2.0)
    assert CopyCount().between(carrier, clipped).tolist() == [2.0]
    assert_same_bits(clipped[0, :5], more[0, :5])
    lighter = more.clone()
    lighter[0, 0, -1] = 0.5
    assert CopyCount().between(carrier, lighter).tolist() == [math.inf]


def test_copies_may_move_and_agree_with_the_search_on_problems() -> None:
    carrier = to_carrier(INPUTS, slots=8)
    labels = labels_of(carrier)
    problem = Problem(LAYER, TokenMeasure(INPUTS[0]), Copies(2), Margin(WEIGHT))
    reach = attack(problem, budget=QUICK).radius
    _, _, still = TokenDuplicationAttack()(model(), carrier, labels, epsilons=2.0)
    _, _, moving = TokenDuplicationAttack(move_epsilon=1.05 * reach, budget=QUICK)(
        model(), carrier, labels, epsilons=2.0
    )
    assert bool(moving[0])
    assert bool((moving | ~still).all())


# ---- splitting ---------------------------------------------------------------------------------------------------


def test_splitting_is_measured_by_exact_transport_and_no_worse_than_moving() -> None:
    carrier = to_carrier(INPUTS[:2], slots=6)
    labels = labels_of(carrier)
    splitter, mover = MassSplittingAttack(budget=QUICKEST), TokenMovingAttack(budget=QUICKEST)
    moved, _, _ = mover(model(), carrier, labels, epsilons=None)
    alone = [wasserstein(from_carrier(a), from_carrier(b), order=2).upper.value for a, b in zip(carrier, moved)]  # noqa: B905
    epsilon = 0.6 * max(alone)
    (raw, _), (_, clipped), (success, won) = splitter(model(), carrier, labels, epsilons=[None, epsilon])
    assert success.all()
    reached = splitter.distance.between(carrier, raw)  # type: ignore[attr-defined]
    for row, points, moving, distance in zip(raw, INPUTS, alone, reached.tolist(), strict=False):
        exact = wasserstein(TokenMeasure(points), from_carrier(row), order=2).upper.value
        assert distance == pytest.approx(exact, rel=1e-12)
        assert_at_most(distance, moving, rtol=1e-3)
    assert bool((splitter.distance.between(carrier, clipped) <= epsilon).all())  # type: ignore[attr-defined]
    assert_same_bits(labels_of(clipped) != labels, won)


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_measures_are_clipped_onto_the_ball(order: float) -> None:
    clean, other = TokenMeasure(draw(4, 3)), TokenMeasure(draw(6, 3, seed=1), torch.softmax(draw(6, seed=2), dim=0))
    first, second = to_carrier([clean], slots=9), to_carrier([other], slots=9)
    whole = wasserstein(clean, other, order=order).upper.value
    for share in (0.9, 0.3, 1e-3):
        clipped = MeasureDistance(order).clip(first, second, share * whole)
        distance = float(MeasureDistance(order).between(first, clipped))
        assert_at_most(distance, share * whole)
        assert_at_most(0.99 * share * whole, distance, what="on a shortest path")  # nine slots hold the whole plan
    tight = MeasureDistance(order).clip(first[:, :6], second[:, :6], 0.5 * whole)
    assert_at_most(float(MeasureDistance(order).between(first[:, :6], tight)), 0.5 * whole)
    assert_same_bits(MeasureDistance(order).clip(first, second, 1.1 * whole), second)
    assert_same_bits(MeasureDistance(order).clip(first, second, 0.0), first)


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_inputs_that_fail_leave_the_others_alone() -> None:
    carrier = to_carrier(INPUTS, slots=6)
    labels = labels_of(carrier)
    wrong = labels.clone()
    wrong[0] = (wrong[0] + 1) % 3  # misclassified already
    broken = carrier.clone()
    broken[1, :5, :-1] = 1e200  # the scores overflow
    for one in (TokenMovingAttack(budget=QUICK), TokenDuplicationAttack()):
        raw, _, success = one(model(), broken, wrong, epsilons=None if isinstance(one, TokenMovingAttack) else 1.0)
        assert one.statuses[0] is Status.MISCLASSIFIED
        assert one.statuses[1] is Status.ERROR
        assert "not finite" in one.notes[1]
        assert one.statuses[2] in (Status.FOUND, Status.NOT_FOUND)
        assert_same_bits(raw[:2], broken[:2])
        assert bool(success[0])
        assert bool(success[2]) == (one.statuses[2] is Status.FOUND)
    assert one.statuses[2] is not Status.ERROR


def test_what_is_not_supported_is_refused() -> None:
    carrier = to_carrier(INPUTS)
    labels = labels_of(carrier)

    class Odd(Criterion):
        def __repr__(self) -> str:
            return "Odd()"

        def __call__(self, perturbed, outputs):  # type: ignore[no-untyped-def]
            return outputs

    with refused(InputError, "Odd", "Misclassification"):
        TokenMovingAttack()(model(), carrier, Odd(), epsilons=None)
    with refused(InputError, "slots, d \\+ 1"):
        TokenMovingAttack()(model(), carrier[0], labels[:1], epsilons=None)
    with pytest.raises(TypeError, match="no option 'speed'"):
        TokenMovingAttack()(model(), carrier, labels, epsilons=None, speed=3)
    with refused(InputError, "move_epsilon"):
        TokenDuplicationAttack(move_epsilon=-1.0)
    with refused(InputError, "order 3"):
        MeasureDistance(3.0)
    with pytest.raises(NotImplementedError):  # foolbox's own answer for attacks of a fixed size
        TokenDuplicationAttack()(model(), carrier, labels, epsilons=None)
