"""Shape checks of the package at run time: the first calls of every test.

A check costs 50 us, and a search makes a hundred thousand calls with the same few shapes: to check them all took most
of the suite's time. So every test checks its first ``CALLS`` calls, and runs as it does for users afterwards.
"""

from collections.abc import Callable
from functools import wraps
from itertools import count
from typing import Any

import jaxtyping
from beartype import beartype

CALLS = 4000
"""Checked in every test; nearly all tests make fewer."""


class _Calls:
    """How many calls this test has had checked."""

    number = count()


def restart() -> None:
    """Another test begins."""
    _Calls.number = count()
    _switch(on=True)


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The type checker of the import hook: beartype, until the test has used its calls."""
    checked: Callable[..., Any] = beartype(function)

    @wraps(function)
    def check(*args: Any, **kwargs: Any) -> Any:
        if next(_Calls.number) >= CALLS:
            _switch(on=False)
        return checked(*args, **kwargs)

    return check


def _switch(*, on: bool) -> None:
    jaxtyping.config.update("jaxtyping_disable", not on)
