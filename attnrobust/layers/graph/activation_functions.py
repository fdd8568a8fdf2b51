"""Activation functions with their first three derivatives in closed form, entry by entry.

With ``s`` the logistic function, ``Phi`` and ``p`` the normal distribution function and density:
``(x Phi)' = Phi + x p``, ``'' = p (2 - x^2)``, ``''' = p (x^3 - 4 x)``;
``(x s(c x))' = s + c x s'``, ``'' = 2 c s' + c^2 x s''``, ``''' = 3 c^2 s'' + c^3 x s'''``;
``(x (1 + tanh u) / 2)' = (1 + T) / 2 + x T' / 2``, ``'' = T' + x T'' / 2``, ``''' = 3 T'' / 2 + x T''' / 2`` with
``T = tanh u(x)``. What falls off at infinity is formed from what falls off (sech, s(-x)), never as ``1 - tanh^2``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "sigmoid", "identity"]
"""Names as in ``Mlp``, and "quick_gelu": ``x s(1.702 x)``."""

Derivatives = tuple[Tensor, Tensor, Tensor]

QUICK = 1.702
CUBIC = 0.044715  # of the tanh form of GELU


@dataclass(frozen=True)
class Scalar:
    """A function of one number.

    Args:
        value: The function, differentiable by autograd.
        slope: Its first derivative.
        higher: Its second and third derivative; None where they do not exist everywhere.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    higher: Callable[[Tensor], tuple[Tensor, Tensor]] | None


def _smooth(value: Callable[[Tensor], Tensor], derivatives: Callable[[Tensor], Derivatives]) -> Scalar:
    return Scalar(value, lambda x: derivatives(x)[0], lambda x: derivatives(x)[1:])


def _normal(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _gelu(x: Tensor) -> Derivatives:
    p = _normal(x)
    return 0.5 * torch.special.erfc(-x / math.sqrt(2.0)) + x * p, p * (2.0 - x * x), p * x * (x * x - 4.0)


def _tanh(x: Tensor) -> Derivatives:
    t, square = torch.tanh(x), torch.cosh(x).reciprocal().square()
    return square, -2.0 * t * square, square * (6.0 * t * t - 2.0)


def _logistic(x: Tensor) -> Derivatives:
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    first = s * rest
    return first, first * (rest - s), first * (1.0 - 6.0 * first)


def _gated(x: Tensor, c: float) -> Derivatives:
    s_1, s_2, s_3 = _logistic(c * x)
    return torch.sigmoid(c * x) + c * x * s_1, 2.0 * c * s_1 + c**2 * x * s_2, 3.0 * c**2 * s_2 + c**3 * x * s_3


def _gelu_tanh(x: Tensor) -> Derivatives:
    c = math.sqrt(2.0 / math.pi)
    u = c * (x + CUBIC * x**3)
    u_1, u_2, u_3 = c * (1.0 + 3.0 * CUBIC * x * x), 6.0 * c * CUBIC * x, 6.0 * c * CUBIC
    d_1, d_2, d_3 = _tanh(u)
    t_1, t_2 = d_1 * u_1, d_2 * u_1**2 + d_1 * u_2
    t_3 = d_3 * u_1**3 + 3.0 * d_2 * u_1 * u_2 + d_1 * u_3
    return torch.sigmoid(2.0 * u) + 0.5 * x * t_1, t_1 + 0.5 * x * t_2, 1.5 * t_2 + 0.5 * x * t_3


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(QUICK * x)


FUNCTIONS: Mapping[str, Scalar] = {
    "relu": Scalar(nn.functional.relu, lambda x: (x > 0).to(x.dtype), None),
    "gelu": _smooth(nn.functional.gelu, _gelu),
    "gelu_tanh": _smooth(partial(nn.functional.gelu, approximate="tanh"), _gelu_tanh),
    "quick_gelu": _smooth(_quick_gelu, partial(_gated, c=QUICK)),
    "silu": _smooth(nn.functional.silu, partial(_gated, c=1.0)),
    "tanh": _smooth(torch.tanh, _tanh),
    "sigmoid": _smooth(torch.sigmoid, _logistic),
    "identity": _smooth(lambda x: x, lambda x: (torch.ones_like(x), torch.zeros_like(x), torch.zeros_like(x))),
}
