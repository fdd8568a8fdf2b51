"""Attacks: verified upper bounds of the robust radius."""

from collections.abc import Sequence

from attnrobust.attacks.foolbox.names import FOOLBOX_ATTACKS, FoolboxEntry, foolbox_names
from attnrobust.attacks.mass_splitting import split_attack
from attnrobust.attacks.measures.result import MeasureAttackResult
from attnrobust.attacks.method import AttackBudget, AttackMethod, checked_epsilon, run_many
from attnrobust.attacks.registry import ALL_ATTACKS, attack_named
from attnrobust.attacks.token_duplication import duplication_attack, duplication_effect
from attnrobust.attacks.token_radii import token_radii
from attnrobust.errors import InputError
from attnrobust.problem import Problem
from attnrobust.results import AttackResult

__all__ = [
    "ALL_ATTACKS",
    "FOOLBOX_ATTACKS",
    "AttackBudget",
    "AttackMethod",
    "FoolboxEntry",
    "MeasureAttackResult",
    "attack",
    "attack_many",
    "attack_named",
    "duplication_attack",
    "duplication_effect",
    "foolbox_names",
    "split_attack",
    "token_radii",
]

DEFAULT_BUDGET = AttackBudget()


def attack(
    problem: Problem,
    *,
    method: str = "token-moving",
    epsilon: float | None = None,
    seed: int = 0,
    budget: AttackBudget = DEFAULT_BUDGET,
) -> AttackResult:
    """Attack one input: the nearest violation found, or with ``epsilon`` the largest use of the budget found.

    Args:
        problem: Network, clean input, threat and goal.
        method: Name of the attack: ``token-moving``, or a foolbox attack such as ``foolbox:L2PGD``.
        epsilon: Fixed budget of the adversary, > 0; None searches the minimal radius.
        seed: Seed of the run.
        budget: What the search may cost.

    Returns:
        A result whose radius and usage were re-measured in float64 at exactly the returned tokens. The radius of a
        FOUND row without epsilon is an upper bound of the true robust radius.

    Raises:
        UnknownNameError: A method that does not exist.
        UnsupportedThreatError: The method does not handle this threat or goal.
        InputError: epsilon that is not a positive number.
    """
    chosen = attack_named(method)
    return chosen.run([problem], epsilon=checked_epsilon(epsilon), seed=seed, budget=budget)[0]


def attack_many(
    problems: Sequence[Problem],
    *,
    method: str = "token-moving",
    epsilon: float | None = None,
    seed: int = 0,
    budget: AttackBudget = DEFAULT_BUDGET,
    batch_size: int = 16,
) -> list[AttackResult]:
    """Attack many inputs; those of equal shape on the same layer advance together.

    The seed of an input is a hash of ``seed``, the problem and the attack, and no number of one input depends on its
    companions: results are the same for every batch size and order (unless ``budget.seconds`` cuts a run short).

    Args:
        problems: Any problems; they are grouped by layer, shape, threat and kind of goal.
        method: Name of the attack: ``token-moving``, or a foolbox attack such as ``foolbox:L2PGD``.
        epsilon: Fixed budget of the adversary, > 0; None searches the minimal radius.
        seed: Seed of the run.
        budget: What the search may cost, per input.
        batch_size: Most inputs that are attacked together.

    Returns:
        One result per problem, in order; an input that fails has status ERROR and a note, the others go on.

    Raises:
        UnknownNameError: A method that does not exist.
        InputError: epsilon or batch_size that is not positive.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be >= 1; got {batch_size}")
    chosen = attack_named(method)
    return run_many(chosen, problems, epsilon=checked_epsilon(epsilon), seed=seed, budget=budget, batch_size=batch_size)
