"""Figures of curves: both formats, the same bytes for the same figure, and nothing to draw."""

import pytest

from attnrobust.reports.curves import Curve, Panel, _draw, curve_figure


def test_both_formats_and_the_same_bytes() -> None:
    curve = Curve(label="a line", x=[1.0, 10.0], y=[2.0, 3.0], low=[1.0, 2.0], high=[3.0, 4.0])
    panels = [Panel(title="t & <u>", x="x", y="y", curves=[curve]), Panel(title="empty", x="x", y="y", curves=[])]
    first, second = (curve_figure(panels, title="a figure") for _ in range(2))
    assert set(first) == {"png", "svg"}
    assert first == second
    assert first["png"].startswith(b"\x89PNG")
    assert b"a line" in first["svg"]


def test_the_legend_hides_no_curve() -> None:
    """It lies below the axis, inside of the figure."""
    figures = pytest.importorskip("matplotlib.figure")
    curves = [Curve(label=f"line {k}", x=[1.0, 10.0], y=[1.0 + k, 2.0 + k]) for k in range(4)]
    figure = figures.Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.subplots()
    _draw(axes, Panel(title="t", x="x", y="y", curves=curves))
    figure.draw_without_rendering()
    legend = axes.get_legend().get_window_extent()
    assert figure.bbox.y0 <= legend.y0
    assert legend.y1 < axes.xaxis.label.get_window_extent().y0
