"""Every token's own radius in the terminal."""

from dataclasses import replace

import pytest

from attnrobust.reports.tokens import MOST_TOKENS, SPECIAL, token_tables
from attnrobust.runs.heat import is_special
from tests.reports.test_tables import text
from tests.runs.storage.test_files import FULL

ROW = replace(FULL, tokens=("[CLS]", "na", "ive"), token_radii=(0.4, 0.20001, None), token_norm=2.0)


def test_the_most_vulnerable_token_is_first_and_special_ones_are_marked() -> None:
    (table,) = token_tables([ROW])
    lines = [line for line in text(table).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert cells == [["1", "na", "0.2001", "10.1%", ""], ["0", "[CLS]", "0.4", "20%", SPECIAL]]
    assert "1 tokens may not move, or nothing was found for them" in text(table)


def test_long_inputs_are_clipped_and_rows_without_radii_have_no_table() -> None:
    count = 3 * MOST_TOKENS
    radii = tuple(1.0 + place for place in range(count))
    (table,) = token_tables([replace(ROW, n=count, tokens=("w",) * count, token_radii=radii), FULL])
    shown = text(table)
    assert sum(line.startswith("│") for line in shown.splitlines()) == MOST_TOKENS
    assert f"the {MOST_TOKENS} smallest of {count}" in shown
    assert "--json" in shown


@pytest.mark.parametrize("token", ["[CLS]", "[SEP]", "<s>", "</s>", "<|im_start|>", "<bos>", "<end_of_turn>"])
def test_special_tokens(token: str) -> None:
    assert is_special(token)


@pytest.mark.parametrize("token", ["the", "##s", "[", "<", "]", "[a]", "a<b>", "->", "I"])
def test_others(token: str) -> None:
    assert not is_special(token)
