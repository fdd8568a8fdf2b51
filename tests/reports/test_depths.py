"""The depth profile as people see it."""

import struct
from dataclasses import replace

from attnrobust.reports.depths import MANY_DEPTHS, depth_plot, depth_table
from attnrobust.runs.depths import depth_profile
from tests.reports.test_tables import PNG, text
from tests.runs.storage.test_files import FULL
from tests.runs.test_depths import whole


def test_the_table_has_a_line_per_depth() -> None:
    rows = [whole("embeddings", 1.0, 0.0), whole("embeddings", None, 0.0), whole("block:1", 2.0, 0.5, gap=4.0)]
    lines = [line for line in text(depth_table(depth_profile(rows))).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert cells == [
        ["embeddings", "1/2", "10%", "0%", "1", "0", "-", "10"],
        ["block:1", "1/1", "20%", "5%", "2", "0.5", "4", "10"],
    ]


def test_the_plot_of_every_kind_of_rows() -> None:
    both = [whole("embeddings", 1.0, 0.0), whole("block:1", 2.0, 0.5)]
    several = [*both, *(replace(row, threat="any-token") for row in both)]
    deep = [whole(f"block:{k}", 1.0 + k, 0.1) for k in range(1, MANY_DEPTHS + 5)]
    sizes = []
    for rows in (both, several, deep, [FULL]):
        png = depth_plot(rows, title="a model")
        assert png.startswith(PNG)
        sizes.append(struct.unpack(">II", png[16:24]))
    assert sizes[1][1] > sizes[0][1]  # a field for each threat
