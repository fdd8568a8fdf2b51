"""A Lipschitz bound from what the tokens really spread over, instead of a ball around the origin (derived)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.method import PLACED_FEATURES, CertificateMethod
from attnrobust.certify.shared.change import ChangeBound, smallest
from attnrobust.certify.shared.head_sizes import HeadSizes, ValueView, value_views
from attnrobust.certify.shared.reach import Reach, RowSums, attention_of, visible_tokens
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem


@dataclass(frozen=True, eq=False)
class Spread:
    """Sizes of the layer on the whole set of a threat of a given size."""

    sizes: HeadSizes
    views: tuple[ValueView, ...]
    rows: RowSums

    @classmethod
    def of(cls, problem: Problem) -> "Spread":
        """Measure the clean input."""
        layer, points = attention_of(problem), problem.clean.points
        visible = visible_tokens(layer, problem.clean.n)
        return cls(
            sizes=HeadSizes.of(layer, points, visible),
            views=value_views(layer, points, visible, problem.resolved),
            rows=RowSums(problem.resolved.weights, Reach.of(problem, visible)),
        )

    def key_gradient(self, size: float) -> Float[Tensor, "h n"]:
        """``|d s_ij / d x_j|`` of every query on the set."""
        reach = self.rows.reach
        return self.sizes.key_gradient + self.sizes.bilinear[:, None] * (reach.token * size) * reach.movable

    def query_diameter(self, size: float) -> Float[Tensor, "h"]:
        """Diameter of the score gradients in ``x_i`` over the keys, on the set."""
        return self.sizes.query_diameter + self.sizes.bilinear * self.rows.reach.pair * size

    def value_diameter(self, view: ValueView, size: float) -> Float[Tensor, "c h"]:
        """Diameter of the visible tokens' values on the set."""
        return view.diameters + view.norms * self.rows.reach.pair * size

    def change(self, size: float) -> Float[Tensor, "c"]:
        """Upper bound of the goal's changes on the set: first derivative along the segment, everywhere on it."""
        return smallest([view.total(self._head_change(view, size)) for view in self.views])

    def _head_change(self, view: ValueView, size: float) -> Float[Tensor, "c h"]:
        rows, reach = self.rows, self.rows.reach
        half = 0.5 * self.value_diameter(view, size)
        key = 0.5 * reach.pair * size * rows.steady(self.key_gradient(size))
        each = torch.ones_like(self.sizes.key_gradient[0])
        query = 0.5 * self.query_diameter(size) * rows.moved(each) * size
        return view.norms * reach.attended * size * rows.steady(each) + half * (key + query)


class SpreadLipschitz(CertificateMethod):
    """Lipschitz bound from diameters of values and keys and the largest key gradient on the threat's set.

    One head, Frobenius: ``sqrt(n) ||w_v|| + (D_v/2) [ (sum_i |beta_i|^2)^{1/2} / sqrt(2) + D_k/2 ]`` with the diameters
    ``D_v``, ``D_k`` of ``x_j w_v`` and ``x_j B^T``. Never larger than the derived ball bound; blind to a common offset
    of all tokens.
    """

    name = "spread-lipschitz"
    reference = "derived (docs/certificates-literature.md, section 3)"
    region = "the threat's set around the clean input"
    layers = (Attention,)
    features = PLACED_FEATURES

    def prepare(self, problem: Problem, *, seed: int) -> ChangeBound:
        return ChangeBound(problem, Spread.of(problem).change)
