"""What was run, profiles and means of backbones, and every setting: the sections that show M1–M7 as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from sae_lightning.analysis.grid import KIND, METRICS, ORDER, Grid, missing_cells, section
from sae_lightning.analysis.paper import PAPER, Paper, spelled
from sae_lightning.rendering.figures import figure, limits_of, numbered
from sae_lightning.rendering.page import EVALUATE, TRAIN, Block, Picture, lacking, plural, some
from sae_lightning.rendering.table import Head, Spread, Table


@section("What was run")
def what_was_run(grid: Grid, paper: Paper) -> Block:
    """Scale, data, settings and seeds, a line a backbone, with the paper's; what lacks."""
    main, absent = grid.main, _lacking(grid)
    heads = [Head("backbone"), Head("data"), Head("features"), Head("layer"), Head("d_in", ".0f"), Head("expansion"),
             Head("k"), Head("seeds"), Head("runs", ".0f"), Head("missing", ".0f")]  # fmt: skip
    rows: list[list[object]] = []
    for title in grid.titles:
        own = main[main["title"] == title]
        layer = own["layer"].iloc[0]
        rows.append([
            title, own["data"].iloc[0], own["features"].iloc[0], "" if math.isnan(layer) else f"{layer:g}",
            own["d_in"].iloc[0], *(_levels(own[name]) for name in ("expansion", "k", "seed")), len(own),
            sum(name == title for name, _ in absent),
        ])  # fmt: skip
    rows.append(["paper: 5 × ViT-B", "ImageNet-1K", "patch", "11", 768, "8, 16, 32", "64, 128, 192, 256", "42", 60, 0])
    return [_about(grid, absent), Table("runs", "Runs", heads, rows)]


def _lacking(grid: Grid) -> list[tuple[str, str]]:
    """Backbones and configurations without a run that has a score of M1–M7."""
    scored = grid.main[grid.main[list(METRICS)].notna().any(axis=1)]
    return [(grid.names[backbone], setting) for backbone, setting in missing_cells(scored)]


def _about(grid: Grid, absent: list[tuple[str, str]]) -> tuple[str, ...]:
    main, rest = grid.main, grid.frame[~grid.frame["run"].isin(grid.main["run"])]
    first = main.iloc[0]
    kind = f"{first['variant']}" + (f" with MonoLoss {first['monoloss']:g}" if first["monoloss"] else "")
    factors = {
        "title": ("backbone", ""),
        "expansion": ("expansion", ""),
        "k": ("k", "values of k"),
        "seed": ("seed", ""),
    }
    spelled = " × ".join(plural(n, *words) for name, words in factors.items() if (n := main[name].nunique()))
    says = [f"{plural(len(main), 'run')} of {kind}: {spelled}, scored on the {grid.split} images."]
    if absent:
        cells = [" ".join(cell) for cell in absent]
        count = f"{len(cells)} cells lack" if len(cells) > 1 else "One cell lacks"
        says.append(f"{count} a run with scores: {some(cells)}. `{TRAIN}` and `{EVALUATE}` make them.")
    partial = [f"{m} ({int(main[m].isna().sum())})" for m in METRICS if main[m].isna().any()]
    if partial:
        says.append(f"Runs that lack a metric: {', '.join(partial)}; `{EVALUATE}` fills them in.")
    if len(rest):
        same = (rest[list(KIND)] == first[list(KIND)]).all(axis=1)
        others = rest.assign(other=same & (rest.get("recipe") != first.get("recipe")))
        others = others.groupby([*KIND, "other", "layer"], dropna=False).size()
        said = [f"{n} of {variant}" + (f" with MonoLoss {weight:g}" if weight else "")
                + (f" on layer {layer:g}" if layer == layer else "") + ("" if data == first["data"] else f" on {data}")
                + (" with other settings" if other else "")
                for (data, _, variant, weight, other, layer), n in others.items()]  # fmt: skip
        says.append(f"Beside them {len(rest)} runs which only comparisons of layers and variants use: {some(said)}.")
    if grid.tiny:
        says.append("Backbones marked (tiny) are small stand-ins trained on CIFAR-10 with the published models’ "
                    "paradigms. The paper’s figures are those of published ViT-B on ImageNet-1K: they are shown to "
                    "compare patterns, never values.")  # fmt: skip
    return tuple(says)


def _levels(values: pd.Series) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values.dropna().unique()))


def normalised(means: pd.DataFrame, better: Mapping[str, bool]) -> pd.DataFrame:
    """Means [backbone, metric], each metric from 0 at the worst backbone to 1 at the best [Fig. 1a].

    NaN where a metric does not differ between backbones, or is not known.
    """
    signed = means * pd.Series({m: 1.0 if better[m] else -1.0 for m in means.columns})
    width = signed.max() - signed.min()
    return (signed - signed.min()) / width.where(width > 0)


@section("Profiles of backbones")
def profiles(grid: Grid, paper: Paper) -> Block:
    """Normalised scores of backbones [Fig. 1a], with the scores table beside."""
    means = grid.means(list(METRICS)).dropna(axis=1, how="all")
    if len(means) < 2:
        return lacking(f"A profile compares backbones; here is one. `{TRAIN}` trains five.")
    scores = normalised(means, {m: METRICS[m].better for m in means})
    firsts = {t: [str(m) for m in scores if scores[m].max() == scores.at[t, m]] for t in scores.index}
    lasts = {t: [str(m) for m in scores if scores[m].min() == scores.at[t, m]] for t in scores.index}
    rows = [[t, *scores.loc[t], ", ".join(firsts[t]) or "–", ", ".join(lasts[t]) or "–"] for t in scores.index]
    heads = [Head("backbone"), *(Head(str(m), ".2f") for m in scores), Head("first in"), Head("last in")]
    with figure(8.2, 3.0) as drawing:
        axis = drawing.axis
        for title, row in scores.iterrows():
            axis.plot(range(len(row)), row.to_numpy(), "o-", ms=5, lw=1.5, color=grid.colours[str(title)], alpha=0.9)
        names = [METRICS[str(m)].title.replace(" ", "\n", 1) for m in scores]
        axis.set_xticks(range(len(names)), names)
        axis.set_ylim(-0.06, 1.06)
        axis.set_yticks((0, 0.5, 1), ("worst", "", "best"))
        axis.tick_params(length=0)
    return [
        "Means over all settings, each metric from the worst backbone (0) to the best (1); FVU and absorption count "
        "downwards. [ViSAEBench Fig. 1a]",
        Picture(drawing.svg), grid.key,
        Table("profiles", "Normalised scores of backbones", heads, rows),
    ]  # fmt: skip


@section("Means of backbones")
def means_table(grid: Grid, paper: Paper) -> Block:
    """Mean and standard deviation of M1–M7 over each backbone's settings."""
    names = [m for m in METRICS if grid.main[m].notna().any()]
    heads = [Head("backbone"), *(Head(METRICS[m].title, better=METRICS[m].better) for m in names), Head("L0", ".1f"),
             Head("dead", ".1%", better=False)]  # fmt: skip
    columns = [*names, "l0", "dead_share"]
    means, stds = grid.means(columns), grid.stds(columns)
    rows = []
    for t in grid.titles:
        spreads = {c: Spread(means.at[t, c], stds.at[t, c]) for c in columns}
        rows.append([t, *(spreads[m] for m in names), spreads["l0"].mean, spreads["dead_share"]])
    about = "Mean ± standard deviation over a backbone’s settings; an arrow shows the better direction."
    return [
        about,
        Table("means", "M1–M7 by backbone, mean and standard deviation over settings", heads, rows),
        _printed_means(paper),
    ]  # fmt: skip


def _printed_means(paper: Paper) -> list[Table]:
    """The means that the paper's text gives; it has no table of them."""
    found = {key: value for key, value in paper.means().items() if key[1] in METRICS}
    names = [m for m in METRICS if any(metric == m for _, metric in found)]
    heads = [Head("backbone"), *(Head(METRICS[m].title) for m in names)]
    rows = [[spelled(b), *(found.get((b, m)) for m in names)] for b in ORDER]
    note = "Only those that its text gives; M6 and its deviations are under Other data sets."
    return [Table("means-paper", f"Means of backbones, {PAPER}", heads, rows, note)] if found else []


def setting_frames(runs: pd.DataFrame, metric: str, titles: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Means of a metric over seeds by title: [k descending, expansion], of the same k and expansions for all."""
    known = runs.dropna(subset=["k", metric])
    ks, expansions = sorted(known["k"].unique(), reverse=True), sorted(known["expansion"].unique())
    return {
        t: own.pivot_table(metric, "k", "expansion").reindex(index=ks, columns=expansions)
        for t in titles if len(own := known[known["title"] == t])
    }  # fmt: skip


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
            numbered(axis, frame.to_numpy(float), limits, "YlGnBu" if better else "YlGnBu_r", form, 7.5, left)
            axis.text(left - 0.5, -0.62, name, fontsize=8.5, va="bottom")
            ticks |= {left + i: f"×{expansion:g}" for i, expansion in enumerate(frame.columns)}
            left += frame.shape[1] + 0.4
        axis.set_xlim(-0.5, left - 0.9)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.set_yticks(range(len(rows)), [f"{k:g}" for k in rows])
        axis.set_ylabel("k", rotation=0)
    return drawing.svg


@section("Every setting")
def settings(grid: Grid, paper: Paper) -> Block:
    """Heat maps of each metric over expansion and k, a map a backbone."""
    main = grid.main.dropna(subset=["k"])
    if main.empty or (main["k"].nunique() < 2 and main["expansion"].nunique() < 2):
        return lacking(f"All runs have one expansion and one k; `{TRAIN}` trains twelve settings.")
    pictures = []
    for name, (title, better) in METRICS.items():
        if maps := setting_frames(main, name, grid.titles):
            pictures.append(Picture(setting_maps(maps, ".3f", better), title))
    return ["Means over seeds; one scale a metric, dark is better.", pictures]
