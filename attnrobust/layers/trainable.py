"""Trainable torch modules of the layers whose Lipschitz bounds are known; each gives its exact specification."""

import math
from dataclasses import fields
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnrobust.errors import InputError
from attnrobust.layers.heads import HeadSpecification
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention

S = TypeVar("S", bound=HeadSpecification)


class TrainableAttention(nn.Module, Generic[S]):
    """Multi-head self-attention on (*b, n, d) with parameters of the same names and shapes as its specification.

    ``spec()`` gives what an attack or a certificate takes: the same function in float64 at the present weights. It owns
    copies, so training may go on. Gradients, ``torch.autocast``, bfloat16, ``torch.utils.checkpoint``,
    ``torch.compile``, parametrisations and state dictionaries work as in any module. Padding: mass 0 hides a token as
    key (every sequence needs a token that counts); LipschitzNorm attention takes no masses. Only L2 attention can be
    causal.

    Args:
        width: Token width d.
        heads: Number of heads h.
        head_width: Query, key and value width of one head; None means d / h.
        out_width: Output width e of the projection ``w_o``; None means d, 0 means no projection (heads concatenated).
        bias: Whether there is an output bias ``b_o``.
        dropout: Probability with which an entry of the output is dropped in training.
        dtype: Type of the parameters.
        device: Where they live.

    Raises:
        InputError: Sizes below 1, a width that does not divide into the heads, or no probability below 1.
    """

    kind: type[S]
    """The specification, whose formula is evaluated."""
    weights: tuple[str, ...] = ("w_q", "w_k", "w_v")
    """Parameters of shape (h, d, head width)."""
    _names: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._names = tuple(field.name for field in fields(cls.kind))  # type: ignore[arg-type]

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_width: int | None = None,
        out_width: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise InputError(f"dropout is {dropout}; it must be a probability below 1")
        self.dropout = float(dropout)
        inner = _head_width(width, heads, head_width)
        out = width if out_width is None else out_width
        if out < 0:
            raise InputError(f"out_width is {out}; it must be >= 0 (0: no projection)")
        for name in self.weights:
            shape = (heads, width, inner)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        projection = nn.Parameter(torch.empty(heads, inner, out, dtype=dtype, device=device)) if out else None
        self.register_parameter("w_o", projection)
        size = out or heads * inner
        self.register_parameter("b_o", nn.Parameter(torch.empty(size, dtype=dtype, device=device)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: uniform with the variance of Glorot and Bengio over all heads together; biases 0."""
        for name in self.weights:
            weight = self.get_parameter(name)
            _glorot(weight, weight.shape[1], weight.shape[0] * weight.shape[2])
        if self.w_o is not None:
            _glorot(self.w_o, self.w_o.shape[0] * self.w_o.shape[1], self.w_o.shape[2])
        if self.b_o is not None:
            nn.init.zeros_(self.b_o)

    w_q: Tensor
    w_o: Tensor | None
    b_o: Tensor | None

    def forward(self, x: Float[Tensor, "*b n d"], mass: Float[Tensor, "*m n"] | None = None) -> Float[Tensor, "*b n e"]:
        """Evaluate; ``mass`` None means equal masses."""
        output: Tensor = self.kind.formula(x, mass, **self._record())
        return nn.functional.dropout(output, self.dropout, self.training) if self.dropout else output

    def spec(self) -> S:
        """The specification at the present weights.

        Raises:
            InputError: Train mode with dropout, where the layer is no function; call ``eval()`` first.
        """
        if self.training and self.dropout:
            raise InputError("in train mode the layer drops entries at random; call eval() before spec()")
        return self.kind(**self._record())

    @property
    def scale(self) -> float:
        """Factor on the scores, where the formula has one: 1/sqrt(head width)."""
        return 1.0 / math.sqrt(self.w_q.shape[2])

    def _record(self) -> dict[str, Any]:
        """The specification's fields by name."""
        return {name: getattr(self, name) for name in self._names}


class TrainableL2Attention(TrainableAttention[L2Attention]):
    """Trainable ``L2Attention`` (scale 1/sqrt(head width)).

    Args:
        width: Token width d.
        heads: Number of heads h.
        causal: Token i sees the tokens j <= i only.
        **sizes: As in ``TrainableAttention``.

    Examples:
        >>> layer = TrainableL2Attention(4, 2, dtype=torch.float64)
        >>> x = torch.eye(3, 4, dtype=torch.float64)
        >>> bool(torch.equal(layer(x), layer.spec()(x)))
        True
    """

    kind = L2Attention
    weights = ("w_q", "w_v")

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = False,
        head_width: int | None = None,
        out_width: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"head_width": head_width, "out_width": out_width, "bias": bias}
        super().__init__(width, heads, dropout=dropout, dtype=dtype, device=device, **sizes)  # type: ignore[arg-type]
        self.causal = bool(causal)


class TrainableCosineAttention(TrainableAttention[CosineAttention]):
    """Trainable ``CosineAttention``; ``tau``, ``nu`` and ``eps`` are fixed numbers.

    Args:
        width: Token width d.
        heads: Number of heads h.
        tau: Factor on the cosines, > 0.
        nu: Factor on the output of every head, > 0.
        eps: Smoothing of the norms, > 0.
        **sizes: As in ``TrainableAttention``.
    """

    kind = CosineAttention

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        tau: float = 1.0,
        nu: float = 1.0,
        eps: float = 1e-6,
        head_width: int | None = None,
        out_width: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"head_width": head_width, "out_width": out_width, "bias": bias}
        super().__init__(width, heads, dropout=dropout, dtype=dtype, device=device, **sizes)  # type: ignore[arg-type]
        self.tau, self.nu, self.eps = float(tau), float(nu), float(eps)
        self.spec()  # refuses numbers that are not positive


class TrainableSigmoidAttention(TrainableAttention[SigmoidAttention]):
    """Trainable ``SigmoidAttention`` (scale 1/sqrt(head width), no shift)."""

    kind = SigmoidAttention
    shift = 0.0


class TrainableLipschitzNormAttention(TrainableAttention[LipschitzNormAttention]):
    """Trainable ``LipschitzNormAttention``."""

    kind = LipschitzNormAttention


def _head_width(width: int, heads: int, head_width: int | None) -> int:
    if width < 1 or heads < 1 or (head_width is not None and head_width < 1):
        raise InputError(f"width {width}, heads {heads} and head_width {head_width} must be >= 1")
    if head_width is None and width % heads:
        raise InputError(f"width {width} does not divide into {heads} heads; give head_width")
    return width // heads if head_width is None else head_width


def _glorot(weight: Tensor, fan_in: int, fan_out: int) -> None:
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    with torch.no_grad():
        weight.uniform_(-bound, bound)
