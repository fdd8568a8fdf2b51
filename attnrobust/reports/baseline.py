"""Rows against those of an earlier run: by layer, threat and goal, how much smaller certified radii have become."""

import statistics
from collections.abc import Sequence

from attnrobust.runs.rows import Row
from attnrobust.text import shown

Key = tuple[str, str, str]


def worse_than(rows: Sequence[Row], baseline: Sequence[Row], *, allowed: float) -> list[str]:
    """Where the median certified radius fell by more than a share, the worst first.

    Only inputs that both runs have count, so that a changed list of inputs is not taken for a changed model; a layer,
    threat and goal of the baseline without such inputs is one that fell.

    Args:
        rows: The rows to judge.
        baseline: Earlier rows.
        allowed: Share by which a median may fall, in [0, 1).

    Returns:
        One line for each that fell.
    """
    new, old = _groups(rows), _groups(baseline)
    fallen: list[tuple[float, str]] = []
    for key, before in old.items():
        now = new.get(key, {})
        common = [name for name in before if name in now]
        name = ", ".join(key)
        if not common:
            fallen.append((1.0, f"{name}: none of the baseline's {len(before)} inputs is there"))
            continue
        was, is_now = (statistics.median(of[name] for name in common) for of in (before, now))
        if was > 0 and is_now < was * (1.0 - allowed):
            loss = 1.0 - is_now / was
            line = f"{name}: median certified radius {shown(is_now)} is {loss:.1%} below the baseline's {shown(was)}"
            fallen.append((loss, line))
    return [line for _, line in sorted(fallen, key=lambda pair: -pair[0])]


def _groups(rows: Sequence[Row]) -> dict[Key, dict[str, float]]:
    """Certified radius of each input; nothing certified, or a row that failed, counts as 0."""
    found: dict[Key, dict[str, float]] = {}
    for row in rows:
        found.setdefault((row.layer, row.threat, row.goal), {})[row.input_id] = row.certified_radius or 0.0
    return found
