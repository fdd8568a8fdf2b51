"""Ways to compute the rows of work items: here, by processes that may die, or on a Ray cluster."""

import threading
from collections.abc import Generator, Sequence

from attnrobust.runs.rows import Row
from attnrobust.runs.work import Workbench, WorkItem


def compute(bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> Generator[Row, None, None]:
    """Rows of items by the engine of the configuration, as they are done; the values do not depend on the engine.

    Args:
        bench: The configuration's workbench; used for the rows themselves only by the engine in this process.
        items: What to compute.
        stop: Once set, no further item is begun; the ones at work are finished.
    """
    execution = bench.config.execution
    if execution.engine == "ray":
        from attnrobust.runs.engines.ray import compute_on_ray

        return compute_on_ray(bench, items, stop)
    if execution.workers == 0:
        from attnrobust.runs.engines.here import compute_here

        return compute_here(bench, items, stop)
    from attnrobust.runs.engines.processes import compute_in_pool

    return compute_in_pool(bench, items, stop)
