"""Clean inputs whose tokens are written as several atoms, so that atoms can be searched like tokens."""

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnrobust.attacks.measures.expand_graph import expand_graph, picked_tokens, pools
from attnrobust.attacks.search.pullback import FEATURES, covers
from attnrobust.attacks.search.stacked_goal import ScaledGoal
from attnrobust.errors import InputError, UnsupportedModelError, UnsupportedThreatError
from attnrobust.goals import Goal, ResolvedGoal
from attnrobust.layers.attention import Attention
from attnrobust.layers.features import features_of
from attnrobust.layers.graph.network_graph import NetworkGraph
from attnrobust.problem import Problem, TokenMap
from attnrobust.threats.copies import CausalOrder
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure, tensor_digest

PLACED = frozenset({"rotary", "head_bias", "window"})
"""Features that depend on a token's place: it is not said where a copy or a split token stands."""


def covers_copies(layer: TokenMap) -> TypeGuard[Attention]:
    """Whether it is known what the layer does with copied or split tokens."""
    return covers(layer) and not features_of(layer) & PLACED


def not_copied(layer: TokenMap) -> str:
    """What of the layer keeps it from being known, by name."""
    unknown = features_of(layer) - (FEATURES - PLACED)
    return ", ".join(sorted(unknown)) or f"the subclass {type(layer).__name__}"


@dataclass(frozen=True)
class _Given(Goal):
    """A goal that was resolved elsewhere."""

    given: ResolvedGoal
    origin: str

    @property
    def key(self) -> str:
        return "given"

    @property
    def digest(self) -> str:
        return self.origin

    def resolve(self, output: Tensor, mass: Tensor) -> ResolvedGoal:
        return self.given


def expand_layer(layer: TokenMap, parent: Int[Tensor, "m"], n: int, *, order: CausalOrder = "tied") -> TokenMap:
    """The layer for atoms with the given parents: its masks act between the parents' positions.

    Args:
        layer: A layer for n tokens, or for any number.
        parent: Parent of each atom, in increasing order where the order is "strict".
        n: Number of clean tokens.
        order: Meaning of a causal mask, see ``CausalOrder``.

    Returns:
        A layer for m atoms; with "tied" it gives every atom the output of its parent as long as nothing moved and the
        masses are those of the parents.

    Raises:
        UnsupportedModelError: A map with a mask that is not known to act on scores; a subclass of ``Attention``, or one
            whose scores depend on the tokens' places otherwise, or with a feature added later.
        InputError: "strict" with atoms that are not in the order of their parents.
    """
    if isinstance(layer, Attention):
        if not covers_copies(layer):
            unknown = not_copied(layer)
            raise UnsupportedModelError(f"it is not known what {unknown} of Attention does with split or copied tokens")
        return _expand_attention(layer, parent, n, order)
    if isinstance(layer, NetworkGraph):
        return expand_graph(layer, parent, n, order=order, attention=_expand_attention_of_graph)
    inner = {"layers", "inner", "attention"} & ({f.name for f in fields(layer)} if is_dataclass(layer) else set())
    if inner:
        changed: dict[str, Any] = {name: _expand_parts(getattr(layer, name), parent, n, order) for name in inner}
        return cast("TokenMap", replace(cast("Any", layer), **changed))
    if getattr(layer, "mask", None) is not None or getattr(layer, "causal", False):
        raise UnsupportedModelError(f"{type(layer).__name__} has a mask; atoms are supported for Attention only")
    return layer


def _expand_parts(part: object, parent: Tensor, n: int, order: CausalOrder) -> object:
    if isinstance(part, tuple):
        return tuple(expand_layer(one, parent, n, order=order) for one in part)
    return expand_layer(cast("TokenMap", part), parent, n, order=order)


def _expand_attention_of_graph(layer: Attention, parent: Tensor, n: int, order: CausalOrder) -> Attention:
    expanded = expand_layer(layer, parent, n, order=order)
    assert isinstance(expanded, Attention)  # noqa: S101 - as its argument; narrows the type
    return expanded


def _expand_attention(layer: Attention, parent: Tensor, n: int, order: CausalOrder) -> Attention:
    if order == "strict" and layer.causal and bool((parent.diff() < 0).any()):
        raise InputError("strict copies must be inserted behind their parents: give the atoms in their order")
    mask = None if layer.mask is None else layer.mask[parent][:, parent]
    if not layer.causal or order == "strict":
        return layer if mask is None else replace(layer, mask=mask)
    position = torch.arange(n, device=parent.device)[parent]
    hidden = position[None, :] > position[:, None]
    mask = layer.w_q.new_zeros(hidden.shape) if mask is None else mask
    return replace(layer, mask=mask.masked_fill(hidden, -math.inf), causal=False)


def expanded_problem(
    problem: Problem,
    parent: Int[Tensor, "m"],
    mass: Float[Tensor, "m"],
    *,
    row_scale: Float[Tensor, "m"],
    movable: tuple[int, ...] | None = None,
    order: CausalOrder = "tied",
) -> Problem:
    """The same question about atoms at their parents' places.

    Margins and pooled displacements read the atoms' pooled output: the mass-weighted mean, or the first atom of the
    goal's row. A displacement of all rows compares every atom with its parent's clean row, times ``row_scale``.

    Args:
        problem: The question about the clean input.
        parent: Parent of each atom.
        mass: Mass of each atom.
        row_scale: Factors of the rows of a displacement (ignored by pooled goals).
        movable: Atoms that may move; None means all.
        order: Meaning of a causal mask.

    Raises:
        UnsupportedThreatError: A goal on one row whose token is split.
    """
    return Problem(
        network=expand_layer(problem.network, parent, problem.clean.n, order=order),
        clean=TokenMeasure(problem.clean.points[parent], mass),
        threat=FrobeniusBall(tokens=movable),
        goal=_Given(expanded_goal(problem, parent, mass, row_scale), tensor_digest(parent, mass, extra=problem.digest)),
    )


def expanded_goal(problem: Problem, parent: Tensor, mass: Tensor, row_scale: Tensor) -> ResolvedGoal:
    """The resolved goal of the clean input, read from atoms; see ``expanded_problem``.

    A network that pools gives one row, however many atoms there are: its goal stays as it is.
    """
    goal = problem.resolved
    if pools(problem.network):
        return replace(goal, noise=None)
    if goal.weights is None:
        clean = goal.clean[parent] * row_scale[:, None]
        return ScaledGoal(None, None, goal.budgets, clean, rounding=goal.rounding, row_scale=row_scale)
    weights = mass
    row = goal_row(problem)
    if row is not None:
        weights = torch.nn.functional.one_hot((parent == row).nonzero()[0, 0], parent.shape[0]).to(mass)
    return ResolvedGoal(
        weights, goal.functionals, goal.budgets, goal.clean, goal.classes, goal.label, rounding=goal.rounding
    )


def tokens_read(problem: Problem) -> frozenset[int]:
    """Tokens whose own rows are read: by the goal, or inside of a network that pools."""
    if isinstance(problem.network, NetworkGraph) and pools(problem.network):
        return picked_tokens(problem.network, problem.clean.n)
    row = goal_row(problem)
    return frozenset() if row is None else frozenset({row})


def goal_row(problem: Problem) -> int | None:
    """The one row that the goal reads, or None where it reads the mean, all rows, or the one row of a network."""
    if pools(problem.network):
        return None
    pool = getattr(problem.goal, "pool", None)
    if pool is None:
        raise UnsupportedThreatError(f"goal {problem.goal.key!r} does not say which rows it reads")
    return pool if isinstance(pool, int) else None
