"""L2 self-attention: weights from distances, Lipschitz on all of space."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError, one_line
from attnrobust.layers.features import PLAIN
from attnrobust.layers.heads import (
    ScaledHeadSpecification,
    adopt_number,
    combine,
    project,
    softmax_average,
)


def l2_attention(
    x: Float[Tensor, "*b n d"],
    mass: Float[Tensor, "*m n"] | None,
    *,
    w_q: Float[Tensor, "h d k"],
    w_v: Float[Tensor, "h d v"],
    w_o: Float[Tensor, "h v e"] | None,
    b_o: Float[Tensor, "e"] | None,
    scale: float,
    causal: bool = False,
) -> Float[Tensor, "*b n e"]:
    """The formula of ``L2Attention`` in the precision of its arguments, differentiable."""
    y = project(x, w_q)
    # Distances do not change when all tokens are shifted; near 0 their expansion keeps the most digits. As the result
    # does not depend on the shift, neither does its derivative.
    z = y - y.mean(dim=-2, keepdim=True).detach()
    # |z_i|^2 is the same for every j and cancels in the softmax.
    scores = scale * (2.0 * z @ z.transpose(-1, -2) - z.square().sum(dim=-1)[..., None, :])
    if causal:
        hidden = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    # (P X) A w_v = P (scale (X w_q) (w_q^T w_v)): the d x d matrix A is never formed.
    values = scale * y @ (w_q.transpose(-1, -2) @ w_v)
    return combine(softmax_average(scores, values, mass), w_o, b_o)


@dataclass(frozen=True, eq=False)
class L2Attention(ScaledHeadSpecification):
    """L2 attention with one weight for queries and keys: ``f(X)_i = sum_h (sum_j P^h_ij x_j) A_h w_v^h w_o^h + b_o``.

    ``P_ij`` is proportional to ``mass_j exp(-scale |x_i w_q - x_j w_q|^2)`` and ``A_h = scale w_q w_q^T``. With
    separate key weights, or without ``A_h`` in the value path, the layer would not be Lipschitz: tokens could move
    along the kernel of ``w_q^T`` with their weights unchanged and their spread unbounded.

    Args:
        w_q: Query and key weights (h, d, k).
        w_v: Value weights (h, d, v).
        w_o: Output projection (h, v, e); None concatenates the heads.
        b_o: Output bias (e,) or None.
        scale: Factor on the squared distances and in ``A_h``, > 0; None means 1/sqrt(k).
        causal: Token i sees the tokens j <= i only.

    Raises:
        InputError: Shapes that do not fit, NaN or infinite weights, a scale that is not positive.

    References:
        Kim, Papamakarios and Mnih, "The Lipschitz constant of self-attention", ICML 2021 (definition as reported).

    Examples:
        >>> import torch
        >>> layer = L2Attention(w_q=torch.eye(2)[None], w_v=torch.eye(2)[None], scale=1.0)
        >>> layer(torch.tensor([[0.0, 3.0]], dtype=torch.float64))
        tensor([[0., 3.]], dtype=torch.float64)
    """

    w_q: Float[Tensor, "h d k"]
    w_v: Float[Tensor, "h d v"]
    w_o: Float[Tensor, "h v e"] | None = None
    b_o: Float[Tensor, "e"] | None = None
    scale: float | None = None
    causal: bool = False

    feature_names: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("w_q", "w_v", "scale"), PLAIN),
        "w_o": "out_projection",
        "b_o": "bias",
        "causal": "causal",
    }
    later_fields: ClassVar[frozenset[str]] = frozenset({"causal"})
    formula = staticmethod(l2_attention)

    def __post_init__(self) -> None:
        super().__post_init__()
        adopt_number(self, "scale")  # positive
        if not isinstance(self.causal, bool):
            raise InputError(f"causal is {one_line(self.causal)}; it must be True or False")

    @cached_property
    def metric(self) -> Float[Tensor, "h d d"]:
        """``A_h = scale w_q w_q^T``."""
        return self.factor * self.w_q @ self.w_q.transpose(-1, -2)
