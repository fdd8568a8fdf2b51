"""Running error analysis: a float64 computation carries a bound of its own rounding, entry by entry.

``tracked(x)`` is a tensor that every operation of the layers accepts; ``error_of(f(tracked(x)))`` bounds
``|computed f(x) - exact f(x)|``. Every rule adds what the errors of its arguments do to the exact result and what the
operation itself rounds, whatever the order of its sums (docs/rounding.md has the rules with their proofs). An operation
without a rule raises ``NotTrackedError``.

References:
    Wilkinson 1986; Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 3.1 (gamma_n) and 3.3.
"""

# ruff: noqa: ARG001, ARG005 - every rule takes the computed value and the arguments of its operation
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

UNIT = 2.0**-52
"""Twice the unit roundoff: the second half covers products of errors and the rounding of the bounds themselves."""
UNDERFLOW = 2.0**-1021
"""What one operation may lose below the normal numbers."""
LIBRARY = 8.0
"""Units within which an exponential, logarithm, root, sigmoid or error function of the library is rounded."""
DIRECT_POINTS = 25
"""Up to so many points the library subtracts them (the default ``compute_mode`` of cdist)."""

Rule = Callable[..., Tensor]


class NotTrackedError(NotImplementedError):
    """An operation has no rule, so its rounding is not known."""


class Tracked(Tensor):
    """A float64 tensor with ``bound``, at least the distance of each entry from its exact value."""

    bound: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _apply(func, args, kwargs or {})


class tracking(TorchFunctionMode):  # noqa: N801 - a context manager
    """Inside, products of plain tensors (weights with weights) carry the bound of their rounding as well."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _apply(func, args, kwargs or {})


def _apply(func: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # .shape, .T and the like: func.__self__ is the descriptor
        name = getattr(func.__self__, "__name__", "")
    followed = any(isinstance(a, Tracked) for a in (*args, *options.values()))
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - the documented way to call the function itself
        if name in _PLAIN or (name in _VIEWS and not followed):
            return func(*args, **options)
        if name in _VIEWS:
            return make(func(_value(args[0]), *args[1:], **options), func(_bound(args[0]), *args[1:], **options))
        rule = _RULES.get(name)
        if rule is None:
            raise NotTrackedError(f"no rounding rule for {name}")
        value = func(*[_value(a) for a in args], **{key: _value(a) for key, a in options.items()})
        return make(value, rule(value, *args, **options)) if value.is_floating_point() else value


def make(value: Tensor, bound: Tensor) -> Tracked:
    """A tensor with its bound; an infinite value that every rule hands on (a mask's -inf) is exact."""
    found: Tracked = value.detach().as_subclass(Tracked)
    found.bound = torch.where(torch.isinf(value), 0.0, bound).expand(value.shape)
    return found


def tracked(value: Tensor) -> Tracked:
    """An exact input."""
    return make(value, torch.zeros_like(value))


def error_of(value: Tensor) -> Tensor:
    """Bound of the distance from the exact value; infinity where an argument's error leaves the function's domain."""
    return _bound(value).nan_to_num(math.inf, math.inf, math.inf)


def gamma(terms: int) -> float:
    """``gamma_n``: relative error of a sum or inner product of n terms in any order."""
    return terms * UNIT


def _value(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Tracked) else x


def _bound(x: Any) -> Tensor:
    if isinstance(x, Tracked):
        return x.bound
    return torch.zeros_like(x) if isinstance(x, Tensor) else torch.zeros((), dtype=torch.float64)


def _size(x: Any) -> Any:
    plain = _value(x)
    return plain.abs() if isinstance(plain, Tensor) else abs(plain)


# ---- rules: (computed value, arguments) -> bound -------------------------------------------------------------------


def _add(z: Tensor, a: Any, b: Any) -> Tensor:
    return _bound(a) + _bound(b) + UNIT * z.abs()


def _multiply(z: Tensor, a: Any, b: Any) -> Tensor:
    return _bilinear(torch.mul, _as_tensor(a, z), _as_tensor(b, z)) + UNIT * z.abs() + UNDERFLOW


def _as_tensor(x: Any, like: Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else like.new_tensor(float(x))


def _bilinear(product: Rule, a: Tensor, b: Tensor) -> Tensor:
    """``|ab - a*b*| <= e_a |b| + |a| e_b + e_a e_b``; infinite masks times 0 count as nothing."""
    ea, eb = _bound(a), _bound(b)
    return product(ea, _size(b)) + product(_size(a), eb) + product(ea, eb)


def _divide(z: Tensor, a: Any, b: Any) -> Tensor:
    room = _size(b) - _bound(b)
    moved = (_bound(a) + z.abs() * _bound(b)) / (room if isinstance(room, Tensor) else z.new_tensor(room))
    return torch.where(torch.as_tensor(room > 0), moved, math.inf) + UNIT * z.abs() + UNDERFLOW


def _reversed_divide(z: Tensor, a: Any, b: Any) -> Tensor:
    return _divide(z, b, a)


def _matmul(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    terms = a.shape[-1]
    own = gamma(terms) * torch.matmul(_size(a), _size(b)) + terms * UNDERFLOW
    return _bilinear(torch.matmul, a, b) + own


def _einsum(z: Tensor, equation: str, a: Tensor, b: Tensor) -> Tensor:
    left, out = equation.replace("...", "").split("->")
    first, second = left.split(",")
    sizes = dict(zip(first, a.shape[-len(first) :], strict=True)) | dict(
        zip(second, b.shape[-len(second) :], strict=True)
    )
    terms = math.prod(size for label, size in sizes.items() if label not in out)

    def product(x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = torch.einsum(equation, x, y)
        return found

    return _bilinear(product, a, b) + gamma(terms) * product(_size(a), _size(b)) + terms * UNDERFLOW


def _softmax(z: Tensor, s: Tensor, dim: int = -1) -> Tensor:
    """Exact weights are within ``exp(+-(d_j + log sum_k P_k e^{d_k}))`` of the computed ones, d the scores' errors."""
    scores = _value(s)
    fall = (scores.amax(dim=dim, keepdim=True) - scores).nan_to_num(0.0, 0.0, 0.0)
    moved = _bound(s) + UNIT * fall + LIBRARY * UNIT
    together = torch.logsumexp(torch.where(z > 0, z.log() + moved, -math.inf), dim=dim, keepdim=True).clamp_min(0.0)
    relative = torch.expm1(moved + together + gamma(scores.shape[dim] + 2))
    changed = torch.where(z > 0, z * relative, 0.0) + math.exp(-708.0) * torch.exp(moved)
    bounded: Tensor = torch.where(torch.isinf(scores), 0.0, changed).clamp_max(1.0)  # weights are in [0, 1]
    return bounded


def _lipschitz(constant: float, *, own: str = "value") -> Rule:
    """A function of this Lipschitz constant, rounded relative to its value or (cancellation inside) its argument."""

    def rule(z: Tensor, a: Tensor, *_: Any, **__: Any) -> Tensor:
        size = z.abs() if own == "value" else torch.maximum(z.abs(), _size(a))
        return constant * _bound(a) + LIBRARY * UNIT * size + UNDERFLOW

    return rule


def _log(z: Tensor, a: Tensor) -> Tensor:
    moved = _divide(torch.zeros_like(z), make(torch.ones_like(z), _bound(a)), _minus_bound(a))
    return moved + LIBRARY * UNIT * z.abs()


def _minus_bound(a: Tensor) -> Tensor:
    low: Tensor = (_value(a) - _bound(a)).clamp_min(0.0)
    return low


def _square(z: Tensor, a: Tensor, *_: Any) -> Tensor:
    moved: Tensor = (2.0 * _size(a) + _bound(a)) * _bound(a)
    return moved + UNIT * z.abs() + UNDERFLOW


def _sqrt(z: Tensor, a: Tensor) -> Tensor:
    error = _bound(a)
    return torch.minimum(error.sqrt(), error / z.clamp_min(UNDERFLOW)) + LIBRARY * UNIT * z


def _rsqrt(z: Tensor, a: Tensor) -> Tensor:
    low = _minus_bound(a)
    return 0.5 * _bound(a) / (low * low.sqrt()) + LIBRARY * UNIT * z


def _cdist(z: Tensor, x: Tensor, y: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """For many points the library expands ``|x - y|^2``, which loses digits of the points' own squares."""
    if p != 2.0 or compute_mode not in (None, "use_mm_for_euclid_dist_if_necessary"):
        raise NotTrackedError("no rounding rule for this form of cdist")
    lengths = [torch.linalg.vector_norm(_size(a) + _bound(a), dim=-1) for a in (x, y)]
    moved = [torch.linalg.vector_norm(_bound(a), dim=-1) for a in (x, y)]
    lost = gamma(x.shape[-1] + 8) * (lengths[0][..., :, None] + lengths[1][..., None, :]).square()
    if max(x.shape[-2], y.shape[-2]) <= DIRECT_POINTS:
        lost = (gamma(x.shape[-1] + 4) * z).square()
    rounded: Tensor = torch.minimum(lost.sqrt(), lost / z.clamp_min(UNDERFLOW)) + LIBRARY * UNIT * z
    rounded += moved[0][..., :, None] + moved[1][..., None, :]
    return rounded


def _terms(a: Tensor, z: Tensor) -> int:
    return max(1, a.numel() // max(1, z.numel()))


def _sum(z: Tensor, a: Tensor, *args: Any, **options: Any) -> Tensor:
    total = _bound(a) + gamma(_terms(a, z)) * _size(a)
    summed: Tensor = total.sum(*args, **options)
    return summed


def _mean(z: Tensor, a: Tensor, *args: Any, **options: Any) -> Tensor:
    total = _bound(a) + gamma(_terms(a, z) + 1) * _size(a)
    averaged: Tensor = total.mean(*args, **options)
    return averaged


def _norm(z: Tensor, a: Tensor, **options: Any) -> Tensor:
    moved: Tensor = torch.linalg.vector_norm(_bound(a), **options)
    return moved * (1.0 + gamma(_terms(a, z))) + (gamma(_terms(a, z)) + LIBRARY * UNIT) * z + UNDERFLOW


def _amax(z: Tensor, a: Tensor, *args: Any, **options: Any) -> Tensor:
    largest: Tensor = _bound(a).amax(*args, **options)
    return largest


def _maximum(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(_bound(a), _bound(b)).expand(z.shape)


def _where(z: Tensor, condition: Tensor, a: Any, b: Any) -> Tensor:
    return torch.where(condition, _bound(a), _bound(b))


def _rms(z: Tensor, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + (torch.finfo(z.dtype).eps if eps is None else eps))
    return _scaled(x, scale, weight)


def _layer_norm(
    z: Tensor, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Variances may be accumulated in one pass, which loses up to ``gamma_d`` of the mean square (Chan et al. 1983)."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    once = 4.0 * gamma(x.shape[-1]) * _size(x).square().mean(dim=-1, keepdim=True)
    variance = make(_value(variance), _bound(variance) + once)
    error = _scaled(centred, torch.rsqrt(variance + eps), weight)
    return error if bias is None else error + UNIT * z.abs()


def _scaled(x: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    out = x * scale
    return _bound(out if weight is None else out * weight)


def _tracking(rule: Rule) -> Rule:
    """A rule that is itself written in tracked operations."""

    def call(z: Tensor, *args: Any, **options: Any) -> Tensor:
        with torch._C._EnableTorchFunction():  # noqa: SLF001 - undoes the switch of the caller
            return rule(z, make(_value(args[0]), _bound(args[0])), *args[1:], **options)

    return call


_PLAIN = {
    "__repr__", "__format__", "shape", "dtype", "device", "ndim", "dim", "size", "numel", "is_floating_point", "layout",
    "requires_grad",
    "__len__", "gt", "lt", "ge", "le", "eq", "ne", "__gt__", "__lt__", "__ge__", "__le__", "stride", "is_contiguous",
    "isneginf", "isinf", "isfinite", "isnan", "new_zeros", "new_ones", "new_tensor", "zeros_like", "ones_like", "ones",
    "zeros", "eye", "arange", "tensor", "is_cuda", "all", "any", "is_complex", "bool", "__bool__",
    "__or__",
}  # fmt: skip
"""Operations whose results are exact: shapes, comparisons, constants."""
_VIEWS = {
    "transpose", "flatten", "__getitem__", "unsqueeze", "squeeze", "expand", "view", "reshape", "T", "mT", "detach",
    "contiguous", "clone", "permute", "roll", "unflatten", "expand_as", "triu", "tril",
}  # fmt: skip
"""Operations that move entries and do nothing else to them."""
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "subtract"), _add),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply"), _multiply),
    **dict.fromkeys(("div", "__truediv__", "true_divide"), _divide),
    **dict.fromkeys(("__rtruediv__", "__rdiv__"), _reversed_divide),
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm"), _matmul),
    "__rmatmul__": lambda z, a, b: _matmul(z, b, a),
    **dict.fromkeys(("neg", "__neg__", "negative", "abs", "absolute"), lambda z, a: _bound(a)),
    "masked_fill": lambda z, a, mask, value: _bound(a).expand(z.shape).masked_fill(mask, 0.0),
    "einsum": _einsum,
    "softmax": _softmax,
    "sigmoid": _lipschitz(0.25),
    "tanh": _lipschitz(1.0),
    "relu": _lipschitz(1.0),
    "silu": _lipschitz(1.1),
    "gelu": _lipschitz(1.13, own="argument"),
    "log": _log,
    "square": _square,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "sum": _sum,
    "mean": _mean,
    "vector_norm": _norm,
    "linalg_vector_norm": _norm,
    "amax": _amax,
    "maximum": _maximum,
    "where": _where,
    "cdist": _cdist,
    "rms_norm": _tracking(_rms),
    "layer_norm": _tracking(_layer_norm),
}
