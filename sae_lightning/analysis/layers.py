"""What changes between SAEs of an early and a late layer of the same backbone [ViSAEBench App. D, Fig. 4]."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sae_lightning.analysis.grid import CONFIGURATION, FAMILY, METRICS, Grid, one_sign, section
from sae_lightning.analysis.paper import Paper
from sae_lightning.rendering.figures import panels
from sae_lightning.rendering.page import TRAIN, Block, Picture, lacking
from sae_lightning.rendering.table import Head, Table

MATCH = [*FAMILY, "backbone", *CONFIGURATION, "seed"]

COLUMNS = ["backbone", "metric", "early_layer", "late_layer", "early", "late", "difference", "cells", "consistent"]


def layer_differences(
    table: pd.DataFrame, early: float | None = None, late: float | None = None, of: Sequence[str] = tuple(METRICS)
) -> pd.DataFrame:
    """One row a backbone and metric over runs that differ only by layer; no rows where there are none.

    Columns: ``backbone``, ``metric``, ``early_layer``, ``late_layer``, means ``early`` and ``late`` over the matched
    runs, their ``difference`` (late minus early), the number of matched ``cells``, and whether the difference is
    ``consistent``, of one sign in all of them. The layers are each backbone's first and last unless given.
    """
    rows = []
    for backbone, runs in table.dropna(subset="layer").groupby("backbone", sort=False):
        first = runs["layer"].min() if early is None else early
        last = runs["layer"].max() if late is None else late
        if first == last:
            continue
        sides = [runs.loc[runs["layer"] == layer, [*MATCH, *of]] for layer in (first, last)]
        pairs = sides[0].merge(sides[1], on=MATCH, suffixes=("/early", "/late"))
        for metric in of:
            values = pairs[[f"{metric}/early", f"{metric}/late"]].dropna()
            if len(values):
                a, b = values.mean()
                change = values.iloc[:, 1] - values.iloc[:, 0]
                rows.append((backbone, metric, first, last, a, b, b - a, len(values), one_sign(change)))
    return pd.DataFrame(rows, columns=COLUMNS)


@section("Layers")
def layers(grid: Grid, paper: Paper) -> Block:
    """Differences of metrics between an early and a late layer [App. D, Fig. 4]."""
    found = layer_differences(grid.frame)
    if found.empty:
        return lacking("No backbone has runs on two layers that differ by nothing else: "
                       f"`{TRAIN.replace('grid', 'layers')}` adds an early one; evaluate them.")  # fmt: skip
    found = found.assign(title=found["backbone"].map(grid.names))
    same = found["early_layer"].nunique() == found["late_layer"].nunique() == 1
    ends = [f"layer {found[f'{end}_layer'].iloc[0]:g}" if same else f"{end} layer" for end in ("early", "late")]
    frames = {}
    for metric, own in found.groupby("metric", sort=False):
        sides = own.set_index("title")[["early", "late"]].T
        frames[METRICS[str(metric)].title] = sides.set_axis(ends, axis=0)
    with panels(list(frames), 2.75, 2.1) as drawing:
        for axis, frame in zip(drawing.axes.flat, frames.values(), strict=False):
            for title in frame.columns:
                axis.plot(range(len(frame)), frame[title], "o-", color=grid.colours[str(title)], ms=5, lw=1.5)
            axis.set_xticks(range(len(frame)), list(map(str, frame.index)))
            axis.set_xlim(-0.35, len(frame) - 0.65)
    return [
        "Means over runs that differ by nothing but the layer. The paper compares layers 3 and 11 of CLIP, "
        "DINOv2 and SigLIP. [ViSAEBench App. D, Fig. 4]",
        Picture(drawing.svg), grid.key, _layer_table(found),
    ]  # fmt: skip


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
