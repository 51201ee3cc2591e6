"""The page's sections on the backbones' own channels and on other data sets."""

from __future__ import annotations

import math

from sae_lightning.analysis.grid import tasks
from sae_lightning.report.grid_paper import PAPER, Paper, spelled
from sae_lightning.report.grid_runs import Grid
from sae_lightning.report.grid_section import EVALUATE, Section
from sae_lightning.report.grid_tables import Head, Spread, Table


def raw_moran(grid: Grid, paper: Paper) -> Section:
    """Moran's I of the channels of a backbone, and how much of it its SAEs keep [App. G, Table 4]."""
    title, rows = "Spatial order of the features themselves", grid.curves("channel_moran")
    if rows["value"].notna().sum() == 0:
        return Section(title, missing=f"No run has Moran's I of its features' channels; `{EVALUATE}` makes it.")
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
    return Section(title, (about,), tables=(Table("raw-moran", "Moran’s I of channels and of latents", heads, lines),))


def cross_domain(grid: Grid, paper: Paper) -> Section:
    """Probes on other data sets, by raw features and reconstructions, and M6 [App. M, Table 6]."""
    title = "Other data sets"
    sets = [task.partition(":")[2] for task in tasks(grid.main) if task.startswith("accuracy:")]
    if not sets:
        return Section(title, missing=f"No run has probes on another data set; `{EVALUATE}` makes them.")
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
    tables = [Table("cross-domain", "Accuracy of probes on other data sets, mean ± standard deviation over settings",
                    heads, rows)]  # fmt: skip
    return Section(
        title, ("Preservation is the accuracy of probes of reconstructions over that of probes of raw features; M6 is "
                "its mean over data sets. [ViSAEBench App. M, Table 6]",),
        tables=(*tables, *_printed(paper)),
    )  # fmt: skip


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
