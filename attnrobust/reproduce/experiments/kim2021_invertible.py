"""Invertible L2 self-attention: error of the inverse against the number of fixed-point iterations."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.closed_form.kim2021_l2 import reported_constant
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.lipschitz.invertible import ContractiveResidual
from attnrobust.lipschitz.search import lipschitz_search
from attnrobust.numerics.sides import Upper
from attnrobust.reports.curves import Curve, Panel
from attnrobust.reproduce.experiment import Experiment, Part, Row, Setting, Verdict, column, groups

WIDTH, HEADS, TOKENS = 8, 2, 8
DRAWN, WORST = "random tokens", "worst tokens found"
DERIVED, REPORTED = "derived constant", "constant of the paper, repaired"
FLOOR = 1e-14
"""Errors below are rounding."""


def parts(setting: Setting) -> list[Part]:
    """Every contraction rate, depth and constant."""
    shares = setting.pick((0.9,), (0.5, 0.7, 0.9, 0.99), (0.3, 0.5, 0.7, 0.9, 0.95, 0.99))
    depths = setting.pick((1, 2), (1, 4, 16), (1, 2, 4, 8, 16, 32, 64))
    iterations = setting.pick(5, 40, 200)
    steps = setting.pick(10, 150, 600)
    return [
        Part(
            name=f"share-{share:g}-depth-{depth}-{'derived' if constant == DERIVED else 'reported'}",
            config={"share": share, "depth": depth, "iterations": iterations, "steps": steps, "constant": constant},
            compute=partial(_inverse, share, depth, constant, iterations, steps, setting.seed),
        )
        for constant in (DERIVED, REPORTED)
        for depth in depths
        for share in shares
    ]


def _inverse(share: float, depth: int, constant: str, iterations: int, steps: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    stack = [_block(share, constant, generator) for _ in range(depth)]
    drawn = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    inputs = {DRAWN: drawn, WORST: _worst(stack[0], steps, seed)}
    about: Row = {"share": share, "depth": depth, "constant": constant}
    return [{**about, "tokens": name, **row} for name, x in inputs.items() for row in _errors(stack, x, iterations)]


def _block(share: float, constant: str, generator: torch.Generator) -> ContractiveResidual:
    k = WIDTH // HEADS

    def normal(*shape: int) -> Float[Tensor, "..."]:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(WIDTH)

    layer = L2Attention(w_q=normal(HEADS, WIDTH, k), w_v=normal(HEADS, WIDTH, k), w_o=normal(HEADS, k, WIDTH))
    if constant == DERIVED:
        return ContractiveResidual.of_l2(layer, tokens=TOKENS, share=share)
    return ContractiveResidual(layer, Upper(reported_constant(layer, TOKENS).value), share, TOKENS)


def _worst(block: ContractiveResidual, steps: int, seed: int) -> Float[Tensor, "n d"]:
    """Tokens at which ascent finds a large derivative: there the iteration is slow."""
    centre = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    return lipschitz_search(block.layer, centre, 4.0, restarts=4, steps=steps, seed=seed).tokens.points


def _errors(stack: Sequence[ContractiveResidual], x: Float[Tensor, "n d"], iterations: int) -> list[Row]:
    """Each block is inverted by k iterations from its own output on; the last block first.

    After k iterations a block's error is at most ``c^k |g(y)| / (1 - c)``, and errors of the blocks above grow by
    1/(1 - c) in each; here only a stack of one block is bounded so.
    """
    y = x
    for block in stack:
        y = block(y)
    rows: list[Row] = []
    share = stack[0].share
    first = float(torch.linalg.vector_norm(stack[0].branch(y))) if len(stack) == 1 else math.nan
    for k in range(1, iterations + 1):
        back = y
        for block in reversed(stack):
            back = _iterated(block, back, k)
        error = float(torch.linalg.vector_norm(back - x))
        row: Row = {"iterations": k, "error": error / float(torch.linalg.vector_norm(x))}
        if len(stack) == 1:
            rounding = FLOOR * float(torch.linalg.vector_norm(x)) / (1.0 - share)
            row |= {"found": error, "upper": share**k / (1.0 - share) * first + rounding}
        rows.append(row)
        if error <= FLOOR * float(torch.linalg.vector_norm(x)):
            break
    return rows


def _iterated(block: ContractiveResidual, y: Float[Tensor, "n d"], count: int) -> Float[Tensor, "n d"]:
    x = y
    for _ in range(count):
        x = y - block.branch(x)
    return x


# ---- what is shown -------------------------------------------------------------------------------------------------


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Rates at depth 1, for random and for bad tokens; depths at the rate nearest to 0.9."""
    shares, depths = groups(rows, "share"), groups(rows, "depth")
    fields = [
        Panel(
            title=f"one block, {tokens}",
            x="iterations",
            y="relative error",
            log_x=False,
            curves=[_curve(rows, f"c = {share}", share=share, depth=1, tokens=tokens) for share in shares],
        )
        for tokens in (DRAWN, WORST)
    ]
    share = min(shares, key=lambda value: abs(float(value or 0) - 0.9))
    deep = Panel(
        title=f"depths at c = {share}, {WORST}",
        x="iterations of each block",
        y="relative error",
        log_x=False,
        curves=[_curve(rows, f"{depth} blocks", share=share, depth=depth, tokens=WORST) for depth in depths],
    )
    return [*fields, deep]


def _curve(rows: Sequence[Row], label: str, **where: str | int | float | None) -> Curve:
    where["constant"] = DERIVED
    error = [max(value, 1e-17) for value in column(rows, "error", **where)]
    return Curve(label=label, x=column(rows, "iterations", **where), y=error, style=".-")


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Convergence, the rate, the depth."""
    ends = {
        (row["constant"], row["share"], row["depth"], row["tokens"]): float(row["error"] or 0.0) for row in rows
    }  # the last iteration
    rates = {tokens: _rates(rows, tokens) for tokens in (DRAWN, WORST)}
    reached = sum(error < 1e-8 for error in ends.values())
    return [
        Verdict(
            claim="the fixed-point iteration inverts the layer to rounding",
            paper="yes, for every rate c < 1",
            ours=f"{reached} of {len(ends)} cases below a relative error of 1e-8",
            agrees=reached == len(ends),
            reason="Banach's theorem; few iterations are enough because the layer's own rate is far below c",
        ),
        Verdict(
            claim="the error falls at the rate c",
            paper="rate c",
            ours="; ".join(
                f"{tokens}: " + ", ".join(f"{rate:.3g} at c = {share:g}" for share, rate in found.items())
                for tokens, found in rates.items()
            ),
            agrees=all(rate <= share for found in rates.values() for share, rate in found.items()),
            reason="c bounds the rate from above; it is smaller by the looseness of the Lipschitz constant, and would "
            "be c for one token",
        ),
    ]


def _rates(rows: Sequence[Row], tokens: str) -> dict[float, float]:
    """Largest quotient of successive errors of one block, as long as they are above rounding."""
    found = {}
    for share in groups(rows, "share"):
        error = column(rows, "error", share=share, depth=1, tokens=tokens, constant=DERIVED)
        quotients = [b / a for a, b in pairwise(error) if b > 100 * FLOOR]
        found[float(share or 0.0)] = max(quotients, default=0.0)
    return found


EXPERIMENT = Experiment(
    name="kim2021-invertible",
    paper="Kim, Papamakarios, Mnih, The Lipschitz constant of self-attention, ICML 2021",
    statement="invertible L2 self-attention: error of the inverse against iterations, contraction rates and depths",
    minutes=(1, 10),
    parts=parts,
    panels=panels,
    verdicts=verdicts,
    sides=(("found", "upper"),),
)
