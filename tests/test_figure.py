"""The picture of one comparison says what the results say."""

import math
import re

import pytest

from attnrobust import figure
from attnrobust.comparison import join
from attnrobust.results import Status
from tests.test_comparison import found, linear_problem, report


@pytest.mark.parametrize(
    ("radius", "status", "said"), [(0.25, Status.FOUND, "by-hand: 0.25"), (math.inf, Status.NOT_FOUND, "nothing found")]
)
def test_a_comparison_draws_every_radius(
    monkeypatch: pytest.MonkeyPatch, radius: float, status: Status, said: str
) -> None:
    drawn = list[str]()

    def as_svg(*size_and_draw: object) -> bytes:
        drawing = figure.rendered(*size_and_draw, formats=("svg", "png"))  # type: ignore[arg-type]
        drawn.append(drawing["svg"].decode())
        return drawing["png"]

    monkeypatch.setattr(figure, "png", as_svg)
    problem = linear_problem()
    comparison = join(problem, found(problem, radius, status), report(problem, 0.125, 0.0))
    picture = comparison.plot()
    assert picture.png.startswith(b"\x89PNG")
    assert picture.title.startswith(str(status))
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", drawn[0])
    assert {"bound-0: 0.125", "bound-1: 0"} <= set(texts)
    assert any(said in text for text in texts)


def test_nothing_to_draw_is_a_picture_too() -> None:
    problem = linear_problem()
    comparison = join(problem, found(problem, math.inf, Status.NOT_FOUND), report(problem))
    assert comparison.plot().png.startswith(b"\x89PNG")
