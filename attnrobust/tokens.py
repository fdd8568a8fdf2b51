"""Inputs as measures: tokens with masses, and what they become when they move, split and are copied."""

import hashlib
import math
import operator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.errors import InputError, one_line

MASS_SUM_TOLERANCE = 1e-9  # masses are user data in float64; n <= 1e5 terms sum to 1 far inside this
MASS_SUM_ROUNDING = 1e-14  # sums this near to 1 are kept bit for bit, others are divided by their sum
INDEX_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
KEPT_MASS_ROUNDING = 1e-12  # relative, of a token's mass where its children's masses are added up


def as_tensor(name: str, value: object) -> Tensor:
    """A tensor of what a user gave: tensors as they are, numpy arrays and (nested) lists of numbers converted."""
    if isinstance(value, Tensor):
        # a subclass may hold its numbers elsewhere
        empty = value.is_meta and type(value) in (Tensor, torch.nn.Parameter)
        if value.layout is not torch.strided or empty or value.is_quantized:
            kind = "meta" if empty else "quantized" if value.is_quantized else str(value.layout)
            raise InputError(f"{name} is a {kind} tensor; give a dense tensor that holds its numbers")
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(f"{name} is a masked array, whose mask would be lost; fill it (filled) or leave the rows out")
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value, dtype=np.float64)
        return torch.as_tensor(np.ascontiguousarray(array))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        kind = type(value).__name__
        raise InputError(f"{name} is a {kind} that is no array of numbers; give a tensor, an array or lists") from None


def as_number(name: str, value: object) -> float:
    """A float of any real scalar: Python and numpy numbers, arrays and tensors with one entry; no booleans."""
    try:
        if isinstance(value, bool | np.bool_ | str | bytes) or getattr(value, "ndim", 0) > 0:
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(f"{name} is {one_line(value)}; give a number") from None


def as_positive(name: str, value: object) -> float:
    """A finite float > 0 of any real scalar."""
    number = as_number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name} must be a positive number; got {number}")
    return number


def as_index(name: str, value: object) -> int:
    """An int of any integer scalar; no booleans, no rounding of fractions."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} is {one_line(value)}; give an integer") from None


def as_count(name: str, value: object, *, least: int = 1) -> int:
    """An int >= ``least`` of any integer scalar."""
    count = as_index(name, value)
    if count < least:
        raise InputError(f"{name} must be >= {least}; got {one_line(count)}")
    return count


def as_seed(value: object) -> int:
    """A seed: an integer of 64 bits with its sign."""
    seed = as_index("seed", value)
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"seed is {one_line(seed)}; give an integer from -2**63 to 2**63 - 1")
    return seed


def require_finite(name: str, value: Tensor) -> Tensor:
    """A float64 copy of ``value``, which later changes of the original do not reach; no integers, NaN or infinity."""
    value = as_tensor(name, value)
    if not value.is_floating_point():
        raise InputError(f"{name} has dtype {value.dtype}; give floating-point numbers")
    value = value.detach().to(torch.float64, copy=True)
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise InputError(f"{name} holds {bad} NaN or infinite entries of {value.numel()}; remove or repair them")
    return value


@dataclass(frozen=True, eq=False)
class TokenMeasure:
    """A token measure ``sum_j mass_j delta_{points_j}``; equal masses 1/n unless given.

    Args:
        points: Token vectors, one a row, (n, d): a tensor, an array or lists; copied to float64.
        mass: Positive masses that sum to 1 within 1e-9 (float32 and shorter: within n of their roundings), (n,), kept
            divided by their sum; None means 1/n each.

    Raises:
        InputError: Empty, not two-dimensional, NaN or infinite points; masses that are not positive or do not sum to 1.
    """

    points: Float[Tensor, "n d"]
    mass: Float[Tensor, "n"] = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        points = as_tensor("tokens", self.points)
        if points.ndim != 2 or points.shape[0] == 0 or points.shape[1] == 0:
            raise InputError(f"tokens must have shape (n, d) with n, d >= 1; got {tuple(points.shape)}")
        points = require_finite("tokens", points)
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "mass", _checked_mass(self.mass, points))

    @property
    def n(self) -> int:
        """Number of tokens."""
        return int(self.points.shape[0])

    @property
    def width(self) -> int:
        """Token width d."""
        return int(self.points.shape[1])

    @property
    def uniform(self) -> bool:
        """Whether every token has the mass 1/n (then the masses drop out of the softmax)."""
        return bool(torch.allclose(self.mass, torch.full_like(self.mass, 1.0 / self.n), rtol=1e-12, atol=0.0))

    def digest(self) -> str:
        """SHA-256 over shape, points and masses."""
        return tensor_digest(self.points, self.mass)


@dataclass(frozen=True, eq=False)
class PerturbedTokens:
    """Tokens that came from the tokens of a clean input: ``sum_j mass_j delta_{points_j}``, atom j from ``parent_j``.

    Args:
        points: (m, d).
        mass: Positive, sums to 1, (m,).
        parent: Index of the clean token that each atom came from, (m,); every clean token has at least one atom.

    Raises:
        InputError: Shapes that do not fit, NaN or infinity, masses that are not positive or do not sum to 1.
    """

    points: Float[Tensor, "m d"]
    mass: Float[Tensor, "m"]
    parent: Int[Tensor, "m"]

    def __post_init__(self) -> None:
        measure = TokenMeasure(self.points, self.mass)  # the checks of points and masses
        object.__setattr__(self, "points", measure.points)
        object.__setattr__(self, "mass", measure.mass)
        parent = self.parent if isinstance(self.parent, Tensor | np.ndarray) else _indices(self.parent)
        object.__setattr__(self, "parent", as_tensor("parent", parent))
        if tuple(self.parent.shape) != (measure.n,) or self.parent.dtype not in INDEX_TYPES:
            kind = f"shape {tuple(self.parent.shape)} and dtype {self.parent.dtype}"
            raise InputError(f"parent must hold one token index per atom; got {kind}")
        object.__setattr__(self, "parent", self.parent.to(torch.int64))
        if bool((self.parent < 0).any()):
            raise InputError("parent holds a negative token index")

    @property
    def measure(self) -> TokenMeasure:
        """The atoms without their parents."""
        return TokenMeasure(self.points, self.mass)

    def displacement(self, clean: TokenMeasure) -> Float[Tensor, "m d"]:
        """How far each atom is from its parent."""
        return self.points - clean.points[self._parents_of(clean)]

    def keeps_masses(self, clean: TokenMeasure) -> bool:
        """Whether every token's atoms carry exactly its mass (a splitting; a duplication does not)."""
        total = torch.zeros_like(clean.mass).index_add(0, self._parents_of(clean), self.mass)
        # Relative: what a token of tiny mass gains from rounding of the others would not be rounding for it.
        return bool(((total - clean.mass).abs() <= KEPT_MASS_ROUNDING * clean.mass).all())

    def _parents_of(self, clean: TokenMeasure) -> Tensor:
        present = torch.bincount(self.parent, minlength=clean.n)
        if present.shape[0] != clean.n or bool((present == 0).any()):
            raise InputError(f"the parents must cover exactly the {clean.n} clean tokens")
        return self.parent


def as_measure(tokens: object) -> TokenMeasure:
    """A token measure of what a user gave: bare tokens get equal masses."""
    return tokens if isinstance(tokens, TokenMeasure) else TokenMeasure(tokens)  # type: ignore[arg-type]


def _indices(value: object) -> Tensor:
    """Indices that were given as a list."""
    if not isinstance(value, list | tuple):
        raise InputError(f"parent is {one_line(value)}; give one token index per atom")
    return torch.tensor([as_index("an entry of parent", entry) for entry in value], dtype=torch.int64)


def _checked_mass(mass: Tensor | None, points: Tensor) -> Tensor:
    n = points.shape[0]
    if mass is None:
        return torch.full((n,), 1.0 / n, dtype=torch.float64, device=points.device)
    mass = as_tensor("mass", mass)
    if tuple(mass.shape) != (n,):
        raise InputError(f"mass must have shape ({n},), one per token; got {tuple(mass.shape)}")
    # Masses that were divided by their sum in a shorter format sum to 1 within that format's rounding.
    coarse = n * torch.finfo(mass.dtype).eps if mass.is_floating_point() else 0.0
    mass = require_finite("mass", mass).to(points.device)
    if not bool((mass > 0).all()):
        raise InputError("every token mass must be > 0; leave out tokens without mass")
    total = float(mass.sum())
    if not abs(total - 1.0) <= max(MASS_SUM_TOLERANCE, coarse):
        raise InputError(f"token masses must sum to 1, they sum to {total:.12g}; divide them by their sum")
    # A measure that lacked 1e-9 of its mass would change every mean by 1e-9 of its size, and no distance would see it.
    return mass if abs(total - 1.0) <= MASS_SUM_ROUNDING else mass / total


def tensor_digest(*tensors: Tensor | None, extra: str = "") -> str:
    """SHA-256 over dtype, shape and bytes of tensors (None allowed) and a text."""
    sha = hashlib.sha256(extra.encode())
    for tensor in tensors:
        if tensor is None:
            sha.update(b"none;")
            continue
        array = tensor.detach().cpu().contiguous().numpy()
        sha.update(f"{array.dtype}{array.shape};".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()
