"""A run killed with SIGKILL at random, again and again, against an undisturbed one: the rows must be equal.

Run ``python -m benchmarks.pipeline_kill``; about 500 rows on three layers of MiniLM, killed ten times. Every second
start works with two processes and the others with none; every third kill takes the main process alone, so that its
workers are orphans. It prints rate, memory and what was on disk after each kill, and ends with an error at any
difference.
"""

import argparse
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections import Counter
from os import killpg
from pathlib import Path

from attnrobust.runs.rows import without_times
from attnrobust.runs.storage.files import MANIFEST
from attnrobust.runs.storage.store import RunStore
from benchmarks.pipeline_common import LAYERS, command, configured

ORPHANS_END_WITHIN = 60.0


def ids_on_disk(out: Path) -> list[str]:
    """Row ids of all parts, one entry for each time that one is there."""
    import pyarrow.parquet as pq

    return [i for part in sorted((out / "parts").glob("*.parquet")) for i in pq.read_table(part)["row_id"].to_pylist()]


def kill(process: subprocess.Popen[bytes], *, alone: bool) -> int:
    """End a run as a crash does; the number of its workers that were left, which end by themselves."""
    if not alone:
        killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 0
    process.kill()
    process.wait()
    left, deadline = members(process.pid), time.monotonic() + ORPHANS_END_WITHIN
    while members(process.pid):
        if time.monotonic() > deadline:
            raise SystemExit(f"workers are still there {ORPHANS_END_WITHIN:g} s after the end of their run")
        time.sleep(0.1)
    return left


def members(group: int) -> int:
    """Processes of a group that are alive."""
    alive = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = entry.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        alive += int(its_group) == group and state != "Z"
    return alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    texts = -(-options.rows // len(LAYERS))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        reference = configured(place, texts=texts, out="reference")
        start = time.monotonic()
        if command(reference).wait() != 0:
            raise SystemExit("the undisturbed run failed")
        seconds = time.monotonic() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        expected = without_times(RunStore.open(reference.output).rows())
        lengths = [row.n for row in expected]
        print(f"{len(expected)} rows of {min(lengths)} to {max(lengths)} tokens on {len(LAYERS)} layers, undisturbed:")
        print(f"  {seconds:.0f} s, {len(expected) / seconds:.2f} rows a second, {used.ru_utime:.0f} s of CPU,", end=" ")
        print(f"{used.ru_maxrss / 1024:.0f} MiB at most; statuses {dict(Counter(str(r.status) for r in expected))}")
        kills = 0
        out = place / "killed"
        while kills < options.kills:
            process = command(configured(place, texts=texts, out="killed", workers=2 * (kills % 2)))
            # The mean leaves one share of the work to each of the starts; some come before the model is loaded.
            time.sleep(chance.uniform(0.0, 2.0 * seconds / (options.kills + 1)))
            if process.poll() is not None:
                if process.returncode != 0:
                    raise SystemExit(f"a start ended with exit code {process.returncode}")
                print("  the run was complete before the next kill")
                break
            orphans = kill(process, alone=kills % 3 == 2)
            kills += 1
            there = len(ids_on_disk(out)) if (out / MANIFEST).exists() else 0
            print(
                f"  kill {kills}: {there} rows on disk" + (f", {orphans} orphans ended" if orphans else ""), flush=True
            )
        if command(configured(place, texts=texts, out="killed", workers=2)).wait() != 0:
            raise SystemExit("the last resume failed")
        ids = ids_on_disk(out)
        found = without_times(RunStore.open(out).rows())
    different = sum(one != other for one, other in zip(expected, found, strict=False))
    print(f"after {kills} kills: {len(ids)} rows on disk, {len(ids) - len(set(ids))} twice, {different} different")
    if kills < options.kills or found != expected or len(ids) != len(expected):
        raise SystemExit(
            "the rows are not those of the undisturbed run" if found != expected else "rows lost or doubled"
        )


if __name__ == "__main__":
    main()
