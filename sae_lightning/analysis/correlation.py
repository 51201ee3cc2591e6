"""Spearman's rank correlation of a handful of backbones, with a p-value that is exact for so few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from sae_lightning.analysis.grid import METRICS, backbone_means, tasks
from sae_lightning.rendering.page import EVALUATE

EXACT = 8  # up to so many pairs all n! orderings are counted

DIGITS = 12  # values that agree to so many significant digits are ties: means of equal values differ in the last ones


class Correlation(NamedTuple):
    """Spearman's ``rho`` of ``n`` pairs with its two-sided ``p``, which is ``exact`` for n ≤ 8 and ``p_t`` above.

    ``p_t`` is that of t = ρ √((n − 2) / (1 − ρ²)) with n − 2 degrees of freedom, which most packages and papers print.
    At n = 5 it is 0.037 for ρ = 0.9, where 10 of the 120 orderings are as extreme: p = 0.083.
    """

    rho: float
    p: float
    p_t: float
    n: int
    exact: bool


def spearman(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Correlate the ranks of ``x`` and ``y`` [n], ties at their mean rank; pairs with a NaN are left out.

    ρ and both p are NaN where fewer than two pairs are left or one side is constant, ``p_t`` with two pairs too.
    ValueError where the two differ in length.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"Spearman's ρ is of two rows of equal length; got shapes {a.shape} and {b.shape}.")
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = _ranks(a[both]), _ranks(b[both])
    n = len(a)
    if n < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(math.nan, math.nan, math.nan, n, n <= EXACT)
    found = stats.spearmanr(a, b)
    rho = round(float(found.statistic), DIGITS)
    p_t = math.nan if n < 3 else 0.0 if abs(rho) == 1 else float(found.pvalue)
    return Correlation(rho, _exact_p(a, b) if n <= EXACT else p_t, p_t, n, n <= EXACT)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks, centred on zero, of values read to ``DIGITS`` digits."""
    rounded = [float(f"{v:.{DIGITS}g}") for v in values]
    return stats.rankdata(rounded) - (len(rounded) + 1) / 2


def _exact_p(a: np.ndarray, b: np.ndarray) -> float:
    """The share of all orderings of ``b`` whose covariance with ``a`` is at least as far from zero as the given one."""
    sums = b[_orderings(len(b))] @ a
    return float(np.mean(np.abs(sums) >= abs(a @ b) - 1e-9))


@cache
def _orderings(n: int) -> np.ndarray:
    return np.array(list(permutations(range(n))), dtype=np.int8)


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


NO_TASKS = ("No run has scores of a downstream task: retrieval, segmentation, or probes on other data sets. "
            f"`{EVALUATE}` makes them.")  # fmt: skip

KINDS = {"retrieval": "R@1", "segmentation": "mIoU", "accuracy": "accuracy", "probing": "sparse probing AUC"}


def task_title(task: str) -> str:
    """``segmentation:mosaic`` as ``mosaic mIoU``."""
    kind, _, data = task.partition(":")
    return f"{data} {KINDS.get(kind, kind)}" if data else f"{kind} {KINDS.get(kind, '')}".strip()
