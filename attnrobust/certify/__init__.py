"""Certificates: lower bounds of the robust radius."""

import importlib
import inspect
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from attnrobust.certify.measures.copies import WorstCopies, worst_copies
from attnrobust.certify.method import CertificateMethod, PreparedBound, certify_with
from attnrobust.certify.registry import METHODS, ON_REQUEST, method_named
from attnrobust.errors import InputError, one_line
from attnrobust.problem import Problem, refuse_second_threat, require_problem
from attnrobust.results import CertificationReport
from attnrobust.tokens import as_seed

__all__ = [
    "METHODS",
    "ON_REQUEST",
    "CertificateMethod",
    "PreparedBound",
    "WorstCopies",
    "certify",
    "certify_with",
    "method_named",
    "worst_copies",
]


def certify(
    problem: Problem,
    *,
    methods: Sequence[str] | str | None = None,
    seed: int = 0,
    **removed: object,
) -> CertificationReport:
    """Certify one problem by every method that applies (or the named ones); ``report.best`` has the largest radius.

    Args:
        problem: Network, clean input, threat and goal.
        methods: Names of certificates, or one name; None means all but those that would take minutes.
        seed: Seed of the random start vectors of probabilistic methods.
        removed: ``threat=`` of earlier versions; refused with the new way.

    Returns:
        All certificates beside each other; each radius is a lower bound of the true robust radius. Methods that do not
        speak about the problem, or whose computation failed, are in ``skipped`` with the reason.

    Raises:
        UnknownNameError: A name that does not exist (lists the nearest).
        InputError: ``threat=``; the threat is part of the problem.
    """
    refuse_second_threat(removed)
    require_problem(problem)
    seed = as_seed(seed)
    methods = (methods,) if isinstance(methods, str) else methods
    chosen = METHODS if methods is None else tuple(map(method_named, _names(methods)))
    return certify_with(problem, chosen, seed=seed, named=methods is not None)


def _names(methods: object) -> tuple[str, ...]:
    if not isinstance(methods, Iterable):
        raise InputError(f"methods is {one_line(methods)}; give names of certificates, or None for all that apply")
    return tuple(methods)


class _CallablePackage(ModuleType):
    """This package and the function ``certify`` share a name in ``attnrobust``, and an import may bind either; so the
    package is callable: ``attnrobust.certify(problem)`` and ``attnrobust.certify.registry`` work in every order.
    """

    __call__ = staticmethod(certify)
    __signature__ = inspect.signature(certify)

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (__name__,)  # pickled by name, as functions are


sys.modules[__name__].__class__ = _CallablePackage
