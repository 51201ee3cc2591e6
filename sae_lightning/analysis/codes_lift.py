"""Whether SAE codes help weak backbones more than strong ones [ViSAEBench App. O, Table 8]."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from sae_lightning.analysis.cells import backbone_means, backbone_stds
from sae_lightning.analysis.correlation import spearman
from sae_lightning.analysis.grid import tasks


class Lift(NamedTuple):
    """``tasks``: one row a task with ``rho`` of the mean raw score and the mean lift across backbones, ``p``, ``p_t``,
    ``n``, the backbones ``lowest`` and ``highest`` with their lifts, and how many are ``above`` 1. ``backbones``: one
    row a task and backbone with ``raw``, ``codes``, ``lift`` and ``lift_std`` over configurations.
    """

    tasks: pd.DataFrame
    backbones: pd.DataFrame


def codes_lift(table: pd.DataFrame) -> Lift:
    """Lift = score of codes / score of raw features, averaged over the configurations of a backbone.

    Tasks without both scores are left out, as are runs whose raw score is 0.
    """
    overall, each = [], []
    for task in tasks(table):
        raw, codes = f"{task}/raw", f"{task}/codes"
        if raw not in table or codes not in table:
            continue
        rows = table.assign(lift=table[codes] / table[raw].replace(0, np.nan))
        means = backbone_means(rows, [raw, codes, "lift"]).dropna()
        if means.empty:
            continue
        stds = backbone_stds(rows, ["lift"])["lift"]
        found, lift = spearman(means[raw], means["lift"]), means["lift"]
        overall.append({
            "task": task, "rho": found.rho, "p": found.p, "p_t": found.p_t, "n": found.n,
            "lowest": lift.idxmin(), "lowest_lift": lift.min(), "highest": lift.idxmax(), "highest_lift": lift.max(),
            "above": int((lift > 1).sum()),
        })  # fmt: skip
        each += [
            {"task": task, "backbone": name, "raw": row[raw], "codes": row[codes], "lift": row["lift"],
             "lift_std": stds[name]}
            for name, row in means.iterrows()
        ]  # fmt: skip
    overall_columns = ["task", "rho", "p", "p_t", "n", "lowest", "lowest_lift", "highest", "highest_lift", "above"]
    each_columns = ["task", "backbone", "raw", "codes", "lift", "lift_std"]
    return Lift(pd.DataFrame(overall, columns=overall_columns), pd.DataFrame(each, columns=each_columns))
