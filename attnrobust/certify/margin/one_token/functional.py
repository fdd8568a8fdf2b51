"""One margin functional while a single token moves: its bound for every candidate token."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.certify.margin.one_token.descent import TokenDescent, combined
from attnrobust.certify.margin.one_token.foreign_rows import (
    PROOF_NODES,
    SEARCH_NODES,
    ForeignParameters,
    ForeignRows,
    foreign_form,
    foreign_rows,
    foreign_start,
)
from attnrobust.certify.margin.one_token.own_row import (
    OwnConstants,
    OwnParameters,
    largest_average,
    own_constants,
    own_form,
    own_start,
)
from attnrobust.certify.margin.one_token.rows import TokenFunctional, TokenRows
from attnrobust.certify.margin.quadratic_form import FunctionalRows
from attnrobust.certify.margin.small_trust_regions import (
    DECOMPOSE_LIMIT,
    many_approximate,
    many_certified,
    many_iterated,
)
from attnrobust.numerics.rounding import PROOF, SMALLEST_UNIT, outward

STEPS, RATE = 50, 0.1  # of the descent at the first radius
AGAIN_STEPS, AGAIN_RATE = 25, 0.06  # the same at a radius far from the last one
WARM_STEPS, WARM_RATE = 6, 0.015  # the same near it
NEAR = 0.04  # change of the radius, in its logarithm, that is near
FIRST_KRYLOV, KRYLOV = 14, 5  # steps of an approximate maximum at first, and from the last one
EXPONENT_CAP = 600.0
CHUNK_NUMBERS = 12_000_000  # float64 numbers per temporary: about 100 MB


@dataclass(frozen=True, eq=False)
class TokenParameters:
    """Free parameters, one set per candidate token l; every choice is sound.

    Args:
        foreign: Those of the foreign rows' quadratics.
        capped: Share in [0, 1] of a head's own row that is bounded by its range instead of its majorant.
        cap_split: Balance of ``|t|`` in that range, in units of ``|gamma| r``.
        own: Those of the own row's majorant.
    """

    foreign: ForeignParameters
    capped: Float[Tensor, "h l"]
    cap_split: Float[Tensor, "h l"]
    own: OwnParameters


def _replaced(where: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return torch.where(where, new.detach(), old)


def _bounded(value: Tensor) -> Tensor:
    """An overflow bounds nothing: NaN would lose every comparison and so pass for a small bound."""
    return value.nan_to_num(nan=torch.inf, posinf=torch.inf)


@dataclass(frozen=True, eq=False)
class _Set:
    """What a radius fixes for some candidate tokens."""

    group: TokenFunctional
    own: OwnConstants
    average: Float[Tensor, "h l"]
    foreign: ForeignRows
    radius: float


class TokenFunctionalBound:
    """Bounds of the drop of one functional; parameters are kept between radii."""

    def __init__(self, functional: FunctionalRows, tokens: Int[Tensor, "l"]) -> None:
        self.functional, self.tokens = functional, tokens
        self.gradient = functional.gradient
        self.parameters: TokenParameters | None = None
        # Radius at which a token's parameters were chosen; 0: never.
        self.seen = functional.gradient.new_zeros(functional.rows.n)

    @property
    def largest_gradient(self) -> float:
        """Largest first-order drop per unit of one token's move."""
        return float(torch.linalg.vector_norm(self.gradient[self.tokens], dim=-1).amax())

    @property
    def chunk(self) -> int:
        """Candidate tokens that are treated at once."""
        h, n, d = self.functional.gamma.shape[0], self.functional.rows.n, self.functional.rows.points.shape[1]
        m = 2 * self.functional.rows.layer.key_width + 1
        return max(1, CHUNK_NUMBERS // max(2 * PROOF_NODES * h * n, h * n * m, h * d * m, 4 * d * d))

    def bound(self, radius: float, *, floor: float = 0.0) -> float:
        """Upper bound of the drop over all moves of length at most the radius of one candidate token.

        Tokens come in the order of their bounds with the parameters at hand; once those are below the best bound
        found, or below a drop that does not matter beside another class (``floor``), the rest is not refined.
        """
        left, known = self.tokens, self._at_hand(radius, self.tokens)
        worst, size = 0.0, max(1, min(self.chunk, 1 + left.numel() // 8))
        while left.numel() and float(known.amax()) > max(worst, floor):
            order = known.argsort(descending=True)
            left, known = left[order], known[order]
            found = _bounded(torch.minimum(self.refined(radius, left[:size]), known[:size]))
            worst = max(worst, float(found.amax()))
            left, known = left[size:], known[size:]
            if bool((self.seen[left] == 0).any()):  # they start from better parameters now
                known = torch.minimum(known, self._at_hand(radius, left))
        return max(worst, float(known.amax())) if left.numel() else worst

    def _at_hand(self, radius: float, tokens: Tensor) -> Tensor:
        """Bounds with the parameters at hand."""
        parts = [self._first(radius, part) for part in tokens.split(self.chunk)]
        return _bounded(torch.cat(parts)) if parts else self.gradient.new_zeros(0)

    def at_radius(self, radius: float, tokens: Tensor) -> _Set | None:
        token = TokenRows(self.functional.rows, tokens)
        group = TokenFunctional(token, self.functional)
        own = own_constants(token, radius)
        if not bool((own.limit < EXPONENT_CAP).all()):
            return None
        return _Set(group, own, largest_average(group, own), foreign_rows(group, radius), radius)

    def present_parameters(self, found: _Set) -> TokenParameters:
        """The parameters at hand."""
        tokens = found.group.token.tokens
        if self.parameters is None:
            return self.start_parameters(found)
        taken: TokenParameters = combined(self.parameters, self.parameters, lambda a, _: a[..., tokens])
        return taken

    def start_parameters(self, found: _Set) -> TokenParameters:
        row = torch.ones_like(found.average)
        return TokenParameters(
            foreign=foreign_start(found.foreign), capped=0.4 * row, cap_split=0.5 * row, own=own_start(row)
        )

    def _first(self, radius: float, tokens: Tensor) -> Tensor:
        found = self.at_radius(radius, tokens)
        if found is None:
            return self.gradient.new_full((tokens.numel(),), torch.inf)
        return self._certified(found, self.present_parameters(found))

    def refined(self, radius: float, tokens: Tensor) -> Tensor:
        """Trust regions whose parameters follow the slope of the bound at its maximisers."""
        found = self.at_radius(radius, tokens)
        best = self.gradient.new_full((tokens.numel(),), torch.inf)
        if found is None:
            return best
        keep = self.present_parameters(found)
        steps, rate = self._effort(radius, tokens)
        search = TokenDescent(keep, steps=steps, rate=rate)
        points: Tensor | None = None
        for _ in search:
            with torch.enable_grad():
                par: TokenParameters = search.parameters()
                core, identity, linear, constant = self._form(found, par, nodes=SEARCH_NODES)
            value, points = self._maximised(found, core.detach(), identity.detach(), linear.detach(), points)
            value = value + constant.detach()
            better = value < best
            best = torch.where(better, value, best)
            keep = combined(keep, par, partial(_replaced, better))
            with torch.enable_grad():
                y = torch.einsum("bld,hda->bhla", points, found.group.basis)
                image = (core @ y[..., None])[..., 0]
                along = (y * (linear + 0.5 * image)).sum((1, 3)) + 0.5 * identity * points.square().sum(-1)
                search.step((constant + along.mean(0)).sum())
        self._store(tokens, keep, radius)
        return self._certified(found, keep)

    def _effort(self, radius: float, tokens: Tensor) -> tuple[int, float]:
        """Steps and rate of the descent."""
        away = float((self.seen[tokens] / radius).log().abs().amax())
        if math.isinf(away):
            return STEPS, RATE
        return (AGAIN_STEPS, AGAIN_RATE) if away > NEAR else (WARM_STEPS, WARM_RATE)

    def _maximised(
        self, found: _Set, core: Tensor, identity: Tensor, linear: Tensor, last: Tensor | None
    ) -> tuple[Float[Tensor, "l"], Float[Tensor, "p l d"]]:
        """Approximate maxima without the constants, and where they are."""
        basis = found.group.basis
        if basis.shape[1] <= DECOMPOSE_LIMIT:
            value, points, _ = many_approximate(*self._dense(found, core, identity, linear), found.radius)
            return value, points

        wide = basis.transpose(0, 1).flatten(1)  # all heads side by side

        def product(block: Tensor) -> Tensor:
            count = block.shape[-1]
            y = (wide.T @ block.transpose(0, 1).flatten(1)).unflatten(0, core.shape[::3]).unflatten(2, (-1, count))
            image = (core @ y.transpose(1, 2)).transpose(1, 2).flatten(2).flatten(0, 1)
            back: Tensor = (wide @ image).unflatten(1, (-1, count)).transpose(0, 1)
            return back + identity[:, None, None] * block

        value, points, _ = many_iterated(
            product,
            self._gradient(found, linear),
            found.radius,
            second=last,
            steps=FIRST_KRYLOV if last is None else KRYLOV,
        )
        return value, points

    def _gradient(self, found: _Set, linear: Tensor) -> Float[Tensor, "l d"]:
        change = torch.einsum("hla,hda->ld", linear, found.group.basis)
        return self.gradient[found.group.token.tokens] + change

    def _certified(self, found: _Set, par: TokenParameters) -> Tensor:
        """Proved bounds at given parameters."""
        matrix, gradient, constant = self.quadratic_majorant(found, par)
        _, _, multiplier = many_approximate(matrix, gradient, found.radius)
        return many_certified(matrix, gradient, found.radius, multiplier) + outward(constant, PROOF)

    def quadratic_majorant(self, found: _Set, par: TokenParameters) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix (l, d, d), gradient (l, d) and constant (l,) of the majorant at given parameters."""
        core, identity, linear, constant = self._form(found, par, nodes=PROOF_NODES)
        return *self._dense(found, core, identity, linear), constant

    def _form(self, found: _Set, par: TokenParameters, *, nodes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The majorant in the coordinates y: core, multiple of ``|delta|^2``, linear part beyond G, constant."""
        pi, share = found.group.own_pooling, par.capped
        core, linear, constant = foreign_form(found.foreign, par.foreign, nodes=nodes)
        row = own_form(found.group, found.own, par.own)
        cap, cap_linear, cap_constant = self._cap(found, par)
        part, kept = pi * share, pi * (1.0 - share)
        core = core + kept[..., None, None] * row.core + part[..., None, None] * cap
        linear = linear + kept[..., None] * row.linear + part[..., None] * cap_linear
        constant = constant + (kept * row.constant + part * cap_constant).sum(0)
        return core, (kept * row.identity).sum(0), linear, constant

    def _cap(self, found: _Set, par: TokenParameters) -> tuple[Tensor, Tensor, Tensor]:
        """Quadratic, linear part beyond the first-order drop and constant of the own row's range."""
        group, heaviest = found.group, found.own.heaviest
        unit = (par.cap_split * found.radius * self.functional.value_norm).clamp_min(SMALLEST_UNIT)
        width = group.own_gradient.shape[-1]
        last = torch.zeros(width, dtype=unit.dtype, device=unit.device)
        last[-1] = 1.0
        core = (0.5 * heaviest / unit)[..., None, None] * torch.outer(last, last)
        linear = -group.own_gradient - 0.5 * heaviest[..., None] * last
        return core, linear, found.average + 0.25 * heaviest * unit

    def _store(self, tokens: Tensor, keep: TokenParameters, radius: float) -> None:
        def put(old: Tensor, new: Tensor) -> Tensor:
            # Tokens that were never treated start from the average of these.
            out = torch.where(self.seen > 0, old, new.mean(-1, keepdim=True))
            out[..., tokens] = new
            return out

        if self.parameters is None:
            n = self.functional.rows.n
            self.parameters = combined(keep, keep, lambda a, _: a.mean(-1, keepdim=True).expand(*a.shape[:-1], n))
        self.parameters = combined(self.parameters, keep, put)
        self.seen[tokens] = radius

    def _dense(self, found: _Set, core: Tensor, identity: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """``sum_h basis N basis^T + identity`` (l, d, d) and the whole gradient (l, d)."""
        basis = found.group.basis
        left = (basis[:, None] @ core).permute(1, 2, 0, 3).flatten(2)
        out = left @ basis.permute(0, 2, 1).flatten(0, 1)
        out = out + identity[:, None, None] * torch.eye(out.shape[-1], dtype=out.dtype, device=out.device)
        return out, self._gradient(found, linear)
