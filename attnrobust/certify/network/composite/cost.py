"""How long a preparation takes, so that the long ones are refused by name."""

from dataclasses import dataclass

from attnrobust.certify.network.composite.preparation import (
    BASIS_LIMIT,
    BEND_PAIRS,
    LEADING,
    PAIR_LIMIT,
    PILOT,
    PILOT_ROUNDS,
)
from attnrobust.certify.network.composite.top_eigenvalue import DENSE_LIMIT
from attnrobust.certify.network.passes import FLOPS_PER_SECOND, pass_flops
from attnrobust.layers.graph.network_graph import NetworkGraph

FULL_WIDTH = 256.0  # narrower networks are products of small matrices, which are slower
PRODUCTS = 32.0  # of one norm: two starts of Lanczos
THIRD_PASSES = 2.0  # of half the depth per product and pair, at the few products of a rough norm
OVERHEAD = 5e-5  # seconds per node and pass, whatever the sizes


@dataclass(frozen=True)
class Cost:
    """Rough cost of one preparation.

    Args:
        seconds: On one core.
        directions: Of the sketch or the basis.
    """

    seconds: float
    directions: int


def estimated(network: NetworkGraph, tokens: int, moving: int, *, sketch: int, readouts: int = 1) -> Cost:
    """Cost of a preparation for ``moving`` numbers of an input of ``tokens`` tokens, and for so many readouts."""
    curved = sum(not step.node.affine for step in network.steps)
    sketched = moving > max(BASIS_LIMIT, sketch)
    directions = sketch + LEADING if sketched else moving
    one_pass = pass_flops(network, tokens)
    rate = FLOPS_PER_SECOND * min(1.0, network.width / FULL_WIDTH)
    pairs = moving * (moving + 1) / 2 if moving <= PAIR_LIMIT else sketch
    products = max(PRODUCTS, float(moving)) if moving <= DENSE_LIMIT else PRODUCTS  # small matrices are built
    second = 2.6 * products * directions  # curvature, cross terms and insertions, two passes over half the depth
    third = THIRD_PASSES * products * pairs
    tails = 0.5 * PRODUCTS * curved * (curved + 1)
    own = third + 6.0 * products  # of one functional: third order, Hessian, cross terms, gradient
    passes = (curved + 1) * (second + third) + (readouts - 1) * own + tails + moving + BEND_PAIRS
    passes += 2.0 * PILOT_ROUNDS * PILOT * LEADING if sketched else 0.0
    overhead = OVERHEAD * len(network.steps) * ((curved + 1 + 2 * readouts) * 4.0 * PRODUCTS + tails)
    return Cost(passes * one_pass / rate + overhead, directions)
