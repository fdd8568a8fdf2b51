"""The one place that imports foolbox: its attacks by table entry, its base classes, and a model for them to query."""

import ctypes
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.attacks.foolbox.names import FoolboxEntry, Options

with warnings.catch_warnings():
    # foolbox 3.3 takes a filter of its image attacks from a place that scipy is about to close.
    warnings.simplefilter("ignore", DeprecationWarning)
    from eagerpy.astensor import astensor, astensor_
    from foolbox import attacks
    from foolbox.attacks.base import AttackWithDistance, FixedEpsilonAttack, MinimizationAttack, get_criterion
    from foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
    from foolbox.distances import Distance, l2
    from foolbox.models.base import Model
    from foolbox.models.pytorch import PyTorchModel
    from foolbox.types import Bounds

__all__ = [
    "AttackWithDistance",
    "Criterion",
    "Distance",
    "FixedEpsilonAttack",
    "Interrupted",
    "MinimizationAttack",
    "Misclassification",
    "Model",
    "QueryModel",
    "TargetedMisclassification",
    "astensor",
    "astensor_",
    "attacks",
    "call_attack",
    "foolbox_model",
    "get_criterion",
    "l2",
    "make_attack",
    "run_limited",
]

STEP_SHARE = 2.5
"""The steps of a fixed-size search together are this many radii long."""
BOXED_STEP = 0.1
"""Least first step of the attacks in a box, in units of the first-order radius."""
FIRST_CONSTANT = 1.0
CONSTANTS = 4
"""Weights of the violation against the length: the first one, and how many the attacks in a box try."""
GRACE_SECONDS = 2.0
"""How long an interrupted search may take to notice."""


class Interrupted(BaseException):
    """Ends a foolbox attack from within; not an ``Exception``, so that no attack swallows it."""


class QueryModel(Model):
    """Two or more scores for each of a batch of points; score 0 wins as long as the goal holds.

    Args:
        scores: Scores (b, c) of points (b, n, d), differentiable.
        box: Largest absolute entry of a point; infinity for none.
    """

    def __init__(self, scores: Callable[[Tensor], Tensor], *, box: float) -> None:
        self._scores, self._bounds = scores, Bounds(-box, box)

    @property
    def bounds(self) -> Bounds:
        return self._bounds

    def __call__(self, inputs: Any) -> Any:
        points, restore = astensor_(inputs)
        return restore(astensor(self._scores(points.raw)))


def foolbox_model(module: torch.nn.Module, *, bounds: tuple[float, float]) -> Model:
    """A module as a foolbox model on the CPU or wherever its inputs are; foolbox by itself moves it to a GPU."""
    return PyTorchModel(module, bounds=bounds, device="cpu")


def make_attack(entry: FoolboxEntry, *, steps: int, entries: int) -> AttackWithDistance:
    """A foolbox attack with options that fit points in units of their first-order radius.

    Args:
        entry: A supported attack.
        steps: Gradient steps.
        entries: Entries n d of a point.
    """
    kind: type[Any] = getattr(attacks, entry.attack)
    return kind(**_options(entry, steps=steps, entries=entries))  # type: ignore[no-any-return]


def _options(entry: FoolboxEntry, *, steps: int, entries: int) -> dict[str, int | float]:
    """Keyword arguments of the attack's class."""
    if entry.options is Options.DESCENT:
        return {"steps": steps, "rel_stepsize": STEP_SHARE / steps}
    if entry.options is Options.ADAM:
        return {"steps": steps, "rel_stepsize": STEP_SHARE / steps / entries ** (1.0 / entry.norm)}
    if entry.options is Options.STEPS:
        return {"steps": steps}
    if entry.options is Options.BOXED:
        root, step = entries**0.5, max(BOXED_STEP, STEP_SHARE / steps)
        search = {"binary_search_steps": CONSTANTS, "steps": steps, "initial_const": FIRST_CONSTANT}
        if entry.attack == "EADAttack":
            return search | {"initial_stepsize": step, "regularization": step / root / steps}
        return search | {"stepsize": step / ((entry.box or 1.0) * root)}
    if entry.options is Options.NOISE and "Repeated" in entry.attack:
        return {"repeats": steps}
    return {}


def call_attack(
    attack: AttackWithDistance, model: QueryModel, start: Float[Tensor, "b n d"], *, epsilon: float | None
) -> Float[Tensor, "b n d"]:
    """What the attack proposes against score 0, starting at ``start``: its raw points, whatever it says about them."""
    labels = torch.zeros(start.shape[0], dtype=torch.int64, device=start.device)
    raw, _, _ = attack(model, start, Misclassification(labels), epsilons=epsilon)
    points: Tensor = raw
    return points


def run_limited(call: Callable[[], Tensor], *, seconds: float) -> Tensor | BaseException:
    """The result of a call, the exception that it ended with, or ``Interrupted`` where it does not return in time.

    The call runs in a thread of its own with gradients enabled. A search that does not end is interrupted at its next
    Python instruction; one that is stuck inside a library call is left behind (as a daemon thread).

    Args:
        call: The search.
        seconds: Wall time that it gets.
    """
    outcome: list[Tensor | BaseException] = []

    def work() -> None:
        try:
            with torch.enable_grad():
                outcome.append(call())
        except Interrupted as stop:
            outcome.append(stop)
        except Exception as error:  # noqa: BLE001 - another library's code: every failure becomes a status
            outcome.append(error)

    thread = threading.Thread(target=work, name="foolbox", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
        return outcome[0] if outcome else Interrupted(f"did not return within {seconds:.3g} s")
    finally:
        if thread.is_alive():
            _interrupt(thread)
            thread.join(GRACE_SECONDS)


def _interrupt(thread: threading.Thread) -> None:
    """Raise ``Interrupted`` in the thread when it runs its next instruction."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupted))
