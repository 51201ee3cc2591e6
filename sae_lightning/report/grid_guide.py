"""The page's section of recommendations, computed from the scores [ViSAEBench App. P, Fig. 8]."""

from __future__ import annotations

import math

from sae_lightning.analysis.grid import METRICS
from sae_lightning.analysis.recommendations import Choice, Guide, Recommendation, recommend
from sae_lightning.report.grid_maps import Route, flowchart
from sae_lightning.report.grid_paper import PAPER, Paper
from sae_lightning.report.grid_runs import Grid
from sae_lightning.report.grid_section import TRAIN, Picture, Section
from sae_lightning.report.grid_tables import Head, Table
from sae_lightning.report.grid_tasks import NO_TASKS, task_title

TITLE = "Recommendations"
OF_PAPER = (  # App. P.1: kind of task, by raw features, by codes, supporting metric
    ("dense spatial prediction", "DINOv2", "DINOv2", "M1, ρ = 0.90"),
    ("fine-grained concepts", "DINOv2", "DINOv2 or SigLIP", "M4, ρ = 0.80 to 0.90"),
    ("texture and material", "SigLIP", "SigLIP", "M4, ρ = 1.00"),
    ("image retrieval", "DeiT", "DeiT", "M3, ρ = 0.60"),
)


def guide(grid: Grid, paper: Paper) -> Section:
    """A flowchart from tasks to backbones, what to select on and what not, beside the paper's advice."""
    found = recommend(grid.main)
    if not found.routes or len(grid.titles) < 2:
        return Section(TITLE, missing=NO_TASKS if not found.routes else "A choice needs several backbones: "
                       f"`{TRAIN}` trains five.")  # fmt: skip
    routes = [_route(grid, r) for r in found.routes]
    chart = flowchart(routes, "What is the SAE for?")
    return Section(
        TITLE, _about(grid, found), (Picture(chart, caption="Task, backbone, and the metrics that rank the backbones "
                                             "most as the task does."),),
        (_routes(grid, found, bool(paper.files)), _metrics(grid, found)),
    )  # fmt: skip


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


def _route(grid: Grid, r: Recommendation) -> Route:
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
