"""Margins: gradient and Hessian of the whole network exactly, in one trust region; the rest with clean cotangents."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from attnrobust.certify.margin.trust_region import Quadratic, decomposed_bound
from attnrobust.certify.method import PreparedBound
from attnrobust.certify.network.composite.preparation import Preparation
from attnrobust.certify.network.composite.recursion import Recursion, TargetNorms, smallest
from attnrobust.certify.network.composite.targets import Port, Readout, added
from attnrobust.numerics.rounding import FORMULA, SMALLEST, used_share
from attnrobust.numerics.sides import Upper
from attnrobust.problem import Problem

KRYLOV = 32
"""Products with the Hessian that the trust region knows exactly; the rest of the space has its largest eigenvalue."""
CLOSED = 1e-13  # of the largest coupling: the Krylov space is invariant


@dataclass(eq=False)
class ClassDrop:
    """Upper bound of the drop of one class margin ``<c, pooled output>``, by theorem 2.

    Args:
        preparation: Norms of the network's ports.
        readout: The functional c of the pooled output, one number.
    """

    preparation: Preparation
    readout: Readout

    def at(self, recursion: Recursion, radius: float) -> float:
        """Bound of the drop at a Frobenius radius whose ports are known."""
        parts = recursion.at(self.norms)
        thirds = {name: self._third(recursion, name) for name in self._clean_cotangents}
        node_by_node = (parts.cross + self._beyond(recursion, thirds), self._lifted(recursion, thirds))
        rest = smallest((parts.rest_of_levels, *node_by_node))
        return smallest((self._quadratic(radius) + rest, self.slope * radius + parts.whole))

    def _beyond(self, recursion: Recursion, thirds: Mapping[str, float]) -> float:
        """``sum_m |<c_m, Beyond_m>|``: node by node the norm of its parts, or its third order read out (lemma 8)."""
        total = 0.0
        for name, cotangent in self._clean_cotangents.items():
            ball, node = recursion.balls[name], self.preparation.remainders[name]
            found = [self._carried(name, recursion.of(name, recursion.beyond)), math.inf]
            if math.isfinite(ball.rho) and math.isfinite(ball.rest):
                found[1] = node.third_readout(cotangent, ball) + self._carried(name, node.quadratic(ball))
            apart = thirds[name] + self._carried(name, recursion.of(name, recursion.drift))
            total += smallest((*found, apart))
        return total * (1.0 + FORMULA)

    def _lifted(self, recursion: Recursion, thirds: Mapping[str, float]) -> float:
        """The same and the cross terms, ``sum_m |<c_m, Rem_m(T D) - 1/2 f''[T D, T D] + Lift_m>|``."""
        sizes = (third + self._carried(n, recursion.of(n, recursion.lift)) for n, third in thirds.items())
        return math.fsum(sizes) * (1.0 + FORMULA)

    def _third(self, recursion: Recursion, name: str) -> float:
        """``|<c_m, Rem_m(T D) - 1/2 f''[T D, T D]>|``."""
        read = self.preparation.remainders[name].third_readout(
            self._clean_cotangents[name], recursion.balls[name].still
        )
        return smallest((read, self._carried(name, recursion.of(name, recursion.third))))

    def _carried(self, name: str, sizes: Mapping[str, float]) -> float:
        tails = self.norms.tails
        return math.fsum(
            0.0 if 0.0 in (tails[name, key], size) else tails[name, key] * size for key, size in sizes.items()
        )

    @cached_property
    def _clean_cotangents(self) -> dict[str, Tensor]:
        """``c_m`` of every node before the readout."""
        names = [port.name for port in self.preparation.upstream(self.readout)]
        return self.preparation.record.pull({self.readout.state: self._cotangent}, names)

    @cached_property
    def slope(self) -> float:
        """Norm of the gradient."""
        return float(torch.linalg.vector_norm(self.gradient))

    @cached_property
    def gradient(self) -> Float[Tensor, "N"]:
        """Of the drop: minus that of the margin."""
        record, moves = self.preparation.record, self.preparation.moves
        return -moves.flat(record.gradient(self._cotangent))

    @cached_property
    def norms(self) -> TargetNorms:
        """Tails are vectors here, and the cross term is a bilinear form whose norm needs no sketch."""
        preparation = self.preparation
        ports = preparation.upstream(self.readout)
        sources = [port for port in ports if preparation.upstream(port)]
        return TargetNorms(
            curvature=0.0,
            third=preparation.third_norm(self.readout),
            cross=self._cross(sources),
            sources=tuple(port.name for port in sources),
            tails=preparation.tails(self.readout),
        )

    @cached_property
    def _cotangent(self) -> Tensor:
        one = torch.ones(1, dtype=torch.float64, device=self.preparation.moves.movable.device)
        return self.readout.cotangents(one)[self.readout.state]

    # ---- second order ----------------------------------------------------------------------------------------------

    def _curved(self, v: Float[Tensor, "*b N"]) -> Float[Tensor, "*b N"]:
        """Minus the Hessian of the margin times v."""
        record, moves = self.preparation.record, self.preparation.moves
        return -moves.flat(record.hessian_product(self._cotangent, moves.tokens(v)))

    def _quadratic(self, radius: float) -> float:
        """``sup G.D + D M D / 2`` in a Krylov space of G, with the largest eigenvalue outside of it (lemma 4)."""
        matrix, gradient = self._reduced
        problem = Quadratic(lambda v: v @ matrix, gradient)
        return decomposed_bound(problem, radius)[0].value

    @cached_property
    def _reduced(self) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k"]]:
        """``[[T, beta e_k], [beta e_k^T, mu]]`` and the gradient in it."""
        size = self.gradient.numel()
        if self.slope < SMALLEST:  # no direction to start from: all of the form has its largest eigenvalue
            return torch.tensor([[self._top]], dtype=torch.float64), torch.tensor([self.slope], dtype=torch.float64)
        alpha, beta = _krylov(self._curved, self.gradient, min(KRYLOV, size))
        steps = len(alpha)
        matrix = torch.diag(torch.tensor([*alpha, self._top], dtype=torch.float64))
        for index, coupling in enumerate(beta):
            matrix[index, index + 1] = matrix[index + 1, index] = coupling
        gradient = torch.zeros(steps + 1, dtype=torch.float64)
        gradient[0] = self.slope
        return (matrix[:-1, :-1], gradient[:-1]) if steps == size else (matrix, gradient)

    @cached_property
    def _top(self) -> float:
        return self.preparation.top(self._curved)

    def _cross(self, sources: Sequence[Port]) -> float:
        """Norm of ``(D, R) -> sum_m <c_m, f_m''[T_m D, R_m]>`` in the metrics of the ports."""
        if not sources:
            return 0.0
        record, moves = self.preparation.record, self.preparation.moves
        cotangents = record.pull({self.readout.state: self._cotangent}, [port.name for port in sources])
        sizes = [port.size for port in sources]
        nodes = record.nodes

        def forward(v: Tensor) -> Tensor:
            along = record.along(moves.tokens(v)).features
            back = {p: nodes[p.name].bilinear_adjoint(along[p.name], cotangents[p.name]) for p in sources}
            return torch.cat([port.flat_cotangent(back[port]) for port in sources], dim=-1)

        def backward(y: Tensor) -> Tensor:
            names: list[str] = []
            edges: list[Tensor] = []
            for port, part in zip(sources, y.split(sizes, dim=-1), strict=True):
                features = nodes[port.name].features(port.edges(part))
                names += port.reads
                edges += nodes[port.name].bilinear_adjoint(features, cotangents[port.name])
            source = record.wiring.source
            return moves.flat(record.pull(added(names, edges), (source,))[source])

        return self.preparation.norm(forward, backward, moves.size, sum(sizes))


@dataclass(eq=False)
class MarginBound(PreparedBound):
    """The largest used share over all class margins.

    Args:
        problem: The question; its goal is a margin.
        preparation: Norms at its clean input, shared by all classes.
        factor: ``sup ||D||_F / distance(D)`` of the threat.
    """

    problem: Problem
    preparation: Preparation
    factor: float

    @property
    def failure_probability(self) -> float:
        return self.preparation.failure_probability

    @cached_property
    def classes(self) -> list[ClassDrop]:
        """One bound per wrong class."""
        functionals = self.problem.resolved.functionals
        assert functionals is not None  # noqa: S101 - a margin has functionals
        return [ClassDrop(self.preparation, replace(self.preparation.output, functional=f)) for f in functionals]

    @property
    def first_guess(self) -> float | None:
        pairs = zip(self.problem.resolved.budgets.tolist(), self.classes, strict=True)
        least: float = min(budget / max(drop.slope, SMALLEST) for budget, drop in pairs)
        return 0.3 * least / self.factor

    def usage(self, radius: float) -> Upper:
        """Upper bound of the largest used share on the threat's set of this radius."""
        reach = radius * self.factor
        recursion = self.preparation.recursion(reach)
        drops = [drop.at(recursion, reach) for drop in self.classes]
        used = used_share(drops, self.problem.resolved.budgets, share=FORMULA)
        return Upper(used, self.failure_probability if math.isfinite(used) else 0.0)


def _krylov(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Diagonal and couplings of a form in its Krylov space; the last coupling leads out of it."""
    rows, alpha, beta = [start / torch.linalg.vector_norm(start)], [], []
    for step in range(steps):
        image = product(rows[-1])
        alpha.append(float(image @ rows[-1]))
        found = torch.stack(rows)
        for _ in range(2):
            image = image - (found @ image) @ found
        coupling = float(torch.linalg.vector_norm(image))
        beta.append(coupling)
        if step + 1 == steps or coupling <= CLOSED * max(beta):
            break
        rows.append(image / coupling)
    return alpha, beta
