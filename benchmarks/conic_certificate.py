"""The conic margin certificate on small layers: radius, gap and seconds beside margin-majorant and the attack.

Run ``python -m benchmarks.conic_certificate``; the wide ones (``--wide``: one head, d = 16) take minutes each.
"""

import argparse
from collections.abc import Iterator

import torch

from attnrobust.attacks import attack
from attnrobust.certify import certify
from attnrobust.goals import Margin
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure

METHODS = ("margin-majorant", "conic-margin")
HEADING = ("n", "d", "seed", "majorant", "conic", "attack", "gap majorant", "gap conic", "s majorant", "s conic")


def problem(n: int, d: int, seed: int) -> Problem:
    """One head with Gaussian weights; two classes told apart by the outputs of two random inputs."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(1, d, d, generator=generator, dtype=torch.float64) / d**0.5 for _ in range(3)]
    layer = Attention(w_q=draw[0], w_k=draw[1], w_v=draw[2])
    points, other = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    centres = torch.stack([layer(x).mean(0) for x in (points, other)])
    goal = Margin(weight=centres, bias=-0.5 * (centres**2).sum(1))
    return Problem(layer, TokenMeasure(points), FrobeniusBall(), goal)


def rows(*, wide: bool) -> Iterator[tuple[str, ...]]:
    """One line per problem."""
    sizes = [(4, 16), (8, 16)] if wide else [(n, d) for n in (2, 3, 4) for d in (2, 4, 8)]
    for n, d in sizes:
        for seed in range(1 if wide else 2):
            question = problem(n, d, seed)
            report = certify(question, methods=METHODS)
            if report.skipped:
                yield (str(n), str(d), str(seed), report.skipped[0].reason)
                continue
            majorant, conic = report.certificates
            found = attack(question).radius
            radii, gaps = (majorant.radius, conic.radius, found), (found / majorant.radius, found / conic.radius)
            texts = [f"{value:.4f}" for value in radii] + [f"{gap:.3f}" for gap in gaps]
            yield (str(n), str(d), str(seed), *texts, f"{majorant.seconds:.1f}", f"{conic.seconds:.1f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wide", action="store_true", help="one head of width 16, 4 and 8 tokens")
    wide = parser.parse_args().wide
    print("| " + " | ".join(HEADING) + " |")
    print("|" + "---|" * len(HEADING))
    for row in rows(wide=wide):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
