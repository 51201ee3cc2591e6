"""H1–H4 of ViSAEBench: which metric of the SAEs should go with which downstream task, fixed in advance [§4.5]."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import NamedTuple

import pandas as pd
from matplotlib.patches import Rectangle

from sae_lightning.analysis.correlation import (
    NO_TASKS,
    Correlation,
    across_backbones,
    metric_tasks,
    stands_in,
    task_column,
    task_title,
)
from sae_lightning.analysis.grid import METRICS, Grid, section, tasks
from sae_lightning.analysis.paper import PAPER, Paper
from sae_lightning.rendering.figures import COLOURS, figure, numbered, panels
from sae_lightning.rendering.page import TRAIN, Block, Picture, lacking
from sae_lightning.rendering.table import Head, P, Table

SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable"

TOO_FEW = "too few backbones"  # for a verdict: of fewer than ENOUGH_FOR_ONE no order is unlikely (exact p ≥ 0.08)

ENOUGH_FOR_ONE = 5

NONE = Correlation(math.nan, math.nan, math.nan, 0, True)

ENOUGH = 3  # backbones: two are always in the same order or in the opposite one


class Hypothesis(NamedTuple):
    """``metric`` goes with the first of ``tasks`` that there is, with ρ of at least ``threshold``.

    The first is the paper's; later ones, which may be patterns, stand in for it. ``checks`` are further tasks that
    the paper reports with it.
    """

    name: str
    metric: str
    tasks: tuple[str, ...]
    threshold: float
    claim: str
    checks: tuple[str, ...] = ()


HYPOTHESES = (
    Hypothesis("H1", "M1", ("segmentation:ade20k", "segmentation:*"), 0.7,
               "coherent latents carry the structure that a segmentation head uses"),
    Hypothesis("H2", "M5", ("accuracy:cub200", "accuracy:*"), 0.6,
               "latents whose top images are alike help to tell similar classes apart"),
    Hypothesis("H3", "M3", ("retrieval",), 0.6, "what keeps a probe's accuracy keeps the similarity of images"),
    Hypothesis("H4", "M4", ("probing:inaturalist", "probing:*"), 0.7,
               "latents that tell classes apart do so on other pictures too", ("probing:cub200", "probing:dtd")),
)  # fmt: skip


def check_hypotheses(table: pd.DataFrame, of: Sequence[Hypothesis] = HYPOTHESES) -> pd.DataFrame:
    """One row a hypothesis, and one for each of its checks that there are scores of.

    Columns: ``name``, ``metric``, ``task``, ``given`` (what the task is solved with), ``stand_in`` (the task is not the
    paper's), ``check``, ``threshold``, ``rho``, ``p``, ``p_t``, ``n``, ``verdict`` (supported, not supported, not
    testable, too few backbones) and ``reason``. ρ is across backbones, of means over configurations [§4.5]. The
    downstream number is that of raw features (App. P.1 says so of segmentation, and ρ = 0.30 of H2 and 0.60 of H3 are
    those of the raw accuracies and recalls that the paper prints), but for sparse probing, which is the codes' own.
    Retrieval stands in where the runs are not of ImageNet.
    """
    found = tasks(table)
    rows = []
    for hypothesis in of:
        task = next((t for pattern in hypothesis.tasks for t in found if fnmatch(t, pattern)), None)
        rows.append(_tested(table, hypothesis, task))
        rows += [_tested(table, hypothesis, c, check=True) for c in hypothesis.checks if c in found and c != task]
    return pd.DataFrame(rows)


def _other(table: pd.DataFrame, h: Hypothesis, task: str) -> bool:
    """Whether a task is not the one that the paper tests the hypothesis with, or checks it with."""
    return task not in (h.tasks[0], *h.checks) or stands_in(table, task)


def _tested(table: pd.DataFrame, h: Hypothesis, task: str | None, check: bool = False) -> dict[str, object]:
    column = task_column(task or h.tasks[0])
    found = across_backbones(table, h.metric, column) if task else NONE
    if task is None:
        stand_in = " nor of a stand-in" if len(h.tasks) > 1 else ""
        verdict, reason = NOT_TESTABLE, f"there are no scores of {h.tasks[0]}{stand_in}"
    elif h.metric not in table or table[h.metric].isna().all():
        verdict, reason = NOT_TESTABLE, f"there is no {METRICS[h.metric].title}"
    elif found.n < ENOUGH:
        verdict, reason = NOT_TESTABLE, f"{found.n} backbones have both scores; ρ needs at least {ENOUGH}"
    elif math.isnan(found.rho):
        verdict, reason = NOT_TESTABLE, "one of the two is the same for all backbones"
    elif found.n < ENOUGH_FOR_ONE:
        verdict, reason = TOO_FEW, f"{found.n} have both scores; a verdict needs {ENOUGH_FOR_ONE}"
    else:
        holds = found.rho >= h.threshold - 1e-9
        verdict = SUPPORTED if holds else NOT_SUPPORTED
        reason = f"ρ = {found.rho:.2f} {'≥' if holds else '<'} {h.threshold:g}"
    return {
        "name": h.name, "metric": h.metric, "task": task or "", "given": column.rpartition("/")[2],
        "stand_in": task is not None and _other(table, h, task), "check": check, "threshold": h.threshold,
        "rho": found.rho, "p": found.p, "p_t": found.p_t, "n": found.n, "verdict": verdict, "reason": reason,
    }  # fmt: skip


def correlation_map(rho: pd.DataFrame, marked: Sequence[tuple[str, str]] = ()) -> str:
    """ρ [metric, task] from -1 to 1 with its numbers; ``marked`` pairs are framed [Fig. 2b]."""
    with figure(1.9 + 0.98 * rho.shape[1], 0.7 + 0.42 * rho.shape[0]) as drawing:
        axis = drawing.axis
        numbered(axis, rho.to_numpy(float), (-1.0, 1.0), "RdBu_r", "+.2f", 9)
        axis.set_xticks(range(rho.shape[1]), [textwrap.fill(str(task), 14) for task in rho.columns])
        axis.set_yticks(range(rho.shape[0]), [str(metric) for metric in rho.index])
        for metric, task in marked:
            if metric in rho.index and task in rho.columns:
                x, y = list(rho.columns).index(task), list(rho.index).index(metric)
                axis.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, lw=1.8,
                                                            ec="#222"))  # fmt: skip
    return drawing.svg


def correlations(tasks: Mapping[str, pd.Series], names: Sequence[str]) -> str:
    """Spearman's ρ of each metric in ``names`` with each of the tasks, a panel a task [Fig. 7]."""
    with panels(list(tasks), 2.8, 2.0) as drawing:
        for axis, rho in zip(drawing.axes.flat, tasks.values(), strict=False):
            for x, name in enumerate(names):
                value = rho.get(name, math.nan)
                if not math.isfinite(value):
                    axis.text(x, 0.04, "–", ha="center", color="#888")
                    continue
                axis.bar(x, value, 0.68, color=COLOURS[0] if value > 0 else COLOURS[1])
                place = value + math.copysign(0.05, value) if value else 0.05
                axis.text(x, place, f"{value:.1f}", ha="center", va="bottom" if value >= 0 else "top", fontsize=7)
            axis.axhline(0, color="#888", lw=0.8)
            axis.set_xticks(range(len(names)), names)
            axis.tick_params(axis="x", length=0)
            axis.grid(False, axis="x")
            axis.set_ylim(-1.25, 1.25)
            axis.set_yticks((-1, 0, 1))
    return drawing.svg


@section("Metrics and tasks")
def metric_task(grid: Grid, paper: Paper) -> Block:
    """ρ of each metric and task across backbones [Fig. 2b, Fig. 7]."""
    found = metric_tasks(grid.main)
    if found.empty or found["rho"].isna().all():
        few = f"Correlations across backbones need at least three of them; `{TRAIN}` trains five."
        return lacking(NO_TASKS if found.empty else few)
    names, all_tasks = list(METRICS), list(dict.fromkeys(found["task"]))
    rho, p = (found.pivot(index="metric", columns="task", values=c).loc[names, all_tasks] for c in ("rho", "p"))
    tested = check_hypotheses(grid.main)
    framed = [(METRICS[h["metric"]].title, task_title(h["task"])) for _, h in tested[~tested["check"]].iterrows()]
    shown = rho.rename(index={m: METRICS[m].title for m in names}, columns=task_title)
    by_task = {task_title(task): rho[task] for task in all_tasks}
    heads = [Head("metric"), *(Head(sign, ".2f" if sign == "ρ" else P, over=task_title(t), sign=sign == "ρ")
                               for t in all_tasks for sign in ("ρ", "p"))]  # fmt: skip
    rows = [[METRICS[m].title, *(f.at[m, t] for t in all_tasks for f in (rho, p))] for m in names]
    n = int(found["n"].max())
    return [
        f"Spearman’s ρ across {n} backbones of a metric’s mean over settings and of the task solved with raw features "
        "(sparse probing: with codes). Of M2 and M7 less is better: there a negative ρ says that the better by the "
        f"metric, the better at the task. With n = {n}, p is exact: over all orderings.",
        Picture(correlation_map(shown, framed), caption="Framed: the pairs of H1–H4. [ViSAEBench Fig. 2b]"),
        Picture(correlations(by_task, names), caption="The same, a panel a task. [ViSAEBench Fig. 7]"),
        Table("metric-tasks", "Spearman’s ρ of metrics and tasks across backbones, exact two-sided p", heads, rows),
        _paper_correlations(rho, paper),
    ]  # fmt: skip


def _paper_correlations(rho: pd.DataFrame, paper: Paper) -> list[Table]:
    """The correlations that the paper prints beside ours of the same task, or of the same kind."""
    printed = paper.correlations()
    if not printed:
        return []
    rows = []
    for metric, task, value in ((row["metric"], row["task"], row["rho"]) for row in printed):
        own = task if task in rho else next((t for t in rho if t.partition(":")[0] == task.partition(":")[0]), "")
        rows.append([METRICS[metric].title, task_title(task), value, task_title(own) if own else "–",
                     rho.at[metric, own] if own else None])  # fmt: skip
    heads = [Head("metric"), Head("task", over=PAPER), Head("ρ", ".2f", over=PAPER, sign=True),
             Head("task", over="here, the same or of its kind"),
             Head("ρ", ".2f", over="here, the same or of its kind", sign=True)]  # fmt: skip
    return [Table("metric-tasks-paper", "Correlations that the paper prints, and ours", heads, rows)]


@section("Hypotheses H1–H4")
def hypotheses(grid: Grid, paper: Paper) -> Block:
    """H1–H4 with both p-values and the verdict, beside the paper's [§4.5, §5.8]."""
    found, printed = check_hypotheses(grid.main), paper.hypotheses()
    claims = {h.name: h.claim for h in HYPOTHESES}
    heads = [Head(""), Head("metric"), Head("task", over=grid.here), Head("at least", ".1f", over=grid.here),
             Head("ρ", ".2f", over=grid.here, sign=True), Head("exact p", P, over=grid.here),
             Head("p of t", P, over=grid.here), Head("n", ".0f", over=grid.here),
             Head("verdict", over=grid.here)]  # fmt: skip
    if printed:
        heads += [Head("task", over=PAPER), Head("ρ", ".2f", over=PAPER, sign=True),
                  Head("p as printed", P, over=PAPER), Head("verdict", over=PAPER)]  # fmt: skip
    rows = []
    for _, h in found.iterrows():
        task = (task_title(h["task"]) + (" (stand-in)" if h["stand_in"] else "")) if h["task"] else "–"
        verdict = f"{h['verdict']}: {h['reason']}" if h["verdict"] in (NOT_TESTABLE, TOO_FEW) else h["verdict"]
        rows.append([h["name"] + (" (check)" if h["check"] else ""), METRICS[h["metric"]].title, task, h["threshold"],
                     h["rho"], h["p"], h["p_t"], h["n"], verdict])  # fmt: skip
        if printed:
            theirs = printed.get(h["name"], {}) if not h["check"] else {}
            rows[-1] += [task_title(theirs["task"]) if theirs else "–", theirs.get("rho"), theirs.get("p"),
                         theirs.get("verdict", "–")]  # fmt: skip
    counts = found[~found["check"]]["verdict"].value_counts()
    says = f"Of {counts.sum()} hypotheses, here: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + "."
    return [
        "Fixed in advance: " + "; ".join(f"{name}, {claim}" for name, claim in claims.items()) + ".",
        f"{says} A hypothesis is supported when ρ reaches its threshold, as in the paper; with five backbones the "
        "smallest exact p is 0.017 at ρ = ±1, and ρ = 0.9 has 0.083, where the t-approximation says 0.037.",
        Table("hypotheses", "H1–H4: rank correlations of metrics and tasks across backbones", heads, rows),
    ]  # fmt: skip
