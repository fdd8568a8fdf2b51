"""Certificates: lower bounds of the robust radius."""

import importlib
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from attnrobust.certify.measures.copies import WorstCopies, worst_copies
from attnrobust.certify.measures.method import MeasureMethod, certify_question
from attnrobust.certify.measures.question import MeasureQuestion
from attnrobust.certify.measures.registry import ALL_MEASURE_METHODS, measure_method_named
from attnrobust.certify.method import CertificateMethod, PreparedBound, certify_with
from attnrobust.certify.registry import ALL_METHODS, method_named
from attnrobust.problem import Problem
from attnrobust.results import CertificationReport
from attnrobust.threats.measures import Copies, MeasureThreat

__all__ = [
    "ALL_MEASURE_METHODS",
    "ALL_METHODS",
    "CertificateMethod",
    "MeasureMethod",
    "MeasureQuestion",
    "PreparedBound",
    "WorstCopies",
    "certify",
    "certify_with",
    "measure_method_named",
    "method_named",
    "worst_copies",
]


def certify(
    problem: Problem,
    *,
    methods: Sequence[str] | str | None = None,
    seed: int = 0,
    threat: MeasureThreat | Copies | None = None,
) -> CertificationReport:
    """Certify one problem by every method that applies (or the named ones); ``report.best`` has the largest radius.

    Args:
        problem: Network, clean input, threat and goal.
        methods: Names of certificates, or one name; None means all.
        seed: Seed of the random start vectors of probabilistic methods.
        threat: Perturbed token measures (split, copied, moved masses) in place of the problem's own threat, of which
            only the movable tokens count then; ``Copies`` also move within it.

    Returns:
        All certificates beside each other; each radius is a lower bound of the true robust radius.

    Raises:
        UnknownNameError: A name that does not exist (lists the nearest).
        UnsupportedThreatError: A threat on measures that no certificate covers, with the cure.
    """
    methods = (methods,) if isinstance(methods, str) else methods
    if threat is not None:
        for_measures = ALL_MEASURE_METHODS if methods is None else tuple(map(measure_method_named, methods))
        return certify_question(MeasureQuestion(problem, threat), for_measures, seed=seed)
    chosen = ALL_METHODS if methods is None else tuple(method_named(name) for name in methods)
    return certify_with(problem, chosen, seed=seed)


class _CallablePackage(ModuleType):
    """This package and the function ``certify`` share a name in ``attnrobust``, and an import may bind either; so the
    package is callable: ``attnrobust.certify(problem)`` and ``attnrobust.certify.registry`` work in every order.
    """

    __call__ = staticmethod(certify)
    __signature__ = inspect.signature(certify)

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (__name__,)  # pickled by name, as functions are


sys.modules[__name__].__class__ = _CallablePackage
