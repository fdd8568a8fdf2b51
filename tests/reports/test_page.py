"""The report: complete, self-contained, safe against what texts hold, and right in a real browser."""

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from attnrobust.cli import ExitCode, run
from attnrobust.errors import InputError
from attnrobust.figure import png
from attnrobust.reports.data import ReportData
from attnrobust.reports.page import _colours, _luminance, _plots, render, write_report
from attnrobust.reports.plots import gap_boxes, gaps_by_method, radii_by_layer, scatter_plot
from attnrobust.runs.heat import heat_line, heat_map, token_shares
from attnrobust.runs.rows import Row
from attnrobust.runs.run import run as run_all
from attnrobust.runs.storage.files import JSON_NAME, write_results
from attnrobust.runs.storage.parquet import read_parquet
from tests.conftest import CHROMIUM
from tests.layer_files import write_layer
from tests.runs.storage.test_files import EMPTY, FULL
from tests.runs.test_depths import whole
from tests.runs.test_run import NO_SHARD, configured, write_files

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = "</td><script>alert('x')</script> & \"quoted\""


def many(count: int) -> list[Row]:
    return [
        replace(FULL, input_id=f"{i:04d}-ab", attack_radius=0.3 + i / 100, gap=3.0 + i / 10, layer=f"layer.{i % 3}")
        for i in range(count)
    ]


def page(rows: list[Row]) -> str:
    data = ReportData(rows, "Robustness of x", "subtitle", [("Run it:", "attnrobust run run.yaml")], len(rows))
    return render(data, _plots(rows), source=Path("out"))


class Checker(HTMLParser):
    """Collects attributes and checks that tags are closed in order."""

    VOID = frozenset({"meta", "img", "input", "br", "wbr", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.seen if name == tag]


# ---- the page --------------------------------------------------------------------------------------------------------


def test_everything_comes_from_the_page_itself() -> None:
    checked = Checker(page(many(5)))
    assert checked.all("link") == []
    assert all((attrs.get("src") or "").startswith("data:image/png;base64,") for attrs in checked.all("img"))
    assert all("src" not in attrs for attrs in checked.all("script"))
    assert all((attrs["href"] or "").startswith("#") for attrs in checked.all("a") + checked.all("use"))
    assert not re.search(r"https?://|@import|url\((?!#)", page(many(5)))


def test_readable_without_eyes() -> None:
    checked = Checker(page(many(5)))
    assert checked.all("html")[0]["lang"] == "en"
    assert all(attrs.get("alt") for attrs in checked.all("img"))
    assert all(attrs.get("scope") == "col" for attrs in checked.all("th"))
    assert len(checked.all("caption")) == len(checked.all("table"))


@pytest.mark.parametrize("field", ["text", "input_id", "layer", "message"])
def test_texts_are_shown_and_never_run(field: str) -> None:
    html = page([replace(FULL, **{field: EVIL}, status="unsound"), EMPTY])  # type: ignore[arg-type]
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert len(Checker(html).all("script")) == 1


def test_tokens_are_shown_and_never_run() -> None:
    html = page([replace(FULL, tokens=("<b>", EVIL, "&"))])
    assert "<b>" not in html
    assert len(Checker(html).all("script")) == 1


def test_every_row_has_its_line() -> None:
    html = page(many(30))
    assert all(f">{row.input_id}</td>" in html for row in many(30))


def test_what_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnrobust.reports.page.MOST_ROWS", 4)
    monkeypatch.setattr("attnrobust.reports.page.MOST_SENTENCES", 3)
    html = page(many(10))
    assert "The first 4 rows; 6 more" in html
    assert "The 3 inputs with the smallest attack radius are shown, 7 more" in html


def test_a_message_of_every_row_is_told_once() -> None:
    rows = [replace(row, message="no certificate: it says why") for row in many(3)]
    assert page(rows).count("no certificate: it says why") == 1
    assert page([*rows, FULL]).count("no certificate: it says why") == 3


def test_rows_about_a_whole_model_show_depth_and_classes() -> None:
    rows = [whole(depth, 1.25, 0.0, label="yes", attack_label="no") for depth in ("embeddings", "block:1")]
    text = page(rows)
    for part in ("the tokens move at embeddings, block:1", "yes &rarr; no", "yes \N{RIGHTWARDS ARROW} no", "12.5%"):
        assert part in text
    assert [plot["name"] for plot in _plots(rows)] == ["depth-profile.png", "radius-by-layer.png"]


def test_unsound_rows_come_first() -> None:
    html = page([*many(3), replace(FULL, status="unsound", message="attack inside", attack_radius=0.05, gap=0.5)])
    assert "1 UNSOUND row." in html
    assert html.index("UNSOUND") < html.index('id="summary"')
    assert "UNSOUND" not in page(many(3))


def test_an_unfinished_run_says_so() -> None:
    data = ReportData(many(3), "t", "s", [], 10)
    assert "3 of 10" in render(data, [], source=Path("out"))


def test_rows_of_every_kind_make_a_page() -> None:
    odd = [
        EMPTY,
        replace(FULL, attack_radius=None, gap=None, status="not_found", token_moves=()),
        replace(FULL, certified_radius=0.0, attack_radius=0.0, gap=None, status="misclassified"),
        replace(FULL, certificates={}, certificate=None, certified_radius=None, gap=None),
        replace(FULL, tolerance=None, margin=2.0, text=None, tokens=(), token_moves=(0.1,)),
    ]
    for rows in (odd, [EMPTY], []):
        Checker(page(rows))


def test_missing_numbers_sort_as_missing() -> None:
    assert 'data-sort="nan"' in page([EMPTY])


# ---- the heat map ----------------------------------------------------------------------------------------------------


def test_shares_are_of_the_squared_move() -> None:
    assert token_shares(replace(FULL, token_moves=(3.0, 4.0, 0.0))) == pytest.approx((0.36, 0.64, 0.0))
    assert token_shares(replace(FULL, token_moves=())) == ()
    assert token_shares(replace(FULL, token_moves=(0.0, 0.0, 0.0))) == ()


def test_strong_tokens_are_marked_without_colour_too() -> None:
    line = heat_line(replace(FULL, token_moves=(3.0, 4.0, 0.1)))
    assert line is not None
    assert [token.top for token in line.tokens] == [True, True, False]
    assert [token.text for token in line.strongest] == ["##ïve", "na"]
    assert line.tokens[1].strength == 1.0


def test_own_radii_of_tokens_come_before_the_move() -> None:
    row = replace(FULL, token_moves=(3.0, 4.0, 0.1), token_radii=(0.4, None, 0.2))
    line = heat_line(row)
    assert line is not None
    assert line.by_radius
    assert [token.strength for token in line.tokens] == [0.5, 0.0, 1.0]
    assert [token.top for token in line.tokens] == [True, False, True]
    assert [token.radius for token in line.strongest] == [0.2, 0.4]
    html = page([row])
    for words in ("Smallest radii of one token alone", "0.4 moving alone", "no radius found", "own attack radius"):
        assert words in html
    assert "of the move" not in html
    both = page([replace(row, token_certified=(0.10009, None, 0.3))])
    assert "0.1 to 0.4 moving alone" in both
    assert "no radius found moving alone" in both
    assert "--token-radii" in page([replace(row, token_radii=())])


def test_rows_without_strings_have_no_heat() -> None:
    assert heat_line(replace(FULL, tokens=())) is None
    assert heat_line(replace(FULL, token_moves=())) is None


def test_the_most_vulnerable_inputs_come_first() -> None:
    rows = [replace(FULL, input_id=name, attack_radius=radius) for name, radius in (("a", 0.5), ("b", 0.1), ("c", 0.3))]
    rows.append(replace(FULL, input_id="a", layer="other", attack_radius=0.05))
    shown, more = heat_map(rows, sentences=2)
    assert [sentence.input_id for sentence in shown] == ["a", "b"]
    assert [line.row.attack_radius for line in shown[0].lines] == [0.05, 0.5]
    assert more == 1


def test_words_can_be_read_on_every_colour() -> None:
    for step in range(101):
        colours = _colours(step / 100)
        light = {name: _luminance(tuple(bytes.fromhex(colour[1:]))) for name, colour in colours.items()}
        high, low = max(light.values()), min(light.values())
        assert (high + 0.05) / (low + 0.05) >= 4.5


# ---- plots -----------------------------------------------------------------------------------------------------------


def test_gap_of_each_method() -> None:
    gaps = gaps_by_method([FULL, replace(FULL, attack_radius=0.6), EMPTY])
    assert list(gaps) == ["b", "a"]
    assert gaps["b"] == pytest.approx([3.0, 6.0])
    assert gaps["a"] == pytest.approx([6.0, 12.0])


@pytest.mark.parametrize("plot", [scatter_plot, gap_boxes, radii_by_layer])
def test_plots_of_few_and_odd_rows(plot: object) -> None:
    assert callable(plot)
    for rows in ([], [EMPTY], [FULL], [FULL, EMPTY, replace(FULL, layer="b", certified_radius=0.0)], many(20)):
        assert png(*plot(rows)).startswith(PNG)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_run_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_files(tmp_path)
    run_all(configured(files), shard=NO_SHARD)
    assert run(["report", str(files / "out")]) == ExitCode.OK
    assert "report.html" in capsys.readouterr().err
    html = (files / "out" / "report.html").read_text(encoding="utf-8")
    for part in ("castin2024-derived", "displacement 1%", "attnrobust run run.yaml", "seed: 0", "torch: "):
        assert part in html
    assert {path.suffix for path in (files / "out").iterdir() if path.is_file()} >= {".html", ".png", ".json"}
    again = write_report(files / "out", out=files / "elsewhere")
    assert again[0] == files / "elsewhere" / "report.html"
    assert again[0].read_text(encoding="utf-8") == html


def test_a_report_of_one_command(tmp_path: Path) -> None:
    write_results(tmp_path, many(3), run={"model": "minilm", "seed": 3, "label": None}, job="j")
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "Robustness of attention layers (layer.0, layer.1, layer.2) of minilm" in html
    assert "seed: 3" in html
    assert "The command:" not in html


def test_a_report_says_what_makes_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the seed 0, which is no option that was left out."""
    write_layer(tmp_path, np.random.default_rng(0), x1=2)
    out = tmp_path / "my out"
    asked = ["compare", str(tmp_path / "layer.npz"), "--tokens", str(tmp_path / "x.npz"), "--out", str(out)]
    assert run(asked) == ExitCode.OK
    capsys.readouterr()
    html = unescape(write_report(out)[0].read_text(encoding="utf-8"))
    problem = read_parquet(out / "results.parquet")[0].problem
    for part in (shlex.join(["attnrobust", *asked]), "seed: 0", f"x1: {problem}", "torch: "):
        assert part in html


def test_no_results_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / JSON_NAME).write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="is damaged"):
        write_report(tmp_path)


# ---- a browser -------------------------------------------------------------------------------------------------------


def browse(page_file: Path, *arguments: str) -> str:
    browser = next(path for path in map(shutil.which, CHROMIUM) if path)
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        *arguments,
        page_file.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.chromium
def test_a_browser_sorts_and_searches(tmp_path: Path) -> None:
    rows = [replace(FULL, input_id=n, attack_radius=r) for n, r in (("aa", 0.2), ("bb", 10.0), ("cc", 0.9))]
    rows.append(replace(FULL, input_id="dd", attack_radius=None, gap=None, status="not_found"))
    act = """<script>
      var button = Array.prototype.find.call(document.querySelectorAll("#all button"), b => b.textContent === "attack");
      button.click(); var up = document.querySelector("#all tbody").innerText;
      button.click(); var down = document.querySelector("#all tbody").innerText;
      var box = document.getElementById("search"); box.value = "CC found"; box.dispatchEvent(new Event("input"));
      var order = text => (text.match(/aa|bb|cc|dd/g) || []).join("");
      document.title = "up=" + order(up) + ";down=" + order(down) + ";" + document.getElementById("count").textContent;
    </script></body>"""
    path = tmp_path / "page.html"
    path.write_text(page(rows).replace("</body>", act), encoding="utf-8")
    dom = browse(path, "--dump-dom")
    assert "<title>up=aaccbbdd;down=bbccaadd;1 of 4 rows</title>" in dom


@pytest.mark.chromium
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(page(many(12)), encoding="utf-8")
    browse(path, "--window-size=1200,1500", f"--screenshot={picture}")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (1500, 1200)
    ink = (pixels < 0.9).any(axis=-1)
    assert 0.01 < ink.mean() < 0.5
    assert ink[:, 1180:].mean() < 0.01  # nothing is cut off at the right
    browse(path, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


# ---- nothing is pooled -----------------------------------------------------------------------------------------------


def test_radii_of_different_threats_are_never_put_together() -> None:
    near = [replace(row, certified_radius=0.1, attack_radius=0.2, layer="one") for row in many(3)]
    far = [replace(row, certified_radius=100.0, attack_radius=200.0, threat="any-token") for row in near]
    names = [plot["name"] for plot in _plots([*near, *far])]
    assert names.count("gap-by-method-1.png") == names.count("gap-by-method-2.png") == 1
    html = page([*near, *far])
    assert "<h3>frobenius, displacement 10%</h3>" in html
    assert "<dd>0.1</dd>" in html
    assert "<dd>100</dd>" in html
    assert "<dd>50" not in html  # the median over both


def test_radii_of_different_layers_are_never_put_together() -> None:
    near = [replace(row, certified_radius=0.1, attack_radius=0.2, layer="near", gap=2.0) for row in many(3)]
    far = [replace(row, certified_radius=100.0, attack_radius=700.0, layer="far", gap=7.0) for row in many(3)]
    html = page([*near, *far])
    assert "median certified radius" not in html  # of one layer it is in a tile
    assert "median certified radius" in page(near)
    assert not re.search(r"<dd>(50|0\.1|100)", html)
    accuracy = next(plot["svg"] for plot in _plots([*near, *far]) if plot["name"] == "certified-accuracy.png")
    for name in ("near: certified", "near: not broken", "far: certified", "far: not broken"):
        assert f"<title>{name}</title>" in accuracy
    boxes = next(plot for plot in _plots([*near, *far]) if plot["name"] == "gap-by-method.png")
    assert boxes["caption"] == "Gap of the best certificate by layer."
    for plot in _plots([*near, *far]):
        assert all(f">{name}</text>" in plot["svg"] for name in ("near", "far")), plot["name"]


def test_special_tokens_can_be_hidden_and_the_colours_are_then_of_the_others() -> None:
    row = replace(FULL, tokens=("[CLS]", "na", "ive"), token_moves=(10.0, 2.0, 1.0))
    html = page([row])
    assert 'id="hide-special"' in html
    words = [a for _, a in Checker(html).seen if "word" in (a.get("class") or "").split()]
    assert ["special" in (a["class"] or "") for a in words] == [True, False, False]
    strongest, pale = _colours(1.0)["background"], _colours(0.04)["background"]
    assert f"--back: {strongest}" in (words[0]["style"] or "")
    assert f"--back: {pale}" in (words[1]["style"] or "")
    assert f"--back-alone: {strongest}" in (words[1]["style"] or "")
    assert 'id="hide-special"' not in page([replace(row, tokens=("un", "na", "ive"))])


def test_long_names_break_between_their_parts() -> None:
    data = ReportData([FULL], "Robustness of encoder.layer.2.attention of a/b_c", "s", [], 1)
    html = render(data, [], source=Path("out"))
    assert "<h1>Robustness of encoder.<wbr>layer.<wbr>2.<wbr>attention of a/<wbr>b_<wbr>c</h1>" in html
    assert "<script>" not in render(replace(data, title="<script>."), [], source=Path("out")).split("</h1>")[0]


def test_plots_are_drawn_inside_the_page_with_titles() -> None:
    checked = Checker(page(many(5)))
    assert len(checked.all("svg")) >= 3
    assert checked.all("img") == []
    identifiers = [attrs["id"] for _, attrs in checked.seen if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    html = page(many(5))
    assert "<title>0003-ab, layer.0: certified 0.1, attack 0.33" in html
    hostile = page([replace(FULL, input_id=EVIL, layer='"><script>')])
    assert len(Checker(hostile).all("script")) == 1
