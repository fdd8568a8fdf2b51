"""The whole conic program of one class margin: all rows, the shared moves and energies."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from attnrobust.certify.conic.basis import Bases, bases_of
from attnrobust.certify.conic.program import Affine, Box, Cone, ConeRows, ConicProgram, MomentMatrix, Moves
from attnrobust.certify.conic.ranges import row_ranges
from attnrobust.certify.conic.relaxation import Block
from attnrobust.certify.conic.row import MoveSet, Row
from attnrobust.numerics.rounding import ENTRY, outward

Array = Float[np.ndarray, "..."]
Index = Int[np.ndarray, "..."]

ONE = outward(1.0, ENTRY)  # scaled quantities are at most 1


def drop_gradient(rows: tuple[Row, ...]) -> Float[np.ndarray, "m d"]:
    """Gradient of the drop at the clean input, per moving token."""
    out = np.zeros((rows[0].moving, len(rows[0].beta)))
    for row in rows:
        out += row.share * np.einsum("j,jmd->md", row.weight * row.drop, row.directions)
        np.add.at(out, row.key[row.key_moves], -row.share * row.weight[row.key_moves, None] * row.value)
    return out


@dataclass(frozen=True, eq=False)
class Assembly:
    """Global columns: the moves (m d), the energies (m), then each block's own variables.

    Args:
        program: The program.
        blocks: Its blocks, with the global column of every local one.
    """

    program: ConicProgram
    blocks: tuple[tuple[Block, Index], ...]


def margin_program(rows: tuple[Row, ...], reach: MoveSet, *, budget: float, bases: Bases) -> Assembly:
    """``minimise -drop / budget`` over a convex set that holds every move of the threat.

    Args:
        rows: Every row that counts.
        reach: The perturbation set.
        budget: The clean margin.
        bases: Which directions of the tokens each row keeps (more: tighter, larger).
    """
    m, d = rows[0].moving, len(rows[0].beta)
    gradient = drop_gradient(rows)
    start = m * d + m
    placed: list[tuple[Block, Index]] = []
    linear = np.zeros((m, d))
    for row in rows:
        if row.constant:
            np.add.at(linear, row.key[row.key_moves], -row.share * row.weight[row.key_moves, None] * row.value)
            continue
        block = Block(row, reach, row_ranges(row, reach), bases_of(row, gradient, bases=bases))
        own = np.arange(start, start + block.width - (m * d + m))
        placed.append((block, np.concatenate([np.arange(m * d + m), own])))
        start += len(own)
    cost, offset = np.zeros(start), 0.0
    cost[: m * d] = -linear.ravel() * reach.token / budget
    for block, columns in placed:
        drop = block.drop()
        np.add.at(cost, columns, -drop.coef[0] / budget)
        offset -= float(drop.const[0]) / budget
    moves = moves_of(np.arange(m * d).reshape(m, d), reach)
    boxes = [Box(np.arange(m * d, m * d + m), np.zeros(m), np.full(m, ONE))]
    boxes += [box for block, columns in placed for box in _boxes(block, columns)]
    groups = [*_shared(m, d, reach, start), *(group for pair in placed for group in _groups(*pair, start))]
    program = ConicProgram(
        cost=cost, offset=offset, rows=tuple(groups), boxes=tuple(boxes),
        moments=tuple(_moments(block, columns, reach) for block, columns in placed), moves=moves,
        reach=_reach(start, boxes),
    )  # fmt: skip
    return Assembly(program, tuple(placed))


def moves_of(index: Int[np.ndarray, "m d"], reach: MoveSet) -> Moves:
    """The set of moves in units of ``reach.token``."""
    if reach.norm is None:
        return Moves(index, "frobenius", ONE)
    return Moves(index, reach.norm, outward(reach.epsilon / reach.token, ENTRY))


def _shared(m: int, d: int, reach: MoveSet, width: int) -> Iterator[ConeRows]:
    """Energies ``|delta_l|^2 / rho^2``: each at most 1, together at most ``(r_F / rho)^2``."""
    place = np.arange(m * d, m * d + m)
    each = sparse.csr_array((-np.ones(m), (np.arange(m), place)), shape=(m, width))
    yield ConeRows(Cone.NONNEGATIVE, each, np.full(m, ONE), "energy of a token")
    total = sparse.csr_array((-np.ones(m), (np.zeros(m, dtype=np.int64), place)), shape=(1, width))
    bound = outward(min((reach.frobenius / reach.token) ** 2, float(m)), ENTRY)
    yield ConeRows(Cone.NONNEGATIVE, total, np.array([bound]), "energy of all tokens")


def _groups(block: Block, columns: Index, width: int) -> Iterator[ConeRows]:
    """Facts of one block over the global columns, one group per cone and name."""
    for name, cone, value in block.facts():
        even = _evened(cone, value)
        yield ConeRows(cone, _widened(even, columns, width), even.const, name)


def _evened(cone: Cone, value: Affine) -> Affine:
    """ConeRows over their largest coefficient, three at a time for cones of three: the same facts, easier to solve."""
    largest = np.maximum(np.abs(value.coef).max(axis=1, initial=0.0), np.abs(value.const))
    if cone in (Cone.SECOND_ORDER, Cone.EXPONENTIAL):
        largest = np.repeat(largest.reshape(-1, 3).max(axis=1), 3)
    return value * (1.0 / np.where(largest > 0.0, largest, 1.0))


def _widened(value: Affine, columns: Index, width: int) -> sparse.csr_array:
    row, local = np.nonzero(value.coef)
    return sparse.csr_array((value.coef[row, local], (row, columns[local])), shape=(len(value.const), width))


def _moments(block: Block, columns: Index, reach: MoveSet) -> MomentMatrix:
    """Largest trace: 1 + |y|^2 + |eta|^2 + p^2 with the last two at most 1."""
    energy = min((reach.frobenius / reach.token) ** 2, float(len(block.places)))
    return MomentMatrix(columns[block.columns["moments"]], block.size, outward(2.0 + energy + block.bends, ENTRY))


def _boxes(block: Block, columns: Index) -> Iterator[Box]:
    """Bounds of the single variables (scaled); ``values`` is in units of the largest change of a value."""
    ranges = block.ranges
    limits: dict[str, tuple[Array | float, Array | float]] = {
        "weight": (np.exp(ranges.log_low), np.exp(ranges.log_high)),
        "log-mass": (0.0, block.largest_log_mass),
        "cross": (0.0, 1.0), "pair": (-1.0, 1.0), "values": (-1.0, 1.0), "rest": (-2.0, 2.0),
        "tail-query": (0.0, 1.0), "tail-key": (0.0, 1.0), "length": (0.0, 1.0),
    }  # fmt: skip
    for name, (low, high) in limits.items():
        index = columns[block.columns[name]]
        wide = np.full(len(index), ONE)
        yield Box(index, low * np.where(np.asarray(low) < 0, wide, 1.0), high * wide)


def _reach(width: int, boxes: list[Box]) -> Array:
    """Largest absolute value of every variable; 1 for moves and entries of moment matrices."""
    out = np.full(width, ONE)
    for box in boxes:
        out[box.index] = np.maximum(np.abs(box.lower), np.abs(box.upper))
    return out
