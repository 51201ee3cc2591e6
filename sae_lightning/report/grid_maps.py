"""Heat maps of the page over a grid: correlations, metrics over expansion and k, and the flowchart; inline SVG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.patches import FancyBboxPatch

from sae_lightning.report.grid_figures import drawn, limits_of
from sae_lightning.report.visaebench_tables import number

DIVERGING, SEQUENTIAL = "RdBu_r", "YlGnBu"
TEAL, PURPLE, BLUE = ("#d9efec", "#2f7f76"), ("#e6e0f3", "#6b4fa0"), ("#dde9f6", "#1b6ca8")  # fill and edge


def correlation_map(rho: pd.DataFrame, marked: Sequence[tuple[str, str]] = ()) -> str:
    """ρ [metric, task] from -1 to 1 with its numbers; ``marked`` pairs are framed [Fig. 2b]."""

    def draw(axis: Any) -> None:
        _cells(axis, rho.to_numpy(float), (-1.0, 1.0), DIVERGING, "+.2f", 9)
        axis.set_xticks(range(rho.shape[1]), [textwrap.fill(str(task), 14) for task in rho.columns])
        axis.set_yticks(range(rho.shape[0]), [str(metric) for metric in rho.index])
        for metric, task in marked:
            if metric in rho.index and task in rho.columns:
                x, y = list(rho.columns).index(task), list(rho.index).index(metric)
                axis.add_patch(matplotlib.patches.Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, lw=1.8,
                                                            ec="#222"))  # fmt: skip

    return drawn(draw, 1.9 + 0.98 * rho.shape[1], 0.7 + 0.42 * rho.shape[0])


def setting_maps(maps: Mapping[str, pd.DataFrame], form: str, better: bool) -> str:
    """One metric over k (rows) and expansion (columns), a map a backbone, on one scale; dark is better.

    All maps have the rows of the first; ``setting_frames`` makes them so.
    """
    limits = limits_of(np.concatenate([frame.to_numpy(float).ravel() for frame in maps.values()]), 0.0)
    rows = list(next(iter(maps.values())).index)

    def draw(axis: Any) -> None:
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

    return drawn(draw, max(4.4, 2.2 * len(maps)), 0.75 + 0.27 * len(rows))


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

    def draw(axis: Any) -> None:
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

    return drawn(draw, whole, 4.6)


def _box(axis: Any, x: float, y: float, w: float, h: float, text: str, look: tuple[str, str], size: float) -> None:
    axis.add_patch(FancyBboxPatch((x - w / 2 + 0.06, y - h / 2 + 0.06), w - 0.12, h - 0.12, lw=1.2, fc=look[0],
                                  ec=look[1], boxstyle="round,pad=0.04,rounding_size=0.08"))  # fmt: skip
    lines = [textwrap.fill(line, int(w * 13.5)) for line in text.splitlines()]
    axis.text(x, y, "\n".join(lines), ha="center", va="center", fontsize=size, color="#1d2129")
