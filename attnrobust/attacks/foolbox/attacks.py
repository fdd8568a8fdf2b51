"""Token moving, duplication and splitting as foolbox attacks: ``attack(fmodel, inputs, criterion, epsilons=[...])``.

``inputs`` are carriers (see ``attacks.foolbox.carrier``), ``fmodel`` any foolbox model that maps them to logits. As in
foolbox, ``raw`` is what the search found, ``clipped`` its projection onto each epsilon, and ``success`` is evaluated by
foolbox on ``clipped``. Importing this module imports foolbox.
"""

from typing import Any

import torch
from torch import Tensor

from attnrobust.attacks.foolbox import search
from attnrobust.attacks.foolbox.carrier import used_slots
from attnrobust.attacks.foolbox.distances import CopyCount, MeasureDistance, TokenDistance
from attnrobust.attacks.foolbox.library import (
    Criterion,
    Distance,
    FixedEpsilonAttack,
    MinimizationAttack,
    Model,
    astensor,
    astensor_,
    get_criterion,
)
from attnrobust.attacks.method import AttackBudget, input_seed
from attnrobust.errors import AlreadyViolatedError, AttnRobustError, InputError
from attnrobust.numerics.transport import Order
from attnrobust.results import Status
from attnrobust.threats.moves import FrobeniusBall, MoveThreat

__all__ = [
    "CopyCount",
    "MassSplittingAttack",
    "MeasureDistance",
    "TokenDistance",
    "TokenDuplicationAttack",
    "TokenMovingAttack",
]


class _Carriers:
    """What the three attacks share: one input at a time, each with its own seed and status.

    Args:
        budget: What one input may cost.
        seed: Seed of the run.
    """

    def __init__(self, *, budget: AttackBudget | None = None, seed: int = 0) -> None:
        self.budget, self.seed = budget or AttackBudget(), seed
        self.statuses: tuple[Status, ...] = ()
        self.notes: tuple[str, ...] = ()

    def _attack(self, row: "search.CarrierInput", epsilon: float | None) -> Tensor | None:
        """The strongest perturbed carrier (slots, d + 1) of one input, or None where nothing was found."""
        raise NotImplementedError

    def _run(self, model: Model, inputs: Any, criterion: Any, *, epsilon: float | None, options: Any) -> Any:
        if options:
            raise TypeError(f"{type(self).__name__} takes no option {next(iter(options))!r}")
        wrapped, restore = astensor_(inputs)
        carrier = wrapped.raw
        if not isinstance(carrier, Tensor) or carrier.ndim != 3:
            raise InputError("give carriers as a torch tensor (B, slots, d + 1); see attacks.foolbox.carrier")
        chosen: Criterion = get_criterion(criterion)
        counts = used_slots(carrier)
        rows, statuses, notes = [], [], []
        for index, count in enumerate(counts):
            found, status, note = self._one(model, carrier[index], count, search.wanted(chosen, index), epsilon)
            rows.append(found)
            statuses.append(status)
            notes.append(note)
        self.statuses, self.notes = tuple(statuses), tuple(notes)
        return restore(astensor(torch.stack(rows)))

    def _one(
        self, model: Model, row: Tensor, count: int, wanted: "search.Wanted", epsilon: float | None
    ) -> tuple[Tensor, Status, str]:
        """One input; what fails leaves it as it is, with a status that says so."""
        clean = row.detach().clone()
        try:
            with torch.no_grad():
                question = search.CarrierInput(model, clean, count, wanted)
                found = self._attack(question, epsilon)
                if found is None or not bool(torch.isfinite(found).all()):
                    return clean, Status.NOT_FOUND if found is None else Status.NAN, ""
                moved = question.settle(found)
                return moved, Status.FOUND if question.holds(moved) else Status.NOT_FOUND, ""
        except AlreadyViolatedError as error:
            return clean, Status.MISCLASSIFIED, str(error)
        except (AttnRobustError, ArithmeticError, RuntimeError) as error:
            return clean, Status.ERROR, f"{type(error).__name__}: {error}"

    def _seed_of(self, row: "search.CarrierInput") -> int:
        return input_seed(self.seed, row.problem(FrobeniusBall()).digest, type(self).__name__)


class TokenMovingAttack(_Carriers, MinimizationAttack):
    """Moves tokens as little as possible; masses stay.

    Args:
        threat: What may move and how it is measured; ``epsilons`` are in its distance.
        budget: What one input may cost.
        seed: Seed of the run; each input has its own.
    """

    def __init__(self, threat: MoveThreat | None = None, *, budget: AttackBudget | None = None, seed: int = 0) -> None:
        super().__init__(budget=budget, seed=seed)
        self.threat = threat or FrobeniusBall()

    @property
    def distance(self) -> Distance:
        """The threat's distance between carriers."""
        return TokenDistance(self.threat)

    def run(self, model: Model, inputs: Any, criterion: Any, *, early_stop: float | None = None, **kwargs: Any) -> Any:
        """The nearest violation of each input; an input without one stays as it is."""
        return self._run(model, inputs, criterion, epsilon=None, options=kwargs)

    def _attack(self, row: "search.CarrierInput", epsilon: float | None) -> Tensor | None:
        return search.moved(row, self.threat, budget=self.budget, seed=self.seed)


class TokenDuplicationAttack(_Carriers, FixedEpsilonAttack):
    """Copies tokens into empty slots, at most epsilon of them, and then moves all tokens if it may.

    Args:
        move_epsilon: Frobenius budget of the moves of tokens and copies; 0 means that copies stay at their parents.
        budget: What the moves of one input may cost.
        seed: Seed of the run.

    Raises:
        InputError: A negative ``move_epsilon``.
    """

    def __init__(self, *, move_epsilon: float = 0.0, budget: AttackBudget | None = None, seed: int = 0) -> None:
        super().__init__(budget=budget, seed=seed)
        if not move_epsilon >= 0.0:
            raise InputError(f"move_epsilon must be >= 0; got {move_epsilon}")
        self.move_epsilon = move_epsilon

    @property
    def distance(self) -> Distance:
        """The number of copies."""
        return CopyCount()

    def run(self, model: Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Greedily chosen copies, the strongest first, until the criterion holds or epsilon is reached."""
        return self._run(model, inputs, criterion, epsilon=epsilon, options=kwargs)

    def _attack(self, row: "search.CarrierInput", epsilon: float | None) -> Tensor | None:
        copies = int(epsilon or 0)
        return search.duplicated(row, copies, move_epsilon=self.move_epsilon, budget=self.budget, seed=self.seed)


class MassSplittingAttack(_Carriers, MinimizationAttack):
    """Moves tokens and splits them into children in empty slots; ``epsilons`` are distances W_p between the measures.

    The search pays for the coupling of children with their parents, which W_p never exceeds.

    Args:
        order: p, one of 1, 2, infinity.
        domain_radius: Tokens stay in this ball around 0; None means all of space.
        budget: What each of the searches may cost.
        seed: Seed of the run.
    """

    def __init__(
        self,
        order: Order = 2,
        *,
        domain_radius: float | None = None,
        budget: AttackBudget | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(budget=budget, seed=seed)
        self.order, self.domain_radius = order, domain_radius

    @property
    def distance(self) -> Distance:
        """W_p between the measures, by exact transport."""
        return MeasureDistance(self.order)

    def run(self, model: Model, inputs: Any, criterion: Any, *, early_stop: float | None = None, **kwargs: Any) -> Any:
        """The nearest measure found; an input without one stays as it is."""
        return self._run(model, inputs, criterion, epsilon=None, options=kwargs)

    def _attack(self, row: "search.CarrierInput", epsilon: float | None) -> Tensor | None:
        return search.split(row, self.order, domain_radius=self.domain_radius, budget=self.budget, seed=self.seed)
