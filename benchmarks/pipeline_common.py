"""What the benchmarks of the pipeline share: sentences of 8 to 64 tokens, run on three layers of MiniLM."""

import os
import subprocess
import sys
from pathlib import Path

from attnrobust.demo import demo_sentences
from attnrobust.runs.config import RunConfig, make_config

ROOT = Path(__file__).parent.parent
LAYERS = ("encoder.layer.0.attention", "encoder.layer.2.attention", "encoder.layer.5.attention")
SHORTEST, LONGEST = 6, 52  # words; 8 to 64 tokens with the two that MiniLM adds
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def sentences(count: int) -> list[str]:
    """Different windows of real text, their lengths all from SHORTEST to LONGEST words in mixed order."""
    passages = (ROOT / "benchmarks" / "passages.txt").read_text(encoding="utf-8")
    words = [*" ".join(demo_sentences()).split(), *passages.split()]
    lengths = LONGEST - SHORTEST + 1
    found: dict[str, None] = {}
    for number in range(count):
        length = SHORTEST + number * 19 % lengths  # 19 and 47 have no common divisor
        places = len(words) - length
        windows = (" ".join(words[i % places : i % places + length]) for i in range(number * 37, number * 37 + places))
        found[next(window for window in windows if window not in found)] = None
    return list(found)


def configured(
    place: Path, *, texts: int, out: str, workers: int = 0, part_rows: int = 10, restarts: int = 2, steps: int = 10
) -> RunConfig:
    """A run of cheap certificates and, by default, a short attack; the input file is written if it is not there."""
    file = place / f"texts-{texts}.txt"
    if not file.exists():
        file.write_text("".join(f"{line}\n" for line in sentences(texts)), encoding="utf-8")
    return make_config(
        {
            "model": "minilm",
            "layers": LAYERS,
            "texts": str(file),
            "goals": ["10%"],
            "certificates": ["castin2024-derived", "singla2020-curvature"],
            "attack": {"restarts": restarts, "steps": steps},
            "output": str(place / out),
            "execution": {"workers": workers, "part_rows": part_rows, "part_seconds": 5},
        }
    )


def command(config: RunConfig) -> subprocess.Popen[bytes]:
    """The run as a user starts it, in a process group of its own; its tables are not shown."""
    path = config.output.parent / f"{config.output.name}-{config.execution.workers}.yaml"
    path.write_text(config.as_yaml(), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "attnrobust", "run", str(path), "-q"],
        cwd=ROOT, env=os.environ | ONE_THREAD, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
