"""Figures of the page over a grid: profiles, scatters, stacked bars, curves and differences, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sae_lightning.report.figures import COLOURS, STYLE, svg
from sae_lightning.report.visaebench_figures import HEADLINE_K, NULL, budget_axis

ORDER = ("dinov2", "clip", "siglip", "mae", "deit")  # of the paper; others follow, and take the next colours
MARKS = "osD^vPX"  # of expansions, the smallest first
SHARES = {  # of a metric's variance: title and colour of each factor
    "backbone": ("backbone", "#1b6ca8"), "hp": ("expansion × k", "#e08e1b"), "residual": ("residual", "#c9cdd6"),
}  # fmt: skip
Draw = Callable[[Any], None]


def colours(frame: pd.DataFrame) -> dict[str, str]:
    """Colours by title of a grid's backbones: the paper's in its order, each in a colour of its own, then others."""
    titles = dict(zip(frame["backbone"], frame["title"], strict=True))
    order = [*ORDER, *sorted(set(titles) - set(ORDER))]
    return {titles[name]: COLOURS[i % len(COLOURS)] for i, name in enumerate(order) if name in titles}


def drawn(draw: Draw, width: float, height: float, rows: int = 1, columns: int = 1, **subplots: Any) -> str:
    """A figure whose axes [rows, columns] ``draw`` fills, one pair of axes given as such; SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **subplots)
        draw(axes[0, 0] if rows == columns == 1 else axes)
        return svg(figure)


def normalised(means: pd.DataFrame, better: Mapping[str, bool]) -> pd.DataFrame:
    """Means [backbone, metric], each metric from 0 at the worst backbone to 1 at the best [Fig. 1a].

    NaN where a metric does not differ between backbones, or is not known.
    """
    signed = means * pd.Series({m: 1.0 if better[m] else -1.0 for m in means.columns})
    width = signed.max() - signed.min()
    return (signed - signed.min()) / width.where(width > 0)


def profile(scores: pd.DataFrame, titles: Sequence[str], of: Mapping[str, str]) -> str:
    """Normalised scores [backbone, metric], one line a backbone over the metrics' ``titles``."""

    def draw(axis: Any) -> None:
        for title, row in scores.iterrows():
            axis.plot(range(len(row)), row.to_numpy(), "o-", ms=5, lw=1.5, color=of[str(title)], alpha=0.9)
        axis.set_xticks(range(len(titles)), [title.replace(" ", "\n", 1) for title in titles])
        axis.set_ylim(-0.06, 1.06)
        axis.set_yticks((0, 0.5, 1), ("worst", "", "best"))
        axis.tick_params(length=0)

    return drawn(draw, 8.2, 3.0)


def scatter(frame: pd.DataFrame, x: str, y: str, labels: tuple[str, str], of: Mapping[str, str]) -> str:
    """One mark a run: colour its backbone, shape its expansion, size its k; large rings are backbones' means."""
    expansions, ks = sorted(frame["expansion"].unique()), sorted(frame["k"].dropna().unique())

    def draw(axis: Any) -> None:
        for _, row in frame.iterrows():
            size = 18 + (26 * ks.index(row["k"]) / max(1, len(ks) - 1) if row["k"] in ks else 0)
            mark = MARKS[expansions.index(row["expansion"]) % len(MARKS)]
            axis.scatter(row[x], row[y], s=size, marker=mark, color=of[row["title"]], alpha=0.6, lw=0)
        for title, mean in frame.groupby("title")[[x, y]].mean().iterrows():
            axis.scatter(mean[x], mean[y], s=150, facecolor="none", edgecolor=of[str(title)], lw=1.8)
        axis.axhline(1, color=NULL, lw=1, ls=":")
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.set_xlabel(labels[0])
        axis.set_ylabel(labels[1])
        if len(expansions) > 1:
            handles = [Line2D([], [], ls="", marker=MARKS[i % len(MARKS)], color="#666", label=f"×{e:g}")
                       for i, e in enumerate(expansions)]  # fmt: skip
            axis.legend(handles=handles, frameon=False, fontsize=8, loc="lower left")

    return drawn(draw, 5.4, 3.6)


def shares(parts: Mapping[str, Mapping[str, float]], paper: Mapping[str, Mapping[str, float]]) -> str:
    """η² of a metric's factors as stacked bars, ``parts`` by metric's title; thin and paler below, the paper's."""

    def draw(axis: Any) -> None:
        for y, (title, own) in enumerate(list(parts.items())[::-1]):
            _stack(axis, own, y + (0.12 if title in paper else 0), 0.42, 1.0)
            if title in paper:
                _stack(axis, paper[title], y - 0.27, 0.2, 0.5)
        axis.set_yticks(range(len(parts)), list(parts)[::-1])
        axis.tick_params(axis="y", length=0)
        axis.grid(False, axis="y")
        axis.set_xlim(0, 1)
        axis.set_ylim(-0.55, len(parts) - 0.4)
        axis.set_xlabel("share of the variance, η²")

    return drawn(draw, 6.4, 0.7 + 0.47 * len(parts))


def _stack(axis: Any, own: Mapping[str, float], y: float, height: float, alpha: float) -> None:
    left = 0.0
    for name, (_, colour) in SHARES.items():
        width = own.get(name, math.nan)
        if not math.isfinite(width):
            continue
        axis.barh(y, width, height, left=left, color=colour, alpha=alpha, lw=0)
        if width > 0.07 and height > 0.3:
            ink = "#222" if name == "residual" else "#fff"
            axis.text(left + width / 2, y, f"{width:.2f}", ha="center", va="center", color=ink, fontsize=8)
        left += width


def correlations(tasks: Mapping[str, pd.Series], names: Sequence[str]) -> str:
    """Spearman's ρ of each metric in ``names`` with each of the tasks, a panel a task [Fig. 7]."""
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)

    def draw(axes: Any) -> None:
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        for axis, (title, rho) in zip(axes.flat, tasks.items(), strict=False):
            for x, name in enumerate(names):
                value = rho.get(name, math.nan)
                if not math.isfinite(value):
                    axis.text(x, 0.04, "–", ha="center", color="#888")
                    continue
                axis.bar(x, value, 0.68, color=COLOURS[0] if value > 0 else COLOURS[1])
                place = value + math.copysign(0.05, value) if value else 0.05
                axis.text(x, place, f"{value:.1f}", ha="center", va="bottom" if value >= 0 else "top", fontsize=7)
            axis.set_title(title, loc="left", fontsize=9)
            axis.axhline(0, color="#888", lw=0.8)
            axis.set_xticks(range(len(names)), names)
            axis.tick_params(axis="x", length=0)
            axis.grid(False, axis="x")
            axis.set_ylim(-1.25, 1.25)
            axis.set_yticks((-1, 0, 1))

    # one axis more where there is a single task, so that ``draw`` always gets an array
    return drawn(draw, max(4.0, 2.8 * columns), 2.0 * rows, rows, max(2, columns))


def curves(panels: Mapping[str, pd.DataFrame], of: Mapping[str, str], ylabel: str, limits: tuple[float, float]) -> str:
    """Lines over budgets, a panel for each frame [title, budget, value]: means a backbone, bands from least to most."""

    def draw(axes: Any) -> None:
        for axis, (name, frame) in zip(axes.flat, panels.items(), strict=False):
            axis.axvline(HEADLINE_K, color=NULL, lw=0.8, ls=":")
            for title, own in frame.groupby("title"):
                by = own.groupby("budget")["value"]
                axis.plot(by.mean().index, by.mean(), color=of[str(title)], lw=1.4)
                axis.fill_between(by.min().index, by.min(), by.max(), color=of[str(title)], alpha=0.15, lw=0)
            budget_axis(axis, sorted(frame["budget"].unique()))
            axis.tick_params(axis="x", labelsize=7)
            axis.set_title(name, loc="left", fontsize=9)
            axis.set_ylim(limits)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel(ylabel)
        for axis in axes[-1]:
            axis.set_xlabel("latents k of the probe")

    columns = max(2, min(4, len(panels)))
    rows = math.ceil(len(panels) / columns)
    return drawn(draw, 11 if columns > 2 else 7, 2.3 * rows + 0.2, rows, columns, sharey=True)


def lifts(panels: Mapping[str, pd.DataFrame], of: Mapping[str, str]) -> str:
    """Lift against raw score, one mark a backbone, a panel a task: frames with title, raw, lift and lift_std."""

    def draw(axes: Any) -> None:
        for axis, (name, frame) in zip(axes.flat, panels.items(), strict=False):
            for _, row in frame.iterrows():
                axis.errorbar(row["raw"], row["lift"], row["lift_std"], fmt="o", ms=6, lw=1, color=of[row["title"]])
            axis.axhline(1, color=NULL, lw=1, ls=":")
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.set_xlabel("raw features")
            axis.set_title(name, loc="left", fontsize=9)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        axes[0, 0].set_ylabel("codes / raw")

    columns = max(2, min(4, len(panels)))
    rows = math.ceil(len(panels) / columns)
    return drawn(draw, 2.75 * columns, 2.3 * rows, rows, columns)


def steps(panels: Mapping[str, pd.DataFrame], of: Mapping[str, str]) -> str:
    """Means at two or more layers, joined, a panel a metric: frames [layer, title] [Fig. 4]."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(axes: Any) -> None:
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (name, frame) in zip(axes.flat, panels.items(), strict=False):
            for title in frame.columns:
                axis.plot(range(len(frame)), frame[title], "o-", color=of[str(title)], ms=5, lw=1.5)
            axis.set_xticks(range(len(frame)), list(map(str, frame.index)))
            axis.set_xlim(-0.35, len(frame) - 0.65)
            axis.set_title(name, loc="left", fontsize=9)

    return drawn(draw, 2.75 * max(2, columns), 2.1 * rows, rows, max(2, columns))


def limits_of(values: Sequence[float] | np.ndarray, margin: float = 0.04) -> tuple[float, float]:
    """The range of finite values, a little wider; (0, 1) where there is none."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return 0.0, 1.0
    space = margin * max(float(known.max() - known.min()), 1e-3)
    return float(known.min()) - space, float(known.max()) + space
