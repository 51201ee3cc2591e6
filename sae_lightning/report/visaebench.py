"""The page's section on ViSAEBench, and the files beside it, from runs that have its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_lightning.report import visaebench_figures as figures
from sae_lightning.report.encoding import encoding
from sae_lightning.report.visaebench_tables import (
    MAIN,
    Scored,
    by_backbone,
    raw_note,
    scores_csv,
    scores_markdown,
    table,
)
from sae_lightning.report.visaebench_topics import topics


def section(saes: Sequence[Scored]) -> dict[str, Any] | None:
    """What the page shows of M1–M7 but for pictures; None without SAEs. Figures without rows are empty."""
    if not saes:
        return None
    of = encoding(saes)
    return {
        "saes": saes, "legend": of.legend(), "main": table(saes, MAIN, of.of_backbones()),
        "notes": {title: raw_note(members) for title, members in by_backbone(saes).items()},
        "topics": [
            {"title": t.title, "about": t.about, "table": table(saes, t.columns, of.of_backbones())}
            for t in topics(saes)
        ],
        "moran": figures.moran(saes, of), "monosemanticity": figures.monosemanticity(saes, of),
        "dissociation": figures.dissociation(saes, of), "probing": figures.probing(saes, of),
        "recovery": figures.recovery(saes, of), "histograms": figures.histograms(saes, of),
    }  # fmt: skip


def files(saes: Sequence[Scored]) -> dict[str, str]:
    """The texts of visaebench.csv and visaebench.md; none without SAEs."""
    return {"visaebench.csv": scores_csv(saes), "visaebench.md": scores_markdown(saes)} if saes else {}
