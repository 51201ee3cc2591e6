"""Figures of how MonoScores are spread over a run's latents [MonoLoss §4.1, App. D]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sae_lightning.benchmark.latents import LATENTS, read_tensors
from sae_lightning.report.figures import COLOURS, STYLE, svg
from sae_lightning.report.pairs import Arm, Group

POINTS = 201  # of a curve, so that a page of many runs stays small
WITHOUT = "#8a8f99"


def profile(scores: np.ndarray, points: int = POINTS) -> np.ndarray:
    """MonoScores [d_sae] sorted descending, read at ``points`` even places of the normalised index 0 … 1."""
    ordered = np.sort(scores)[::-1]
    return np.interp(np.linspace(0, 1, points), np.linspace(0, 1, len(ordered)), ordered)


def monoscores(folder: Path) -> np.ndarray:
    """MonoScore of each latent of an evaluated run, [d_sae]; 0 where there is none."""
    return read_tensors(folder / LATENTS)[0]["monoscore"].numpy()


def profiles(runs: Sequence[Mapping[str, Any]]) -> str:
    """Scores over the normalised latent index, their distribution, and their mean against R², for every run; SVG.

    Dotted is the mean similarity of all pairs of images, the score of a latent that is equally active on all of them.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1), layout="constrained")
        left, right, last = figure.subplots(1, 3)
        baselines = {round(run["similarity"]["baseline"], 4) for run in runs}
        edges = _edges(runs)
        for run in runs:
            scores = monoscores(run["folder"])
            left.plot(np.linspace(0, 1, POINTS), profile(scores), color=run["colour"], lw=1.4)
            share = np.histogram(scores, edges)[0] / len(scores)
            right.stairs(share, edges, color=run["colour"], lw=1.2)
            last.scatter(run["metrics"]["r2"], run["metrics"]["monoscore"], s=34, color=run["colour"])
            if len(baselines) > 1:
                _baseline(left, run["similarity"]["baseline"], run["colour"])
        if len(baselines) == 1:
            _baseline(left, baselines.pop(), "#444")
        _frame(left)
        right.set_xlabel("MonoScore (0: also those without)")
        right.set_ylabel("share of latents")
        right.set_ylim(bottom=0)
        last.set_xlabel("R²")
        last.xaxis.set_major_locator(MaxNLocator(5))
        last.set_ylabel("mean MonoScore")
        return svg(figure)


def group_profile(group: Group) -> str:
    """The curves of one group: grey without MonoLoss, coloured with it; the mean over seeds and their range; SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        axis = figure.subplots()
        _curve(axis, group.without, WITHOUT, "without")
        for i, arm in enumerate(group.with_loss):
            _curve(axis, arm, COLOURS[i % len(COLOURS)], group.label(arm))
        first = next(iter(group.without.runs.values()))
        _baseline(axis, first["similarity"]["baseline"], "#444")
        _frame(axis)
        axis.legend(frameon=False, fontsize=8)
        return svg(figure)


def _curve(axis: Axes, arm: Arm, colour: str, label: str) -> None:
    curves = np.stack([profile(monoscores(run["folder"])) for run in arm.runs.values()])
    x = np.linspace(0, 1, POINTS)
    axis.plot(x, curves.mean(0), color=colour, lw=1.6, label=label)
    if len(curves) > 1:
        axis.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)


def _baseline(axis: Axes, value: float, colour: str) -> None:
    axis.axhline(value, color=colour, lw=1.1, ls=":")


def _frame(axis: Axes) -> None:
    axis.set_xlabel("latents, highest first (share of d_sae)")
    axis.set_ylabel("MonoScore")
    axis.set_xlim(0, 1)
    low, high = axis.get_ylim()
    axis.set_ylim(min(0.0, low), max(high, 0.05))


def _edges(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Bins of width 0.02 over all runs' scores."""
    found = [monoscores(run["folder"]) for run in runs]
    low = min(0.0, *(float(scores.min()) for scores in found))
    high = max(0.02, *(float(scores.max()) for scores in found))
    return np.arange(np.floor(low / 0.02), np.ceil(high / 0.02 + 1e-9) + 1) * 0.02
