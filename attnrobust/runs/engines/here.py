"""Rows of work items in this process."""

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch

from attnrobust.runs.rows import Row
from attnrobust.runs.work import Workbench, WorkItem


def compute_here(bench: Workbench, items: Sequence[WorkItem], stop: threading.Event) -> Generator[Row, None, None]:
    """One item after the other in this process."""
    with torch_threads(bench.config.threads):
        for item in items:
            if stop.is_set():
                return
            yield bench.row(item)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads inside, the former number after."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
