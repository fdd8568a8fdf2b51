"""Figures of curves: both formats, the same bytes for the same figure, and nothing to draw."""

from attnrobust.reports.curves import Curve, Panel, curve_figure


def test_both_formats_and_the_same_bytes() -> None:
    curve = Curve(label="a line", x=[1.0, 10.0], y=[2.0, 3.0], low=[1.0, 2.0], high=[3.0, 4.0])
    panels = [Panel(title="t & <u>", x="x", y="y", curves=[curve]), Panel(title="empty", x="x", y="y", curves=[])]
    first, second = (curve_figure(panels, title="a figure") for _ in range(2))
    assert set(first) == {"png", "svg"}
    assert first == second
    assert first["png"].startswith(b"\x89PNG")
    assert b"a line" in first["svg"]
