"""Displacement certificate: where its radius will be. Nothing here is proved; the bound then proves one radius.

The bound at a radius is the least over shares of an eigenvalue whose form has coefficients of that radius (eq. 19). The
search looks at few directions instead of all, takes the coefficients of two radii and what lies between them in log r,
and estimates eigenvalues by short iterations from the last maximiser.
"""

import math
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.displacement.remainder import LogitForms
from attnrobust.certify.displacement.shares import balanced_shares
from attnrobust.certify.displacement.trial import Trial
from attnrobust.errors import InputError
from attnrobust.numerics.lanczos import rough_largest_eigenvalue

AIM = 0.9965  # used share that is aimed at: the proof's eigenvalue is a little larger than the estimate
ROUNDS = 5  # radii whose coefficients are computed
DIRECTIONS = 5  # new maximisers at each of them
TOKEN_DIRECTIONS = 12  # where token scales adapt, and by leaps: the best of them counts
SETTLED = 1.5e-3  # relative change of the radius, and excess of an eigenvalue over what the directions say
ROUGH = 0.1  # of a long step: so much less its end is settled
GROWTH = 1.5  # the used share grows like a power between 1 and 2 of the radius, or a little more
BRACKET = 0.5  # logarithm of a ratio of radii beyond which nothing is interpolated between them
NEAR = 0.06  # logarithm of a step so short that the coefficients between two radii hold at its end
LONGEST = 4.0  # factor of one step
FIRST_STEPS, STEPS = 24, 10  # products of one eigenvalue: the first one, and the others from the last maximiser
BISECTIONS = 14  # of a step; the rest is interpolated


@dataclass
class RadiusSearch:
    """Predicts the radius of one bound.

    Args:
        trial: The bound's forms and directions.
        budget: Allowed displacement.
        per_token: Whether the token scales adapt.
    """

    trial: Trial
    budget: float
    per_token: bool
    known: list[tuple[float, LogitForms]] = field(default_factory=list)

    def radius(self, guess: float) -> float | None:
        """The predicted reach (Frobenius norm), from a first guess of it; None where nothing can be predicted."""
        reach = guess
        try:
            for _ in range(ROUNDS):
                forms = self.trial.forms(reach)
                if not forms.finite:
                    reach /= LONGEST
                    continue
                near = [one for one in self.known[-1:] if abs(one[0] - math.log(reach)) < BRACKET]
                self.known = [*near, (math.log(reach), forms)]
                found = self._in_rounds(reach) if self.per_token else self._at_these_forms(reach)
                step = abs(math.log(found / reach))
                if step < SETTLED or (len(self.known) > 1 and step < NEAR):
                    return found
                reach = min(max(found, reach / LONGEST), reach * LONGEST)
        except InputError:  # a product left float64
            return None
        return reach

    def forms_at(self, reach: float) -> LogitForms:
        """Between the two known radii, and beyond them: linear in log r."""
        if len(self.known) == 1:
            return self.known[0][1]
        (low, first), (high, second) = self.known
        share = min(max((math.log(reach) - low) / (high - low), -1.0), 2.0) if high != low else 1.0
        parts = {}
        for one in fields(LogitForms):
            a, b = getattr(first, one.name), getattr(second, one.name)
            parts[one.name] = torch.lerp(a, b, share).clamp_min(0.0)
        return LogitForms(**parts)

    def _at_these_forms(self, reach: float) -> float:
        """The radius where the estimate meets the aim, without new coefficients."""
        start, found, excess = reach, reach, 0.0
        for _ in range(DIRECTIONS):
            rows = self._rows()
            found = self._root(rows, reach)
            scales = self.trial.scales(found)
            shares, least = balanced_shares(self._parts(rows, found) * scales.square())
            excess = self._new_direction(found, scales, shares) / least - 1.0
            moved, reach = abs(math.log(found / reach)), found
            # the coefficients themselves are wrong by a share of the step from where they were computed
            if max(excess, moved) <= max(SETTLED, ROUGH * abs(math.log(found / start))):
                break
        return found * math.pow(1.0 + max(excess, 0.0), -1.0 / GROWTH)

    def _in_rounds(self, reach: float) -> float:
        """The same where token scales adapt: the best of some rounds at this radius, whose scales are kept."""
        best, forms, scales = math.inf, self.known[-1][1], self.trial.scales(reach)
        kept = self.trial.token_scales
        for _ in range(TOKEN_DIRECTIONS):
            used = self.trial.token_scales
            shares, _ = balanced_shares(self.trial.values(forms) * scales.square())
            value = self._new_direction(reach, scales, shares)
            best, kept = min((best, kept), (value, used), key=lambda pair: pair[0])
        self.trial.rescale(kept)
        return reach * math.pow(AIM * self.budget / (reach * best), 1.0 / GROWTH)

    def _rows(self) -> list[Float[Tensor, "s 5"]]:
        """The five forms at the directions seen, with the coefficients of every known radius."""
        return [self.trial.values(forms) for _, forms in self.known]

    def _parts(self, rows: list[Tensor], reach: float) -> Float[Tensor, "s 5"]:
        if len(rows) == 1:
            return rows[0]
        (low, _), (high, _) = self.known
        share = (math.log(reach) - low) / (high - low) if high != low else 1.0
        return torch.lerp(rows[0], rows[1], min(max(share, -1.0), 2.0)).clamp_min(0.0)

    def _root(self, rows: list[Tensor], near: float) -> float:
        """Where the least that any shares give on the directions seen is the aimed share of the budget."""

        def excess(log_reach: float) -> float:
            reach = math.exp(log_reach)
            parts = self._parts(rows, reach) * self.trial.scales(reach).square()
            return math.log(max(balanced_shares(parts)[1] * reach / (AIM * self.budget), 1e-300))

        middle = math.log(near)
        low, high = middle - math.log(LONGEST), middle + math.log(LONGEST)
        x, value = middle, excess(middle)
        for _ in range(BISECTIONS):
            if abs(value) < 0.1 * SETTLED:
                break
            low, high = (x, high) if value < 0 else (low, x)
            step = x - value / GROWTH
            x = step if low < step < high else 0.5 * (low + high)
            value = excess(x)
        return math.exp(x)

    def _new_direction(self, reach: float, scales: Tensor, shares: Tensor) -> float:
        """The estimate with these shares; its maximiser joins the directions."""
        forms = self.forms_at(reach)
        product, start = self.trial.product(forms, scales.square() / shares), self.trial.start
        steps = STEPS if self.trial.warm else FIRST_STEPS
        largest, vector = rough_largest_eigenvalue(product, start, max_steps=steps)
        self.trial.remember(vector, adapt=self.per_token)
        return math.sqrt(max(largest, 0.0) * float(shares.sum()))
