"""Where splitting starts: from the moved tokens, from singular and curvature directions, and from far journeys."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.attacks.method import Search
from attnrobust.attacks.search.directions import random_directions, singular_directions, top_eigenvectors
from attnrobust.attacks.search.evaluate import Evaluator
from attnrobust.attacks.search.geometry import TINY
from attnrobust.attacks.search.projected_gradient import Start
from attnrobust.tokens import PerturbedTokens, TokenMeasure

CURVATURE_STEPS = 5
"""Lanczos steps on the curvature of one token's splitting direction, each two gradients."""
DIFFERENCE = 1e-4
"""Relative step of the central difference: its error 1e-8 and the rounding 1e-16 / 1e-4 are far below what ranks."""
RANDOM_ROWS = 4
JUMPS, FAR_ROWS, ALONE = 16, 6, 10
"""Random places that are tried, rows that start at the best of all places, and children alone in random directions."""
SMALL, LARGE = 0.1, 0.5
"""Sizes of the splitting added to the moved tokens, in units of their distance."""


def near_starts(
    search: Search, clean: TokenMeasure, parent: Int[Tensor, "m"], *, moving: PerturbedTokens | None
) -> Start:
    """Rows for shares that stay near: zero-mean splittings of the moved tokens, singular vectors, random moves.

    Args:
        search: The search over p ways of writing the input as m atoms (they differ in masses only).
        clean: The clean input, n tokens.
        parent: Parents; atoms n, n+1, ... are the second children.
        moving: Where moving alone ended, or None.
    """
    evaluator = search.evaluator
    m, d = evaluator.points.shape[1:]
    children = m - clean.n
    random = random_directions(search.generators(), children + RANDOM_ROWS, (m, d), evaluator.points)
    random = random * evaluator.movable[:, None, :, None]
    parts = [random[:, children:]]
    if evaluator.goal.functionals is None:
        vectors, _ = singular_directions(evaluator, random[:, :1], evaluator.movable[:, None], count=3)
        parts += [vectors[:, 0], -vectors[:, 0]]
    base = None if moving is None else _variables(evaluator, clean, parent, moving)
    if base is not None:
        parts.append(_split_from(evaluator, search, base, parent, clean.n, random[:, :children]))
    directions = torch.cat(parts, dim=1)
    return _start(search, directions, _first_radius(search, evaluator, directions, base), base)


def far_starts(
    search: Search, clean: TokenMeasure, parent: Int[Tensor, "m"], *, moving: PerturbedTokens | None
) -> Start:
    """Rows for shares that travel: one child alone jumps to the place of a token, to its antipode, or at random.

    Every place is tried once by a forward pass; the rows start where the budget that was used, per cost, is largest.
    """
    evaluator = search.evaluator
    p, m, d = evaluator.points.shape
    n, children = clean.n, m - clean.n
    random = random_directions(search.generators(), JUMPS, (d,), evaluator.points)
    length = torch.linalg.vector_norm(clean.points, dim=-1)
    longest = evaluator.domain_radius or float(length.max())
    outward = clean.points * (longest / length.clamp_min(TINY))[:, None]
    shell = random * (longest / torch.linalg.vector_norm(random, dim=-1, keepdim=True))
    places = torch.cat([torch.cat([clean.points, outward, -outward]).expand(p, -1, d), shell], dim=1)
    jump = places[:, None] - clean.points[parent[n:]][None, :, None]  # (p, children, places, d)
    nearest = torch.linalg.vector_norm(jump, dim=-1)
    order = nearest.masked_fill(nearest == 0, torch.inf).argsort(dim=1)[:, 0]  # the child with the shortest way
    rows = torch.arange(places.shape[1], device=places.device)
    variables = evaluator.points.new_zeros(p, places.shape[1], m, d)
    every = torch.arange(p, device=places.device)[:, None]
    variables[every, rows, n + order] = jump[every, order, rows]
    assert evaluator.scale is not None  # noqa: S101 - every splitting search has one; narrows the type
    variables = variables / evaluator.scale[:, None, :, None]
    base = None if moving is None else _variables(evaluator, clean, parent, moving)
    cost = search.threat.distance(variables)
    worth = (evaluator.usage(variables) / cost.clamp_min(TINY)).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    best = worth.argsort(dim=1, descending=True, stable=True)[:, :FAR_ROWS]
    jumps, others = variables[every, best], random_children(evaluator, n, children, search)
    if base is not None:
        # For a small share the zero-mean splitting is a journey of the child along the direction of largest curvature.
        others = torch.cat([others, _split_from(evaluator, search, base, parent, n, others[:, :children])], dim=1)
    radius = torch.cat([search.threat.distance(jumps), _first_radius(search, evaluator, others, base)], dim=1)
    if search.epsilon is not None:
        radius = torch.full_like(radius, search.epsilon)
    return _start(search, torch.cat([jumps, others], dim=1), radius, base)


def random_children(evaluator: Evaluator, n: int, children: int, search: Search) -> Float[Tensor, "p r m d"]:
    """Children alone in random directions."""
    m, d = evaluator.points.shape[1:]
    seeds = [torch.Generator().manual_seed(seed ^ 1) for seed in search.seeds]
    random = random_directions(seeds, ALONE, (m, d), evaluator.points)
    row = torch.arange(ALONE, device=random.device)
    keep = torch.zeros(ALONE, m, dtype=random.dtype, device=random.device)
    keep[row, n + row % children] = 1.0
    return random * keep[..., None]


def kicked_starts(search: Search, moves: Float[Tensor, "m d"]) -> Start:
    """Given atom moves, and random steps away from them in proportion to each atom's move."""
    evaluator = search.evaluator
    scale = evaluator.scale
    assert scale is not None  # noqa: S101 - every splitting search has one; narrows the type
    base = moves / scale[..., None]
    random = random_directions(search.generators(), RANDOM_ROWS, base.shape[1:], evaluator.points)
    random = random / torch.linalg.vector_norm(random, dim=-1, keepdim=True)
    kicks = LARGE * random * torch.linalg.vector_norm(base, dim=-1)[:, None, :, None]
    directions = base[:, None] + torch.cat([torch.zeros_like(kicks[:, :1]), kicks], dim=1)
    return _start(search, directions, _first_radius(search, evaluator, directions, base), base)


def _start(search: Search, directions: Tensor, radius: Tensor, base: Tensor | None) -> Start:
    evaluator = search.evaluator
    p, rows, m = directions.shape[:3]
    allowed = evaluator.movable[:, None].expand(p, rows, m)
    return Start(directions, _targets(evaluator, base, rows), radius, allowed, search.threat)


def _variables(evaluator: Evaluator, clean: TokenMeasure, parent: Tensor, moving: PerturbedTokens) -> Tensor:
    """The moved tokens as search variables: all children of a token move with it."""
    move = torch.zeros_like(clean.points).index_copy(0, moving.parent, moving.displacement(clean))
    scale = evaluator.scale
    assert scale is not None  # noqa: S101 - every splitting search has one; narrows the type
    variables: Tensor = move[parent] / scale[..., None]
    return variables


def _split_from(
    evaluator: Evaluator, search: Search, base: Tensor, parent: Tensor, n: int, random: Tensor
) -> Float[Tensor, "p r m d"]:
    """Moved tokens plus a splitting of one token along its top curvature direction, in two sizes."""
    pattern = _zero_mean_pattern(evaluator, parent, n)
    directions = _curvature_directions(evaluator, search, base, pattern, random)
    size = search.threat.distance(base)[:, None] / search.threat.distance(directions).clamp_min(TINY)
    steps = [base[:, None] + (factor * size)[..., None, None] * directions for factor in (SMALL, LARGE)]
    return torch.cat(steps, dim=1)


def _zero_mean_pattern(evaluator: Evaluator, parent: Tensor, n: int) -> Float[Tensor, "p c m"]:
    """Row c: the second child c moves by 1/mass and its sibling by -1/mass, so that the token's mean stays."""
    p, m = evaluator.points.shape[:2]
    mass = evaluator.mass
    mass = torch.full((p, m), 1.0 / m, dtype=evaluator.points.dtype, device=evaluator.device) if mass is None else mass
    pattern = mass.new_zeros(p, m - n, m)
    child = torch.arange(m - n, device=mass.device)
    pattern[:, child, n + child] = 1.0 / mass[:, n:]
    pattern[:, child, parent[n:]] = -1.0 / mass[:, parent[n:]]
    scale = evaluator.scale
    assert scale is not None  # noqa: S101 - as above
    pattern = pattern / scale[:, None]
    length: Tensor = torch.linalg.vector_norm(pattern, dim=-1, keepdim=True)
    return pattern / length


def _curvature_directions(
    evaluator: Evaluator, search: Search, base: Tensor, pattern: Tensor, random: Tensor
) -> Float[Tensor, "p c m d"]:
    """Per second child, the direction v for which moving it by v and its sibling by -v raises the used share most."""
    targets = _targets(evaluator, base, pattern.shape[1])
    step = DIFFERENCE * search.threat.distance(base)[:, None, None, None]

    def curvature(v: Float[Tensor, "p c 1 d"]) -> Tensor:
        shift = step * pattern[..., None] * v
        above = evaluator.shares_and_gradient(base[:, None] + shift, targets)[1]
        below = evaluator.shares_and_gradient(base[:, None] - shift, targets)[1]
        return (pattern[..., None] * (above - below) / (2 * step)).sum(dim=-2, keepdim=True)

    start = random.sum(dim=-2, keepdim=True)
    vectors, _ = top_eigenvectors(curvature, start, 1, CURVATURE_STEPS)
    return pattern[..., None] * vectors[:, :, 0]


def _targets(evaluator: Evaluator, base: Tensor | None, rows: int) -> Int[Tensor, "p r"]:
    p = evaluator.points.shape[0]
    if base is None:
        return torch.zeros(p, rows, dtype=torch.int64, device=evaluator.device)
    return evaluator.shares(base[:, None]).argmax(dim=-1).expand(p, rows)


def _first_radius(search: Search, evaluator: Evaluator, directions: Tensor, base: Tensor | None) -> Tensor:
    p, rows = directions.shape[:2]
    if search.epsilon is not None:
        return directions.new_full((p, rows), search.epsilon)
    if base is not None:
        return search.threat.distance(base)[:, None].expand(p, rows)
    size: Tensor = torch.linalg.vector_norm(evaluator.points, dim=(-2, -1))
    return 0.1 * size[:, None].expand(p, rows)
