"""Figures of the page over a grid: profiles, scatters, stacked bars, curves and differences, as inline SVG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from sae_lightning.rendering.figures import COLOURS, HEADLINE_K, NULL, budget_axis, figure, limits_of, panels
from sae_lightning.rendering.table import number

ORDER = ("dinov2", "clip", "siglip", "mae", "deit")  # of the paper; others follow, and take the next colours

MARKS = "osD^vPX"  # of expansions, the smallest first

SHARES = {  # of a metric's variance: title and colour of each factor
    "backbone": ("backbone", "#1b6ca8"), "hp": ("expansion × k", "#e08e1b"), "residual": ("residual", "#c9cdd6"),
}  # fmt: skip


def colours(frame: pd.DataFrame) -> dict[str, str]:
    """Colours by title of a grid's backbones: the paper's in its order, each in a colour of its own, then others."""
    titles = dict(zip(frame["backbone"], frame["title"], strict=True))
    order = [*ORDER, *sorted(set(titles) - set(ORDER))]
    return {titles[name]: COLOURS[i % len(COLOURS)] for i, name in enumerate(order) if name in titles}


def normalised(means: pd.DataFrame, better: Mapping[str, bool]) -> pd.DataFrame:
    """Means [backbone, metric], each metric from 0 at the worst backbone to 1 at the best [Fig. 1a].

    NaN where a metric does not differ between backbones, or is not known.
    """
    signed = means * pd.Series({m: 1.0 if better[m] else -1.0 for m in means.columns})
    width = signed.max() - signed.min()
    return (signed - signed.min()) / width.where(width > 0)


def profile(scores: pd.DataFrame, titles: Sequence[str], of: Mapping[str, str]) -> str:
    """Normalised scores [backbone, metric], one line a backbone over the metrics' ``titles``."""
    with figure(8.2, 3.0) as drawing:
        axis = drawing.axis
        for title, row in scores.iterrows():
            axis.plot(range(len(row)), row.to_numpy(), "o-", ms=5, lw=1.5, color=of[str(title)], alpha=0.9)
        axis.set_xticks(range(len(titles)), [title.replace(" ", "\n", 1) for title in titles])
        axis.set_ylim(-0.06, 1.06)
        axis.set_yticks((0, 0.5, 1), ("worst", "", "best"))
        axis.tick_params(length=0)
    return drawing.svg


def scatter(frame: pd.DataFrame, x: str, y: str, labels: tuple[str, str], of: Mapping[str, str]) -> str:
    """One mark a run: colour its backbone, shape its expansion, size its k; large rings are backbones' means."""
    expansions, ks = sorted(frame["expansion"].unique()), sorted(frame["k"].dropna().unique())

    with figure(5.4, 3.6) as drawing:
        axis = drawing.axis
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
    return drawing.svg


def shares(parts: Mapping[str, Mapping[str, float]], paper: Mapping[str, Mapping[str, float]]) -> str:
    """η² of a metric's factors as stacked bars, ``parts`` by metric's title; thin and paler below, the paper's."""
    with figure(6.4, 0.7 + 0.47 * len(parts)) as drawing:
        axis = drawing.axis
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
    return drawing.svg


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
    with panels(list(tasks), 2.8, 2.0) as drawing:
        for axis, rho in zip(drawing.axes.flat, tasks.values(), strict=False):
            for x, name in enumerate(names):
                value = rho.get(name, math.nan)
                if not math.isfinite(value):
                    axis.text(x, 0.04, "–", ha="center", color="#888")
                    continue
                axis.bar(x, value, 0.68, color=COLOURS[0] if value > 0 else COLOURS[1])
                place = value + math.copysign(0.05, value) if value else 0.05
                axis.text(x, place, f"{value:.1f}", ha="center", va="bottom" if value >= 0 else "top", fontsize=7)
            axis.axhline(0, color="#888", lw=0.8)
            axis.set_xticks(range(len(names)), names)
            axis.tick_params(axis="x", length=0)
            axis.grid(False, axis="x")
            axis.set_ylim(-1.25, 1.25)
            axis.set_yticks((-1, 0, 1))
    return drawing.svg


def curves(frames: Mapping[str, pd.DataFrame], of: Mapping[str, str], ylabel: str, limits: tuple[float, float]) -> str:
    """Lines over budgets, a panel for each frame [title, budget, value]: means a backbone, bands from least to most."""
    size = (11 / min(4, len(frames)) if len(frames) > 2 else 3.5, 2.5 if len(frames) < 5 else 2.4)
    with panels(list(frames), *size, sharey=True) as drawing:
        axes = drawing.axes
        for axis, frame in zip(axes.flat, frames.values(), strict=False):
            axis.axvline(HEADLINE_K, color=NULL, lw=0.8, ls=":")
            for title, own in frame.groupby("title"):
                by = own.groupby("budget")["value"]
                axis.plot(by.mean().index, by.mean(), color=of[str(title)], lw=1.4)
                axis.fill_between(by.min().index, by.min(), by.max(), color=of[str(title)], alpha=0.15, lw=0)
            budget_axis(axis, sorted(frame["budget"].unique()))
            axis.tick_params(axis="x", labelsize=7)
            axis.set_ylim(limits)
        for axis in axes[:, 0]:
            axis.set_ylabel(ylabel)
        for axis in axes[-1]:
            axis.set_xlabel("latents k of the probe")
    return drawing.svg


def lifts(frames: Mapping[str, pd.DataFrame], of: Mapping[str, str]) -> str:
    """Lift against raw score, one mark a backbone, a panel a task: frames with title, raw, lift and lift_std."""
    with panels(list(frames), 2.75, 2.3) as drawing:
        for axis, frame in zip(drawing.axes.flat, frames.values(), strict=False):
            for _, row in frame.iterrows():
                axis.errorbar(row["raw"], row["lift"], row["lift_std"], fmt="o", ms=6, lw=1, color=of[row["title"]])
            axis.axhline(1, color=NULL, lw=1, ls=":")
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.set_xlabel("raw features")
        drawing.axis.set_ylabel("codes / raw")
    return drawing.svg


def steps(frames: Mapping[str, pd.DataFrame], of: Mapping[str, str]) -> str:
    """Means at two or more layers, joined, a panel a metric: frames [layer, title] [Fig. 4]."""
    with panels(list(frames), 2.75, 2.1) as drawing:
        for axis, frame in zip(drawing.axes.flat, frames.values(), strict=False):
            for title in frame.columns:
                axis.plot(range(len(frame)), frame[title], "o-", color=of[str(title)], ms=5, lw=1.5)
            axis.set_xticks(range(len(frame)), list(map(str, frame.index)))
            axis.set_xlim(-0.35, len(frame) - 0.65)
    return drawing.svg


DIVERGING, SEQUENTIAL = "RdBu_r", "YlGnBu"

TEAL, PURPLE, BLUE = ("#d9efec", "#2f7f76"), ("#e6e0f3", "#6b4fa0"), ("#dde9f6", "#1b6ca8")  # fill and edge


def correlation_map(rho: pd.DataFrame, marked: Sequence[tuple[str, str]] = ()) -> str:
    """ρ [metric, task] from -1 to 1 with its numbers; ``marked`` pairs are framed [Fig. 2b]."""
    with figure(1.9 + 0.98 * rho.shape[1], 0.7 + 0.42 * rho.shape[0]) as drawing:
        axis = drawing.axis
        _cells(axis, rho.to_numpy(float), (-1.0, 1.0), DIVERGING, "+.2f", 9)
        axis.set_xticks(range(rho.shape[1]), [textwrap.fill(str(task), 14) for task in rho.columns])
        axis.set_yticks(range(rho.shape[0]), [str(metric) for metric in rho.index])
        for metric, task in marked:
            if metric in rho.index and task in rho.columns:
                x, y = list(rho.columns).index(task), list(rho.index).index(metric)
                axis.add_patch(matplotlib.patches.Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, lw=1.8,
                                                            ec="#222"))  # fmt: skip
    return drawing.svg


def setting_maps(maps: Mapping[str, pd.DataFrame], form: str, better: bool) -> str:
    """One metric over k (rows) and expansion (columns), a map a backbone, on one scale; dark is better.

    All maps have the rows of the first; ``setting_frames`` makes them so.
    """
    limits = limits_of(np.concatenate([frame.to_numpy(float).ravel() for frame in maps.values()]), 0.0)
    rows = list(next(iter(maps.values())).index)

    with figure(max(4.4, 2.2 * len(maps)), 0.75 + 0.27 * len(rows)) as drawing:
        axis = drawing.axis
        left = 0.0
        ticks: dict[float, str] = {}
        for name, frame in maps.items():
            _cells(axis, frame.to_numpy(float), limits, SEQUENTIAL if better else f"{SEQUENTIAL}_r", form, 7.5, left)
            axis.text(left - 0.5, -0.62, name, fontsize=8.5, va="bottom")
            ticks |= {left + i: f"×{expansion:g}" for i, expansion in enumerate(frame.columns)}
            left += frame.shape[1] + 0.4
        axis.set_xlim(-0.5, left - 0.9)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.set_yticks(range(len(rows)), [f"{k:g}" for k in rows])
        axis.set_ylabel("k", rotation=0)
    return drawing.svg


def setting_frames(runs: pd.DataFrame, metric: str, titles: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Means of a metric over seeds by title: [k descending, expansion], of the same k and expansions for all."""
    known = runs.dropna(subset=["k", metric])
    ks, expansions = sorted(known["k"].unique(), reverse=True), sorted(known["expansion"].unique())
    return {
        t: own.pivot_table(metric, "k", "expansion").reindex(index=ks, columns=expansions)
        for t in titles if len(own := known[known["title"] == t])
    }  # fmt: skip


def _cells(
    axis: Any, values: np.ndarray, limits: tuple[float, float], cmap: str, form: str, size: float, left: float = 0.0
) -> None:
    """Coloured cells with their numbers, the first column at x = ``left``."""
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


@dataclass(frozen=True)
class Route:
    """A column of the flowchart: a ``task``, the ``backbone`` to take, the ``metric`` that says so, and a ``note``."""

    task: str
    backbone: str
    metric: str
    note: str = ""


def flowchart(routes: Sequence[Route], start: str) -> str:
    """From ``start`` to a column for each route: task (teal), backbone (purple), metric (blue) [Fig. 8]."""
    width, gap = 2.5, 0.25
    whole = len(routes) * (width + gap) - gap

    with figure(whole, 4.6) as drawing:
        axis = drawing.axis
        _box(axis, whole / 2, 4.3, 3.4, 0.5, start, ("#fff", "#667"), 10)
        for i, route in enumerate(routes):
            x = i * (width + gap) + width / 2
            axis.plot([whole / 2, whole / 2, x, x], [4.05, 3.87, 3.87, 3.7], color="#99a", lw=1, zorder=0)
            axis.plot([x, x], [3.3, 1.2], color="#99a", lw=1, zorder=0)
            _box(axis, x, 3.35, width, 0.7, route.task, TEAL, 9.5)
            _box(axis, x, 2.25, width, 0.85, route.backbone, PURPLE, 9.5)
            _box(axis, x, 1.15, width, 0.85, route.metric, BLUE, 9)
            axis.text(x, 0.6, textwrap.fill(route.note, 36), ha="center", va="top", fontsize=8, color="#667")
        axis.set_xlim(-0.05, whole + 0.05)
        axis.set_ylim(0, 4.6)
        axis.set_axis_off()
    return drawing.svg


def _box(axis: Any, x: float, y: float, w: float, h: float, text: str, look: tuple[str, str], size: float) -> None:
    axis.add_patch(FancyBboxPatch((x - w / 2 + 0.06, y - h / 2 + 0.06), w - 0.12, h - 0.12, lw=1.2, fc=look[0],
                                  ec=look[1], boxstyle="round,pad=0.04,rounding_size=0.08"))  # fmt: skip
    lines = [textwrap.fill(line, int(w * 13.5)) for line in text.splitlines()]
    axis.text(x, y, "\n".join(lines), ha="center", va="center", fontsize=size, color="#1d2129")
