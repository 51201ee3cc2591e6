"""Which backbone to take for which kind of task, from the scores: the guide of ViSAEBench's App. P as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import NamedTuple

import pandas as pd

from sae_lightning.analysis.cells import backbone_means
from sae_lightning.analysis.grid import METRICS, tasks
from sae_lightning.analysis.metric_tasks import metric_tasks, stands_in, task_column

# kinds of task in the order of App. P.1, by patterns of their names, of which the first that fits counts
KINDS = {
    "dense spatial prediction": ("segmentation:*",),
    "fine-grained concepts": ("accuracy:cub200", "accuracy:inaturalist"),
    "texture and material": ("accuracy:dtd",),
    "image retrieval": ("retrieval",),
    "other classification": ("accuracy:*",),
}


class Choice(NamedTuple):
    """The backbone with the highest mean ``score``, and the ``next`` one with its ``next_score`` (none: "" and NaN)."""

    backbone: str
    score: float
    next: str
    next_score: float


class Recommendation(NamedTuple):
    """For one ``task`` of a ``kind``: the best backbones by ``raw`` features and by ``codes`` (None without scores).

    ``metrics`` are those that rank the backbones most as the raw task does, all that share the highest ``oriented`` ρ
    of ``n`` backbones, with its exact ``p``; empty where no ρ is defined. ``stand_in``: not a task of the paper.
    """

    kind: str
    task: str
    stand_in: bool
    raw: Choice | None
    codes: Choice | None
    metrics: tuple[str, ...]
    oriented: float
    p: float
    n: int


class Guide(NamedTuple):
    """``routes`` from tasks to backbones; ``metrics``, how well each serves to select a backbone, see
    ``selecting_metrics``; ``avoid``, metrics whose mean oriented ρ is below 0.5; ``not_recommended``, backbones that
    are last or last but one by raw features in every task, of four or more.
    """

    routes: list[Recommendation]
    metrics: pd.DataFrame
    avoid: tuple[str, ...]
    not_recommended: tuple[str, ...]


def recommend(table: pd.DataFrame, low: float = 0.5) -> Guide:
    """The guide for the backbones of a grid: means over configurations, correlations across backbones.

    Every task with raw scores gets a route. Metrics are ``oriented``: App. P.3 reads FVU's negative ρ as speaking
    against it, but less FVU is better, so that a negative ρ is what a metric to select by would have.
    """
    found = [task for task in tasks(table) if f"{task}/raw" in table]
    related = metric_tasks(table, found)
    routed = sorted(found, key=lambda task: (list(KINDS).index(kind_of(task)), stands_in(table, task)))
    metrics = selecting_metrics(table, related)
    return Guide(
        [_route(table, related, task) for task in routed], metrics,
        tuple(metrics.loc[metrics["oriented"] < low, "metric"]), _last(table, found),
    )  # fmt: skip


def kind_of(task: str) -> str:
    """The kind of a task; ValueError for one of none."""
    for kind, patterns in KINDS.items():
        if any(fnmatch(task, pattern) for pattern in patterns):
            return kind
    known = ", ".join(pattern for patterns in KINDS.values() for pattern in patterns)
    raise ValueError(f"{task} is of no kind of task known here; expected one of {known}.")


def selecting_metrics(table: pd.DataFrame, related: pd.DataFrame) -> pd.DataFrame:
    """One row a metric, the best to select by first: means over the tasks of ``related`` (``metric_tasks``).

    ``oriented`` is the mean ρ; ``lowest`` and ``highest`` its range; ``picks`` the backbone that the metric puts
    first, and ``loss`` the mean share of the best backbone's raw score that one forgoes by taking it.
    """
    rows = []
    for metric, own in related.dropna(subset="oriented").groupby("metric"):
        metric = str(metric)
        means = backbone_means(table, [metric, *map(task_column, own["task"])]).dropna(subset=metric)
        first = means[metric].idxmax() if METRICS[metric].better else means[metric].idxmin()
        losses = [1 - means[column][first] / means[column].max() for column in means.columns[1:]]
        rho = own["oriented"]
        rows.append((metric, rho.mean(), rho.min(), rho.max(), first, pd.Series(losses).mean(), len(own)))
    columns = ["metric", "oriented", "lowest", "highest", "picks", "loss", "tasks"]
    return pd.DataFrame(rows, columns=columns).sort_values("oriented", ascending=False, ignore_index=True)


def _route(table: pd.DataFrame, related: pd.DataFrame, task: str) -> Recommendation:
    own = related[(related["task"] == task) & related["oriented"].notna()]
    best = own[own["oriented"] >= own["oriented"].max() - 1e-9]
    oriented, p, n = best[["oriented", "p", "n"]].iloc[0] if len(best) else (float("nan"), float("nan"), 0)
    raw, codes = (choice(table, task_column(task, given)) for given in ("raw", "codes"))
    return Recommendation(
        kind_of(task),
        task,
        stands_in(table, task),
        raw,
        codes,
        tuple(best["metric"]),
        float(oriented),
        float(p),
        int(n),
    )


def choice(table: pd.DataFrame, column: str) -> Choice | None:
    """The two backbones with the highest means of a column; None where it has no value."""
    means = backbone_means(table, [column])[column].dropna().sort_values(ascending=False, kind="stable")
    if means.empty:
        return None
    then = (str(means.index[1]), float(means.iloc[1])) if len(means) > 1 else ("", float("nan"))
    return Choice(str(means.index[0]), float(means.iloc[0]), *then)


def _last(table: pd.DataFrame, found: Sequence[str]) -> tuple[str, ...]:
    """Backbones that are last or last but one in every task."""
    ranks = backbone_means(table, [f"{task}/raw" for task in found]).rank(ascending=False, method="min")
    ranks = ranks.dropna(axis=1)
    if ranks.empty or len(ranks) < 4:
        return ()
    return tuple(str(name) for name in ranks.index[(ranks >= len(ranks) - 1).all(axis=1)])
