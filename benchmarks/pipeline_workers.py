"""Rows a second with two worker processes over those with one, one torch thread each.

Run ``python -m benchmarks.pipeline_workers`` on a machine with two idle cores; a few minutes. The rate is told with the
start of the run (libraries, model, work list) and without it: from the first row to the last. Anything else at work
on the cores falsifies it, so the load before the start is told too.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from attnrobust.runs.plan import Shard
from attnrobust.runs.rows import Row, without_times
from attnrobust.runs.run import run
from benchmarks.pipeline_common import LAYERS, ONE_THREAD, configured


def timed(place: Path, *, texts: int, workers: int, name: str) -> tuple[float, float, list[Row]]:
    """Rates with and without the start, and the rows."""
    config = configured(place, texts=texts, out=name, workers=workers, part_rows=64)
    times: list[float] = []

    def watch(rows: Iterator[Row], _: int) -> Iterator[Row]:
        for row in rows:
            times.append(time.monotonic())
            yield row

    start = time.monotonic()
    outcome = run(config, shard=Shard(), watch=watch)
    end = time.monotonic()
    return len(times) / (end - start), (len(times) - 1) / (times[-1] - times[0]), without_times(outcome.store.rows())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="one and two workers by turns, so many times")
    options = parser.parse_args()
    texts = -(-options.rows // len(LAYERS))
    os.environ.update(ONE_THREAD)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {texts * len(LAYERS)} rows")
    whole, steady = [], []
    with tempfile.TemporaryDirectory() as place:
        for turn in range(options.rounds):
            one = timed(Path(place), texts=texts, workers=1, name=f"one{turn}")
            two = timed(Path(place), texts=texts, workers=2, name=f"two{turn}")
            assert one[2] == two[2], "the rows depend on the number of workers"
            whole.append(two[0] / one[0])
            steady.append(two[1] / one[1])
            print(f"rows a second with one and two workers: {one[0]:.2f} {two[0]:.2f}, ratio {whole[-1]:.2f};", end=" ")
            print(f"without the start: {one[1]:.2f} {two[1]:.2f}, ratio {steady[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(whole):.2f}, without the start {statistics.median(steady):.2f}")


if __name__ == "__main__":
    main()
