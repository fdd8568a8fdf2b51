"""Exact first order at the clean input plus a closed-form bound of the second derivative (Singla, Feizi 2020)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.spread_lipschitz import Spread
from attnrobust.certify.method import PLACED_FEATURES, CertificateMethod
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.first_order import FirstOrder, first_order
from attnrobust.certify.shared.head_sizes import ValueView
from attnrobust.certify.shared.reach import attention_of
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.problem import Problem


@dataclass(frozen=True, eq=False)
class _Curvature:
    spread: Spread
    slopes: FirstOrder

    def change(self, size: float) -> Float[Tensor, "c"]:
        """Taylor's formula with the second derivative bounded on the whole set."""
        second = smallest([view.total(self._head_second(view, size)) for view in self.spread.views])
        return self.slopes.slopes * size + 0.5 * second * size**2

    def _head_second(self, view: ValueView, size: float) -> Float[Tensor, "c h"]:
        """Per unit size squared: ``|f''_i| <= c0_i + c1_i |h_i| + c2 |h_i|^2``, constants in section 5 of the docs."""
        rows, sizes = self.spread.rows, self.spread.sizes
        pair = rows.reach.pair
        values, keys = self.spread.value_diameter(view, size), self.spread.query_diameter(size)
        gradient = self.spread.key_gradient(size)
        # One row of one head: (c, h, n).
        norms, values_row = view.norms[..., None], values[..., None]
        steady = 0.5 * norms * gradient * pair**2 + 0.125 * values_row * (gradient * pair) ** 2
        query = norms * keys[:, None] + values_row * sizes.bilinear[:, None]
        moved = 0.5 * pair * query + 0.25 * values_row * keys[:, None] * gradient * pair
        return rows.steady(steady) + rows.moved(moved) + 0.125 * values * keys**2 * rows.moved_squared()


class SinglaCurvature(CertificateMethod):
    """First order exact, second order by a closed-form bound of the Hessian on the threat's set.

    ``change <= L r + K(r) r^2 / 2``: L is the exact dual norm of the margin's gradient, or an upper bound of the
    largest singular value of the derivative; K bounds the second derivative through diameters of values and keys and
    through the key gradients, all on the set of size r. Exact to first order, so it is sharp for small tolerances.
    """

    name = "singla2020-curvature"
    reference = (
        "derived (docs/certificates-literature.md, section 5), after Singla and Feizi, Second-order provable defenses "
        "against adversarial attacks, ICML 2020"
    )
    region = "the threat's set around the clean input"
    layers = (Attention,)
    features = PLACED_FEATURES

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        jacobian = AttentionJacobian(attention_of(problem), problem.clean.points, problem.mass)
        slopes = first_order(problem, jacobian.linear_map(), seed=seed)
        curvature = _Curvature(Spread.of(problem), slopes)
        return ChangeBound(problem, curvature.change, failure_probability=slopes.failure_probability)
