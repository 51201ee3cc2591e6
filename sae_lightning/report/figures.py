"""The report's figures as inline SVG."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

PANELS = {
    "train/explained_variance": "explained variance",
    "train/l0": "L0",
    "train/dead_share": "dead share",
    "loss/reconstruction": "reconstruction loss",
}
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5fbf", "#e08e1b", "#4a4e69", "#00a5a5", "#a0522d")
STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.edgecolor": "#888", "svg.fonttype": "none", "font.family": "sans-serif",
}  # fmt: skip


def history(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of every column of ``history.csv``; empty when there is none."""
    path = run / "history.csv"
    curves: dict[str, tuple[list[float], list[float]]] = {}
    if not path.is_file():
        return curves
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for column, cell in row.items():
                if cell and column not in ("step", "epoch"):
                    steps, values = curves.setdefault(column, ([], []))
                    steps.append(float(row["step"]))
                    values.append(float(cell))
    return curves


def training_curves(runs: list[dict[str, Any]]) -> str:
    """Small multiples of the training curves, one line a run, SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.7), layout="constrained")
        axes = figure.subplots(1, len(PANELS))
        for i, run in enumerate(runs):
            curves = history(run["folder"])
            for axis, column in zip(axes, PANELS, strict=True):
                if column in curves:
                    axis.plot(*curves[column], color=COLOURS[i % len(COLOURS)], lw=1.2, label=run["label"])
        for axis, title in zip(axes, PANELS.values(), strict=True):
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_xlabel("step")
        axes[0].set_ylim(top=1.0)
        axes[1].set_ylim(0, 1.15 * axes[1].get_ylim()[1])
        axes[2].set_ylim(0, max(0.05, axes[2].get_ylim()[1]))
        return svg(figure)


def tradeoff(runs: list[dict[str, Any]]) -> str:
    """Explained variance against L0, one mark a run, SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axis = figure.subplots()
        for i, run in enumerate(runs):
            m = run["metrics"]
            axis.scatter(m["l0"], m["explained_variance"], s=34, color=COLOURS[i % len(COLOURS)])
        axis.set_xlim(0, 1.15 * max(run["metrics"]["l0"] for run in runs))
        axis.set_xlabel("L0 (active latents a token)")
        axis.set_ylabel("explained variance (test)")
        return svg(figure)


def svg(figure: Figure) -> str:
    """The figure as an inline SVG element, without a date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
