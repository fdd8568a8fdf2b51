"""Lower bounds of Lipschitz constants of attention on a ball, with the inputs that show them."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.lipschitz.derivative_map import derivative_map, mass_weighted
from attnrobust.numerics.linear_map import largest_singular_value_lower
from attnrobust.numerics.rounding import SMALLEST
from attnrobust.numerics.sides import Lower
from attnrobust.tokens import TokenMeasure

REAL = 1e-9  # imaginary part, relative to the largest eigenvalue, up to which an eigenvalue counts as real
FINALISTS = 6
POWER_STEPS, MORE_STEPS = 3, 12  # of power iteration: the many inputs are ranked by few, the finalists by more
TOGETHER = 2**21  # numbers of weights and tokens in a batch of inputs


@dataclass(frozen=True, eq=False)
class Witness:
    """A lower bound together with the tokens at which the derivative is that large.

    Args:
        lower: The bound.
        tokens: The input, in the ball.
    """

    lower: Lower
    tokens: TokenMeasure


def finite_lower(attention: Attention, n: int, radius: float, *, seed: int = 0) -> Witness:
    """Lower bound of the Frobenius Lipschitz constant on n tokens in the ball of a radius.

    The tokens sit on the line of a real eigenvector u of ``B^T``: one at one end and the others at a second point, so
    that moving the one moves all averages. For one head without query bias the derivative is at least
    ``||u M|| sqrt(n-1) P (1 + 2 gamma R^2 (1-P))``, ``P = 1/(1 + (n-1) e^{-2 gamma R^2})``, gamma the largest of
    -lambda_min and lambda_max / 8 over real eigenvalues. The returned value is the norm of the whole layer's exact
    derivative at the best such input (every head and sign is tried), which is at least as large.

    Args:
        attention: The layer; its mask must be None (causal is allowed).
        n: Token count, >= 1.
        radius: R >= 0.
        seed: Seed of the eigenvalue iteration.

    Returns:
        A lower bound and its input.

    Raises:
        InputError: A mask, or a negative radius.

    References:
        Configuration as in the code of Castin, Ablin, Peyre 2024; the constant is derived
        (docs/certificates-literature.md, section 8).
    """
    _refuse_mask(attention)
    if n < 1 or not radius >= 0:
        raise InputError("give n >= 1 tokens and a radius >= 0")
    inputs = [torch.zeros(n, attention.width, dtype=torch.float64, device=attention.device)]
    for value, vector in _real_eigenvectors(attention):
        first, others = _positions(value, radius)
        for sign in (1.0, -1.0):
            points = (sign * others * vector).repeat(n, 1)
            points[0] = sign * first * vector
            inputs.append(points)
    return _best(attention, [TokenMeasure(points) for points in inputs], seed=seed)


def mean_field_lower(attention: Attention, radius: float, *, seed: int = 0) -> Witness:
    """Lower bound of the W_2 Lipschitz constant on all token measures in the ball of a radius.

    Two atoms on the line of an eigenvector as in ``finite_lower``, the first with the share ``e^{-2 gamma R^2}`` of the
    second's mass, so that the others give it half of their attention. One head without query bias:
    ``(||u M|| / 2) (1 + gamma R^2) e^{gamma R^2}``, which grows faster than any power of R.

    Args:
        attention: The layer, without mask.
        radius: R >= 0.
        seed: Seed of the eigenvalue iteration.

    Returns:
        A lower bound (the exact weighted derivative at the best input) and its measure.

    Raises:
        InputError: A mask (also causal), or a negative radius.

    References:
        Castin, Ablin, Peyre 2024 state super-exponential growth; this constant is derived
        (docs/certificates-literature.md, section 8).
    """
    _refuse_mask(attention)
    if attention.causal or not radius >= 0:
        raise InputError("a token measure has no order: give a layer without causal mask, and a radius >= 0")
    centre = TokenMeasure(torch.zeros(1, attention.width, dtype=torch.float64, device=attention.device))
    measures = [centre]
    for value, vector in _real_eigenvectors(attention):
        first, others = _positions(value, radius)
        gamma = max(-value, value / 8.0)
        light = math.exp(-2.0 * gamma * radius**2)
        if light < 1e-280:
            continue  # the mass leaves float64; a smaller radius shows the growth
        mass = torch.tensor([light, 1.0], dtype=torch.float64, device=attention.device) / (1.0 + light)
        pair = torch.stack([first * vector, others * vector])
        measures += [TokenMeasure(pair, mass), TokenMeasure(-pair, mass)]
    return _best(attention, measures, seed=seed)


def _positions(value: float, radius: float) -> tuple[float, float]:
    """Where the single token and the others sit on the eigenvector's line."""
    return (radius, 0.5 * radius) if value > 0 and value / 8.0 >= -value else (-radius, radius)


def _real_eigenvectors(attention: Attention) -> list[tuple[float, Float[Tensor, "d"]]]:
    """Extreme real eigenvalues of ``B^T`` of every head (where keys are narrow, not 0), with unit eigenvectors."""
    chosen: list[tuple[float, Tensor]] = []
    narrow = attention.key_width < attention.width
    # B^T w_k z = w_k (scale w_q^T w_k) z: the small matrix has every eigenvalue but 0
    small = attention.factor * attention.w_q.transpose(-1, -2) @ attention.w_k
    for head, matrix in enumerate(small if narrow else attention.bilinear.transpose(-1, -2)):
        values, vectors = torch.linalg.eig(matrix)
        if narrow:
            vectors = torch.complex(attention.w_k[head] @ vectors.real, attention.w_k[head] @ vectors.imag)
            vectors = vectors / torch.linalg.vector_norm(vectors, dim=0).clamp_min(1e-300)
        real = (values.imag.abs() <= REAL * values.abs().max().clamp_min(1e-300)).nonzero().flatten()
        if real.numel() == 0:
            continue
        order = real[values.real[real].argsort()]
        for index in {int(order[0]), int(order[-1])}:
            vector = vectors[:, index].real
            length = float(torch.linalg.vector_norm(vector))
            if length > 0.5:
                chosen.append((float(values[index].real), vector / length))
    return chosen


def _best(attention: Attention, inputs: list[TokenMeasure], *, seed: int) -> Witness:
    """The input with the largest norm: told apart ever less coarsely; each value is a lower bound."""
    for steps, kept in ((POWER_STEPS, FINALISTS), (MORE_STEPS, 1)):
        norms = _rough_norms(attention, inputs, steps=steps, seed=seed)
        inputs = [inputs[k] for k in sorted(range(len(inputs)), key=lambda k: -norms[k])[:kept]]
    return Witness(_norm(attention, inputs[0], seed=seed, tol=1e-9), inputs[0])


def _rough_norms(attention: Attention, inputs: list[TokenMeasure], *, steps: int, seed: int) -> list[float]:
    """``||A v||`` of every input after a few power steps from one random v: enough to rank by."""
    by_length: dict[int, list[int]] = {}
    for index, tokens in enumerate(inputs):
        by_length.setdefault(tokens.n, []).append(index)
    norms = [0.0] * len(inputs)
    for n, indices in by_length.items():
        most = max(1, TOGETHER // (attention.heads * n**2 + n * attention.width))
        for some in (indices[start : start + most] for start in range(0, len(indices), most)):
            found = _power_norms(attention, [inputs[index] for index in some], steps=steps, seed=seed)
            for index, norm in zip(some, found.tolist(), strict=True):
                norms[index] = norm
    return norms


def _power_norms(attention: Attention, inputs: list[TokenMeasure], *, steps: int, seed: int) -> Float[Tensor, "b"]:
    """The same for inputs of one length, all at once."""
    jacobian = AttentionJacobian(
        attention, torch.stack([tokens.points for tokens in inputs]), torch.stack([tokens.mass for tokens in inputs])
    )
    root = torch.stack([tokens.mass for tokens in inputs]).sqrt()[..., None]  # equal masses cancel

    def normed(v: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True)
        return v / length.clamp_min(SMALLEST)

    generator = torch.Generator().manual_seed(seed % 2**63)
    start = torch.randn(jacobian.points.shape[1:], generator=generator, dtype=torch.float64).to(attention.device)
    v = normed(start.expand_as(jacobian.points))
    for _ in range(steps):
        v = normed(jacobian.rmatvec(jacobian.matvec(v / root) * root.square()) / root)
    norms: Tensor = torch.linalg.vector_norm(jacobian.matvec(v / root) * root, dim=(-2, -1))
    return norms.nan_to_num(0.0)


def _norm(attention: Attention, tokens: TokenMeasure, *, seed: int, tol: float) -> Lower:
    """Norm of ``D^{1/2} J D^{-1/2}`` from below, D the masses; equal masses cancel."""
    linear = mass_weighted(derivative_map(attention, tokens), tokens.mass)
    return largest_singular_value_lower(linear, seed=seed, tol=tol)[0]


def _refuse_mask(attention: Attention) -> None:
    if attention.mask is not None:
        raise InputError("the layer has a mask for one length; lower bounds on a ball need a layer without")
    if attention.placed:
        raise InputError(f"no such input is known for a layer with {', '.join(sorted(attention.placed))}")
