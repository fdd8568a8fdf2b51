"""Generated problems that come WITH their exact answer, worked out by hand in their docstrings.

The strategies draw plain records and the tests call ``build()``: the shape checks of the package draw random numbers,
which a strategy must not do.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnrobust.goals import Displacement, Goal, Margin, Pool
from attnrobust.layers.attention import Attention
from attnrobust.problem import Problem
from attnrobust.threats.moves import AnyToken, FrobeniusBall, MoveThreat, PerTokenBall
from attnrobust.tokens import TokenMeasure

Shape = Literal["all", "subset", "one", "per-token", "per-token-subset", "any", "any-subset"]
SHAPES: tuple[Shape, ...] = ("all", "subset", "one", "per-token", "per-token-subset", "any", "any-subset")


@dataclass(frozen=True, eq=False)
class Exact:
    """A problem and its true robust radius (infinity where nothing the adversary does can violate the goal)."""

    problem: Problem
    radius: float
    why: str

    def __repr__(self) -> str:
        problem = self.problem
        return f"{self.why}; {problem.threat.key}; {problem.goal.key}; n = {problem.clean.n}; radius {self.radius!r}"


def draw_layer(generator: torch.Generator, heads: int, width: int, *, concatenated: bool, biases: bool) -> Attention:
    """A random layer: k = 3, v = 2, e = 4 or the heads side by side."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Attention(
        w_q=normal(heads, width, 3),
        w_k=normal(heads, width, 3),
        w_v=normal(heads, width, 2),
        b_q=normal(heads, 3) if biases else None,
        b_k=normal(heads, 3) if biases else None,
        b_v=normal(heads, 2) if biases else None,
        w_o=None if concatenated else normal(heads, 2, 4),
        b_o=None if concatenated or not biases else normal(4),
    )


def make_threat(shape: Shape, n: int) -> tuple[MoveThreat, Tensor]:
    """A threat of l2 moves and which tokens it lets move."""
    some = tuple(sorted({0, n - 1}))
    threat: MoveThreat = {
        "all": FrobeniusBall(),
        "subset": FrobeniusBall(tokens=some),
        "one": FrobeniusBall(tokens=(n - 1,)),
        "per-token": PerTokenBall(),
        "per-token-subset": PerTokenBall(tokens=some),
        "any": AnyToken(),
        "any-subset": AnyToken(tokens=some),
    }[shape]
    movable = torch.zeros(n, dtype=torch.bool)
    movable[list(some) if shape.endswith("subset") else [n - 1] if shape == "one" else list(range(n))] = True
    return threat, movable


def reach(shape: Shape, weights: Tensor) -> float:
    """``sup || sum_j weights_j D_j ||`` over threats of size 1: every D_j along one direction (Cauchy-Schwarz)."""
    if shape in ("all", "subset", "one"):
        return float(torch.linalg.vector_norm(weights))
    return float(weights.abs().sum()) if shape.startswith("per-token") else float(weights.abs().max())


def _ratio(budget: float, gain: float) -> float:
    return budget / gain if gain > 0 else math.inf


@dataclass(frozen=True)
class Affine:
    """A layer whose output is affine in the tokens, so that the radius is a quotient of budget and gain.

    With ``W = sum_h w_v^h w_o^h`` (or the w_v side by side):

    * "single" (n = 1) or "self-only" (a mask that shows each query only itself): ``f_i = x_i W + const``. Row i moves
      by ``D_i W``, the whole output by ``D W`` (gain ``||W||_2 sup ||D||_F``), the mean by ``sum_i m_i D_i W``.
    * "uniform" (w_q = 0, b_q = 0: the scores are constant along each row): ``f_i = sum_j m_j x_j W + const`` for every
      i. One row, and the mean, move by ``sum_j m_j D_j W``; the whole output by ``sqrt(n)`` times that.
    """

    seed: int
    kind: Literal["single", "self-only", "uniform"]
    shape: Shape
    goal: Literal["part", "whole", "margin"]
    more_tokens: int
    heads: int
    width: int
    concatenated: bool
    biases: bool
    masses: bool
    pool: Literal["mean", "first", "last"]
    tolerance: float

    def build(self) -> Exact:
        """The problem and its radius."""
        n = 1 if self.kind == "single" else 2 + self.more_tokens
        generator = torch.Generator().manual_seed(self.seed)
        layer = draw_layer(generator, self.heads, self.width, concatenated=self.concatenated, biases=self.biases)
        if self.kind == "uniform":
            layer = replace(layer, w_q=torch.zeros_like(layer.w_q), b_q=None)
        elif self.kind == "self-only":
            layer = replace(layer, mask=torch.full((n, n), -math.inf).fill_diagonal_(0.0))
        mass = torch.softmax(2 * self.masses * torch.randn(n, generator=generator, dtype=torch.float64), dim=0)
        clean = TokenMeasure(torch.randn(n, self.width, generator=generator, dtype=torch.float64), mass)
        threat, movable = make_threat(self.shape, n)
        goal = self._goal(generator, layer, n)
        radius = self._radius(Problem(layer, clean, threat, goal), movable)
        return Exact(Problem(layer, clean, threat, goal), radius, f"{self.kind}, {self.goal}")

    def _goal(self, generator: torch.Generator, layer: Attention, n: int) -> Goal:
        pool: Pool = "mean" if self.pool == "mean" else 0 if self.pool == "first" else n - 1
        if self.goal == "margin":
            return Margin(torch.randn(3, layer.out_width, generator=generator, dtype=torch.float64), pool=pool)
        return Displacement(self.tolerance, pool="all" if self.goal == "whole" else pool)

    def _radius(self, problem: Problem, movable: Tensor) -> float:
        layer, mass, n = problem.network, problem.clean.mass, problem.clean.n
        assert isinstance(layer, Attention)
        matrix = layer.w_v.transpose(0, 1).flatten(1) if layer.w_o is None else (layer.w_v @ layer.w_o).sum(dim=0)
        row = {"mean": mass, "first": torch.eye(n)[0].double(), "last": torch.eye(n)[-1].double()}[self.pool]
        gain = reach(self.shape, (mass if self.kind == "uniform" else row) * movable)
        if self.goal == "margin":
            resolved = problem.resolved
            assert resolved.functionals is not None
            slopes = torch.linalg.vector_norm(resolved.functionals @ matrix.T, dim=-1)
            return min(_ratio(float(b), gain * float(s)) for b, s in zip(resolved.budgets, slopes, strict=True))
        if self.goal == "whole" and self.kind == "uniform":
            gain = math.sqrt(n) * reach(self.shape, mass * movable)
        elif self.goal == "whole":
            gain = math.sqrt(int(movable.sum())) if self.shape.startswith("per-token") else 1.0
        return _ratio(self.tolerance, gain * float(torch.linalg.svdvals(matrix)[0]))


def affine_problems() -> st.SearchStrategy[Affine]:
    """Affine problems; ``build()`` gives the problem with its radius."""
    return st.builds(
        Affine,
        seed=st.integers(0, 10_000),
        kind=st.sampled_from(["single", "self-only", "uniform"]),
        shape=st.sampled_from(SHAPES),
        goal=st.sampled_from(["part", "whole", "margin"]),
        more_tokens=st.integers(0, 4),
        heads=st.integers(1, 4),
        width=st.integers(1, 5),
        concatenated=st.booleans(),
        biases=st.booleans(),
        masses=st.booleans(),
        pool=st.sampled_from(["mean", "first", "last"]),
        tolerance=st.floats(1e-3, 10.0),
    )


@dataclass(frozen=True)
class Hopeless:
    """A problem that no move can violate: w_v = 0, or a row that does not see the only token that may move."""

    seed: int
    constant: bool
    shape: Shape
    n: int
    concatenated: bool
    biases: bool
    tolerance: float

    def build(self) -> Exact:
        """The problem; its radius is infinite."""
        generator = torch.Generator().manual_seed(self.seed)
        layer = draw_layer(generator, 2, 4, concatenated=self.concatenated, biases=self.biases)
        clean = TokenMeasure(torch.randn(self.n, 4, generator=generator, dtype=torch.float64))
        if self.constant:
            layer = replace(layer, w_v=torch.zeros_like(layer.w_v))
            threat, _ = make_threat(self.shape, self.n)
            return Exact(Problem(layer, clean, threat, Displacement(self.tolerance)), math.inf, "constant")
        problem = Problem(
            replace(layer, causal=True),
            clean,
            FrobeniusBall(tokens=(self.n - 1,)),
            Displacement(self.tolerance, pool=0),
        )
        return Exact(problem, math.inf, "unseen")


def hopeless_problems() -> st.SearchStrategy[Hopeless]:
    """Hopeless problems; ``build()`` gives the problem."""
    return st.builds(
        Hopeless,
        seed=st.integers(0, 10_000),
        constant=st.booleans(),
        shape=st.sampled_from(SHAPES),
        n=st.integers(2, 6),
        concatenated=st.booleans(),
        biases=st.booleans(),
        tolerance=st.floats(1e-6, 1.0),
    )
