"""Figures of the page on stability, inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_lightning.apps.stability.pairs import ACTIVATION, RELATIONS
from sae_lightning.report.figures import COLOURS, STYLE, svg

NULL, CLASSES = "#9aa0ac", "#e08e1b"
TITLES = {
    "seed": "other seed", "expansion": "larger dictionary", "settings": "other settings",
    "expansion, same start": "larger, same start", "settings, same start": "other settings, same start",
    "backbone": "other backbone",
}  # fmt: skip
COLOUR = dict(zip(RELATIONS, COLOURS, strict=False))
PANELS = 3  # of the distributions beside each other
NUMBERED = 16  # runs up to which a cell of the map has its number


def run_map(names: Sequence[str], labels: Sequence[str], pairs: pd.DataFrame) -> str:
    """Runs × runs: held-out correlation of matched latents above the diagonal, what class means give below."""
    n = len(names)
    at = {name: i for i, name in enumerate(names)}
    values = np.full((n, n), np.nan)
    for row in pairs[pairs["kind"] == ACTIVATION].to_dict("records"):
        i, j = sorted((at[row["run_a"]], at[row["run_b"]]))
        values[i, j], values[j, i] = row["held_out_mean"], row.get("classes_mean", np.nan)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(max(7.5, 2.6 + 0.52 * n), 0.9 + 0.36 * n) if n <= NUMBERED else (11, 8), layout="constrained"
        )
        axis = figure.subplots()
        top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
        image = axis.imshow(values, cmap="YlGnBu", vmin=0, vmax=max(top, 1e-3), aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if n <= NUMBERED and np.isfinite(value):
                ink = "#fff" if value > 0.6 * top else "#1d2129"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
        axis.set_xticks(range(n), [str(i + 1) for i in range(n)])
        axis.set_yticks(range(n), [f"{i + 1}  {label}" for i, label in enumerate(labels)])
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        figure.colorbar(image, ax=axis, shrink=0.8, label="mean correlation")
        return svg(figure)


def distributions(matches: pd.DataFrame) -> str:
    """How alike partners are: cosines by relation beside a random dictionary's, correlations beside their nulls."""
    decoder, activation = (matches[matches["kind"] == kind] for kind in ("decoder", ACTIVATION))
    panels: list[tuple[str, dict[str, tuple[np.ndarray, str]], str]] = []
    for how, of in decoder.groupby("relation", sort=False):
        drawn = {"partners": (of["similarity"].to_numpy(), COLOUR[str(how)]),
                 "random dictionary": (of["null"].dropna().to_numpy(), NULL)}  # fmt: skip
        if "start" in of and of["start"].notna().any():
            drawn["untrained start"] = (of["start"].dropna().to_numpy(), CLASSES)
        panels.append((TITLES[str(how)], drawn, "decoder cosine"))
    of = activation[activation["relation"] == "backbone"]
    if len(of):
        drawn = {"partners": (of["similarity"].to_numpy(), COLOUR["backbone"]),
                 "on shuffled images": (of["null"].dropna().to_numpy(), NULL)}  # fmt: skip
        panels.append((f"{TITLES['backbone']}: as matched", drawn, "correlation"))
        drawn = {"partners": (of["held_out"].to_numpy(), COLOUR["backbone"])}
        if "classes" in of and of["classes"].notna().any():
            drawn["class means alone"] = (of["classes"].dropna().to_numpy(), CLASSES)
        panels.append((f"{TITLES['backbone']}: held out", drawn, "correlation"))
    with matplotlib.rc_context(STYLE):
        rows = -(-len(panels) // PANELS)
        figure = Figure(figsize=(11, 2.6 * rows), layout="constrained")
        axes = figure.subplots(rows, min(PANELS, max(2, len(panels))), squeeze=False).ravel()
        for axis, (title, drawn, label) in zip(axes, panels, strict=False):
            _histogram(axis, drawn)
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_xlabel(label)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        return svg(figure)


def _histogram(axis: Axes, drawn: Mapping[str, tuple[np.ndarray, str]]) -> None:
    lowest = min((float(values.min()) for values, _ in drawn.values() if len(values)), default=0.0)
    bins = np.linspace(min(0.0, lowest), 1, 41).tolist()
    for name, (values, colour) in drawn.items():
        if len(values):
            weights = np.full(len(values), 1 / len(values))
            axis.hist(values, bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.22)
            axis.hist(values, bins, weights=weights, histtype="step", color=colour, lw=1.3, label=name)
    axis.set_ylabel("share of latents")
    axis.legend(frameon=False, fontsize=8)


def frequency(matches: pd.DataFrame) -> str:
    """Mean similarity of partners over how often a latent fires, each relation with its null dashed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        decoder = matches[(matches["kind"] == "decoder") & (matches["firing_a"] > 0)]
        activation = matches[(matches["kind"] == ACTIVATION) & (matches["firing_a"] > 0)]
        for axis, table, column, null in (
            (left, decoder, "similarity", "null"), (right, activation, "held_out", "classes"),
        ):  # fmt: skip
            for how, of in table.groupby("relation", sort=False):
                _curve(axis, of, column, COLOUR[str(how)], TITLES[str(how)], "-")
                if null in of:
                    _curve(axis, of, null, COLOUR[str(how)], None, "--")
            axis.set_xscale("log")
            axis.set_xlabel("share of images that the latent fires on")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=8)
        left.set_title("decoder cosine (dashed: random dictionary)", loc="left", fontsize=9)
        right.set_title("held-out correlation (dashed: class means alone)", loc="left", fontsize=9)
        left.set_visible(len(decoder) > 0)
        return svg(figure)


def _curve(axis: Axes, of: pd.DataFrame, column: str, colour: str, label: str | None, line: str) -> None:
    """Means over ten groups of latents of rising firing rate."""
    known = of.dropna(subset=[column])
    if len(known) < 20:
        return
    group = pd.qcut(known["firing_a"], 10, duplicates="drop")
    means = known.groupby(group, observed=True)[["firing_a", column]].mean()
    axis.plot(means["firing_a"], means[column], line, marker="o" if line == "-" else None, ms=3, lw=1.3, color=colour,
              label=label)  # fmt: skip


def beyond_class(tables: Mapping[str, pd.DataFrame]) -> str:
    """Universal latents' held-out correlations against what class means alone give; "" where there are no classes."""
    drawn: dict[str, Any] = {name: table for name, table in tables.items() if table["classes"].notna().all()}
    if not drawn:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axis = figure.subplots()
        for colour, (name, table) in zip(COLOURS, drawn.items(), strict=False):
            axis.scatter(table["classes"], table["held_out"], s=22, color=colour, alpha=0.8, label=name)
        top = 1.05 * max(float(table[["classes", "held_out"]].max().max()) for table in drawn.values())
        axis.plot([0, top], [0, top], color=NULL, lw=1, ls="--")
        axis.set_xlabel("class means alone")
        axis.set_ylabel("held-out correlation, lowest pair")
        axis.legend(frameon=False, fontsize=8)
        return svg(figure)
