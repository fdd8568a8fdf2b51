"""A local bound that holds for every size of the move, not only infinitesimal ones (after Havens et al. 2024)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.method import PLACED_FEATURES, CertificateMethod
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.first_order import FirstOrder, first_order
from attnrobust.certify.shared.head_sizes import HeadSizes, ValueView, value_views
from attnrobust.certify.shared.reach import Reach, RowSums, attention_of, visible_tokens
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian, value_map
from attnrobust.problem import Problem

VALUE_ACCURACY = 1e-2  # the value part is a small share of this bound


@dataclass(frozen=True, eq=False)
class _Local:
    """Sizes at the clean input; the weights of the clean input enter through ``values`` exactly."""

    sizes: HeadSizes
    views: tuple[ValueView, ...]
    rows: RowSums
    values: FirstOrder

    def change(self, size: float) -> Float[Tensor, "c"]:
        """Values moved under the clean weights, plus moved weights on moved values."""
        each = self.rows.steady(torch.ones_like(self.sizes.key_gradient[0])) * self.rows.reach.attended * size
        exact = [self.values.slopes * size + view.total(self._weights(view, size)) for view in self.views]
        return smallest([*exact, *(view.total(view.norms * each + self._weights(view, size)) for view in self.views)])

    def _weights(self, view: ValueView, size: float) -> Float[Tensor, "c h"]:
        return torch.minimum(self._in_l2(view, size), self._in_total_variation(view, size))

    def _in_l2(self, view: ValueView, size: float) -> Float[Tensor, "c h"]:
        """``||(P' - P) Y'|| <= ||P' - P||_F ||Y'||_2``; the softmax is 1/2-Lipschitz in l2."""
        rows, sizes = self.rows, self.sizes
        attended = rows.reach.frobenius * size if rows.reach.attended > 0 else 0.0
        each = torch.ones_like(sizes.key_gradient[0])
        query = (sizes.query_spectral + sizes.bilinear * attended) * rows.moved(each) * size
        key = sizes.key_gradient_norm
        if rows.pool is not None:
            key = torch.minimum(rows.steady(sizes.key_gradient), key * torch.linalg.vector_norm(rows.pool))
        return 0.5 * (query + key * attended) * (view.spectral + view.norms * attended)

    def _in_total_variation(self, view: ValueView, size: float) -> Float[Tensor, "c h"]:
        """Row i moves by at most ``diam(Y') tanh(osc(score change of i) / 4)``."""
        reach, sizes = self.rows.reach, self.sizes
        each = torch.ones_like(sizes.key_gradient[0])
        gradient = sizes.key_gradient + sizes.bilinear[:, None] * (reach.token * size) * reach.movable
        key = self.rows.steady(torch.tanh(0.25 * gradient * reach.pair * size))
        query = 0.25 * sizes.query_diameter * self.rows.moved(each) * size
        return (view.diameters + view.norms * reach.pair * size) * (key + query)


class HavensLocal(CertificateMethod):
    """Bound of the finite change at the clean input, from the split into moved values and moved weights.

    One head, Frobenius, ``||H|| = rho``:
    ``||sum_h P_h H M_h|| + (1/2) [ rho (||X_c B^T|| + ||G||) + ||B|| rho^2 ] (||X_c M|| + rho ||M||)`` with
    ``M = w_v w_o``, the key gradients ``x_i B + scale w_k b_q`` as rows of ``G``, and ``X_c`` centred. The second part
    is replaced row by row by ``diam(X' M) tanh(osc / 4)`` where that is smaller. Valid for every rho, mask and masses.
    """

    name = "havens2024-local"
    reference = (
        "derived (docs/certificates-literature.md, section 4), after Havens et al., Fine-grained local sensitivity "
        "analysis of standard dot-product self-attention, ICML 2024"
    )
    region = "the threat's set around the clean input"
    layers = (Attention,)
    features = PLACED_FEATURES

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        layer, points = attention_of(problem), problem.clean.points
        visible = visible_tokens(layer, problem.clean.n)
        jacobian = AttentionJacobian(layer, points, problem.mass)
        values = first_order(problem, value_map(jacobian), seed=seed, accuracy=VALUE_ACCURACY)
        local = _Local(
            sizes=HeadSizes.of(layer, points, visible),
            views=value_views(layer, points, visible, problem.resolved),
            rows=RowSums(problem.resolved.weights, Reach.of(problem, visible)),
            values=values,
        )
        return ChangeBound(problem, local.change, failure_probability=values.failure_probability)
