"""Rotary positions: queries and keys are turned, plane by plane, by an angle that grows with the position."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.tokens import as_index, require_finite, tensor_digest

Layout = Literal["half", "interleaved"]


@dataclass(frozen=True, eq=False)
class Rotary:
    """``q_i -> q_i R_i`` and ``k_j -> k_j R_j``, where ``R_i`` turns plane p by ``angle_ip``.

    Coordinates a and b of a plane become ``a cos - b sin`` and ``b cos + a sin``; coordinates from ``dims`` on stay.
    ``R_i R_j^T`` depends on the differences of the angles alone. Factors on cosine and sine (YaRN) are no part of it:
    they are constant, so they belong into the weights and biases of queries and keys.

    Args:
        frequencies: Angle per position of every plane (m,); None where ``angles`` are given.
        dims: Number of turned coordinates, 2 m; None means that.
        layout: Plane p holds coordinates p and p + m ("half") or 2 p and 2 p + 1 ("interleaved").
        offset: Position of the first token.
        angles: Angles (n, m) of n tokens instead of ``frequencies`` times position; they fix n.

    Raises:
        InputError: Neither or both of frequencies and angles, NaN, or a wrong shape, layout or ``dims``.

    References:
        Su et al. 2021 (RoFormer), section 3.2.
    """

    frequencies: Float[Tensor, "m"] | None = None
    dims: int | None = None
    layout: Layout = "half"
    offset: int = 0
    angles: Float[Tensor, "n m"] | None = None

    def __post_init__(self) -> None:
        if (self.frequencies is None) == (self.angles is None):
            raise InputError("rotary positions take frequencies or angles; give exactly one of them")
        for name, rank in (("frequencies", 1), ("angles", 2)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _checked(name, value, rank))
        if self.layout not in get_args(Layout):
            raise InputError(f"rotary layout is {self.layout!r}; give one of {', '.join(get_args(Layout))}")
        object.__setattr__(self, "offset", as_index("offset", self.offset))
        if self.angles is not None and self.offset:
            raise InputError(f"offset is {self.offset}; explicit angles say where the tokens stand, leave it 0")
        dims = 2 * self.planes if self.dims is None else as_index("dims", self.dims)
        if dims != 2 * self.planes:
            raise InputError(f"dims is {dims}; {self.planes} planes turn {2 * self.planes} coordinates")
        object.__setattr__(self, "dims", dims)

    @property
    def _given(self) -> Tensor:
        given = self.frequencies if self.angles is None else self.angles
        assert given is not None  # noqa: S101 - checked at construction; narrows the type
        return given

    @property
    def planes(self) -> int:
        """Number of turned planes m."""
        return int(self._given.shape[-1])

    @property
    def length(self) -> int | None:
        """The token count that explicit angles fix; None for any."""
        return None if self.angles is None else int(self.angles.shape[0])

    def angle_table(self, n: int) -> Float[Tensor, "n m"]:
        """The angles of tokens 0 .. n - 1.

        Raises:
            InputError: Explicit angles are for another number of tokens.
        """
        if self.frequencies is None:
            if self.length != n:
                raise InputError(f"the layer's rotary angles are for {self.length} tokens, the input has {n}")
            return self._given
        return self._angles(torch.arange(n, device=self.frequencies.device))

    def _angles(self, tokens: Int[Tensor, "n"]) -> Float[Tensor, "n m"]:
        if self.frequencies is None:
            return self._given[tokens]
        return (tokens.to(torch.float64) + self.offset)[:, None] * self.frequencies

    def turn(self, heads: Float[Tensor, "*b n k"], at: Int[Tensor, "n"] | None = None) -> Float[Tensor, "*b n k"]:
        """Row i times ``R_i``, or ``R_at_i`` where ``at`` names the tokens whose rows these are."""
        cosine, sine, partners = self._factors(heads.shape[-2], heads.shape[-1], at)
        return heads * cosine + heads[..., partners] * sine

    def turn_back(self, heads: Float[Tensor, "*b n k"], at: Int[Tensor, "n"] | None = None) -> Float[Tensor, "*b n k"]:
        """Row i times the transpose of ``R_i`` (or ``R_at_i``): the adjoint and the inverse of ``turn``."""
        cosine, sine, partners = self._factors(heads.shape[-2], heads.shape[-1], at)
        return heads * cosine - heads[..., partners] * sine

    def _factors(self, n: int, k: int, at: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What a coordinate is multiplied by (n, k), its partner likewise, and the partner's place (k,)."""
        if at is not None:
            return self._turns(self._angles(at), k)
        if (n, k) not in self._tables:
            with torch.inference_mode(mode=False):  # kept, so they may meet automatic differentiation later
                self._tables[(n, k)] = self._turns(self.angle_table(n), k)
        return self._tables[(n, k)]

    def _turns(self, angles: Float[Tensor, "n m"], k: int) -> tuple[Tensor, Tensor, Tensor]:
        n = angles.shape[0]
        cosine, sine = angles.new_ones(n, k), angles.new_zeros(n, k)
        first, second = self._pairs()
        cosine[:, first] = cosine[:, second] = angles.cos()
        sine[:, first], sine[:, second] = -angles.sin(), angles.sin()
        return cosine, sine, self._partners(k)

    @cached_property
    def _tables(self) -> dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
        return {}

    def pair_means(self, values: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        """Each coordinate's mean with its partner in the plane: what commutes with every turn."""
        return 0.5 * (values + values[..., self._partners(values.shape[-1])])

    def differences(self, n: int, at: Int[Tensor, "q"] | None = None) -> "Rotary":
        """Turns by the difference of every two tokens, as explicit angles: ``R_i R_l^T`` for all i, l (repeated).

        Only for i in ``at``, where it is given.
        """
        if at is not None:
            angles = self._angles(at)[:, None] - self.angle_table(n)[None, :]
            return Rotary(angles=angles.flatten(0, 1), layout=self.layout)
        if self.frequencies is not None:
            apart = torch.arange(1 - n, n, dtype=torch.float64, device=self.frequencies.device)
            return Rotary(angles=apart[:, None] * self.frequencies, layout=self.layout)
        table = self.angle_table(n)
        return Rotary(angles=(table[:, None] - table[None, :]).flatten(0, 1), layout=self.layout)

    def _pairs(self) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"]]:
        """First and second coordinate of every plane."""
        index = torch.arange(2 * self.planes, device=self._given.device)
        if self.layout == "half":
            return index[: self.planes], index[self.planes :]
        return index[0::2], index[1::2]

    def _partners(self, k: int) -> Int[Tensor, "k"]:
        """The other coordinate of each one's plane; coordinates that stay are their own."""
        partners = torch.arange(k, device=self._given.device)
        first, second = self._pairs()
        partners[first], partners[second] = second, first
        return partners

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the record."""
        return tensor_digest(self.frequencies, self.angles, extra=f"rotary;{self.layout};{self.offset}")

    def to(self, device: torch.device | str) -> "Rotary":
        """The same positions on another device."""
        frequencies, angles = (None if value is None else value.to(device) for value in (self.frequencies, self.angles))
        return replace(self, frequencies=frequencies, angles=angles)


def _checked(name: str, value: Tensor, rank: int) -> Tensor:
    value = require_finite(f"rotary {name}", value)
    if value.ndim != rank or 0 in value.shape:
        raise InputError(f"rotary {name} must have {rank} dimensions, each >= 1; got shape {tuple(value.shape)}")
    return value
