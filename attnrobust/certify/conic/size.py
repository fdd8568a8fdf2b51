"""What a conic margin certificate would take, before anything is built."""

from collections.abc import Sequence
from dataclasses import dataclass

from attnrobust.certify.conic.basis import Bases

EVALUATIONS = 8  # radii of a typical search
ITERATIONS = 20  # of the interior-point method
SECONDS_PER_BLOCK = 5e-3  # of one iteration, whatever the size
SECONDS_PER_STEP = 1.2e-10  # of one multiply-add in factoring a moment matrix's system, one thread
AFFORDABLE_SECONDS: dict[Bases, float] = {"full": 100.0, "aligned": 200.0}  # up to this estimate they are used


@dataclass(frozen=True)
class Size:
    """Size of one program and time of the certificate.

    Args:
        bases: The largest bases that are affordable.
        blocks: Moment matrices (rows whose weights can change).
        side: Side of the largest moment matrix.
        variables: Variables.
        cones: Scalar rows and second-order or exponential cones.
        programs: Programs per radius (classes times pieces of the threat).
        seconds: Estimated time of the whole search.
    """

    bases: Bases
    blocks: int
    side: int
    variables: int
    cones: int
    programs: int
    seconds: float

    def __str__(self) -> str:
        each = "" if self.programs == 1 else f", {self.programs} programs a radius"
        return (
            f"the conic program would have about {self.variables} variables, {self.cones} cones and {self.blocks} "
            f"moment matrices of side {self.side}{each}, and take about {self.seconds:.0f} s"
        )


def size_of(*, heads: int, keys: Sequence[int], moving: int, width: int, programs: int) -> Size:
    """Estimate with the largest bases that are affordable.

    Args:
        heads: Heads.
        keys: Number of visible keys of every row that counts.
        moving: Tokens that may move.
        width: Token width.
        programs: Programs per radius.
    """
    larger: tuple[Bases, ...] = ("full", "aligned")
    for bases in larger:
        size = _size(heads, keys, moving, width, programs, bases)
        if size.seconds <= AFFORDABLE_SECONDS[bases]:
            return size
    return _size(heads, keys, moving, width, programs, "plain")


def _size(heads: int, keys: Sequence[int], moving: int, width: int, programs: int, bases: Bases) -> Size:
    sides = [_side(k, moving, width, bases) for k in keys if k > 1] * heads
    entries = [side * (side + 1) // 2 for side in sides]
    singles = heads * sum(6 * k for k in keys)
    steps = sum((SECONDS_PER_BLOCK + SECONDS_PER_STEP * count**3 for count in entries), start=0.0)
    return Size(
        bases=bases, blocks=len(sides), side=max(sides, default=0),
        variables=moving * (width + 1) + sum(entries) + singles,
        cones=heads * sum(45 * k for k in keys), programs=programs,
        seconds=EVALUATIONS * ITERATIONS * programs * steps,
    )  # fmt: skip


def _side(keys: int, moving: int, width: int, bases: Bases) -> int:
    """1, p, the bilinear part, the query's basis and those of the other keys that move."""
    more = {"plain": 0, "aligned": 1, "full": width}[bases]
    query, other = min(width, keys + 1 + more), min(width, 2 + more)
    return 1 + 1 + (keys - 1) + query + (min(keys, moving) - 1) * other
