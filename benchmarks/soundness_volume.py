"""Many random problems, every certificate that applies, many points inside each radius; no violation may occur.

    python -m benchmarks.soundness_volume --seeds 0:500 --out results/soundness.jsonl    # goes on where it stopped

A check is one point inside one certified radius: random directions on and below its boundary, and steps of projected
ascent from some of them. One line of JSON per seed; the last line printed is the summary (checks, violations, largest
used share per certificate, refusals, errors).
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnrobust.certify import certify
from attnrobust.certify.radius import LARGEST
from attnrobust.errors import AlreadyViolatedError, InputError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.layers.token_map import TokenMap
from attnrobust.layers.variants.cosine import CosineAttention
from attnrobust.layers.variants.l2 import L2Attention
from attnrobust.layers.variants.lipschitznorm import LipschitzNormAttention
from attnrobust.layers.variants.sigmoid import SigmoidAttention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure

DIRECTIONS = 96
SHARES = (1.0, 0.6)
STARTS, STEPS = 24, 6
WIDEST = 12.0  # scales are 10^u, |u| up to this


@dataclass(eq=False)
class Draw:
    """One seeded stream of everything random about a problem."""

    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choose(self, *options: Any) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def scale(self) -> float:
        """1 in half of the cases; else any power of ten up to 1e3, or up to 1e12."""
        reach = self.choose(0.0, 0.0, 3.0, WIDEST)
        return float(10.0 ** (reach * (2.0 * float(torch.rand((), generator=self.generator)) - 1.0)))


def random_layer(draw: Draw, n: int, width: int) -> TokenMap:
    """Any layer: most are dot-product attention with or without biases, masks and an output projection."""
    heads, key, value = draw.integer(1, 3), draw.integer(1, 4), draw.integer(1, 4)
    strength = draw.scale() ** 0.5
    w_q, w_k, w_v = (draw.normal(heads, width, k) for k in (key, key, value))
    w_q, w_k, w_v = strength * w_q, strength * w_k, draw.scale() * w_v
    out = draw.normal(heads, value, draw.integer(1, 4)) if draw.integer(0, 1) else None
    kind = draw.choose("dot", "dot", "dot", "dot", "l2", "cosine", "sigmoid", "lipschitznorm")
    if kind == "l2":
        return L2Attention(w_q=w_q, w_v=w_v, w_o=out)
    if kind == "cosine":
        return CosineAttention(w_q=w_q, w_k=w_k, w_v=w_v, w_o=out)
    if kind == "sigmoid":
        return SigmoidAttention(w_q=w_q, w_k=w_k, w_v=w_v, w_o=out)
    if kind == "lipschitznorm":
        return LipschitzNormAttention(w_q=w_q, w_k=w_k, w_v=w_v, w_o=out)
    mask = None
    if draw.integer(0, 3) == 0:
        mask = torch.where(draw.normal(n, n) > 0.8, -math.inf, draw.normal(n, n))
        mask.fill_diagonal_(0.0)
    biased = draw.integer(0, 2) == 0
    return Attention(
        w_q=w_q, w_k=w_k, w_v=w_v, w_o=out, mask=mask, causal=draw.integer(0, 4) == 0,
        b_q=draw.scale() * draw.normal(heads, key) if biased else None, b_k=draw.normal(heads, key) if biased else None,
        b_v=draw.scale() * draw.normal(heads, value) if biased else None,
    )  # fmt: skip


def random_tokens(draw: Draw, n: int, width: int, *, masses: bool) -> TokenMeasure:
    """Plain, equal, nearly equal, or with one outlier; some with masses."""
    points = draw.normal(n, width)
    kind = draw.choose("plain", "plain", "plain", "equal", "near", "outlier", "offset")
    if kind in ("equal", "near"):
        points = points[:1] + (1e-6 * points if kind == "near" else 0.0 * points)
    if kind == "outlier":
        points[-1] *= 10.0 ** draw.integer(1, 6)
    if kind == "offset":
        points = points + 10.0 ** draw.integer(1, 5) * draw.normal(1, width)
    mass = torch.softmax(draw.choose(0.5, 3.0) * draw.normal(n), dim=0) if masses and draw.integer(0, 3) == 0 else None
    return TokenMeasure(draw.scale() * points, mass) if mass is not None else TokenMeasure(draw.scale() * points)


def random_threat(draw: Draw, n: int) -> MoveThreat:
    """Any threat on tokens."""
    some = None if draw.integer(0, 2) else (draw.integer(0, n - 1),)
    kind = draw.integer(0, 4)
    if kind < 2:
        return FrobeniusBall(tokens=some)
    if kind == 4:
        return AnyToken()
    return PerTokenBall(norm=draw.choose("l2", "linf", "l1"), tokens=some)


def random_goal(draw: Draw, layer: TokenMap, n: int) -> Goal:
    """A displacement or a margin; margins may be a tiny difference of large logits."""
    row = draw.integer(0, n - 1)
    if draw.integer(0, 1):
        share = 10.0 ** (-draw.choose(0, 1, 2, 4, 8))
        return Displacement(share, relative=True, pool=draw.choose("all", "mean", row))
    weight = draw.scale() * draw.normal(draw.integer(2, 4), layer.out_width)
    bias = draw.choose(0.0, 1.0, 1e6) * torch.ones(weight.shape[0]).double() if draw.integer(0, 1) else None
    return Margin(weight, bias=bias, pool=draw.choose("mean", row))


def random_problem(seed: int) -> Problem:
    """The problem of a seed; raises InputError where the package refuses it."""
    draw = Draw(seed)
    n, width = draw.choose(1, 2, 3, 4, 6), draw.integer(1, 4)
    layer = random_layer(draw, n, width)
    masses = not isinstance(layer, LipschitzNormAttention)
    return Problem(
        layer, random_tokens(draw, n, width, masses=masses), random_threat(draw, n), random_goal(draw, layer, n)
    )


# ---- points inside a radius -----------------------------------------------------------------------------------------


def inside(problem: Problem, moves: Tensor, radius: float) -> Tensor:
    """Moves that stay within the radius once they were added to the tokens (addition rounds); the rest are dropped."""
    clean, kept = problem.clean.points, moves[:0]
    for slack in (1.0, 1.0 - 1e-15, 1.0 - 1e-9):
        moved = clean + slack * problem.moves.project(moves, radius) - clean
        kept = moved[problem.moves.distance(moved) <= radius]
        if len(kept) == len(moved):
            break
    return kept


def ascend(problem: Problem, moves: Tensor, radius: float) -> Iterator[Tensor]:
    """Projected ascent of the used share, every visited point."""
    size = torch.linalg.vector_norm(moves, dim=(-2, -1), keepdim=True)
    for step in range(STEPS):
        points = moves.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(problem.usage(points).sum(), points)
        steepest = radius * problem.moves.steepest(gradient.nan_to_num(0.0, 0.0, 0.0))
        moves = problem.moves.project(moves + 2.0 ** (1 - step) * steepest, radius) if step else steepest
        moves = torch.where((size > 0) & torch.isfinite(moves), moves, 0.0)
        yield moves


def largest_share(problem: Problem, radius: float, draw: Draw) -> tuple[int, float]:
    """Points checked inside the radius, and the largest used share of the budget that is no rounding."""
    directions = draw.normal(DIRECTIONS, *problem.clean.points.shape) * problem.threat.movable(problem.clean.n)[:, None]
    directions[::3] = directions[::3].sign()
    if isinstance(problem.threat, AnyToken):
        directions = problem.moves.project(directions, 1.0)
    unit = directions / problem.moves.distance(directions).clamp_min(1e-300)[:, None, None]
    batches = [radius * share * unit for share in SHARES]
    batches += list(ascend(problem, radius * unit[:STARTS], radius))
    moves = inside(problem, torch.cat(batches), radius)
    with torch.no_grad():
        usage = problem.usage(moves).nan_to_num(-math.inf, -math.inf, -math.inf)
    if usage.numel() == 0:
        return 0, 0.0
    worst = int(usage.argmax())
    used = float(usage[worst])
    if used >= 1.0:
        used -= problem.usage_rounding(problem.clean.points + moves[worst])
    return int(usage.numel()), used


def check(seed: int) -> dict[str, Any]:
    """All checks of one seed."""
    try:
        problem = random_problem(seed)
        report = certify(problem, seed=seed)
    except AlreadyViolatedError:
        return {"seed": seed, "outcome": "violated at the clean input"}
    except InputError as error:
        return {"seed": seed, "outcome": "refused", "message": str(error)[:200]}
    except Exception as error:  # noqa: BLE001 - a raw error is a finding of this run, with its seed
        return {"seed": seed, "outcome": "error", "message": f"{type(error).__name__}: {str(error)[:200]}"}
    found = {}
    for certificate in report.certificates:
        if 0.0 < certificate.radius < LARGEST:
            count, share = largest_share(problem, certificate.radius, Draw(seed + 1))
            found[certificate.method] = [count, share]
    layer = type(problem.network).__name__
    return {
        "seed": seed, "outcome": "checked", "layer": layer, "threat": problem.threat.key, "goal": problem.goal.key,
        "n": problem.clean.n, "certificates": found,
    }  # fmt: skip


# ---- many seeds -----------------------------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over rows."""
    checks: Counter[str] = Counter()
    largest: dict[str, float] = {}
    violations = []
    for row in rows:
        for method, (count, share) in row.get("certificates", {}).items():
            checks[method] += count
            largest[method] = max(largest.get(method, 0.0), share)
            if share >= 1.0:
                violations.append([row["seed"], method, share])
    return {
        "problems": len(rows), "outcomes": dict(Counter(row["outcome"] for row in rows)), "checks": checks.total(),
        "violations": violations, "checks_per_certificate": dict(checks), "largest_share": largest,
        "errors": [[row["seed"], row["message"]] for row in rows if row["outcome"] == "error"],
    }  # fmt: skip


def run(
    seeds: range, out: Path, *, seconds: float = math.inf, check_seed: Callable[[int], dict[str, Any]] = check
) -> None:
    """Check what is not in the file yet, until the time is used up."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["seed"] for row in read(out)}
    start = time.perf_counter()
    with out.open("a", encoding="utf-8") as stream:
        for seed in seeds:
            if seed in done or time.perf_counter() - start > seconds:
                continue
            stream.write(json.dumps(check_seed(seed)) + "\n")
            stream.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """Rows so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:200", help="first:last (exclusive)")
    parser.add_argument("--out", type=Path, default=Path("results/soundness.jsonl"))
    parser.add_argument("--seconds", type=float, default=math.inf)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, last = map(int, options.seeds.split(":"))
    run(range(first, last), options.out, seconds=options.seconds)
    print(json.dumps(summary(read(options.out)), indent=1))


if __name__ == "__main__":
    main()
