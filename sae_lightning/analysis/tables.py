"""Sections that show scores as they are: probing curves, M7's thresholds, channels' Moran's I, other data sets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from sae_lightning.analysis.grid import Grid, section, tasks
from sae_lightning.analysis.paper import PAPER, Paper, spelled
from sae_lightning.analysis.variance import PARTS, SHARES, variance
from sae_lightning.rendering.figures import HEADLINE_K, NULL, budget_axis, limits_of, panels
from sae_lightning.rendering.page import EVALUATE, Block, Picture, lacking
from sae_lightning.rendering.table import Head, Spread, Table


def _curves(frames: Mapping[str, pd.DataFrame], of: Mapping[str, str], ylabel: str, limits: tuple[float, float]) -> str:
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


@section("Sparse-probing curves")
def probing(grid: Grid, paper: Paper) -> Block:
    """Accuracy of sparse probes over budgets, by expansion and by k [App. I, Fig. 6]."""
    rows = grid.curves("sparse_probing_accuracy")
    rows = rows[rows["setting"].str.fullmatch(r"k=\d+")].dropna(subset=["value"])
    if rows.empty:
        return lacking(f"No run has sparse probing; `{EVALUATE}` makes it.")
    rows = rows.assign(budget=rows["setting"].str[2:].astype(int))
    limits = limits_of(rows["value"].to_numpy())
    pictures = []
    for name, sign, over in (("expansion", "×", "k"), ("k", "k = ", "expansions")):
        frames = {f"{sign}{level:g}": own for level, own in rows.groupby(name)}
        if frames:
            text = f"By the SAE’s {name}: mean over its {over}, the band from the least to the most."
            pictures.append(Picture(_curves(frames, grid.colours, "accuracy", limits), caption=text))
    means = rows.groupby(["title", "budget"])["value"].mean().unstack("budget").loc[grid.titles]
    heads = [Head("backbone"), *(Head(f"{budget}", ".3f", True, "accuracy at k latents") for budget in means)]
    table = Table("probing", "Sparse-probing accuracy by the number of latents, mean over settings", heads,
                  [[t, *means.loc[t]] for t in means.index])  # fmt: skip
    about = "Accuracy of probes that see k latents; M4 is the area under it up to k = 128, dotted. [ViSAEBench Fig. 6]"
    return [about, pictures, grid.key, table]


@section("Thresholds of M7")
def thresholds(grid: Grid, paper: Paper) -> Block:
    """Absorption rates over the thresholds α and β [App. N, Table 7]."""
    rows = grid.curves("absorption")
    found = rows["setting"].str.extract(r"alpha=([\d.]+),beta=([\d.]+)").astype(float)
    rows = rows.assign(alpha=found[0], beta=found[1]).dropna(subset=["alpha", "beta", "value"])
    if rows.empty:
        return lacking(f"No run has absorption; `{EVALUATE}` makes it.")
    means = rows.groupby(["alpha", "beta", "title"])["value"].mean().unstack("title")[grid.titles]
    printed = paper.thresholds()
    names = list(next(iter(printed.values()))) if printed else []
    heads = [Head("α", ".1f"), Head("β", ".1f"), *(Head(t, over=grid.here) for t in means),
             Head("lowest", over=grid.here), *(Head(name, over=PAPER) for name in names),
             *([Head("lowest", over=PAPER)] if names else [])]  # fmt: skip
    cells, lowest = [], []
    for (alpha, beta), row in means.iterrows():
        theirs = printed.get((alpha, beta), {})
        lowest.append(_lowest(row.to_dict()))
        own = [*row, ", ".join(lowest[-1]), *(theirs.get(name) for name in names)]
        cells.append([f"{alpha:g}", f"{beta:g}", *own, *([", ".join(_lowest(theirs))] if names else [])])
    counts = {t: sum(t in each for each in lowest) for t in means}
    most = max(counts, key=lambda t: counts[t])
    says = f"{most} has the lowest absorption, ties included, in {counts[most]} of {len(lowest)} settings"
    says += "; in the paper it is DeiT in 7 of 9." if printed else "."
    about = "Absorption is the share of tasks with F1(1 latent) < α and F1(4 latents) > β. [ViSAEBench App. N, Table 7]"
    table = Table("thresholds", "Absorption rate by thresholds, mean over settings", heads, cells)
    return [about, says, table]


def _lowest(row: dict[str, float]) -> list[str]:
    known = {name: round(value, 9) for name, value in row.items() if math.isfinite(value)}
    return [name for name, value in known.items() if value == min(known.values())]


@section("Spatial order of the features themselves")
def raw_moran(grid: Grid, paper: Paper) -> Block:
    """Moran's I of the channels of a backbone, and how much of it its SAEs keep [App. G, Table 4]."""
    rows = grid.curves("channel_moran")
    if rows["value"].notna().sum() == 0:
        return lacking(f"No run has Moran's I of its features' channels; `{EVALUATE}` makes it.")
    own, m1 = rows.groupby("title")["value"].mean(), grid.means(["M1"])["M1"]
    nulls = grid.curves("channel_moran_null").groupby("title")["value"].mean()
    theirs, means = paper.raw_moran(), paper.means()
    names = ("channels", "M1", "M1 / channels")
    heads = [Head("backbone"), *(Head(name, over=grid.here) for name in ("null", *names)),
             *(Head(name, over=PAPER) for name in names if theirs)]  # fmt: skip
    short = {t: name for name, t in grid.names.items()}
    lines: list[list[object]] = []
    for t in grid.titles:
        raw, printed = own.get(t, math.nan), theirs.get(short[t], math.nan)
        line = [t, nulls.get(t), raw, m1[t], m1[t] / raw if raw > 0 else None]
        kept = means.get((short[t], "M1"), math.nan)
        lines.append([*line, *([printed, kept, kept / printed if printed > 0 else None] if theirs else [])])
    about = ("Moran’s I of the features’ own channels: whether spatial order, or its lack, is the backbone’s or the "
             "SAE’s. [ViSAEBench App. G, Table 4]")  # fmt: skip
    return [about, Table("raw-moran", "Moran’s I of channels and of latents", heads, lines)]


@section("Other data sets")
def cross_domain(grid: Grid, paper: Paper) -> Block:
    """Probes on other data sets, by raw features and reconstructions, and M6 [App. M, Table 6]."""
    sets = [task.partition(":")[2] for task in tasks(grid.main) if task.startswith("accuracy:")]
    if not sets:
        return lacking(f"No run has probes on another data set; `{EVALUATE}` makes them.")
    frame = grid.main.copy()
    for name in sets:
        frame[f"{name}/kept"] = frame[f"accuracy:{name}/reconstruction"] / frame[f"accuracy:{name}/raw"]
    columns = [c for name in sets for c in
               (f"accuracy:{name}/raw", f"accuracy:{name}/reconstruction", f"{name}/kept", f"probing:{name}/codes")
               if c in frame]  # fmt: skip
    means, stds = grid.means(columns, frame), grid.stds(columns, frame)
    heads = [Head("backbone")]
    for c in columns:
        kind = {"raw": "raw", "reconstruction": "reconstruction", "kept": "preservation", "codes": "AUC, k = 128"}
        over = c.partition("/")[0].rpartition(":")[2]
        heads.append(Head(kind[c.rpartition("/")[2]], better=True, over=over))
    rows = [
        [t, *(means.at[t, c] if c.endswith("/raw") else Spread(means.at[t, c], stds.at[t, c]) for c in columns)]
        for t in grid.titles
    ]  # fmt: skip
    return [
        "Preservation is the accuracy of probes of reconstructions over that of probes of raw features; M6 is "
        "that on iNaturalist, or where it is not there the mean over data sets. [ViSAEBench App. M, Table 6]",
        Table("cross-domain", "Accuracy of probes on other data sets, mean ± standard deviation over settings",
              heads, rows), _by_set(grid, frame, sets), _printed(paper),
    ]  # fmt: skip


def _by_set(grid: Grid, frame: pd.DataFrame, sets: list[str]) -> Table:
    """Shares of variance of preservation, and the ranking of backbones, on each data set and in the mean."""
    columns = {name: f"{name}/kept" for name in sets} | {"mean": "mean/kept"}
    frame = frame.assign(**{"mean/kept": frame[[columns[name] for name in sets]].mean(axis=1)})
    shares, means = variance(frame, of=list(columns.values())), grid.means(list(columns.values()), frame)
    heads = [Head("data set"), *(Head(title, over="η²") for title, _ in SHARES.values()), Head("backbones, best first")]
    rows = [
        [name, *(row[f"eta_{part}"] for part in PARTS), ", ".join(means[column].dropna().sort_values()[::-1].index)]
        for (name, column), (_, row) in zip(columns.items(), shares.iterrows(), strict=True)
    ]
    return Table("cross-domain-sets", "Preservation on each data set: shares of variance, and backbones", heads, rows)


def _printed(paper: Paper) -> list[Table]:
    theirs = paper.cross_domain()
    sets = list(dict.fromkeys(data for _, data in theirs))
    heads = [Head("backbone"), *(Head(name, over=data) for data in sets
                                 for name in ("raw", "reconstruction", "preservation"))]  # fmt: skip
    rows: list[list[object]] = []
    for backbone in dict.fromkeys(name for name, _ in theirs):
        row: list[object] = [spelled(backbone)]
        for data in sets:
            of = theirs[backbone, data]
            row += [of["raw"], *(Spread(of[c], of[f"{c}_std"]) for c in ("reconstruction", "preservation"))]
        rows.append(row)
    return [Table("cross-domain-paper", f"The same, {PAPER}", heads, rows)] if theirs else []
