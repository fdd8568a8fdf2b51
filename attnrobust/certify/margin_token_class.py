"""One margin functional while a single token moves: its bound for every candidate token."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.certify.margin_form import ClassRows
from attnrobust.certify.margin_logistic import remainder_range
from attnrobust.certify.margin_small import many_approximate, many_certified
from attnrobust.certify.margin_token_own import (
    TINY,
    OwnConstants,
    OwnParameters,
    largest_average,
    own_balanced,
    own_constants,
    own_core,
    own_start,
)
from attnrobust.certify.margin_token_rows import TokenClass, TokenRows

ROUNDS = 14  # balances of the parameters at one radius at most
PATIENCE, PROGRESS = 2, 3e-3  # rounds without this relative progress end the search
CAP_STEP, CAP_SHRINK, WARM_STEPS = 0.25, 0.75, 4  # pattern search of the capped share
MEMORY = 24  # reference moves that the balance averages over: fewer, and the parameters oscillate
EXPONENT_CAP = 600.0
CHUNK_NUMBERS = 12_000_000  # float64 numbers per temporary: about 100 MB
OUTWARD = 1.0 + 1e-9


@dataclass(frozen=True, eq=False)
class TokenParameters:
    """Free parameters, one set per candidate token l; every choice is sound.

    Args:
        split: tau_hl in units of ``|gamma| r``: where |t| is cut.
        capped: Share in [0, 1] of the own row that is bounded by its range instead of its majorant.
        cap_split: Balance of ``|t|`` in that range, in units of ``|gamma| r``.
        own: Those of the own row's majorant.
    """

    split: Float[Tensor, "h l"]
    capped: Float[Tensor, "l"]
    cap_split: Float[Tensor, "h l"]
    own: OwnParameters


def _combine(first: Any, second: Any, rule: Any) -> Any:
    """Apply ``rule`` to every tensor of two records of the same type."""
    if isinstance(first, Tensor):
        return rule(first, second)
    return replace(
        first, **{f.name: _combine(getattr(first, f.name), getattr(second, f.name), rule) for f in fields(first)}
    )


def _bounded(value: Tensor) -> Tensor:
    """An overflow bounds nothing: NaN would lose every comparison and so pass for a small bound."""
    return value.nan_to_num(nan=torch.inf, posinf=torch.inf)


@dataclass(frozen=True, eq=False)
class _Set:
    """What a radius fixes for some candidate tokens."""

    group: TokenClass
    own: OwnConstants
    average: Float[Tensor, "h l"]
    upper: Float[Tensor, "h n l"]
    lower: Float[Tensor, "h n l"]
    radius: float


class TokenClassBound:
    """Bounds of the drop of one functional; parameters and reference moves are kept between radii."""

    def __init__(self, cls: ClassRows, tokens: Int[Tensor, "l"]) -> None:
        self.cls, self.tokens = cls, tokens
        self.gradient = cls.gradient
        n = cls.rows.n
        row = cls.gamma.new_ones(cls.gamma.shape[0], n)
        self.parameters = TokenParameters(
            split=0.3 * row, capped=0.4 * torch.ones_like(row[0]), cap_split=0.5 * row, own=own_start(row)
        )
        self.memory = cls.gradient.new_zeros(0, *cls.gradient.shape)
        self.warm = torch.zeros(n, dtype=torch.bool, device=tokens.device)

    @property
    def largest_gradient(self) -> float:
        """Largest first-order drop per unit of one token's move."""
        return float(torch.linalg.vector_norm(self.gradient[self.tokens], dim=-1).amax())

    @property
    def chunk(self) -> int:
        """Candidate tokens that are treated at once."""
        h, n, d = self.cls.gamma.shape[0], self.cls.rows.n, self.cls.rows.points.shape[1]
        m = 2 * self.cls.rows.layer.key_width + 1
        return max(1, CHUNK_NUMBERS // max(81 * h * n, h * n * m, h * d * m, 4 * d * d))

    def bound(self, radius: float) -> float:
        """Upper bound of the drop over all moves of length at most the radius of one candidate token.

        Tokens come in the order of a rough bound; once that is below the best bound found, the rest cannot matter.
        """
        rough = _bounded(torch.cat([self._rough(radius, part) for part in self.tokens.split(self.chunk)]))
        order = rough.argsort(descending=True)
        worst, done, size = 0.0, 0, max(1, min(self.chunk, 1 + self.tokens.numel() // 8))
        while done < order.numel() and float(rough[order[done]]) > worst:
            part = order[done : done + size]
            found = _bounded(torch.minimum(self._refined(radius, self.tokens[part]), rough[part]))
            worst = max(worst, float(found.amax()))
            done += size
        return worst

    def _set(self, radius: float, tokens: Tensor) -> _Set | None:
        token = TokenRows(self.cls.rows, tokens)
        group = TokenClass(token, self.cls)
        own = own_constants(token, radius)
        if not bool((own.limit < EXPONENT_CAP).all()):
            return None
        limit = radius * torch.linalg.vector_norm(self.cls.rows.beta, dim=-1)[..., None] * (1.0 + 1e-12)
        upper, lower = remainder_range(token.logit, limit.expand_as(token.logit))
        return _Set(group, own, largest_average(group, own), upper, lower, radius)

    def _take(self, tokens: Tensor) -> TokenParameters:
        taken: TokenParameters = _combine(self.parameters, self.parameters, lambda a, _: a[..., tokens])
        return taken

    def _rough(self, radius: float, tokens: Tensor) -> Tensor:
        """``const + |G| r + ||M||_F r^2 / 2`` with the parameters at hand."""
        found = self._set(radius, tokens)
        if found is None:
            return self.gradient.new_full((tokens.numel(),), torch.inf)
        matrix, gradient, constant = self._majorant(found, self._take(tokens))
        size: Tensor = torch.linalg.matrix_norm(matrix)
        value: Tensor = torch.linalg.vector_norm(gradient, dim=-1) * radius + 0.5 * size * radius**2 + constant
        return value * OUTWARD

    def _refined(self, radius: float, tokens: Tensor) -> Tensor:
        """Trust regions with balanced parameters."""
        found = self._set(radius, tokens)
        best = self.gradient.new_full((tokens.numel(),), torch.inf)
        if found is None:
            return best
        warm = bool(self.warm[tokens].all())
        step = CAP_STEP * (CAP_SHRINK**WARM_STEPS if warm else 1.0)
        par = keep = self._take(tokens)
        memory = self.memory[:, tokens]
        memory = memory[memory.flatten(1).any(dim=1)] if warm else memory[:0]
        idle = 0
        for _ in range(ROUNDS):
            value, moves, par = self._solve(found, par, step)
            idle = 0 if bool((value < (1.0 - PROGRESS) * best).any()) else idle + 1
            better = value < best
            best = torch.where(better, value, best)
            keep = _combine(keep, par, lambda old, new, mask=better: torch.where(mask, new, old))
            if idle >= PATIENCE:
                break
            memory = torch.cat([memory, moves / radius])[-MEMORY:]
            par = self._balanced(found, par, radius * memory)
            step *= CAP_SHRINK
        self._store(tokens, keep, memory)
        return self._certified(found, keep)

    def _certified(self, found: _Set, par: TokenParameters) -> Tensor:
        """Proved bounds at given parameters."""
        matrix, gradient, constant = self._majorant(found, par)
        _, _, multiplier = many_approximate(matrix, gradient, found.radius)
        return many_certified(matrix, gradient, found.radius, multiplier) + constant * OUTWARD

    def _majorant(self, found: _Set, par: TokenParameters) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix (l, d, d), gradient (l, d) and constant (l,) of the majorant at given parameters."""
        foreign, row, identity, cap, change, constant = self._parts(found, par)
        share = par.capped
        core = foreign + (1.0 - share[:, None, None]) * row + share[:, None, None] * cap
        matrix = self._dense(found.group, core, (1.0 - share) * identity)
        return matrix, self.gradient[found.group.token.tokens] + share[:, None] * change, share * constant

    def _store(self, tokens: Tensor, keep: TokenParameters, memory: Tensor) -> None:
        def put(old: Tensor, new: Tensor) -> Tensor:
            # Tokens that were never treated start from the average of these.
            out = torch.where(self.warm, old, new.mean(-1, keepdim=True))
            out[..., tokens] = new
            return out

        self.parameters = _combine(self.parameters, keep, put)
        self.warm = self.warm.clone()
        self.warm[tokens] = True
        if self.memory.shape[0] < memory.shape[0]:
            extra = self.memory.new_zeros(memory.shape[0] - self.memory.shape[0], *self.memory.shape[1:])
            self.memory = torch.cat([self.memory, extra])
        self.memory[: memory.shape[0], tokens] = memory

    def _solve(self, found: _Set, par: TokenParameters, step: float) -> tuple[Tensor, Tensor, TokenParameters]:
        """Approximate bounds at three capped shares; the best one of each token stays in the parameters."""
        foreign, row, identity, cap, change, constant = self._parts(found, par)
        base = self._dense(found.group, foreign, torch.zeros_like(identity))
        difference = self._dense(found.group, cap - row, -identity)
        base = base + self._dense(found.group, row, identity)
        shares = torch.stack([(par.capped + move).clamp(0.0, 1.0) for move in (0.0, -step, step)])
        gradient = self.gradient[found.group.token.tokens] + shares[..., None] * change
        value, moves, _ = many_approximate(base + shares[..., None, None] * difference, gradient, found.radius)
        value = value + shares * constant
        pick = value.argmin(0)
        at = found.group.token.place
        return value[pick, at], moves[:, pick, at], replace(par, capped=shares[pick, at])

    def _parts(self, found: _Set, par: TokenParameters) -> tuple[Tensor, ...]:
        """Cores of the foreign rows, the own row and its cap; the cap's change of the gradient and its constant."""
        group, pi = found.group, found.group.own_pooling
        row, identity = own_core(group, found.own, par.own)
        unit = (par.cap_split * found.radius * self.cls.value_norm).clamp_min(TINY)
        cap = torch.zeros_like(row)
        cap[..., -1, -1] = 0.5 * pi * found.own.heaviest / unit
        constant = pi * (found.average + 0.25 * found.own.heaviest * unit).sum(0)
        step = -group.own_gradient
        step = torch.cat([step[..., :-1], step[..., -1:] - 0.5 * found.own.heaviest[..., None]], dim=-1)
        change = pi[:, None] * torch.einsum("hla,hda->ld", step, group.basis)
        return self._foreign(found, par), pi[:, None, None] * row, pi * identity, cap, change, constant

    def _foreign(self, found: _Set, par: TokenParameters) -> Float[Tensor, "h l m m"]:
        """Foreign rows in the coordinates y (Theorem 2, first part)."""
        group, rows = found.group, self.cls.rows
        k = rows.layer.key_width
        curve, rate = self._spans(found, par)
        tau = (par.split * found.radius * self.cls.value_norm).clamp_min(TINY)
        out = curve.new_zeros(*tau.shape, 2 * k + 1, 2 * k + 1)
        q = rows.queries
        out[..., :k, :k] = torch.einsum("hil,hia,hib->hlab", group.pooling * curve, q, q)
        mixed = torch.einsum("hil,hia->hla", group.pooling * group.token.slope, q)
        out[..., :k, -1] -= mixed
        out[..., -1, :k] -= mixed
        out[..., -1, -1] = self._mass(found, rate) / (2.0 * tau)
        return out

    def _spans(self, found: _Set, par: TokenParameters) -> tuple[Tensor, Tensor]:
        """Coefficient of a^2/2 while |t| <= tau, and the one per unit of |t| - tau."""
        tau = (par.split * found.radius * self.cls.value_norm)[:, None, :]
        v = found.group.rest_advantage
        ends = [(v + s * tau) * g for s in (1.0, -1.0) for g in (found.upper, found.lower)]
        return torch.stack(ends).amax(0), torch.maximum(found.upper, -found.lower).clamp_min(0.0)

    def _mass(self, found: _Set, rate: Tensor) -> Float[Tensor, "h l"]:
        """Bound of ``sup sum_i pi_i rate_i a_i^2 / 2``."""
        q = self.cls.rows.queries
        small = torch.einsum("hil,hia,hib->hlab", found.group.pooling * rate, q, q)
        triangle = torch.linalg.qr(self.cls.rows.layer.w_k, mode="r").R
        inner = triangle[:, None] @ small @ triangle.mT[:, None]
        top: Tensor = torch.linalg.eigvalsh(0.5 * (inner + inner.mT))[..., -1].clamp_min(0.0)
        size: Tensor = torch.linalg.matrix_norm(inner)
        return 0.5 * found.radius**2 * (top * OUTWARD + 1e-12 * size)

    def _dense(self, group: TokenClass, core: Tensor, identity: Tensor) -> Float[Tensor, "l d d"]:
        """``sum_h basis N basis^T + identity``."""
        basis = group.basis
        left = (basis[:, None] @ core).permute(1, 2, 0, 3).flatten(2)
        out = left @ basis.permute(0, 2, 1).flatten(0, 1)
        return out + identity[:, None, None] * torch.eye(out.shape[-1], dtype=out.dtype, device=out.device)

    def _balanced(self, found: _Set, par: TokenParameters, moves: Float[Tensor, "b l d"]) -> TokenParameters:
        """Balance every inequality at reference moves."""
        group, radius = found.group, found.radius
        y = torch.einsum("bld,hda->bhla", moves, group.basis)
        k = self.cls.rows.layer.key_width
        unit = radius * self.cls.value_norm
        a2 = (self.cls.rows.queries @ y[..., :k].mT).square().mean(0)
        t2 = y[..., -1].square().mean(0) + 0.02 * unit**2
        _, rate = self._spans(found, par)
        mass = self._mass(found, rate)
        spent = (group.pooling * rate * a2).sum(1) + 0.02 * mass + TINY
        split = (0.5 * mass * t2 / spent).sqrt() / unit
        return TokenParameters(
            split=(par.split * split.clamp(1e-3, 1e3)).sqrt().clamp(0.01, 2.0),
            capped=par.capped,
            cap_split=(par.cap_split * t2.sqrt() / unit).sqrt().clamp(0.01, 1.0),
            own=own_balanced(group, found.own, par.own, y),
        )
