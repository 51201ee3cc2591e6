"""Figures of the pages as inline SVG: their style, and ``with figure(…)``, which draws one."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from sae_lightning.rendering.table import number

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5fbf", "#e08e1b", "#4a4e69", "#00a5a5", "#a0522d")

OTHERS, NULL = "#b9bec8", "#444"  # of what is not spoken of, and of what chance gives

STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.edgecolor": "#888", "svg.fonttype": "none", "font.family": "sans-serif",
}  # fmt: skip

HEADLINE_K = 128


def svg(made: Figure) -> str:
    """A figure as an inline SVG element, without a date."""
    buffer = io.StringIO()
    made.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


@dataclass
class Drawing:
    """A figure's ``axes`` [rows, columns]; when it is finished, its inline ``svg``."""

    axes: Any
    svg: str = ""

    @property
    def axis(self) -> Any:
        """The first of its axes."""
        return self.axes[0, 0]


@contextmanager
def figure(width: float, height: float, rows: int = 1, columns: int = 1, title: str = "", **subplots: Any
           ) -> Iterator[Drawing]:  # fmt: skip
    """A figure, inches, to be drawn on within ``with``; what it gives has the ``svg`` behind it.

    ``title`` is that of the first axes; ``subplots`` are options of matplotlib's function.
    """
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        drawing = Drawing(made.subplots(rows, columns, squeeze=False, **subplots))
        if title:
            drawing.axis.set_title(title, loc="left", fontsize=9)
        yield drawing
        drawing.svg = svg(made)


@contextmanager
def panels(titles: Sequence[str], width: float, height: float, **subplots: Any) -> Iterator[Drawing]:
    """A figure with axes for each of ``titles``, of ``width`` and ``height`` inches each, two to four a row."""
    columns = max(2, min(4, len(titles)))
    rows = math.ceil(len(titles) / columns)
    with figure(width * columns, height * rows, rows, columns, **subplots) as drawing:
        for axis, title in zip(drawing.axes.flat, titles, strict=False):
            axis.set_title(title, loc="left", fontsize=9)
        for axis in drawing.axes.flat[len(titles) :]:
            axis.set_visible(False)
        yield drawing


def budget_axis(axis: Any, budgets: Sequence[float]) -> None:
    """A log2 axis with every other of ``budgets`` named."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(budgets[::2]))
    axis.xaxis.set_minor_locator(FixedLocator([]))
    axis.set_xticklabels([f"{budget:g}" for budget in budgets[::2]])


def limits_of(values: Sequence[float] | np.ndarray, margin: float = 0.04) -> tuple[float, float]:
    """The range of finite values, a little wider; (0, 1) where there is none."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return 0.0, 1.0
    space = margin * max(float(known.max() - known.min()), 1e-3)
    return float(known.min()) - space, float(known.max()) + space


def numbered(
    axis: Any, values: np.ndarray, limits: tuple[float, float], cmap: str, form: str, size: float, left: float = 0.0
) -> None:
    """Cells of a matrix in colours between ``limits``, with their numbers; the first column is at x = ``left``."""
    low, high = limits
    rows, columns = values.shape
    extent = (left - 0.5, left + columns - 0.5, rows - 0.5, -0.5)
    image = axis.imshow(values, vmin=low, vmax=high if high > low else low + 1, cmap=cmap, aspect="auto", extent=extent)
    for (r, c), value in np.ndenumerate(values):
        if math.isfinite(value):
            red, green, blue, _ = image.to_rgba(value)
            ink = "#fff" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "#1d2129"
        else:
            ink = "#888"
        axis.text(left + c, r, number(value, form), ha="center", va="center", fontsize=size, color=ink)
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
