"""How fast outputs change when tokens split in place, against how fast they change when tokens move."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError, UnsupportedModelError
from attnrobust.layers.attention import Attention
from attnrobust.lipschitz.derivative_map import attention_jacobian, mass_weighted
from attnrobust.numerics.linear_map import largest_singular_value_lower
from attnrobust.numerics.sides import Lower, round_down
from attnrobust.tokens import TokenMeasure, as_measure


@dataclass(frozen=True, eq=False)
class SplittingRates:
    """Rates at which W_2 of the output measure grows for small displacements.

    Args:
        moving: Of whole tokens: norm of ``D^{1/2} J D^{-1/2}``, D = diag(masses), from below.
        splitting: Of each token that splits into two equal parts that leave in opposite directions, (n,).
    """

    moving: Lower
    splitting: Float[Tensor, "n"]

    @property
    def best_splitting(self) -> Lower:
        """The largest rate of a token that splits, from below."""
        return Lower(round_down(float(self.splitting.max()), relative=1e-12))

    @property
    def gain(self) -> float:
        """Splitting over moving; above 1 where splitting is the stronger of the two."""
        return self.best_splitting.value / self.moving.value if self.moving.value > 0 else float("inf")


def splitting_rates(layer: Attention, clean: TokenMeasure, *, seed: int = 0) -> SplittingRates:
    """Compare small splits with small moves at one input.

    When token i splits into parts whose moves have mean zero, the context of every query is unchanged to first order,
    and a part at ``x_i + h`` changes by ``h Q_i``, ``Q_i = sum_h scale w_q Cov_i(k, v) w_o``: the derivative of the
    output at i in its own query. For displacements that tend to 0 the largest rate is the larger one of ``moving`` and
    ``max_i ||Q_i||``. It is no
    certificate: in W_2 a tiny mass may also travel far.

    Args:
        layer: Attention without any mask.
        clean: The input.
        seed: Seed of the first directions.

    Returns:
        Both rates.

    Raises:
        UnsupportedModelError: A mask; splitting has no meaning then.
        InputError: Another width.

    References:
        Castin, Ablin, Peyre (first version of arXiv 2312.14820) compare moving and splitting; derived:
        docs/certificates-literature.md, section 9.

    Examples:
        >>> layer = Attention(w_q=torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]), w_k=torch.eye(2)[None],
        ...                   w_v=torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), scale=2.0)
        >>> rates = splitting_rates(layer, TokenMeasure(torch.tensor([[-0.5, 1.0], [0.5, -1.0]])))
        >>> round(rates.moving.value, 4), round(rates.best_splitting.value, 4)
        (0.5, 1.118)
    """
    if layer.causal or layer.mask is not None or layer.placed:
        raise UnsupportedModelError(
            "splitting is about token measures, without order; give a layer without mask and positions"
        )
    clean = as_measure(clean)
    if clean.width != layer.width:
        raise InputError(f"the tokens have width {clean.width}, the layer takes {layer.width}")
    linear = mass_weighted(attention_jacobian(layer, clean).linear_map(), clean.mass)
    moving = largest_singular_value_lower(linear, seed=seed)[0]
    return SplittingRates(moving, torch.linalg.matrix_norm(own_query_blocks(layer, clean), ord=2))


def own_query_blocks(layer: Attention, clean: TokenMeasure) -> Float[Tensor, "n d e"]:
    """``Q_i`` of every token, for moves that multiply from the left."""
    jacobian = attention_jacobian(layer, clean)
    weights = jacobian.weights
    keys = jacobian.keys[:, None] - (weights @ jacobian.keys)[:, :, None]  # centred for every query, (h, i, j, k)
    values = jacobian.values[:, None] - jacobian.averages[:, :, None]
    covariance = torch.einsum("hij,hijk,hijv->hikv", weights, keys, values)
    heads = torch.einsum("hdk,hikv->hidv", layer.w_q, covariance)
    if layer.w_o is None:
        return heads.permute(1, 2, 0, 3).flatten(2)
    return torch.einsum("hidv,hve->ide", heads, layer.w_o)
