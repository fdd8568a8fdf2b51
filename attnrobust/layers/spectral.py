"""Spectral normalisation with a proved bound, as a parametrisation of torch modules."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnrobust.errors import InputError
from attnrobust.layers.trainable import TrainableAttention
from attnrobust.tokens import as_positive

SQUARINGS = 6
"""Of the Gram matrix; the bound exceeds the norm by at most the factor ``rank^(1/2^(SQUARINGS + 2))``."""


def gram_norm_upper(matrices: Float[Tensor, "*b m k"], *, squarings: int = SQUARINGS) -> Float[Tensor, "*b"]:
    """Upper bound of spectral norms by repeated squaring of Gram matrices; differentiable, no decomposition.

    ``||W||^(2 q) = ||(W^T W)^q||_2 <= ||(W^T W)^q||_F`` with ``q = 2^squarings``: true of every matrix, where a power
    iteration would come from below. A Frobenius norm exceeds a spectral one by at most sqrt(rank), so the bound is at
    most ``rank^(1/(4 q))`` times the norm: 1.6 % at rank 64 and six squarings.

    Args:
        matrices: Any matrices.
        squarings: How often the Gram matrix is squared, >= 0.

    Returns:
        The bounds, in float64; true up to rounding (relative about 1e-14).

    References:
        Gram iteration, Delattre et al., ICML 2023, for convolutions; here for plain matrices, with the proof above.

    Examples:
        >>> float(gram_norm_upper(torch.diag(torch.tensor([3.0, 1.0])))) - 3.0 < 1e-9
        True
    """
    largest = matrices.detach().abs().amax(dim=(-2, -1), keepdim=True).double().clamp_min(1e-300)
    w = matrices.double() / largest  # squares of any size stay inside float64
    gram = w.transpose(-1, -2) @ w if w.shape[-1] <= w.shape[-2] else w @ w.transpose(-1, -2)
    log = gram.new_zeros(gram.shape[:-2])  # of the norm, collected so far
    share = 0.5
    for _ in range(squarings):
        size = _frobenius(gram)
        log = log + share * size.log()
        gram = gram / size[..., None, None]
        gram = gram @ gram
        share /= 2.0
    return largest[..., 0, 0] * (log + share * _frobenius(gram).log()).exp()


def _frobenius(matrices: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b"]:
    norms: Tensor = torch.linalg.matrix_norm(matrices).clamp_min(1e-300)
    return norms


class SpectralCap(nn.Module):
    """Scales matrices down until their spectral norm is proved to be at most a limit; smaller ones stay as they are.

    Args:
        limit: The largest norm, > 0.
    """

    def __init__(self, limit: float = 1.0) -> None:
        super().__init__()
        self.limit = as_positive("limit", limit)

    def forward(self, matrices: Float[Tensor, "*b m k"]) -> Float[Tensor, "*b m k"]:
        """``W limit / max(limit, bound of ||W||)``."""
        factor = self.limit / gram_norm_upper(matrices).clamp_min(self.limit)
        return matrices * factor[..., None, None].to(matrices.dtype)


def cap_spectral_norms(
    layer: TrainableAttention[Any], limit: float = 1.0, *, names: Sequence[str] | None = None
) -> TrainableAttention[Any]:
    """Keep every head's weights at a spectral norm of at most a limit, during training and after it.

    The cap is part of the layer (a parametrisation of torch): gradients pass through it, and ``spec()`` has the capped
    weights. ``torch.nn.utils.parametrizations.spectral_norm`` in its place divides by a lower bound of the norm, which
    proves nothing. For L2 attention with query, value and output weights capped at 1 the certified constant on n tokens
    is at most ``h/sqrt(k) [ sqrt(n) (1 + 2c) + 2c ]``, ``c e^(c+1) = n - 1``, whatever is learnt.

    Args:
        layer: A trainable layer; it is changed.
        limit: The largest norm of a head's matrix, up to the rounding of the weights' type.
        names: Which weights; None means all of them.

    Returns:
        The same layer.

    Raises:
        InputError: A limit that is not positive, or weights that the layer does not have.
    """
    known = [name for name in (*layer.weights, "w_o") if getattr(layer, name) is not None]
    for name in known if names is None else names:
        if name not in known:
            raise InputError(f"the layer has no weights {name!r}; it has {', '.join(known)}")
        parametrize.register_parametrization(layer, name, SpectralCap(limit))
    return layer
