"""The seven metrics of ViSAEBench by their headlines, among all rows of a run's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Headline(NamedTuple):
    """One of the seven: its ``title``, the ``metric`` and ``setting`` of its row, and whether more is ``better``.

    A setting ``data=*`` stands for all data sets, whose values are averaged.
    """

    title: str
    metric: str
    setting: str = ""
    better: bool = True


HEADLINES = (
    Headline("M1 Moran's I", "moran"),
    Headline("M2 FVU", "fvu", better=False),
    Headline("M3 preservation", "preservation"),
    Headline("M4 probing AUC", "sparse_probing_auc", "k=128"),
    Headline("M5 monosemanticity", "monosemanticity"),
    Headline("M6 cross-domain", "cross_domain_preservation", "data=*"),
    Headline("M7 absorption", "absorption", "alpha=0.8,beta=0.5", better=False),
)


def headline(rows: Iterable[Mapping[str, Any]], which: Headline) -> float:
    """The value of one headline among a run's ``rows`` of one split; NaN where there is none."""
    found = [r["value"] for r in rows if r["metric"] == which.metric and fits(r["setting"], which.setting)]
    return float(np.mean(found)) if found else float("nan")


def fits(setting: str, wanted: str) -> bool:
    """Whether a row's ``setting`` is the ``wanted`` one, or of the data sets that it stands for."""
    return setting == wanted or (wanted.endswith("*") and setting.startswith(wanted[:-1]) and "," not in setting)
