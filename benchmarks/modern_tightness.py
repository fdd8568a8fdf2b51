"""Gaps on layers of SmolLM2: the last row of one passage, tokens that move behind or before the norm of the block.

    python -m benchmarks.modern_tightness --out results/modern.jsonl [--tokens 16,64] [--at normed,residual]

Rows that are in the file are not computed again; ``--table`` prints the gaps of the file as Markdown and computes
nothing. Margin: the readout c is the difference of the unembedding rows of the two likeliest next tokens times the
weight of the last norm; the margin is a share of ``|c| |f_last|``. Displacement: of the last row, a share of its
length. Every token moves (Frobenius).
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.attacks import attack
from attnrobust.certify import certify
from attnrobust.goals import Displacement, Goal, Margin
from attnrobust.models.capture import text_line
from attnrobust.models.model import ModuleModel, load_model
from attnrobust.models.pre_norm import PLACES, with_place
from attnrobust.problem import Problem
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure

PASSAGES = Path(__file__).with_name("passages.txt")
LAYERS = (0, 5, 15, 29)
GOALS = (("displacement", 0.01), ("displacement", 0.1), ("margin", 0.1), ("margin", 0.3))
WORDS = 400  # more than the longest input needs


class Decoder:
    """SmolLM2 on the first tokens of the passages."""

    @cached_property
    def model(self) -> ModuleModel:
        found = load_model("smollm2")
        assert isinstance(found, ModuleModel)
        return found

    @cached_property
    def text(self) -> str:
        return " ".join(PASSAGES.read_text(encoding="utf-8").split()[:WORDS])

    @cached_property
    def _tokens(self) -> dict[str, Tensor]:
        return {}

    def tokens(self, layer: str, n: int) -> Float[Tensor, "n d"]:
        """The first tokens that enter a layer, or its norm: those that a text of n tokens would give."""
        if layer not in self._tokens:
            self._tokens[layer] = self.model.capture(layer, [text_line(1, self.text)])[0].measure.points
        return self._tokens[layer][:n]

    def readout(self, n: int) -> Float[Tensor, "d"]:
        """c of an input."""
        module: Any = self.model.module
        ids = torch.tensor([self.model._encoder.encode(self.text).ids[:n]])  # noqa: SLF001
        table = module.get_input_embeddings().weight
        with torch.no_grad():
            logits = module(input_ids=ids).logits[0, -1]
        first, second = logits.topk(2).indices.tolist()
        difference: Tensor = (table[first] - table[second]) * module.model.norm.weight
        return difference

    def problem(self, layer: int, place: str, n: int, kind: str, share: float) -> Problem:
        """One question."""
        name = with_place(f"layers.{layer}.self_attn", place)
        spec, points = self.model.specification(name), self.tokens(name, n)
        if kind == "displacement":
            goal: Goal = Displacement(share, relative=True, pool=n - 1)
        else:
            c, row = self.readout(n), spec(points)[-1]
            bias = torch.stack([share * c.norm() * row.norm() - c @ row, torch.zeros((), dtype=torch.float64)])
            goal = Margin(weight=torch.stack([c, torch.zeros_like(c)]), bias=bias, pool=n - 1, label=0)
        return Problem(spec, TokenMeasure(points), FrobeniusBall(), goal)


def answer(problem: Problem) -> dict[str, Any]:
    """Both radii, and the process time of each."""
    start = time.process_time()
    found = attack(problem)
    middle = time.process_time()
    report = certify(problem)
    best = max(report.certificates, key=lambda one: one.radius)
    return {
        "attack": found.radius, "certified": best.radius, "by": best.method, "gap": found.radius / best.radius,
        "seconds_attack": middle - start, "seconds_certify": time.process_time() - middle,
    }  # fmt: skip


def cases(tokens: list[int], places: list[str]) -> Iterator[dict[str, Any]]:
    """The questions, short inputs first."""
    for n in tokens:
        for place in places:
            for layer in LAYERS:
                for kind, share in GOALS:
                    yield {"layer": layer, "at": place, "n": n, "goal": kind, "share": share}


def table(rows: list[dict[str, Any]]) -> str:
    """The gaps, one line for each place, question and length."""
    lines = ["| at | question | n | " + " | ".join(f"layer {layer}" for layer in LAYERS) + " | seconds |"]
    lines.append("|---" * (len(LAYERS) + 4) + "|")
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["at"], f"{row['goal']} {row['share']:.0%}", row["n"]), {})[row["layer"]] = row
    for key, group in groups.items():
        gaps = [f"{group[layer]['gap']:.3g}" if layer in group else "" for layer in LAYERS]
        seconds = [row["seconds_certify"] for row in group.values()]
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(gaps)} | {min(seconds):.0f} to {max(seconds):.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Compute what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="16")
    parser.add_argument("--at", default=",".join(PLACES))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    if given.table:
        print(table(rows))
        return
    torch.set_num_threads(1)
    decoder = Decoder()
    for case in cases([int(n) for n in given.tokens.split(",")], given.at.split(",")):
        if any(case.items() <= row.items() for row in rows):
            continue
        question = decoder.problem(case["layer"], case["at"], case["n"], case["goal"], case["share"])
        row = case | answer(question)
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}, flush=True)


if __name__ == "__main__":
    main()
