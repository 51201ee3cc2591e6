"""Which metric goes with which downstream task across backbones [ViSAEBench Fig. 2b, Fig. 7]."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sae_lightning.analysis.cells import backbone_means
from sae_lightning.analysis.correlation import Correlation, spearman
from sae_lightning.analysis.grid import METRICS, tasks

# those of the paper; the codes' probing on CUB-200 and DTD are its further checks of H4
OF_PAPER = {
    "segmentation:ade20k", "retrieval", "accuracy:cub200", "accuracy:inaturalist", "accuracy:dtd",
    "probing:cub200", "probing:inaturalist", "probing:dtd",
}  # fmt: skip


def stands_in(table: pd.DataFrame, task: str) -> bool:
    """Whether a task is none of the paper's; retrieval is where the runs are not of ImageNet."""
    return task not in OF_PAPER or (task == "retrieval" and set(table["data"]) != {"imagenet"})


def task_column(task: str, given: str = "raw") -> str:
    """The column of a task's score; probing has ``codes`` alone."""
    return f"{task}/codes" if task.startswith("probing:") else f"{task}/{given}"


def across_backbones(table: pd.DataFrame, x: str, y: str) -> Correlation:
    """Spearman's ρ of two columns' means over each backbone's configurations; NaN where a column is not there."""
    means = backbone_means(table, [x, y])
    return spearman(means[x], means[y])


def metric_tasks(table: pd.DataFrame, of: Sequence[str] | None = None, given: str = "raw") -> pd.DataFrame:
    """One row a metric and task: ``metric``, ``task``, ``rho``, ``oriented``, ``p``, ``p_t``, ``n``.

    ``rho`` is of the plain values, as the paper prints it; ``oriented`` is turned round for metrics of which less is
    better, so that 1 means: the better by the metric, the better at the task. ``given`` says what the task is solved
    with; ``raw``, with which the correlations of the paper's printed rankings come out, or ``codes`` or
    ``reconstruction``. All tasks found unless named.
    """
    rows = []
    for task in tasks(table) if of is None else of:
        for metric, (_, better) in METRICS.items():
            found = across_backbones(table, metric, task_column(task, given))
            oriented = found.rho if better else -found.rho
            rows.append((metric, task, found.rho, oriented, found.p, found.p_t, found.n))
    return pd.DataFrame(rows, columns=["metric", "task", "rho", "oriented", "p", "p_t", "n"])
