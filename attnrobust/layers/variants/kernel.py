"""Attention with any positive kernel, given by its logarithm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.features import PLAIN
from attnrobust.layers.heads import Specification, adopt_weights, softmax_average
from attnrobust.tokens import as_number, tensor_digest

Scores = Callable[[Float[Tensor, "*b n d"], Float[Tensor, "*b n d"]], Float[Tensor, "*b n n"]]


@dataclass(frozen=True, kw_only=True)
class KernelConstants:
    """What the user states about a kernel ``exp(s(x, y))`` for x and y in a compact convex set E.

    Bounds rest on these numbers without checking them; ``refute_constants`` can only refute.

    Args:
        diameter: l2 diameter of E, > 0.
        oscillation: ``sup_x (sup_y s(x, y) - inf_y s(x, y))``, >= 0.
        query_slope: Lipschitz constant of ``x -> s(x, y)``, the same for every y; >= 0.
        key_slope: Lipschitz constant of ``y -> s(x, y)``, the same for every x; >= 0.
    """

    diameter: float
    oscillation: float
    query_slope: float
    key_slope: float

    def __post_init__(self) -> None:
        for name in ("diameter", "oscillation", "query_slope", "key_slope"):
            value = as_number(f"kernel constant {name}", getattr(self, name))
            object.__setattr__(self, name, value)
            if not 0.0 <= value < float("inf") or (name == "diameter" and value == 0.0):
                raise InputError(f"kernel constant {name} is {value}; it must be finite and not negative")


@dataclass(frozen=True, eq=False)
class KernelAttention(Specification):
    """Kernel attention: ``f(X)_i = sum_j P_ij x_j w_v`` with ``P_ij`` proportional to ``mass_j exp(s(x_i, x_j))``.

    Args:
        score: ``s``: two token sequences (*b, n, d) to all pairs (*b, n, n); differentiable torch code without state.
        key: A name for ``score`` that changes when it changes; results are told apart by it.
        w_v: Value weights (d, e).
        constants: What is known of the kernel on a compact set; None if nothing (certificates then refuse).

    Raises:
        InputError: An empty key, shapes that do not fit, NaN or infinite weights.

    References:
        Vuckovic, Baratin and Tachet des Combes, arXiv 2007.02876 (attention as an integral operator of a kernel).

    Examples:
        >>> import torch
        >>> layer = KernelAttention(lambda x, y: -torch.cdist(x, y), "laplace", torch.eye(2))
        >>> layer(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
        tensor([[1., 2.]], dtype=torch.float64)
    """

    score: Scores
    key: str
    w_v: Float[Tensor, "d e"]
    constants: KernelConstants | None = None

    feature_names: ClassVar[Mapping[str, str]] = dict.fromkeys(("score", "key", "w_v", "constants"), PLAIN)

    def __post_init__(self) -> None:
        adopt_weights(self, w_v=2)
        if not self.key:
            raise InputError("a kernel needs a key: a name that changes when the score function changes")

    @property
    def width(self) -> int:
        return int(self.w_v.shape[0])

    @property
    def out_width(self) -> int:
        return int(self.w_v.shape[1])

    def __call__(self, x: Tensor, mass: Tensor | None = None) -> Tensor:
        scores = self.score(x, x)
        if scores.shape != (*x.shape[:-1], x.shape[-2]):
            raise InputError(f"the kernel's scores have shape {tuple(scores.shape)} for tokens {tuple(x.shape)}")
        log_mass = 0.0 if mass is None else mass.log()[..., None, :]
        return softmax_average(scores + log_mass, x @ self.w_v, None)

    @cached_property
    def digest(self) -> str:
        return tensor_digest(self.w_v, extra=f"KernelAttention;{self.key};{self.constants!r}")


def refute_constants(layer: KernelAttention, points: Float[Tensor, "n d"]) -> None:
    """Refuse constants that sampled points of the set already contradict; passing proves nothing.

    Args:
        layer: A layer with constants.
        points: Points of the set E, two or more.

    Raises:
        InputError: A constant is too small, with the number that the points need.
    """
    constants = layer.constants
    if constants is None:
        raise InputError("the layer states no constants of its kernel")
    distance = (points[:, None] - points[None]).norm(dim=-1)
    scores = layer.score(points, points)
    apart = distance > 0
    gap = distance.masked_fill(~apart, 1.0)[..., None]
    slopes_x = ((scores[:, None, :] - scores[None, :, :]).abs() / gap)[apart]
    slopes_y = ((scores.T[:, None, :] - scores.T[None, :, :]).abs() / gap)[apart]
    needed = {
        "diameter": distance.max(),
        "oscillation": (scores.amax(dim=1) - scores.amin(dim=1)).max(),
        "query_slope": slopes_x.max() if slopes_x.numel() else distance.new_zeros(()),
        "key_slope": slopes_y.max() if slopes_y.numel() else distance.new_zeros(()),
    }
    for name, value in needed.items():
        stated = getattr(constants, name)
        if float(value) > stated * (1.0 + 1e-9):  # rounding of the sampled quotients
            raise InputError(f"kernel constant {name} is {stated:g}, but sampled points already need {float(value):g}")
