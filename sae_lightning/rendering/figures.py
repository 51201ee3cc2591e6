"""The report's figures as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5fbf", "#e08e1b", "#4a4e69", "#00a5a5", "#a0522d")

STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.edgecolor": "#888", "svg.fonttype": "none", "font.family": "sans-serif",
}  # fmt: skip


def svg(figure: Figure) -> str:
    """The figure as an inline SVG element, without a date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


OTHERS, NULL = "#b9bec8", "#444"

HEADLINE_K = 128


def panel(draw: Callable[[Axes], None], width: float = 3.7, height: float = 2.5, title: str = "") -> str:
    """A small figure of one pair of axes, SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        draw(axis)
        axis.set_title(title, loc="left", fontsize=9)
        return svg(figure)


def budget_axis(axis: Axes, budgets: Sequence[float]) -> None:
    """A log2 axis with every other of ``budgets`` named."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(budgets[::2]))
    axis.xaxis.set_minor_locator(FixedLocator([]))
    axis.set_xticklabels([f"{budget:g}" for budget in budgets[::2]])


Draw = Callable[[Any], None]


def drawn(draw: Draw, width: float, height: float, rows: int = 1, columns: int = 1, **subplots: Any) -> str:
    """A figure whose axes [rows, columns] ``draw`` fills, one pair of axes given as such; SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **subplots)
        draw(axes[0, 0] if rows == columns == 1 else axes)
        return svg(figure)


def limits_of(values: Sequence[float] | np.ndarray, margin: float = 0.04) -> tuple[float, float]:
    """The range of finite values, a little wider; (0, 1) where there is none."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return 0.0, 1.0
    space = margin * max(float(known.max() - known.min()), 1e-3)
    return float(known.min()) - space, float(known.max()) + space
