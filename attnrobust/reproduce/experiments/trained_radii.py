"""Certified and attack radii of small classifiers before and after training, with and without a regulariser."""

import inspect
import statistics
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnrobust.attacks import AttackBudget, attack
from attnrobust.certify import certify
from attnrobust.goals import Margin
from attnrobust.layers.spectral import cap_spectral_norms
from attnrobust.layers.trainable import (
    TrainableAttention,
    TrainableCosineAttention,
    TrainableL2Attention,
    TrainableLipschitzNormAttention,
    TrainableSigmoidAttention,
)
from attnrobust.lipschitz.regulariser import regulariser
from attnrobust.problem import Problem
from attnrobust.reports.curves import Curve, Panel
from attnrobust.reproduce.experiment import Experiment, Part, Row, Setting, Verdict, column, groups
from attnrobust.reproduce.texts import digest, library_text
from attnrobust.threats.moves import FrobeniusBall
from attnrobust.tokens import TokenMeasure

WIDTH, HEADS, TOKENS = 8, 2, 16
BEFORE, PLAIN, REGULARISED, CAPPED = "before training", "trained", "trained, regularised", "trained, capped"
STATES = (BEFORE, PLAIN, REGULARISED, CAPPED)
CERTIFICATES = {
    "L2": "kim2021-l2", "cosine": "cosine-lipschitz", "sigmoid": "sigmoid-ball",
    "LipschitzNorm": "dasoulas2021-lipschitznorm",
}  # fmt: skip
CAP = 1.0
LOSS = 0.05
"""Accuracy that a larger certified radius may cost; a constant classifier has an infinite one."""
STRENGTH = 3e-4
"""Of the regulariser: the bound of the whole classifier's Lipschitz constant."""


def parts(setting: Setting) -> list[Part]:
    """One layer kind a part."""
    kinds = setting.pick(("L2",), tuple(CERTIFICATES), tuple(CERTIFICATES))
    steps, inputs, restarts = setting.pick((10, 2, 1), (300, 6, 2), (5000, 100, 8))
    config: Row = {"steps": steps, "inputs": inputs, "restarts": restarts, "strength": STRENGTH, "cap": CAP}
    known = config | {"text_digest": digest(library_text() + _source())}
    return [
        Part(
            name=kind.lower(),
            config={"kind": kind, **known},
            compute=partial(_rows, kind, steps, inputs, restarts, setting.seed),
        )
        for kind in kinds
    ]


@cache
def _source() -> str:
    """Python source that every Python has."""
    import argparse

    return inspect.getsource(argparse)


class _Classifier(nn.Module):
    """Fixed random embeddings of characters, one trainable attention layer, the mean row, a linear readout."""

    def __init__(self, layer: TrainableAttention[Any]) -> None:
        super().__init__()
        self.layer, self.readout = layer, nn.Linear(WIDTH, 2, dtype=torch.float64)
        embedding = torch.randn(128, WIDTH, dtype=torch.float64)
        self.register_buffer("embedding", embedding / torch.linalg.vector_norm(embedding, dim=-1, keepdim=True))

    embedding: Tensor

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b 2"]:
        logits: Tensor = self.readout(self.layer(self.embedding[ids]).mean(dim=-2))
        return logits

    def bound(self) -> Float[Tensor, ""]:
        """Of the Lipschitz constant of the difference of both logits, in the Frobenius norm of the tokens."""
        difference = self.readout.weight[0] - self.readout.weight[1]
        bound: Tensor = regulariser(self.layer, tokens=TOKENS, radius=2.0) * torch.linalg.vector_norm(difference)
        return bound


def _layer(kind: str) -> TrainableAttention[Any]:
    if kind == "cosine":
        return TrainableCosineAttention(WIDTH, HEADS, eps=0.1, dtype=torch.float64)
    kinds: dict[str, type[TrainableAttention[Any]]] = {"L2": TrainableL2Attention, "sigmoid": TrainableSigmoidAttention}
    return kinds.get(kind, TrainableLipschitzNormAttention)(WIDTH, HEADS, dtype=torch.float64)


def _rows(kind: str, steps: int, inputs: int, restarts: int, seed: int) -> list[Row]:
    rows: list[Row] = []
    for state in STATES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _Classifier(_layer(kind))
            if state == CAPPED:
                cap_spectral_norms(model.layer, CAP)
            if state != BEFORE:
                _train(model, steps, STRENGTH if state == REGULARISED else 0.0)
            ids, labels = _batch(2000, held_out=True)
        about: Row = {"layer": kind, "state": state}
        rows.append(about | _measured(model, ids, labels, kind, inputs, restarts, seed))
    return rows


def _train(model: _Classifier, steps: int, strength: float) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    with torch.enable_grad():
        for _ in range(steps):
            ids, labels = _batch(64, held_out=False)
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(ids), labels)
            if strength:
                loss = loss + strength * model.bound()
            loss.backward()
            optimiser.step()


def _batch(count: int, *, held_out: bool) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b"]]:
    """Windows of English about Python (0) and of Python (1); the last fifth of both texts is held out."""
    windows = []
    for text in (library_text(), _source()):
        border = int(0.8 * len(text))
        low, high = (border, len(text) - TOKENS) if held_out else (0, border - TOKENS)
        starts = torch.randint(low, high, (count // 2,)).tolist()
        windows += [[min(ord(c), 127) for c in text[start : start + TOKENS]] for start in starts]
    return torch.tensor(windows), torch.arange(2).repeat_interleave(count // 2)


@torch.no_grad()
def _measured(
    model: _Classifier, ids: Int[Tensor, "b n"], labels: Int[Tensor, "b"], kind: str, inputs: int, restarts: int,
    seed: int,
) -> Row:  # fmt: skip
    """Accuracy on all windows; medians of both radii on the first ones that are classified rightly."""
    model.eval()
    right = model(ids).argmax(dim=-1) == labels
    chosen = right.nonzero().flatten().tolist()
    chosen = chosen[: inputs // 2] + chosen[len(chosen) - (inputs - inputs // 2) :]  # of both classes
    certified, attacked = [], []
    for place in chosen:
        goal = Margin(model.readout.weight, model.readout.bias, label=int(labels[place]))
        problem = Problem(model.layer.spec(), TokenMeasure(model.embedding[ids[place]]), FrobeniusBall(), goal)
        best = certify(problem, methods=[CERTIFICATES[kind]]).best
        certified.append(0.0 if best is None else best.radius)
        budget = AttackBudget(restarts=restarts, steps=40, rounds=2)
        attacked.append(attack(problem, seed=seed, budget=budget).radius)
    worst = min(range(len(chosen)), key=lambda k: attacked[k] / max(certified[k], 1e-300))
    return {
        "accuracy": float(right.double().mean()), "bound": float(model.bound()),
        "certified_median": statistics.median(certified), "attack_median": statistics.median(attacked),
        "certified": certified[worst], "attack": attacked[worst],
    }  # fmt: skip


# ---- what is shown -------------------------------------------------------------------------------------------------


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Radii of every state, a field for each kind of layer."""
    return [
        Panel(
            title=f"{kind} attention",
            x="1 before, 2 trained, 3 regularised, 4 capped",
            y="median radius (Frobenius)",
            curves=[
                Curve(label=label, x=[1.0, 2.0, 3.0, 4.0], y=column(rows, key, layer=kind))
                for key, label in (("certified_median", "certified"), ("attack_median", "attack"))
            ],
            log_x=False,
        )
        for kind in groups(rows, "layer")
    ]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """What training does to the certified radius, and what the regulariser does."""
    found = {(str(row["layer"]), str(row["state"])): row for row in rows}
    kinds = [str(kind) for kind in groups(rows, "layer")]

    def of(kind: str, state: str, name: str) -> float:
        return float(found[kind, state][name] or 0.0)

    def listed(state: str) -> str:
        return "; ".join(
            f"{kind}: certified {of(kind, state, 'certified_median'):.3g}, "
            f"attack {of(kind, state, 'attack_median'):.3g}, accuracy {of(kind, state, 'accuracy'):.1%}"
            for kind in kinds
        )

    better = [
        of(k, REGULARISED, "certified_median") > of(k, PLAIN, "certified_median")
        and of(k, REGULARISED, "accuracy") > of(k, PLAIN, "accuracy") - LOSS
        for k in kinds
    ]
    costs = ", ".join(f"{k} {of(k, REGULARISED, 'accuracy') - of(k, PLAIN, 'accuracy'):+.1%}" for k in kinds)
    return [
        Verdict(
            claim="plain training",
            paper="no paper: what this package adds",
            ours=listed(PLAIN),
            agrees=None,
            reason=f"before training: {listed(BEFORE)}",
        ),
        Verdict(
            claim=f"the regulariser raises the certified radius for at most {LOSS:.0%} of accuracy",
            paper="no paper",
            ours=listed(REGULARISED),
            agrees=all(better),
            reason=f"it is the constant behind the certificate, times the readout's norm; accuracy changes: {costs}",
        ),
        Verdict(
            claim="capped spectral norms bound the constant whatever is learnt",
            paper="no paper",
            ours=listed(CAPPED),
            agrees=None,
            reason="the readout is not capped, so margins may still grow",
        ),
    ]


EXPERIMENT = Experiment(
    name="trained-radii",
    paper="none: trainable layers, the regulariser and spectral caps of this package",
    statement="certified and attack radii before and after training, with and without the regulariser",
    minutes=(2, 120),
    parts=parts,
    panels=panels,
    verdicts=verdicts,
    sides=(("certified", "attack"),),
)
