"""The convex relaxation of one softmax row: which linear, second-order, exponential and semidefinite facts hold for it.

Every fact is an (in)equality that the true quantities of every move in the set fulfil; docs/conic-certificate.md proves
them one by one under the names used here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from attnrobust.certify.conic.basis import away_from, norm_upper
from attnrobust.certify.conic.program import Affine, Cone, interleaved, product_at_least_square, stacked
from attnrobust.certify.conic.ranges import Ranges
from attnrobust.certify.conic.row import MoveSet, Row
from attnrobust.numerics.rounding import ENTRY, SMALLEST, outward

Array = Float[np.ndarray, "..."]
Fact = tuple[str, Cone, Affine]

SMALLEST_ENERGY = 1e-200  # of a q_j; one below vanishes identically


@dataclass(frozen=True, eq=False)
class Block:
    """Variables and facts of one row.

    Local columns, all scaled to about 1: the move ``D / rho`` (m d), token energies ``|delta_l|^2 / rho^2`` (m), the
    entries of the moment matrix of ``xi = (1, y, eta, p)``, and single variables.

    Args:
        row: The row.
        reach: The perturbation set.
        ranges: Its constants.
        bases: Orthonormal basis (d, .) per moving token of the directions that matter to this row; None: not seen.
    """

    row: Row
    reach: MoveSet
    ranges: Ranges
    bases: tuple[Float[np.ndarray, "d _"] | None, ...]

    # ---- layout ----------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> int:
        """Visible keys."""
        return self.row.keys

    @property
    def bends(self) -> bool:
        """Whether there is a bilinear part."""
        return self.row.bilinear_norm > 0.0

    @cached_property
    def places(self) -> dict[int, slice]:
        """Coordinates of each seen moving token within xi."""
        start, out = 1, {}
        for token, basis in enumerate(self.bases):
            if basis is not None:
                out[token] = slice(start, start + basis.shape[1])
                start += basis.shape[1]
        return out

    @property
    def bilinear_place(self) -> slice:
        """Coordinates eta of the bilinear part."""
        start = 1 + sum(s.stop - s.start for s in self.places.values())
        return slice(start, start + (self.keys - 1 if self.bends else 0))

    @property
    def size(self) -> int:
        """Side of the moment matrix."""
        return int(self.bilinear_place.stop) + 1

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Local columns by name."""
        m, d, k, side = self.row.moving, len(self.row.beta), self.keys, self.size
        bent = k if self.bends else 0
        sizes = {
            "move": m * d, "energy": m, "moments": side * (side + 1) // 2, "weight": k, "log-mass": 1, "cross": k,
            "pair": k, "values": 1, "rest": bent, "tail-query": bent, "tail-key": bent, "length": min(bent, 1),
        }  # fmt: skip
        ends = np.cumsum(list(sizes.values()))
        return {name: slice(int(end) - size, int(end)) for (name, size), end in zip(sizes.items(), ends, strict=True)}

    @cached_property
    def width(self) -> int:
        """Number of local columns."""
        return int(self.columns["length"].stop)

    def variables(self, name: str) -> Affine:
        """The variables of that name."""
        chosen = self.columns[name]
        coef = np.zeros((chosen.stop - chosen.start, self.width))
        coef[:, chosen] = np.eye(chosen.stop - chosen.start)
        return Affine(coef, np.zeros(len(coef)))

    def entries(self, matrices: Float[np.ndarray, "r M M"]) -> Affine:
        """``<G, Omega>`` for every G."""
        upper = np.triu_indices(self.size)
        both = matrices + matrices.transpose(0, 2, 1)
        both[:, np.arange(self.size), np.arange(self.size)] *= 0.5
        coef = np.zeros((len(matrices), self.width))
        coef[:, self.columns["moments"]] = both[:, upper[0], upper[1]]
        return Affine(coef, np.zeros(len(coef)))

    def moment(self, left: Float[np.ndarray, "r M"], right: Float[np.ndarray, "r M"]) -> Affine:
        """``(left . xi)(right . xi)`` for every pair."""
        return self.entries(left[:, :, None] * right[:, None, :])

    def first(self, vectors: Float[np.ndarray, "r M"]) -> Affine:
        """``vectors . xi``."""
        one = np.zeros_like(vectors)
        one[:, 0] = 1.0
        return self.moment(vectors, one)

    def trace(self, token: int) -> Affine:
        """Energy of the token inside its basis."""
        matrix = np.zeros((1, self.size, self.size))
        place = np.arange(self.places[token].start, self.places[token].stop)
        matrix[0, place, place] = 1.0
        return self.entries(matrix)

    def energy(self, token: int) -> Affine:
        """Energy of the token."""
        return self.variables("energy")[[token]]

    # ---- quantities as vectors over xi -----------------------------------------------------------------------------

    @cached_property
    def free_keys(self) -> Int[np.ndarray, "rest"]:
        """All keys but the heaviest; w.q = 0 gives q at that one."""
        return np.delete(np.arange(self.keys), int(np.argmax(self.row.weight)))

    @cached_property
    def completion(self) -> Float[np.ndarray, "keys rest"]:
        """F: q from its entries at the free keys."""
        heaviest = int(np.argmax(self.row.weight))
        out = np.zeros((self.keys, self.keys - 1))
        out[self.free_keys, np.arange(self.keys - 1)] = 1.0
        out[heaviest] = -self.row.weight[self.free_keys] / self.row.weight[heaviest]
        return out

    @cached_property
    def bilinear_vectors(self) -> Float[np.ndarray, "keys M"]:
        """q_j over xi."""
        out = np.zeros((self.keys, self.size))
        if self.bends:
            out[:, self.bilinear_place] = self.ranges.bilinear * self.completion
        return out

    @cached_property
    def logit_vectors(self) -> Float[np.ndarray, "keys M"]:
        """u_j / U_j over xi: linear part and bilinear part."""
        out = self.bilinear_vectors.copy()
        for token, place in self.places.items():
            out[:, place] = self.reach.token * self.row.directions[:, token] @ self.bases[token]  # type: ignore[operator]
        return np.asarray(out / self.ranges.logit[:, None])

    @cached_property
    def value_scale(self) -> Float[np.ndarray, "keys"]:
        """tau_j, or 1 where the value cannot change."""
        return np.where(self.ranges.value > 0.0, self.ranges.value, 1.0)

    @cached_property
    def value_vectors(self) -> Float[np.ndarray, "keys M"]:
        """t_j / tau_j over xi."""
        out = np.zeros((self.keys, self.size))
        for j in np.flatnonzero(self.row.key_moves):
            token = int(self.row.key[j])
            out[j, self.places[token]] = self.reach.token * self.row.value @ self.bases[token]  # type: ignore[operator]
        return np.asarray(out / self.value_scale[:, None])

    @property
    def unit(self) -> float:
        """Unit of the change of a value."""
        return max(float(self.ranges.value.max()), SMALLEST)

    @cached_property
    def largest_log_mass(self) -> float:
        """Bound of kappa = log E e^u."""
        bound = min(float(self.ranges.logit.max()), math.log1p(self.ranges.remainder))
        return bound if self.ranges.share >= 1.0 else min(bound, outward(-math.log1p(-self.ranges.share), ENTRY))

    def remainder_vector(self) -> Float[np.ndarray, "1 M"]:
        """The share p, over pbar, as a vector over xi."""
        out = np.zeros((1, self.size))
        out[0, -1] = 1.0
        return out

    # ---- facts -----------------------------------------------------------------------------------------------------

    def facts(self) -> Iterator[Fact]:
        """All (in)equalities of this row."""
        yield from self._moments()
        if self.bends:
            yield from self._bilinear()
        yield from self._remainder()
        yield from self._softmax()
        yield from self._values()

    def drop(self) -> Affine:
        """The row's share of the drop: ``pi (sum_j P_j v_j - sum_j P_j t_j)``."""
        return (self.variables("weight").total(self.row.drop) + self.variables("values") * self.unit) * self.row.share

    def _moments(self) -> Iterator[Fact]:
        """Omega_00 = 1, first moments of y are the move, energies inside the bases are at most the tokens' energies."""
        start = np.zeros((1, self.size))
        start[0, 0] = 1.0
        yield "moment of 1", Cone.ZERO, self.first(start) - 1.0
        d = len(self.row.beta)
        for token, place in self.places.items():
            basis = self.bases[token]
            assert basis is not None  # noqa: S101 - places holds seen tokens only; narrows the type
            move = self.variables("move")[token * d : (token + 1) * d].mapped(basis.T)
            yield "moment of the move", Cone.ZERO, self.first(np.eye(self.size)[place]) - move
            yield "energy in the basis", Cone.NONNEGATIVE, self.energy(token) - self.trace(token)
        u, t = self.logit_vectors, self.value_vectors
        yield "range of u", Cone.NONNEGATIVE, 1.0 - self.first(u)
        yield "range of -u", Cone.NONNEGATIVE, self.first(u) + 1.0
        yield "range of u^2", Cone.NONNEGATIVE, 1.0 - self.moment(u, u)
        yield "range of t^2", Cone.NONNEGATIVE, 1.0 - self.moment(t, t)

    def _bilinear(self) -> Iterator[Fact]:
        """Bilinear part: q = C b with ``b_j = delta_i A delta_j``: inside the bases from Omega, outside by energy."""
        row, query = self.row, self.row.query
        scale = row.bilinear_norm
        own = self.bases[query]
        assert own is not None  # noqa: S101 - the query token is seen where it moves; narrows the type
        inside = np.zeros((self.keys, self.size, self.size))
        outside_query, outside_key = np.zeros(self.keys), np.zeros(self.keys)
        away = away_from(own)
        tails: list[Affine] = []
        for j in map(int, np.flatnonzero(row.key_moves)):
            token = int(row.key[j])
            basis = self.bases[token]
            assert basis is not None  # noqa: S101 - keys that move are seen; narrows the type
            inside[j, self.places[query], self.places[token]] = own.T @ row.bilinear @ basis / scale
            outside_query[j] = norm_upper(away @ row.bilinear) / scale
            outside_key[j] = norm_upper(own.T @ row.bilinear @ away_from(basis)) / scale
            kept, left = self.trace(query), self.energy(token) - self.trace(token)
            lost = self.energy(query) - kept
            tails.append(product_at_least_square(lost, self.energy(token), self.variables("tail-query")[[j]]))
            tails.append(product_at_least_square(kept, left, self.variables("tail-key")[[j]]))
        yield "tails of the bilinear part", Cone.SECOND_ORDER, stacked(tails)
        rest = self.variables("rest")
        bound = self.variables("tail-query") * outside_query + self.variables("tail-key") * outside_key
        yield "rest of b", Cone.NONNEGATIVE, bound - rest
        yield "rest of -b", Cone.NONNEGATIVE, bound + rest
        bent = (self.entries(inside) + rest).mapped(row.centring[self.free_keys])
        factor = scale * self.reach.token**2 / self.ranges.bilinear
        eta = np.eye(self.size)[self.bilinear_place]
        yield "moment of the bilinear part", Cone.ZERO, self.first(eta) - bent * factor
        yield from self._bilinear_energy(away, own)

    def _bilinear_energy(self, away: Array, own: Array) -> Iterator[Fact]:
        """``sum_j c_j q_j^2 <= s_c |delta_i A|^2`` and the length ``|delta_i A|^2`` from the query's moments."""
        row, query, length = self.row, self.row.query, self.variables("length")
        gram = row.bilinear @ row.bilinear.T / row.bilinear_norm**2
        inside = np.zeros((1, self.size, self.size))
        inside[0, self.places[query], self.places[query]] = own.T @ gram @ own
        cross = norm_upper(away @ gram @ away)
        # Any positive ratio is sound; this one balances the two parts.
        ratio = max(math.sqrt(cross / max(norm_upper(own.T @ gram @ own), SMALLEST)), 1e-6)
        bound = self.entries(inside)
        if cross > 0.0:
            bound = bound * (1.0 + ratio) + (self.energy(query) - self.trace(query)) * ((1.0 + 1.0 / ratio) * cross)
        yield "length of the query's image", Cone.NONNEGATIVE, bound - length
        yield "length by energy", Cone.NONNEGATIVE, self.energy(query) - length
        q = self.bilinear_vectors
        squares = self.moment(q, q)
        weights = np.vstack([row.weight[None, :], np.eye(self.keys)])
        limit = self.ranges.spread * (row.bilinear_norm * self.reach.token) ** 2
        kept = limit > SMALLEST_ENERGY  # 0: that q_j vanishes identically
        scaled = squares.mapped(weights[kept]) * (1.0 / limit[kept])
        yield "energy of the bilinear part", Cone.NONNEGATIVE, length.repeated(int(kept.sum())) - scaled

    def _remainder(self) -> Iterator[Fact]:
        """The share p = s / (1 + s), s = E psi(u): range, square, moments, and products with u and t."""
        ranges, remainder = self.ranges, self.remainder_vector()
        p, squares = self.first(remainder), self.moment(self.logit_vectors, self.logit_vectors)
        half = 0.5 * ranges.logit**2
        scale = 1.0 / ranges.share
        yield "range of p", Cone.NONNEGATIVE, 1.0 - p
        yield "square of p", Cone.NONNEGATIVE, p - self.moment(remainder, remainder)
        yield "p from above", Cone.NONNEGATIVE, squares.total(scale * ranges.saturating * half) - p
        yield "p from below", Cone.NONNEGATIVE, p - squares.total(scale * ranges.flat * half)
        for name, vectors in (("p u", self.logit_vectors), ("p t", self.value_vectors)):
            both = self.moment(np.repeat(remainder, self.keys, axis=0), vectors)
            one, many = self.first(vectors), p.repeated(self.keys)
            yield f"{name}, plane 1", Cone.NONNEGATIVE, many - both
            yield f"{name}, plane 2", Cone.NONNEGATIVE, many + both
            yield f"{name}, plane 3", Cone.NONNEGATIVE, one + 1.0 - many - both
            yield f"{name}, plane 4", Cone.NONNEGATIVE, both - one + 1.0 - many

    def _softmax(self) -> Iterator[Fact]:
        """``P_j = w_j e^(u_j - kappa)``, kappa = log E e^u = -log(1 - p): exponentials from below, chords above."""
        ranges, row = self.ranges, self.row
        weight, mass, p = (
            self.variables("weight"),
            self.variables("log-mass"),
            self.first(self.remainder_vector()) * ranges.share,
        )
        logs = self.first(self.logit_vectors) * ranges.logit - mass.repeated(self.keys) + row.log_weight
        one = Affine(np.zeros_like(weight.coef), np.ones(self.keys))
        yield "weights sum to 1", Cone.ZERO, weight.total() - 1.0
        yield "weight by exponential", Cone.EXPONENTIAL, interleaved(logs, one, weight)
        low, gap = np.exp(ranges.log_low), ranges.log_high - ranges.log_low
        slope = -np.exp(ranges.log_high) * np.expm1(-gap) / gap
        yield "weight by chord", Cone.NONNEGATIVE, (logs - ranges.log_low) * slope + low - weight
        yield "smallest weight", Cone.NONNEGATIVE, weight - low
        yield "largest weight", Cone.NONNEGATIVE, np.exp(ranges.log_high) - weight
        yield "log-mass from below", Cone.NONNEGATIVE, mass
        yield "mass by exponential", Cone.EXPONENTIAL, interleaved(-mass, one[[0]], 1.0 - p)
        top = self.largest_log_mass
        yield "largest log-mass", Cone.NONNEGATIVE, top - mass
        yield "mass by chord", Cone.NONNEGATIVE, p - mass * (-math.expm1(-top) / max(top, SMALLEST))
        yield from self._remainder_weights(weight, p)

    def _remainder_weights(self, weight: Affine, p: Affine) -> Iterator[Fact]:
        """``P_j - w_j (1 - p)(1 + u_j) = w_j psi(u_j) (1 - p)`` lies between two multiples of ``u_j^2 / 2``."""
        ranges, u = self.ranges, self.logit_vectors
        product = self.moment(np.repeat(self.remainder_vector(), self.keys, axis=0), u) * (ranges.share * ranges.logit)
        plain = self.first(u) * ranges.logit - p.repeated(self.keys) - product + 1.0
        left = weight - plain * self.row.weight
        half = self.moment(u, u) * (0.5 * ranges.logit**2)
        yield "weight by quadratic from above", Cone.NONNEGATIVE, half * ranges.saturating - left
        yield "weight by quadratic from below", Cone.NONNEGATIVE, left - half * ranges.flat

    def _values(self) -> Iterator[Fact]:
        """``S = -sum_j P_j t_j``: by its expansion to third order, and by McCormick planes of every product."""
        ranges, u, t = self.ranges, self.logit_vectors, self.value_vectors
        both, cross = self.moment(u, t), self.variables("cross")
        size = ranges.logit * ranges.value / self.unit
        squares = product_at_least_square(self.moment(u, u), self.moment(t, t), cross)
        yield "size of u t", Cone.SECOND_ORDER, squares
        yield "u t", Cone.NONNEGATIVE, cross - both
        yield "-u t", Cone.NONNEGATIVE, cross + both
        weight, tau = self.row.weight, ranges.value / self.unit
        pairs = self.moment(np.repeat(self.remainder_vector(), self.keys, axis=0), t) * ranges.share
        same, opposite = ranges.slope_same, ranges.slope_opposite
        expansion = (pairs - self.first(t)).total(weight * tau)
        expansion = expansion + both.total(size * (0.5 * (same - opposite) - weight))
        expansion = expansion + cross.total(size * 0.5 * (same + opposite))
        values, pair = self.variables("values"), self.variables("pair")
        yield "values by expansion", Cone.NONNEGATIVE, expansion - values
        yield "values by products", Cone.NONNEGATIVE, -pair.total(tau) - values
        low, high, first = np.exp(ranges.log_low), np.exp(ranges.log_high), self.first(t)
        yield "product, plane 1", Cone.NONNEGATIVE, pair - (first * low - self.variables("weight") + low)
        yield "product, plane 2", Cone.NONNEGATIVE, pair - (first * high + self.variables("weight") - high)
