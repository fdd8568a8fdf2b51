"""Many random small networks, every certificate that applies, points and attacks inside each radius; none may violate.

    python -m benchmarks.network_soundness --seeds 0:500 --out results/networks.jsonl    # goes on where it stopped

Networks have one to three blocks in both orders, every node kind, mask and head, saturated and flat softmax, tiny and
huge eps, masses, one token, equal tokens. A check is one point inside one certified radius (see
``benchmarks.soundness_volume``), and one attack with few steps whose radius must not be below the certified one. The
last line printed is the summary: checks and the largest used share by certificate and by feature of the network.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import certify
from attnrobust.certify.radius import LARGEST
from attnrobust.errors import AlreadyViolatedError, InputError
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.layers.attention import Attention
from attnrobust.layers.graph import (
    Activate,
    AddPositions,
    Affine,
    ConcatTokens,
    FeedForward,
    GraphBuilder,
    NetworkGraph,
    PoolMean,
    PoolRow,
    Scale,
)
from attnrobust.layers.normalisation import LayerNorm, RMSNorm
from attnrobust.problem import Problem
from attnrobust.results import Status
from benchmarks.soundness_volume import Draw, largest_share, random_threat, random_tokens, read, run, summary

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "sigmoid", "identity")
BUDGET = AttackBudget(restarts=1, steps=6, rounds=1)


def random_attention(draw: Draw, rows: int, width: int) -> Attention:
    """Flat to saturated, with or without biases, mask, causality and output projection."""
    heads, key = draw.integer(1, 2), draw.integer(1, 3)
    strength = 10.0 ** draw.choose(-2.0, 0.0, 0.0, 0.5, 1.0)
    joined = draw.integer(0, 3) > 0 or width % heads
    value = draw.integer(1, 3) if joined else width // heads
    biased = draw.integer(0, 1)
    mask = None
    if draw.integer(0, 3) == 0:
        mask = torch.where(draw.normal(rows, rows) > 0.7, -math.inf, draw.normal(rows, rows)).fill_diagonal_(0.0)
    return Attention(
        w_q=strength * draw.normal(heads, width, key), w_k=draw.normal(heads, width, key),
        w_v=draw.normal(heads, width, value), w_o=draw.normal(heads, value, width) if joined else None,
        b_q=draw.normal(heads, key) if biased else None, b_k=draw.normal(heads, key) if biased else None,
        b_v=draw.normal(heads, value) if biased else None, b_o=draw.normal(width) if biased else None,
        mask=mask, causal=draw.integer(0, 3) == 0, scale=draw.choose(None, None, 0.7),
    )  # fmt: skip


def random_norm(draw: Draw, width: int) -> LayerNorm | RMSNorm:
    """Either norm; eps from nothing to everything."""
    kind = draw.choose(LayerNorm, LayerNorm, RMSNorm)
    eps = 10.0 ** draw.choose(-12.0, -5.0, -5.0, 0.0, 3.0)
    return kind(draw.normal(width), draw.normal(width) if draw.integer(0, 1) else None, eps)  # type: ignore[no-any-return]


def random_mlp(draw: Draw, width: int) -> FeedForward:
    """Any activation, gated or not."""
    inner, gated = draw.integer(1, 5), draw.integer(0, 2) == 0
    return FeedForward(
        w_1=draw.normal(width, inner), w_2=draw.normal(inner, width), b_1=draw.normal(inner), b_2=draw.normal(width),
        w_gate=draw.normal(width, inner) if gated else None, activation=draw.choose(*ACTIVATIONS),
    )  # fmt: skip


def random_network(draw: Draw, n: int, width: int) -> NetworkGraph:
    """Blocks with or without a class token, positions, a head."""
    builder, rows = GraphBuilder(width), n
    if draw.integer(0, 3) == 0:
        builder.add("class", ConcatTokens(draw.normal(1, width), mass=torch.tensor([0.4], dtype=torch.float64)))
        builder.add("positions", AddPositions(draw.normal(n + 2, width)))
        rows = n + 1
    order = draw.choose(builder.post_norm_block, builder.pre_norm_block)
    for index in range(draw.choose(1, 1, 2, 3)):
        parts = {"attention": random_attention(draw, rows, width), "mlp": random_mlp(draw, width)}
        norms = {"norm_1": random_norm(draw, width), "norm_2": random_norm(draw, width)}
        order(f"block{index}", **parts, **norms)
    if draw.integer(0, 3) == 0:
        builder.add("scale", Scale(draw.normal(width)))
    pool = draw.choose(None, PoolRow(0), PoolRow(-1), PoolMean())
    if pool is not None:
        builder.add("pool", pool)
        builder.add("pooler", Affine(draw.normal(width, 3), draw.normal(3)))
        builder.add("pooler.act", Activate(draw.choose("tanh", "gelu", "relu")))
        builder.add("head", Affine(draw.normal(3, 3), draw.normal(3)))
    return builder.build()


def random_goal(draw: Draw, network: NetworkGraph, rows: int) -> Goal:
    """A displacement or a margin of the output."""
    row = draw.integer(0, rows - 1)
    if draw.integer(0, 1):
        return Displacement(10.0 ** -draw.choose(0, 1, 2, 4), relative=True, pool=draw.choose("all", "mean", row))
    return Margin(draw.normal(draw.integer(2, 4), network.out_width), pool=draw.choose("mean", row))


def random_problem(seed: int) -> Problem:
    """The problem of a seed; raises InputError where the package refuses it."""
    draw = Draw(seed)
    n, width = draw.choose(1, 2, 3, 4), draw.integer(2, 4)
    network = random_network(draw, n, width)
    tokens = random_tokens(draw, n, width, masses=True)
    goal = random_goal(draw, network, network.rows(n)[network.output])
    return Problem(network, tokens, random_threat(draw, n), goal)


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
    failed = [s.reason for s in report.skipped if s.reason.startswith("failed")]
    found, attacked = {}, attack(problem, budget=BUDGET, seed=seed)
    for certificate in report.certificates:
        if 0.0 < certificate.radius < LARGEST:
            count, share = largest_share(problem, certificate.radius, Draw(seed + 1))
            if attacked.status is Status.FOUND:
                count, share = count + 1, max(share, certificate.radius / attacked.radius - 1e-9)
            found[certificate.method] = [count, share]
    return {
        "seed": seed, "outcome": "error" if failed else "checked", "message": "; ".join(failed)[:200],
        "threat": problem.threat.key, "goal": problem.goal.key, "n": problem.clean.n, "certificates": found,
        "features": sorted(problem.network.features),  # type: ignore[attr-defined]
        "radii": {certificate.method: certificate.radius for certificate in report.certificates},
        "attack": attacked.radius if attacked.status is Status.FOUND else None,
    }  # fmt: skip


def by_feature(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Checks and the largest used share of the networks with each feature."""
    checks, largest = Counter[str](), dict[str, float]()
    for row in rows:
        for count, share in row.get("certificates", {}).values():
            for feature in row["features"]:
                checks[feature] += count
                largest[feature] = max(largest.get(feature, 0.0), share)
    return {feature: [checks[feature], largest[feature]] for feature in sorted(checks)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:200", help="first:last (exclusive)")
    parser.add_argument("--out", type=Path, default=Path("results/networks.jsonl"))
    parser.add_argument("--seconds", type=float, default=math.inf)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, last = map(int, options.seeds.split(":"))
    run(range(first, last), options.out, seconds=options.seconds, check_seed=check)
    rows = read(options.out)
    print(json.dumps(summary(rows) | {"features": by_feature(rows)}, indent=1))


if __name__ == "__main__":
    main()
