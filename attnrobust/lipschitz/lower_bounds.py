"""What is known of Lipschitz constants from below: derivatives at chosen inputs, and an attack of fixed size."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify.closed_form.claims import Quantity
from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.kernel import KernelAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.lipschitz.derivative import JacobianNorm
from attnrobust.lipschitz.derivative_map import derivative_map, largest_entry_lower, largest_row_lower, mass_weighted
from attnrobust.lipschitz.eigenvector_inputs import finite_lower, mean_field_lower
from attnrobust.lipschitz.question import Question
from attnrobust.lipschitz.records import LowerRow
from attnrobust.lipschitz.search import lipschitz_search
from attnrobust.lipschitz.starts import Masses
from attnrobust.numerics.linear_map import LinearMap, largest_singular_value_lower, pool_rows
from attnrobust.numerics.sides import round_down
from attnrobust.tokens import TokenMeasure

BUDGET = AttackBudget(restarts=4, steps=40, rounds=1)
"""Of the attack; displacements are nearly linear at small sizes."""
LIGHTER = (1.0, 1e-4, 1e-8)
"""Shares of the two-atom measure's light mass: the W_1 constant is approached as the light atom vanishes."""
FAR = 200.0
"""Score gap at which attention is hard to e^-200."""
RESTARTS = 4
TWO_ATOMS = "two atoms"


@dataclass(frozen=True, eq=False)
class _Candidate:
    """An input in the ball whose derivative is looked at."""

    name: str
    where: str
    tokens: TokenMeasure


def lower_bounds(question: Question, asked: Collection[Quantity]) -> Iterator[LowerRow]:
    """Every lower bound of the quantities that are asked for, in no order; of others there may be some, too."""
    for candidate in _candidates(question):
        yield from _at(question, candidate, asked)
        if candidate.name == TWO_ATOMS and candidate.tokens.n == 2:
            yield _light_atom(question.network, candidate.tokens)
    if question.clean is not None:
        yield from _around(question)
        yield from _far_out(question)


# ---- inputs --------------------------------------------------------------------------------------------------------


def _candidates(question: Question) -> Iterator[_Candidate]:
    clean, network = question.clean, question.network
    if clean is not None:
        largest = float(torch.linalg.vector_norm(clean.points, dim=-1).max())
        if largest <= question.radius:
            yield _Candidate("derivative", "the input X", clean)
        if isinstance(network, KernelAttention):
            return  # the set of the kernel's constants is known to hold the input, nothing else
        if largest > 0 and largest != question.radius:
            # one rounding unit inside, so that no token leaves the ball
            scaled = clean.points * (question.radius / largest * (1.0 - 1e-15))
            yield _Candidate("derivative", "X scaled to the ball", TokenMeasure(scaled, clean.mass))
    if isinstance(network, KernelAttention):
        return
    if isinstance(network, Attention) and network.mask is None and not network.placed:
        witness = finite_lower(network, question.n, question.radius, seed=question.seed)
        yield _Candidate("eigenvector", "one token against the others on an eigenvector's line", witness.tokens)
        if not network.causal:
            measure = mean_field_lower(network, question.radius, seed=question.seed).tokens
            yield _Candidate(TWO_ATOMS, "a light and a heavy atom on an eigenvector's line", measure)
    yield from _searched(question)
    generator = torch.Generator().manual_seed(question.seed)
    drawn = torch.randn(question.n, network.width, generator=generator, dtype=torch.float64).to(question.device)
    drawn = drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True) * (question.radius * (1.0 - 1e-15))
    yield _Candidate("derivative", "random tokens on the sphere", TokenMeasure(drawn))


def _searched(question: Question) -> Iterator[_Candidate]:
    """Where ascent on the derivative's norm over the ball ends, for every norm that a bound speaks about."""
    network = question.network
    if question.search_steps == 0:
        return
    searches: list[tuple[JacobianNorm, Masses]] = [("l2", "equal"), ("max-token", "equal")]
    masked = isinstance(network, Attention) and (network.mask is not None or network.causal or network.placed)
    measures = isinstance(network, Attention) and not masked
    if measures or isinstance(network, SigmoidAttention):
        searches.append(("l2", "free"))
    if isinstance(network, L2Attention):
        searches.append(("linf", "equal"))
    # one rounding unit inside, as above
    centre = torch.zeros(question.n, network.width, dtype=torch.float64, device=question.device)
    size = question.radius * (1.0 - 1e-15)
    for norm, masses in searches:
        found = lipschitz_search(
            network, centre, size, norm=norm, masses=masses, restarts=RESTARTS, steps=question.search_steps,
            seed=question.seed,
        )  # fmt: skip
        yield _Candidate("ascent", f"{norm} norm, {masses} masses, {question.search_steps} steps", found.tokens)


# ---- what one derivative shows -------------------------------------------------------------------------------------


def _at(question: Question, candidate: _Candidate, asked: Collection[Quantity]) -> Iterator[LowerRow]:
    tokens, seed = candidate.tokens, question.seed
    linear = derivative_map(question.network, tokens)

    def row(quantity: Quantity, value: float) -> LowerRow:
        return LowerRow(name=candidate.name, quantity=quantity, value=value, where=candidate.where)

    norm = largest_singular_value_lower(linear, seed=seed)[0].value
    if candidate.tokens is question.clean:
        yield row(Quantity.LOCAL, norm)
    weighted = norm
    if not tokens.uniform:
        weighted = largest_singular_value_lower(mass_weighted(linear, tokens.mass), seed=seed)[0].value
        if candidate.tokens is question.clean:
            yield row(Quantity.LOCAL_MASS, weighted)
    same_length = tokens.n == question.n
    if same_length and (tokens.uniform or tokens is question.clean):
        yield row(Quantity.BALL, norm)
        yield row(Quantity.MEAN, largest_singular_value_lower(pool_rows(linear, tokens.mass), seed=seed)[0].value)
        if Quantity.ENTRY in asked:  # many rows of the derivative, for the bounds of one kind of layer
            yield row(Quantity.ENTRY, largest_entry_lower(linear).value)
    largest = largest_row_lower(linear).value
    if same_length:
        yield row(Quantity.TOKEN, largest)
    layer = question.network
    if isinstance(layer, Attention) and (layer.causal or layer.mask is not None or layer.placed):
        if layer.mask is None and not layer.placed and tokens.uniform:
            yield row(Quantity.D2, norm)
        return
    if getattr(question.network, "causal", False):
        return  # no map of token measures
    yield row(Quantity.W2, weighted)
    yield row(Quantity.W_INF, largest)


# ---- measures, finite moves, the limit -----------------------------------------------------------------------------


def _light_atom(network: TokenMap, found: TokenMeasure) -> LowerRow:
    """W_1: the first atom of a two-atom measure moves along the line; its mass is made small."""
    best = 0.0
    for share in LIGHTER:
        light = float(found.mass[0]) * share  # the first atom is the light one
        tokens = TokenMeasure(found.points, found.mass.new_tensor([light, 1.0]) / (1.0 + light))
        best = max(best, _moving_one(derivative_map(network, tokens), tokens))
    where = "a vanishing atom against a heavy one"
    return LowerRow(name=TWO_ATOMS, quantity=Quantity.W1, value=round_down(best), where=where)


def _moving_one(linear: LinearMap, tokens: TokenMeasure) -> float:
    """``max_j sum_i mass_i |J_ij v| / mass_j`` for the atoms' own direction v: moving one atom, in W_1."""
    direction = tokens.points[0] / torch.linalg.vector_norm(tokens.points[0])
    moves = torch.eye(tokens.n, dtype=torch.float64, device=linear.device)[:, :, None] * direction
    changes = torch.linalg.vector_norm(linear.matvec(moves), dim=-1)  # (moved, row)
    return float(((changes * tokens.mass).sum(dim=-1) / tokens.mass).max())


def _around(question: Question) -> Iterator[LowerRow]:
    """The strongest attack within the size, re-measured by the attack's own verification."""
    try:
        found = attack(question.problem, epsilon=question.epsilon, seed=question.seed, budget=BUDGET)
    except InputError:
        return
    if found.perturbed is None or not math.isfinite(found.usage):
        return
    assert question.epsilon is not None  # noqa: S101 - there is one where there is an input
    value = round_down(found.usage / question.epsilon, relative=1e-9)
    yield LowerRow(name=found.attack, quantity=Quantity.FINITE, value=value, where="the strongest point found")


def _far_out(question: Question) -> Iterator[LowerRow]:
    """The derivative so far out on the ray through X that attention is hard."""
    network, clean = question.network, question.clean
    if not isinstance(network, Attention) or network.placed or clean is None or clean.n == 1:
        return
    if bool((network.key_offset != 0).any()):
        return
    scores = network.scores(clean.points)
    best = scores.topk(2, dim=-1).values
    gaps = best[..., 0] - best[..., 1]
    gap = float(gaps.min())
    added = network.score_bias(clean.n)
    if added is not None and bool((added[added.isfinite()] != 0).any()):
        return  # what is added does not grow with the tokens: far out another key may win than at X
    if not (math.isfinite(float(best[..., 0].abs().max())) and gap > 1e-6 * float(best[..., 0].abs().max())):
        return
    far = TokenMeasure(clean.points * math.sqrt(FAR / gap) if math.isfinite(gap) else clean.points, clean.mass)
    norm = largest_singular_value_lower(derivative_map(network, far), seed=question.seed)[0].value
    yield LowerRow(name="derivative", quantity=Quantity.LIMIT, value=norm, where="X scaled until attention is hard")
