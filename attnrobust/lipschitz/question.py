"""What a table of bounds is asked about."""

from dataclasses import dataclass
from functools import cached_property

import torch

from attnrobust.errors import InputError, one_line
from attnrobust.goals import Displacement
from attnrobust.layers.token_map import TokenMap, require_layer
from attnrobust.problem import Problem
from attnrobust.threats.moves import MoveThreat
from attnrobust.threats.parse import parse_move_threat
from attnrobust.tokens import TokenMeasure, as_count, as_index, as_measure, as_positive, as_seed

SEARCH_STEPS, SEARCHED_SIZE = 40, 256
"""Steps of the ascent for lower bounds where none are given, on inputs of at most so many numbers."""
SHARE = 0.01
"""Size of the finite moves where none is given: this share of the input's Frobenius norm."""


@dataclass(frozen=True, eq=False)
class Question:
    """A layer, the ball of its tokens, and an input if there is one.

    Args:
        network: The layer.
        n: Token count.
        radius: R, > 0.
        clean: The input X, or None.
        epsilon: Size of finite moves around X, > 0; None without an input.
        threat: How finite moves are measured.
        seed: Seed of everything random.
        search: Steps of the ascent for lower bounds; None leaves it to the size.
    """

    network: TokenMap
    n: int
    radius: float
    clean: TokenMeasure | None
    epsilon: float | None
    threat: MoveThreat
    seed: int
    search: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        place = getattr(self.network, "device", None) if self.clean is None else self.clean.points.device
        return place if isinstance(place, torch.device) else torch.device("cpu")

    @property
    def search_steps(self) -> int:
        """Steps of the ascent."""
        if self.search is not None:
            return self.search
        return SEARCH_STEPS if self.n * max(self.network.width, self.network.out_width) <= SEARCHED_SIZE else 0

    @cached_property
    def problem(self) -> Problem:
        """Displacement 1 around X; the bounds of its change do not depend on that number."""
        assert self.clean is not None  # noqa: S101 - asked for only where there is an input
        return Problem(self.network, self.clean, self.threat, Displacement(1.0))


def checked(
    network: TokenMap,
    clean: TokenMeasure | None,
    n: int | None,
    radius: float | None,
    epsilon: float | None,
    threat: MoveThreat | str,
    seed: int,
    search: int | None,
) -> Question:
    """Fill in what follows from the input, refuse what cannot be used.

    Raises:
        InputError: Neither an input nor a radius with a token count; numbers that are not positive; a count or a radius
            that the input contradicts.
    """
    require_layer(network)
    if isinstance(threat, str):
        threat = parse_move_threat(threat)
    if not isinstance(threat, MoveThreat):
        raise InputError(f"the threat is {one_line(threat)}; give one on moved tokens, such as FrobeniusBall()")
    seed = as_seed(seed)
    search = None if search is None else as_count("search (steps)", search, least=0)
    clean = None if clean is None else as_measure(clean)
    if clean is None:
        if n is None or radius is None:
            raise InputError("give an input, or a radius together with a token count n")
        if epsilon is not None:
            raise InputError("epsilon is a distance from an input; give an input or leave epsilon out")
        return Question(
            network, as_count("the token count n", n), as_positive("radius", radius), None, None, threat, seed, search
        )
    if clean.width != network.width:
        raise InputError(f"the tokens have width {clean.width}, the layer takes {network.width}")
    if n is not None and as_index("the token count n", n) != clean.n:
        raise InputError(f"the input has {clean.n} tokens, not n = {n}; leave n out")
    largest = float(torch.linalg.vector_norm(clean.points, dim=-1).max())
    if radius is None and largest == 0.0:
        raise InputError("every token of the input is zero, which gives a ball of radius 0; give a radius")
    radius = largest if radius is None else as_positive("radius", radius)
    if epsilon is None:
        epsilon = SHARE * (float(torch.linalg.vector_norm(clean.points)) or radius)
    return Question(network, clean.n, radius, clean, as_positive("epsilon", epsilon), threat, seed, search)
