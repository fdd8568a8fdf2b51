"""Attacks: verified upper bounds of the robust radius."""

from collections.abc import Iterable, Sequence

from attnrobust.attacks.foolbox.names import FOOLBOX_ATTACKS, FoolboxEntry, foolbox_names
from attnrobust.attacks.mass_splitting import MassSplitting
from attnrobust.attacks.method import (
    AttackBudget,
    AttackMethod,
    MovingAttack,
    checked_epsilon,
    require_budget,
    run_many,
)
from attnrobust.attacks.registry import ATTACKS, DEFAULT_ATTACK, attack_for, attack_named, check_attack_name
from attnrobust.attacks.token_duplication import TokenDuplication, duplication_effect
from attnrobust.attacks.token_moving import TokenMoving
from attnrobust.attacks.token_radii import token_radii
from attnrobust.errors import InputError
from attnrobust.problem import Problem, refuse_second_threat, require_problem
from attnrobust.results import AttackResult
from attnrobust.tokens import as_count, as_seed

__all__ = [
    "ATTACKS",
    "DEFAULT_ATTACK",
    "FOOLBOX_ATTACKS",
    "AttackBudget",
    "AttackMethod",
    "FoolboxEntry",
    "MassSplitting",
    "MovingAttack",
    "TokenDuplication",
    "TokenMoving",
    "attack",
    "attack_for",
    "attack_many",
    "attack_named",
    "check_attack_name",
    "duplication_effect",
    "foolbox_names",
    "token_radii",
]

DEFAULT_BUDGET = AttackBudget()


def attack(
    problem: Problem,
    *,
    method: str | AttackMethod = DEFAULT_ATTACK,
    epsilon: float | None = None,
    seed: int = 0,
    budget: AttackBudget = DEFAULT_BUDGET,
    **removed: object,
) -> AttackResult:
    """Attack one input: the nearest violation found, or with ``epsilon`` the largest use of the budget found.

    Args:
        problem: Network, clean input, threat and goal.
        method: The attack, or its name: ``token-moving``, ``mass-splitting``, ``token-duplication``, a foolbox attack
            such as ``foolbox:L2PGD``; the default is the one of the threat.
        epsilon: Fixed budget of the adversary, > 0; None searches the minimal radius.
        seed: Seed of the run.
        budget: What the search may cost.
        removed: ``threat=`` of earlier versions; refused with the new way.

    Returns:
        A result whose radius and usage were re-measured in float64 at exactly the returned tokens. The radius of a
        FOUND row without epsilon is an upper bound of the true robust radius.

    Raises:
        UnknownNameError: A method that does not exist.
        UnsupportedThreatError: The method does not handle this threat, layer or goal.
        InputError: epsilon that is not a positive number.
    """
    refuse_second_threat(removed)
    require_problem(problem)
    seed = as_seed(seed)
    require_budget(budget)
    chosen = attack_for(problem.threat, method)
    return chosen.run([problem], epsilon=checked_epsilon(epsilon), seed=seed, budget=budget)[0]


def attack_many(
    problems: Sequence[Problem],
    *,
    method: str | AttackMethod = DEFAULT_ATTACK,
    epsilon: float | None = None,
    seed: int = 0,
    budget: AttackBudget = DEFAULT_BUDGET,
    batch_size: int = 16,
) -> list[AttackResult]:
    """Attack many inputs; those of equal shape on the same layer advance together.

    The seed of an input is a hash of ``seed``, the problem and the attack, and no number of one input depends on its
    companions: results are the same for every batch size and order (unless ``budget.seconds`` cuts a run short).

    Args:
        problems: Any problems; they are grouped by attack, layer, shape, threat and kind of goal.
        method: The attack, or its name, see ``attack``; the default is the one of each problem's threat.
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
    batch_size, epsilon, seed = as_count("batch_size", batch_size), checked_epsilon(epsilon), as_seed(seed)
    require_budget(budget)
    if not isinstance(problems, Iterable):
        raise InputError(f"the problems are a {type(problems).__name__}; give a list of attnrobust.Problem")
    problems = tuple(problems)
    for problem in problems:
        require_problem(problem)
    # a named attack answers every problem; where it does not search the threat, by a row that says so
    named = attack_named(method) if isinstance(method, str) and method != DEFAULT_ATTACK else method
    shares: dict[AttackMethod, list[int]] = {}
    for index, problem in enumerate(problems):
        shares.setdefault(attack_for(problem.threat) if isinstance(named, str) else named, []).append(index)
    results: dict[int, AttackResult] = {}
    for chosen, places in shares.items():
        part = [problems[i] for i in places]
        rows = run_many(chosen, part, epsilon=epsilon, seed=seed, budget=budget, batch_size=batch_size)
        results.update(zip(places, rows, strict=True))
    return [results[i] for i in range(len(problems))]
