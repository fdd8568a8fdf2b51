"""Attack and certify many inputs of several layers into a directory that can be resumed, and write the report.

python examples/attack_benchmark.py [MODEL] [TEXTS] [OUTPUT]
"""

import statistics
import sys
import tempfile
from pathlib import Path

from attnrobust.demo import demo_sentences
from attnrobust.reports.page import write_report
from attnrobust.runs.config import make_config
from attnrobust.runs.run import run


def main(model: str = "minilm", texts: str | None = None, output: str | None = None) -> None:
    place = Path(tempfile.mkdtemp())
    if texts is None:
        texts = str(place / "sentences.txt")
        Path(texts).write_text("\n".join(demo_sentences()[:2]), encoding="utf-8")
    config = make_config(
        {
            "model": model,
            "layers": ["encoder.layer.[05].attention"],
            "texts": texts,
            "threats": ["frobenius", "any-token"],
            "goals": ["10%"],
            "certificates": ["castin2024-derived", "singla2020-curvature"],
            "attack": {"restarts": 2, "steps": 20},
            "output": output or str(place / "results"),
        }
    )
    outcome = run(config)  # the same call goes on after an interruption
    rows = outcome.store.rows()
    for layer in sorted({row.layer for row in rows}):
        gaps = [row.gap for row in rows if row.layer == layer and row.gap is not None]
        print(f"{layer}: median gap {statistics.median(gaps):.3g} over {len(gaps)} rows")
    page, *_ = write_report(outcome.store.directory)
    print(f"report: {page}")


if __name__ == "__main__":  # worker processes import this file
    main(*sys.argv[1:])
