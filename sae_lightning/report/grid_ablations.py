"""The page's sections on probing curves, M7's thresholds, layers, and families of SAEs."""

from __future__ import annotations

import math
import re

import pandas as pd

from sae_lightning.analysis.grid import METRICS
from sae_lightning.analysis.layers import layer_differences
from sae_lightning.analysis.rank_consistency import Consistency, rank_consistency
from sae_lightning.report.grid_figures import curves, limits_of, steps
from sae_lightning.report.grid_paper import PAPER, Paper
from sae_lightning.report.grid_runs import Grid
from sae_lightning.report.grid_section import EVALUATE, TRAIN, Picture, Section, some
from sae_lightning.report.grid_tables import Head, P, Table


def probing(grid: Grid, paper: Paper) -> Section:
    """Sparse-probing AUC over budgets, by expansion and by k [App. I, Fig. 6]."""
    title, rows = "Sparse-probing curves", grid.curves("sparse_probing_auc")
    rows = rows[rows["setting"].str.fullmatch(r"k=\d+")].dropna(subset=["value"])
    if rows.empty:
        return Section(title, missing=f"No run has sparse probing; `{EVALUATE}` makes it.")
    rows = rows.assign(budget=rows["setting"].str[2:].astype(int))
    limits = limits_of(rows["value"].to_numpy())
    pictures = []
    for name, sign, over in (("expansion", "×", "k"), ("k", "k = ", "expansions")):
        panels = {f"{sign}{level:g}": own for level, own in rows.groupby(name)}
        if panels:
            text = f"By the SAE’s {name}: mean over its {over}, the band from the least to the most."
            pictures.append(Picture(curves(panels, grid.colours, "AUC", limits), caption=text))
    means = rows.groupby(["title", "budget"])["value"].mean().unstack("budget").loc[grid.titles]
    heads = [Head("backbone"), *(Head(f"{budget}", ".3f", True, "mean AUC at k latents") for budget in means)]
    table = Table("probing", "Sparse-probing AUC by the number of latents, mean over settings", heads,
                  [[t, *means.loc[t]] for t in means.index])  # fmt: skip
    about = "Mean AUC over classes of probes that see k latents; dotted: k = 128, which is M4. [ViSAEBench Fig. 6]"
    return Section(title, (about,), tuple(pictures), (table,), keys=True)


def thresholds(grid: Grid, paper: Paper) -> Section:
    """Absorption rates over the thresholds α and β [App. N, Table 7]."""
    title, rows = "Thresholds of M7", grid.curves("absorption")
    found = rows["setting"].str.extract(r"alpha=([\d.]+),beta=([\d.]+)").astype(float)
    rows = rows.assign(alpha=found[0], beta=found[1]).dropna(subset=["alpha", "beta", "value"])
    if rows.empty:
        return Section(title, missing=f"No run has absorption; `{EVALUATE}` makes it.")
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
    return Section(title, (about, says), tables=(
        Table("thresholds", "Absorption rate by thresholds, mean over settings", heads, cells),))  # fmt: skip


def _lowest(row: dict[str, float]) -> list[str]:
    known = {name: round(value, 9) for name, value in row.items() if math.isfinite(value)}
    return [name for name, value in known.items() if value == min(known.values())]


def layers(grid: Grid, paper: Paper) -> Section:
    """Differences of metrics between an early and a late layer [App. D, Fig. 4]."""
    title = "Layers"
    found = layer_differences(grid.frame)
    if found.empty:
        return Section(title, missing="No backbone has runs on two layers that differ by nothing else: "
                       f"`{TRAIN.replace('grid', 'layers')}` adds an early one; evaluate them.")  # fmt: skip
    found = found.assign(title=found["backbone"].map(grid.names))
    same = found["early_layer"].nunique() == found["late_layer"].nunique() == 1
    ends = [f"layer {found[f'{end}_layer'].iloc[0]:g}" if same else f"{end} layer" for end in ("early", "late")]
    panels = {}
    for metric, own in found.groupby("metric", sort=False):
        frame = own.set_index("title")[["early", "late"]].T
        panels[METRICS[str(metric)].title] = frame.set_axis(ends, axis=0)
    return Section(
        title, ("Means over runs that differ by nothing but the layer. The paper compares layers 3 and 11 of CLIP, "
                "DINOv2 and SigLIP. [ViSAEBench App. D, Fig. 4]",),
        (Picture(steps(panels, grid.colours)),), (_layer_table(found),), keys=True,
    )  # fmt: skip


def _layer_table(found: pd.DataFrame) -> Table:
    """A line a metric, three columns a backbone."""
    overs = {t: f"{t}, layer {own['early_layer'].iloc[0]:g} → {own['late_layer'].iloc[0]:g}"
             for t, own in found.groupby("title", sort=False)}  # fmt: skip
    heads = [Head("metric"), *(Head(name, over=over, sign=name == "difference") for over in overs.values()
                               for name in ("early", "late", "difference"))]  # fmt: skip
    by = found.set_index(["metric", "title"])
    rows: list[list[object]] = []
    for metric in dict.fromkeys(found["metric"]):
        row: list[object] = [METRICS[metric].title]
        for title in overs:
            own = by.loc[(metric, title)] if (metric, title) in by.index else {}
            row += [own.get(name) for name in ("early", "late", "difference")]
        rows.append(row)
    cells = found["cells"]
    note = f"{cells.min()} to {cells.max()}" if cells.min() < cells.max() else f"{cells.min()}"
    one_sign = [f"{r['metric']} {r['title']}" for _, r in found.iterrows() if r["consistent"]]
    note += f" matched runs each. Of one sign in all of them: {', '.join(one_sign) or 'none'}."
    return Table("layers", "M1–M7 of an early and a late layer", heads, rows, note)


def families(grid: Grid, paper: Paper) -> Section:
    """Whether another variant ranks the backbones alike [App. Q, Table 9]."""
    title, first = "Families of SAEs", str(grid.main["variant"].iloc[0])
    comparable = grid.comparable()
    others = [v for v in dict.fromkeys(comparable["variant"]) if v != first]
    if not others:
        return Section(title, missing=f"All runs are of {first}: train a second variant on the same backbones, "
                       f"`{TRAIN.replace('grid', 'jumprelu')}`, and evaluate it.")  # fmt: skip
    about, tables = ["Backbones from best to worst by their means, over runs whose L0 is within 2 of k. "
                     "[ViSAEBench App. Q, Table 9]"], []  # fmt: skip
    for second in others:
        found = rank_consistency(comparable, first, second)
        if len(found.dropped):
            left = [f"{run} ({why})" for run, why in zip(found.dropped["run"], found.dropped["reason"], strict=True)]
            about.append(f"Left out with {second}: {some(left, 4)}.")
        tables += [_table_9(grid, found, first, second, paper), *_differences(grid, found, first, second)]
    return Section(title, tuple(about), tables=tuple(tables))


def _table_9(grid: Grid, found: Consistency, first: str, second: str, paper: Paper) -> Table:
    theirs = paper.ranks() if (first, second) == ("batchtopk", "jumprelu") else {}
    heads = [Head("metric"), Head(first, over=grid.here), Head(second, over=grid.here),
             Head("ρ", ".2f", over=grid.here, sign=True), Head("exact p", P, over=grid.here),
             Head("p of t", P, over=grid.here),
             *([Head(first, over=PAPER), Head(second, over=PAPER), Head("ρ", ".2f", over=PAPER, sign=True),
                Head("p as printed", P, over=PAPER)] if theirs else [])]  # fmt: skip
    rows = []
    for _, r in found.metrics.iterrows():
        own = [METRICS[r["metric"]].title, *(_ranking(grid, r[side]) for side in ("first", "second")), r["rho"],
               r["p"], r["p_t"]]  # fmt: skip
        printed = theirs.get(r["metric"], {})
        rows.append([*own, *(printed.get(c) for c in ("batchtopk", "jumprelu", "rho", "p") if theirs)])
    return Table(f"ranks-{_slug(second)}", f"Rankings of backbones by {first} and by {second}", heads, rows)


def _ranking(grid: Grid, names: tuple[str, ...]) -> str:
    return ", ".join(grid.names[name].removesuffix(" (tiny)") for name in names) or "–"


def _differences(grid: Grid, found: Consistency, first: str, second: str) -> list[Table]:
    rows = found.differences
    if rows.empty:
        return []
    of = [name for name in grid.names if name in set(rows["backbone"])]
    wide = rows.pivot(index="metric", columns="backbone", values="difference")
    overall = rows[rows["backbone"] == "all"].set_index("metric")
    heads = [Head("metric"), Head("all", sign=True), *(Head(grid.names[name], sign=True) for name in of),
             Head("same sign for all"), Head("matched cells", ".0f")]  # fmt: skip
    lines = [
        ["dead share" if m == "dead_share" else METRICS[str(m)].title, r["difference"], *(wide.at[m, b] for b in of),
         "yes" if r["consistent"] else "no", r["cells"]]
        for m, r in overall.iterrows()
    ]  # fmt: skip
    return [Table(f"differences-{_slug(second)}", f"{second} minus {first} at the same expansion and k", heads, lines)]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
