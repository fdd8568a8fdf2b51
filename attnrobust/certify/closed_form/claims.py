"""What a closed formula claims: a Lipschitz constant of a kind of layer, on a set, under conditions."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.method import CertificateMethod
from attnrobust.errors import InputError
from attnrobust.goals import Displacement, ResolvedGoal
from attnrobust.layers.attention import Attention
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.kernel import KernelAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.numerics.sides import Upper, round_up
from attnrobust.problem import Problem
from attnrobust.results import Kind
from attnrobust.threats.moves import FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure

PAGE = "docs/certificates-literature.md"
BALL_REGION = "all n tokens of norm <= R"
MEASURES_REGION = "token measures on the ball of radius R"
SPACE_REGION = "all of space"
LAYER_NAMES: dict[type, str] = {
    Attention: "dot-product attention",
    L2Attention: "L2 attention",
    CosineAttention: "scaled cosine attention",
    SigmoidAttention: "sigmoid attention",
    LipschitzNormAttention: "LipschitzNorm attention",
    KernelAttention: "kernel attention with stated constants",
}


class Quantity(StrEnum):
    """What a bound bounds: only values of one quantity are compared."""

    BALL = "frobenius"
    """Frobenius norm of the output's change over that of the tokens'."""
    MEAN = "frobenius -> mean row"
    """Change of the mean of the output rows over the Frobenius norm of the tokens' change."""
    TOKEN = "largest token move -> largest row"  # noqa: S105 - a token of text
    """Largest l2 change of an output row over the largest l2 move of a token."""
    ENTRY = "largest entry -> largest entry"
    """Largest change of an output entry over the largest change of an input entry."""
    W1 = "W_1 -> W_1"
    """Wasserstein distance W_1 of the outputs over that of the inputs, any token measures."""
    W2 = "W_2 -> W_2"
    """The same in W_2."""
    W_INF = "W_inf -> W_inf"
    """The same in W_inf."""
    CONTEXT = "W_1 of the context -> one query's output"
    """Change of the output at one fixed query over the distance W_1 of its contexts."""
    D2 = "d_2 -> d_2"
    """Distance d_2 (W_2 position by position) of the outputs over that of the inputs."""
    LOCAL = "derivative at X"
    """Spectral norm of the derivative at the input X; says nothing about a ball."""
    LOCAL_MASS = "derivative at X, weighted by the masses"
    """The same of ``D^{1/2} J D^{-1/2}``, D = diag(masses)."""
    FINITE = "change per size around X"
    """Largest change of the output within the given distance of X, divided by that distance."""
    LIMIT = "derivative at sX, s -> infinity"
    """Limit of the spectral norm of the derivative far out on the ray through X."""


@runtime_checkable
class Asked(Protocol):
    """Where a constant is asked for."""

    @property
    def network(self) -> TokenMap:
        """The layer."""

    @property
    def n(self) -> int:
        """Token count."""

    @property
    def radius(self) -> float:
        """R, the radius of the ball of tokens around 0."""

    @property
    def clean(self) -> TokenMeasure | None:
        """The input X, if there is one."""

    @property
    def seed(self) -> int:
        """Seed of everything random."""

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A bound that may apply.

    Args:
        name: Short name.
        quantity: What is bounded.
        layer: Class of the layers that it speaks about; None: every layer.
        region: On what set.
        conditions: When it holds.
        reference: Paper and form, or "derived" with the place of the proof.
        value: Layer and question to the bound; InputError says why it does not apply.
        kind: How far it is proved, where nothing random is behind the value.
    """

    name: str
    quantity: Quantity
    layer: type | None
    region: str
    conditions: str
    reference: str
    value: Callable[[Any, Asked], Upper]
    kind: Kind = Kind.FLOAT64

    def upper(self, asked: Asked) -> Upper:
        """The bound.

        Raises:
            InputError: It does not apply, and why.
        """
        if self.layer is not None and not isinstance(asked.network, self.layer):
            raise InputError(f"it speaks about {LAYER_NAMES[self.layer]}, not {type(asked.network).__name__}")
        placed: frozenset[str] = getattr(asked.network, "placed", frozenset())
        if self.layer is not None and placed:
            raise InputError(f"it does not cover {', '.join(sorted(placed))} of {type(asked.network).__name__}")
        return self.value(asked.network, asked)


def refuted(name: str, quantity: Quantity, layer: type, why: str) -> Claim:
    """A published form that is no bound: it never has a value, and says why."""

    def refuse(*_: object) -> Upper:
        raise InputError(why)

    return Claim(name=name, quantity=quantity, layer=layer, region="", conditions="", reference="", value=refuse)


def input_of(asked: Asked) -> TokenMeasure:
    """The input X; InputError where there is none."""
    if asked.clean is None:
        raise InputError("it needs an input X; give tokens or texts")
    return asked.clean


# ---- certificates whose slope is a constant ------------------------------------------------------------------------

Around = Callable[[Any, Asked], tuple[Float[Tensor, "n d"], float]]
"""Layer and question to tokens and a size: the certificate's slope there is the constant."""


def anywhere(network: TokenMap, asked: Asked) -> tuple[Float[Tensor, "n d"], float]:
    """Any tokens and size 1: the slope is the same everywhere."""
    return torch.ones(asked.n, network.width, dtype=torch.float64, device=asked.device), 1.0


def slope_claims(
    method: CertificateMethod, layer: type, *, region: str = SPACE_REGION, around: Around = anywhere
) -> tuple[Claim, ...]:
    """The constants behind a certificate of a layer, for all rows, their mean, and token by token."""
    return tuple(
        Claim(
            name=method.name,
            quantity=quantity,
            layer=layer,
            region=region,
            conditions=f"{LAYER_NAMES[layer]}; equal masses",
            reference=method.reference,
            value=partial(_slope, method=method, quantity=quantity, around=around),
        )
        for quantity in (Quantity.BALL, Quantity.MEAN, Quantity.TOKEN)
    )


def _slope(network: TokenMap, asked: Asked, *, method: CertificateMethod, quantity: Quantity, around: Around) -> Upper:
    points, size = around(network, asked)
    threat: MoveThreat = PerTokenBall() if quantity is Quantity.TOKEN else FrobeniusBall()
    pool = {Quantity.BALL: "all", Quantity.MEAN: "mean"}.get(quantity, 0)
    problem = Problem(network, TokenMeasure(points), threat, Displacement(1.0, pool=pool))  # type: ignore[arg-type]
    return per_size(method.prepare(problem, seed=asked.seed).usage(size), size)


def per_size(usage: Upper, size: float) -> Upper:
    """A change within a size as a change per unit of size."""
    return Upper(round_up(usage.value / size), usage.failure_probability)


def whole_output(device: torch.device) -> ResolvedGoal:
    """The goal that measures whole outputs, to ask for norms."""
    one = torch.ones(1, dtype=torch.float64, device=device)
    return ResolvedGoal(weights=None, functionals=None, budgets=one, clean=one)
