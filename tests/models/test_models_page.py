"""The page of families against the families of the tests."""

import re

import pytest

from benchmarks.model_survey import PAGE, families, refusal, row, survey
from tests.hf_families import REFUSED

ROW = re.compile(r"\| (.+?) \| (.+) \|$", re.MULTILINE)


def rows() -> dict[str, str]:
    """The rows of both tables by family."""
    return {match[1]: match[2] for match in ROW.finditer(PAGE.read_text()) if match[1] != "family"}


def test_the_page_has_every_family() -> None:
    assert rows().keys() - {"---"} == families().keys() | REFUSED.keys()


@pytest.mark.parametrize("name", ["qwen2", "falcon, alibi"])
def test_a_row_is_what_the_survey_finds(name: str) -> None:
    line = survey(name)
    assert line.difference < 1e-13
    written, found = (text.rpartition(" | ")[0] for text in (f"| {name} | {rows()[name]}", row(line)))
    assert written == found.removesuffix(" |")


def test_a_refused_row_is_what_the_survey_finds() -> None:
    assert rows()["llama4"] == refusal("llama4")
