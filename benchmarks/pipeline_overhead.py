"""CPU seconds of the harness over those of the certificates and attacks, over many rows on MiniLM.

Run ``python -m benchmarks.pipeline_overhead``; minutes on one core, and CPU seconds barely feel other load. The harness
is everything else that a run does for a row: work list, model digest, capture of the tokens, the problem, the row, the
parts on disk. Loading the model and the libraries is told apart: it is paid once, whatever the number of rows. Two
cheap certificates and the default attack: with all certificates a row takes longer and the share is smaller.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attnrobust.runs.evaluate
import attnrobust.runs.run
import attnrobust.runs.work
from attnrobust.attacks import DEFAULT_BUDGET
from attnrobust.models.model import ModuleModel
from attnrobust.runs.plan import Shard
from attnrobust.runs.storage.store import RunStore
from benchmarks.pipeline_common import LAYERS, configured


class Clock:
    """CPU seconds of this process inside the wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.process_time() - start

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--restarts", type=int, default=DEFAULT_BUDGET.restarts, help="of the attack")
    parser.add_argument("--steps", type=int, default=DEFAULT_BUDGET.steps, help="of the attack")
    options = parser.parse_args()
    texts = -(-options.rows // len(LAYERS))
    work, capture, parts, loading = Clock(), Clock(), Clock(), Clock()
    attnrobust.runs.evaluate.certify_row = work.around(attnrobust.runs.evaluate.certify_row)
    attnrobust.runs.evaluate.run_attack = work.around(attnrobust.runs.evaluate.run_attack)
    attnrobust.runs.work.load_model = loading.around(attnrobust.runs.work.load_model)
    ModuleModel.capture_layers = capture.around(ModuleModel.capture_layers)  # type: ignore[method-assign]
    RunStore.append = parts.around(RunStore.append)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as place:
        config = configured(
            Path(place), texts=texts, out="out", part_rows=64, restarts=options.restarts, steps=options.steps
        )
        start = time.process_time()
        outcome = attnrobust.runs.run.run(config, shard=Shard())
        total = time.process_time() - start
        rows = outcome.store.rows()
    assert outcome.computed == len(rows) == texts * len(LAYERS)
    harness = total - work.seconds - loading.seconds
    lengths = [row.n for row in rows]
    print(f"{len(rows)} rows of {min(lengths)} to {max(lengths)} tokens on {len(LAYERS)} layers, seconds of CPU:")
    print(f"certificates and attacks {work.seconds:8.2f}, {work.seconds / len(rows):.3f} a row")
    print(f"harness                  {harness:8.2f}, capture {capture.seconds:.2f} and parts {parts.seconds:.2f} of it")
    print(f"overhead                 {harness / work.seconds:8.2%}")
    print(f"libraries and model      {loading.seconds:8.2f}, once")


if __name__ == "__main__":
    main()
