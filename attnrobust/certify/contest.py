"""The certificates of one problem that can still win, given what an attack found and what was certified so far."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from attnrobust.problem import Problem
from attnrobust.results import Certificate, CertificationReport, NotApplicable

LEADERS = ("displacement", "margin-one-token", "margin-majorant")
"""Run first: on the measured problems of a layer one of them, or ``singla2020-curvature``, has the largest radius."""

BEHIND = frozenset({
    "castin2024-reported", "castin2024-derived", "spread-lipschitz", "havens2024-local", "rigorous-local",
})  # fmt: skip
"""Well behind a leader that is within ``NEAR`` of the attack in the medians of docs/tightness.md."""

NEAR, EXACT = 3.0, 1.01
"""Gaps: up to the first a leader is not overtaken by those behind, up to the second by nothing worth its time."""

ALL = "--all-certificates runs it"

Watch = Callable[[str], object]


@runtime_checkable
class Contestant(Protocol):
    """What is asked of a ``CertificateMethod`` here."""

    @property
    def name(self) -> str:
        """Its name."""

    def undeclared(self, problem: Problem) -> str | None:
        """What of the problem it does not speak about."""

    def attempt(self, problem: Problem, *, seed: int, named: bool) -> Certificate | NotApplicable:
        """Its certificate, or why there is none."""


def certify_what_can_win(
    problem: Problem,
    methods: Sequence[Contestant],
    *,
    attack_radius: float,
    seed: int = 0,
    watch: Watch | None = None,
) -> CertificationReport:
    """Certificates whose radius may be the largest one; the others are in ``skipped`` with the reason.

    No certified radius of a right certificate exceeds the attack radius. So nothing more is run once the best is within
    1 % of it. Behind a leader at a gap of at most ``NEAR`` those are left out that the measurements show behind;
    this is a record of measurements and no theorem, which is why they run where the gap is larger. Each radius is
    searched as always: the attack never bounds a search, so an unsound certificate still shows.

    Args:
        problem: The question.
        methods: Candidates.
        attack_radius: Verified radius of a violation, an upper bound of the robust radius.
        seed: As in ``certify``.
        watch: Is told the name of each certificate that begins.

    Returns:
        The report; its best radius is a lower bound of the robust radius.
    """
    start = time.perf_counter()
    done: list[Certificate] = []
    skipped: list[NotApplicable] = []
    for method in sorted(methods, key=_place):
        reason = _cannot_win(method.name, done, attack_radius)
        if reason is not None and method.undeclared(problem) is None:
            skipped.append(NotApplicable(method=method.name, reason=f"not run: {reason}; {ALL}"))
            continue
        if watch is not None:
            watch(method.name)
        answer = method.attempt(problem, seed=seed, named=False)
        done += [answer] if isinstance(answer, Certificate) else []
        skipped += [answer] if isinstance(answer, NotApplicable) else []
    return CertificationReport(problem.digest, tuple(done), tuple(skipped), time.perf_counter() - start)


def _place(method: Contestant) -> int:
    """Leaders in their order, then the others as they come."""
    return LEADERS.index(method.name) if method.name in LEADERS else len(LEADERS)


def _cannot_win(name: str, done: Sequence[Certificate], attack_radius: float) -> str | None:
    best = max(done, key=lambda certificate: certificate.radius, default=None)
    if best is None or best.radius <= 0.0:
        return None
    if attack_radius <= EXACT * best.radius:
        return f"{best.method} is within 1% of the attack radius"
    if name in BEHIND and best.method in LEADERS and attack_radius <= NEAR * best.radius:
        return f"dominated by {best.method}"
    return None
