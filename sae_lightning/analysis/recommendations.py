"""Which backbone to take for which kind of task, from the scores: the guide of ViSAEBench's App. P as plain data."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.patches import FancyBboxPatch

from sae_lightning.analysis.correlation import NO_TASKS, metric_tasks, stands_in, task_column, task_title
from sae_lightning.analysis.grid import METRICS, Grid, backbone_means, section, tasks
from sae_lightning.analysis.paper import PAPER, Paper
from sae_lightning.rendering.figures import figure
from sae_lightning.rendering.page import TRAIN, Block, Picture, lacking
from sae_lightning.rendering.table import Head, Table

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
    kind, stand_in = kind_of(task), stands_in(table, task)
    return Recommendation(kind, task, stand_in, raw, codes, tuple(best["metric"]), float(oriented), float(p), int(n))


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


TEAL, PURPLE, BLUE = ("#d9efec", "#2f7f76"), ("#e6e0f3", "#6b4fa0"), ("#dde9f6", "#1b6ca8")  # fill and edge


@dataclass(frozen=True)
class Route:
    """A column of the flowchart: a ``task``, the ``backbone`` to take, the ``metric`` that says so, and a ``note``."""

    task: str
    backbone: str
    metric: str
    note: str = ""


def flowchart(routes: Sequence[Route], start: str) -> str:
    """From ``start`` to a column for each route: task (teal), backbone (purple), metric (blue) [Fig. 8]."""
    width, gap = 2.5, 0.25
    whole = len(routes) * (width + gap) - gap

    with figure(whole, 4.6) as drawing:
        axis = drawing.axis
        _box(axis, whole / 2, 4.3, 3.4, 0.5, start, ("#fff", "#667"), 10)
        for i, route in enumerate(routes):
            x = i * (width + gap) + width / 2
            axis.plot([whole / 2, whole / 2, x, x], [4.05, 3.87, 3.87, 3.7], color="#99a", lw=1, zorder=0)
            axis.plot([x, x], [3.3, 1.2], color="#99a", lw=1, zorder=0)
            _box(axis, x, 3.35, width, 0.7, route.task, TEAL, 9.5)
            _box(axis, x, 2.25, width, 0.85, route.backbone, PURPLE, 9.5)
            _box(axis, x, 1.15, width, 0.85, route.metric, BLUE, 9)
            axis.text(x, 0.6, textwrap.fill(route.note, 36), ha="center", va="top", fontsize=8, color="#667")
        axis.set_xlim(-0.05, whole + 0.05)
        axis.set_ylim(0, 4.6)
        axis.set_axis_off()
    return drawing.svg


def _box(axis: Any, x: float, y: float, w: float, h: float, text: str, look: tuple[str, str], size: float) -> None:
    axis.add_patch(FancyBboxPatch((x - w / 2 + 0.06, y - h / 2 + 0.06), w - 0.12, h - 0.12, lw=1.2, fc=look[0],
                                  ec=look[1], boxstyle="round,pad=0.04,rounding_size=0.08"))  # fmt: skip
    lines = [textwrap.fill(line, int(w * 13.5)) for line in text.splitlines()]
    axis.text(x, y, "\n".join(lines), ha="center", va="center", fontsize=size, color="#1d2129")


OF_PAPER = (  # App. P.1: kind of task, by raw features, by codes, supporting metric
    ("dense spatial prediction", "DINOv2", "DINOv2", "M1, ρ = 0.90"),
    ("fine-grained concepts", "DINOv2", "DINOv2 or SigLIP", "M4, ρ = 0.80 to 0.90"),
    ("texture and material", "SigLIP", "SigLIP", "M4, ρ = 1.00"),
    ("image retrieval", "DeiT", "DeiT", "M3, ρ = 0.60"),
)


@section("Recommendations")
def guide(grid: Grid, paper: Paper) -> Block:
    """A flowchart from tasks to backbones, what to select on and what not, beside the paper's advice."""
    found = recommend(grid.main)
    if not found.routes or len(grid.titles) < 2:
        few = f"A choice needs several backbones: `{TRAIN}` trains five."
        return lacking(few if found.routes else NO_TASKS)
    routes = [_drawn_route(grid, r) for r in found.routes]
    chart = flowchart(routes, "What is the SAE for?")
    return [
        _about(grid, found),
        Picture(chart, caption="Task, backbone, and the metrics that rank the backbones most as the task does."),
        _routes(grid, found, bool(paper.files)), _metrics(grid, found),
    ]  # fmt: skip


def _about(grid: Grid, found: Guide) -> tuple[str, ...]:
    n = max(r.n for r in found.routes)
    says = [f"Computed from the means of {len(grid.titles)} backbones here; ρ across them rests on n = {n} and many "
            "pairs of metric and task, so that a high one may be chance. ρ is oriented: 1 means the better by the "
            "metric, the better at the task. [ViSAEBench App. P, Fig. 8]"]  # fmt: skip
    if found.not_recommended:
        names = ", ".join(title for name, title in grid.names.items() if name in found.not_recommended)
        says.append(f"Last or last but one by raw features in every task: {names}. In the paper: MAE.")
    if found.avoid:
        avoided = ", ".join(METRICS[m].title for m in found.avoid)
        says.append(f"Not to select on here, their mean ρ is below 0.5: {avoided}. In the paper: M2 FVU, "
                    "whose ρ there is negative, though less FVU is better.")  # fmt: skip
    return tuple(says)


def _chosen(grid: Grid, choice: Choice | None) -> str:
    """``dinov2 (tiny) 0.171, next clip (tiny) 0.058``."""
    if choice is None:
        return "–"
    then = f", next {grid.names[choice.next]} {choice.next_score:.3f}" if choice.next else ""
    return f"{grid.names[choice.backbone]} {choice.score:.3f}{then}"


def _support(r: Recommendation) -> str:
    if not r.metrics:
        return "no metric: ρ is not defined"
    return f"{', '.join(r.metrics)}: ρ = {r.oriented:.2f}, p = {r.p:.3f}"


def _drawn_route(grid: Grid, r: Recommendation) -> Route:
    stand_in = " (stand-in)" if r.stand_in else ""
    own = [(given, choice) for given, choice in (("raw", r.raw), ("codes", r.codes)) if choice is not None]
    same = len({choice.backbone for _, choice in own}) == 1 and len(own) > 1
    lines = [grid.names[own[0][1].backbone]] if same else [f"{given}: {grid.names[c.backbone]}" for given, c in own]
    if same:
        lines.append(", ".join(f"{given} {choice.score:.3f}" for given, choice in own))
    nexts = [f"{given} {grid.names[c.next]} {c.next_score:.3f}" for given, c in own if c.next]
    return Route(f"{r.kind}\n{task_title(r.task)}{stand_in}", "\n".join(lines), _support(r).replace(": ", "\n"),
                 f"next: {', '.join(nexts)}" if nexts else "")  # fmt: skip


def _routes(grid: Grid, found: Guide, with_paper: bool) -> Table:
    heads = [Head("kind of task"), Head("task", over=grid.here), Head("best by raw features", over=grid.here),
             Head("best by codes", over=grid.here), Head("supporting metrics", over=grid.here),
             *(Head(title, over=PAPER) for title in ("raw", "codes", "supporting metric") if with_paper)]  # fmt: skip
    theirs = {kind: rest for kind, *rest in OF_PAPER if with_paper}
    rows = []
    for r in found.routes:
        task = task_title(r.task) + (" (stand-in)" if r.stand_in else "")
        printed = theirs.pop(r.kind, ["–"] * 3) if with_paper else []
        rows.append([r.kind, task, _chosen(grid, r.raw), _chosen(grid, r.codes), _support(r), *printed])
    rows += [[kind, *["–"] * 4, *rest] for kind, rest in theirs.items()]
    return Table("recommendations", "Which backbone for which task", heads, rows)


def _metrics(grid: Grid, found: Guide) -> Table:
    heads = [Head("metric"), *(Head(title, ".2f", over="oriented ρ over tasks", sign=True)
                               for title in ("mean", "lowest", "highest")),
             Head("picks"), Head("raw score forgone", ".1%", better=False), Head("tasks", ".0f")]  # fmt: skip
    rows = [
        [METRICS[r["metric"]].title, r["oriented"], r["lowest"], r["highest"], grid.names[r["picks"]],
         r["loss"] if math.isfinite(r["loss"]) else None, r["tasks"]]
        for _, r in found.metrics.iterrows()
    ]  # fmt: skip
    return Table("selecting", "What to select a backbone on: the metric’s first choice against the best", heads, rows)
