"""Per input: the verified attack against the certified radius."""

import math
from collections.abc import Sequence

from attnrobust.attacks import DEFAULT_ATTACK, DEFAULT_BUDGET, AttackBudget
from attnrobust.attacks import attack as run_attack
from attnrobust.certify import certify
from attnrobust.errors import InputError, SoundnessError
from attnrobust.problem import Problem, refuse_second_threat, require_problem
from attnrobust.results import AttackResult, Certificate, CertificationReport, Comparison, Status

RADIUS_ROUNDING = 1e-12
"""Relative rounding of a radius itself. That of the outputs is no excuse: an attack's usage has it taken away and a
certificate's budgets are lowered by it (docs/rounding.md)."""


class UnsoundError(SoundnessError):
    """A verified attack lies inside a certified radius; ``comparison`` holds both sides.

    Args:
        message: One line that names the attack, the certificates and their references.
        comparison: The two results, status UNSOUND.
    """

    def __init__(self, message: str, comparison: Comparison) -> None:
        super().__init__(message)
        self.comparison = comparison

    def __reduce__(self) -> tuple[type["UnsoundError"], tuple[str, Comparison]]:
        return (type(self), (str(self), self.comparison))


def compare(
    problem: Problem,
    *,
    seed: int = 0,
    methods: Sequence[str] | str | None = None,
    attack: str | None = None,
    budget: AttackBudget | None = None,
    **removed: object,
) -> Comparison:
    """Certify and attack one problem: ``certified radius <= true robust radius <= attack radius``.

    Args:
        problem: Network, clean input, threat and goal.
        seed: Seed of the attack's starts and of probabilistic certificates.
        methods: Names of certificates, or one name; None means all that apply.
        attack: Name of the attack; None means the one of the threat.
        budget: What the attack may cost; None means its default.
        removed: ``threat=`` of earlier versions; refused with the new way.

    Returns:
        Both results; ``gap = attack radius / best certified radius`` (infinite where one side is missing).

    Raises:
        UnsoundError: The verified attack is inside a certified radius.
        UnknownNameError: A certificate or an attack that does not exist.
        UnsupportedThreatError: An attack that does not search the threat.
        InputError: ``threat=``; the threat is part of the problem.
    """
    refuse_second_threat(removed)
    require_problem(problem)
    certification = certify(problem, methods=methods, seed=seed)
    chosen = DEFAULT_ATTACK if attack is None else attack
    result = run_attack(problem, method=chosen, seed=seed, budget=DEFAULT_BUDGET if budget is None else budget)
    return join(problem, result, certification)


def join(problem: Problem, attack: AttackResult, certification: CertificationReport) -> Comparison:
    """Put an attack and certificates of the same problem beside each other.

    Args:
        problem: The problem that both answer.
        attack: Verified attack result.
        certification: Certificates.

    Returns:
        The comparison, status of the attack, gap >= 1 up to rounding.

    Raises:
        InputError: A result that belongs to another problem, or a verified radius that is NaN or negative.
        UnsoundError: A verified attack is inside a certified radius, beyond ``RADIUS_ROUNDING``.
    """
    _refuse_other_problem(problem.digest, attack, certification)
    found = attack.status is Status.FOUND
    if found and not attack.radius >= 0.0:
        raise InputError(f"attack {attack.attack} reports the radius {attack.radius} for a violation; it must be >= 0")
    slack = RADIUS_ROUNDING * problem.threat.rounding_factor
    broken = [c for c in certification.certificates if found and attack.radius < c.radius * (1.0 - slack)]
    comparison = Comparison(
        problem=problem.digest,
        attack=attack,
        certification=certification,
        status=Status.UNSOUND if broken else attack.status,
        gap=_gap(attack.radius if found else math.inf, certification.best),
    )
    if broken:
        raise UnsoundError(_accusation(attack, broken), comparison)
    return comparison


def _refuse_other_problem(expected: str, attack: AttackResult, certification: CertificationReport) -> None:
    claims = [("attack " + attack.attack, attack.problem), ("certification report", certification.problem)]
    claims += [("certificate " + c.method, c.problem) for c in certification.certificates]
    for what, digest in claims:
        if digest != expected:
            raise InputError(
                f"{what} answers problem {digest[:12]}, not {expected[:12]}; "
                "compare results of the same weights, tokens, threat and goal"
            )


def _gap(radius: float, best: Certificate | None) -> float:
    if best is None or best.radius <= 0.0 or not math.isfinite(radius):
        return math.inf
    return radius / best.radius


def _accusation(attack: AttackResult, broken: Sequence[Certificate]) -> str:
    certificates = "; ".join(f"{c.method} certifies {c.radius:.9g} ({c.kind}, {c.reference})" for c in broken)
    return (
        f"UNSOUND on problem {attack.problem[:12]}: attack {attack.attack} (seed {attack.seed}) violates the goal at "
        f"radius {attack.radius:.9g} with usage {attack.usage:.9g}, but {certificates}; one of them is wrong, please "
        "report it"
    )
