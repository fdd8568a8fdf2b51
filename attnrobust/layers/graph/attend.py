"""Dot-product self-attention as a node, with its second and third derivative.

Per head and row let ``E`` be the mean under the clean weights P, ``l_a`` the first-order change of the scores along a,
``Q_ab = scale (dq_a dk_b + dq_b dk_a)`` their second-order change (there is no third), both less their mean under E,
and ``g_a`` the change of the values. The Taylor coefficients of ``P exp(w) / E exp(w)`` are
``P_a = P l_a``, ``P_ab = P (l_a l_b + Q_ab - E[l_a l_b])`` and
``P_abc = P (t - E t)`` with ``t = l_a l_b l_c + sum (Q_ab - E[l_a l_b]) l_c``, and since the values are affine
``f'' = P_ab v + P_a g_b + P_b g_a`` and ``f''' = P_abc v + sum P_ab g_c``, sums over the three choices of one, each
then sent through ``w_o``. Derivation: coefficient by coefficient from ``P(x + .) = P exp(w) / E exp(w)``.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnrobust.errors import UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph.node import Edges, Node, NodeState, require_width
from attnrobust.layers.jacobian import AttentionJacobian


@dataclass(frozen=True, eq=False)
class Attend(Node):
    """Multi-head dot-product self-attention; masks, causality and biases are those of the specification.

    Args:
        attention: The existing specification.

    Raises:
        UnsupportedModelError: Another kind of attention.
    """

    attention: Attention

    def __post_init__(self) -> None:
        if type(self.attention) is not Attention:
            raise UnsupportedModelError(f"{type(self.attention).__name__} is not dot-product Attention")

    @property
    def kind(self) -> str:
        return f"Attention({self.attention.heads} heads)"

    @property
    def features(self) -> frozenset[str]:
        """The class and the features of the attention."""
        return super().features | {f"Attention.{feature}" for feature in self.attention.features}

    def out_width(self, widths: tuple[int, ...]) -> int:
        require_width("Attention", self.attention.width, widths)
        return self.attention.out_width

    def forward(self, inputs: Edges, mass: Tensor | None = None) -> Tensor:
        return self.attention(inputs[0], mass)

    def at(self, inputs: Edges, mass: Tensor | None = None) -> NodeState["AttentionFeatures"]:
        return AttentionState(AttentionJacobian(self.attention, inputs[0], mass))


@dataclass(frozen=True, eq=False)
class AttentionFeatures:
    """What attention's higher derivatives need of one direction, per head.

    Args:
        queries: Change of the queries (..., h, n, k).
        keys: Change of the keys (..., h, n, k).
        values: Change of the values (..., h, n, v).
        logits: First-order change of the scores less its mean under the clean weights (..., h, n, n).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor


@dataclass(frozen=True, eq=False)
class AttentionState(NodeState[AttentionFeatures]):
    """Derivatives of attention at the tokens of ``jacobian``."""

    jacobian: AttentionJacobian

    @property
    def _weights(self) -> Tensor:
        return self.jacobian.weights

    @cached_property
    def _top(self) -> Tensor:
        return self._weights.argmax(dim=-1, keepdim=True)

    def jvp(self, a: Edges) -> Tensor:
        return self.jacobian.matvec(a[0])

    def vjp(self, y: Tensor) -> Edges:
        return (self.jacobian.rmatvec(y),)

    def features(self, a: Edges) -> AttentionFeatures:
        layer, state = self.jacobian.attention, self.jacobian
        dq, dk, dv = (torch.einsum("...nd,hdk->...hnk", a[0], w) for w in (layer.w_q, layer.w_k, layer.w_v))
        dq, dk = layer.turned(dq), layer.turned(dk)
        logits = dq @ state.keys.mT + state.queries @ dk.mT
        return AttentionFeatures(dq, dk, dv, self._centre(logits))

    def logits_adjoint(self, y: Tensor) -> Edges:
        """Transpose of the map from a direction to the ``logits`` of its features."""
        return self._to_tokens(y, (), torch.zeros_like(self.jacobian.values))

    def bilinear(self, a: AttentionFeatures, b: AttentionFeatures) -> Tensor:
        weights = self._second_weights(a, b)
        heads = weights @ self.jacobian.values + self._first_weights(a) @ b.values + self._first_weights(b) @ a.values
        return self.jacobian.attention.combine(heads)

    def bilinear_adjoint(self, a: AttentionFeatures, y: Tensor) -> Edges:
        heads = self._split(y)
        on_second = self._weigh(heads @ self.jacobian.values.mT)
        on_logits = on_second * a.logits + self._weigh(heads @ a.values.mT)
        return self._to_tokens(on_logits, ((on_second, a),), self._first_weights(a).mT @ heads)

    def trilinear(self, a: AttentionFeatures, b: AttentionFeatures, c: AttentionFeatures) -> Tensor:
        t, heads = a.logits * b.logits * c.logits, torch.zeros_like(c.values)
        for one, two, three in ((a, b, c), (b, c, a), (c, a, b)):
            bends, pair = self._centre(self._bends(one, two)), one.logits * two.logits
            rest = bends - self._mean(pair)
            t = t + rest * three.logits
            heads = heads + (self._weights * (pair + rest)) @ three.values
        return self.jacobian.attention.combine(heads + self._weigh(t) @ self.jacobian.values)

    def trilinear_adjoint(self, a: AttentionFeatures, b: AttentionFeatures, y: Tensor) -> Edges:
        heads = self._split(y)
        on_third, on_a, on_b = (self._weigh(heads @ v.mT) for v in (self.jacobian.values, a.values, b.values))
        pair = a.logits * b.logits
        sum_a, sum_b = ((on_third * f.logits).sum(dim=-1, keepdim=True) for f in (a, b))
        on_logits = on_third * (pair - self._mean(pair) + self._centre(self._bends(a, b)))
        on_logits = on_logits - self._weights * (sum_b * a.logits + sum_a * b.logits)
        on_logits = on_logits + on_b * a.logits + on_a * b.logits
        bends_a = on_third * b.logits - self._weights * sum_b + on_b
        bends_b = on_third * a.logits - self._weights * sum_a + on_a
        return self._to_tokens(on_logits, ((bends_a, a), (bends_b, b)), self._second_weights(a, b).mT @ heads)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _mean(self, scores: Tensor) -> Tensor:
        mean: Tensor = torch.linalg.vecdot(self._weights, scores, dim=-1)
        return mean[..., None]

    def _centre(self, scores: Tensor) -> Tensor:
        """``t - E t``, counted from the likeliest key, so that nothing cancels where its weight is nearly 1."""
        shifted = scores - scores.gather(-1, self._top.expand(*scores.shape[:-1], 1))
        return shifted - self._mean(shifted)

    def _weigh(self, scores: Tensor) -> Tensor:
        """``P (t - E t)``; symmetric as a map of t, so it is its own transpose."""
        return self._weights * self._centre(scores)

    def _bends(self, a: AttentionFeatures, b: AttentionFeatures) -> Tensor:
        """Second-order change of the scores, not centred."""
        return self.jacobian.attention.factor * (a.queries @ b.keys.mT + b.queries @ a.keys.mT)

    def _first_weights(self, a: AttentionFeatures) -> Tensor:
        return self._weights * a.logits

    def _second_weights(self, a: AttentionFeatures, b: AttentionFeatures) -> Tensor:
        return self._weigh(a.logits * b.logits + self._bends(a, b))

    def _split(self, y: Tensor) -> Tensor:
        """Transpose of ``Attention.combine``."""
        layer = self.jacobian.attention
        if layer.w_o is not None:
            return torch.einsum("...ne,hve->...hnv", y, layer.w_o)
        heads: Tensor = y.unflatten(-1, (layer.heads, layer.value_width))
        return heads.transpose(-3, -2)

    def _to_tokens(
        self, on_logits: Tensor, on_bends: tuple[tuple[Tensor, AttentionFeatures], ...], on_values: Tensor
    ) -> Edges:
        """From cotangents of the centred logits, of the bends with given directions and of the values to tokens."""
        layer = self.jacobian.attention
        on_logits = on_logits - self._weights * on_logits.sum(dim=-1, keepdim=True)
        on_queries, on_keys = on_logits @ self.jacobian.keys, on_logits.mT @ self.jacobian.queries
        for cotangent, f in on_bends:
            on_queries = on_queries + layer.factor * (cotangent @ f.keys)
            on_keys = on_keys + layer.factor * (cotangent.mT @ f.queries)
        on_queries, on_keys = layer.turned_back(on_queries), layer.turned_back(on_keys)
        tokens = _back(on_queries, layer.w_q) + _back(on_keys, layer.w_k) + _back(on_values, layer.w_v)
        return (tokens,)


def _back(cotangent: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("...hnk,hdk->...nd", cotangent, weight)
