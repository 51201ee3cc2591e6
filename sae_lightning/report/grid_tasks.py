"""The page's sections on downstream tasks: which metric goes with which, H1–H4, and what codes gain."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sae_lightning.analysis.codes_lift import Lift, codes_lift
from sae_lightning.analysis.grid import METRICS
from sae_lightning.analysis.hypotheses import HYPOTHESES, NOT_TESTABLE, check_hypotheses
from sae_lightning.analysis.metric_tasks import metric_tasks
from sae_lightning.report.grid_figures import correlations, lifts
from sae_lightning.report.grid_maps import correlation_map
from sae_lightning.report.grid_paper import PAPER, Paper
from sae_lightning.report.grid_runs import Grid
from sae_lightning.report.grid_section import EVALUATE, TRAIN, Picture, Section
from sae_lightning.report.grid_tables import Head, P, Spread, Table

NO_TASKS = ("No run has scores of a downstream task: retrieval, segmentation, or probes on other data sets. "
            f"`{EVALUATE}` makes them.")  # fmt: skip
KINDS = {"retrieval": "R@1", "segmentation": "mIoU", "accuracy": "accuracy", "probing": "sparse probing AUC"}


def task_title(task: str) -> str:
    """``segmentation:mosaic`` as ``mosaic mIoU``."""
    kind, _, data = task.partition(":")
    return f"{data} {KINDS.get(kind, kind)}" if data else f"{kind} {KINDS.get(kind, '')}".strip()


def metric_task(grid: Grid, paper: Paper) -> Section:
    """ρ of each metric and task across backbones [Fig. 2b, Fig. 7]."""
    found = metric_tasks(grid.main)
    if found.empty or found["rho"].isna().all():
        return Section("Metrics and tasks", missing=NO_TASKS if found.empty else
                       "Correlations across backbones need at least three of them; "
                       f"`{TRAIN}` trains five.")  # fmt: skip
    names, all_tasks = list(METRICS), list(dict.fromkeys(found["task"]))
    rho, p = (found.pivot(index="metric", columns="task", values=c).loc[names, all_tasks] for c in ("rho", "p"))
    tested = check_hypotheses(grid.main)
    framed = [(METRICS[h["metric"]].title, task_title(h["task"])) for _, h in tested[~tested["check"]].iterrows()]
    shown = rho.rename(index={m: METRICS[m].title for m in names}, columns=task_title)
    panels = {task_title(task): rho[task] for task in all_tasks}
    heads = [Head("metric"), *(Head(sign, ".2f" if sign == "ρ" else P, over=task_title(t), sign=sign == "ρ")
                               for t in all_tasks for sign in ("ρ", "p"))]  # fmt: skip
    rows = [[METRICS[m].title, *(f.at[m, t] for t in all_tasks for f in (rho, p))] for m in names]
    n = int(found["n"].max())
    return Section(
        "Metrics and tasks",
        (f"Spearman’s ρ across {n} backbones of a metric’s mean over settings and of the task solved with raw features "
         "(sparse probing: with codes). Of M2 and M7 less is better: there a negative ρ says that the better by the "
         f"metric, the better at the task. With n = {n}, p is exact: over all orderings.",),
        (Picture(correlation_map(shown, framed), caption="Framed: the pairs of H1–H4. [ViSAEBench Fig. 2b]"),
         Picture(correlations(panels, names), caption="The same, a panel a task. [ViSAEBench Fig. 7]")),
        (Table("metric-tasks", "Spearman’s ρ of metrics and tasks across backbones, exact two-sided p", heads, rows),
         *_paper_correlations(rho, paper)),
    )  # fmt: skip


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


def hypotheses(grid: Grid, paper: Paper) -> Section:
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
        verdict = f"{h['verdict']}: {h['reason']}" if h["verdict"] == NOT_TESTABLE else h["verdict"]
        rows.append([h["name"] + (" (check)" if h["check"] else ""), METRICS[h["metric"]].title, task, h["threshold"],
                     h["rho"], h["p"], h["p_t"], h["n"], verdict])  # fmt: skip
        if printed:
            theirs = printed.get(h["name"], {}) if not h["check"] else {}
            rows[-1] += [
                task_title(theirs["task"]) if theirs else "–",
                theirs.get("rho"),
                theirs.get("p"),
                theirs.get("verdict", "–"),
            ]
    counts = found[~found["check"]]["verdict"].value_counts()
    says = f"Of {counts.sum()} hypotheses, here: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + "."
    return Section(
        "Hypotheses H1–H4",
        ("Fixed in advance: " + "; ".join(f"{name}, {claim}" for name, claim in claims.items()) + ".",
         f"{says} A hypothesis is supported when ρ reaches its threshold, as in the paper; with five backbones the "
         "smallest exact p is 0.017 at ρ = ±1, and ρ = 0.9 has 0.083, where the t-approximation says 0.037.",),
        tables=(Table("hypotheses", "H1–H4: rank correlations of metrics and tasks across backbones", heads, rows),),
    )  # fmt: skip


def lift(grid: Grid, paper: Paper) -> Section:
    """What codes give over raw features, and whether weak backbones gain most [App. O, Table 8]."""
    found = codes_lift(grid.main)
    if found.tasks.empty:
        return Section("Codes lift", missing=NO_TASKS)
    each = found.backbones.assign(title=found.backbones["backbone"].map(grid.names))
    panels = {task_title(str(task)): own for task, own in each.groupby("task", sort=False)}
    return Section(
        "Codes lift",
        ("Lift is the score of codes over that of raw features, averaged over settings. A negative ρ of raw score and "
         "lift says that weaker backbones gain more. [ViSAEBench App. O]",),
        (Picture(lifts(panels, grid.colours)),), (_table_8(grid, found, paper), _each_lift(each, grid.titles)),
        keys=True,
    )  # fmt: skip


def _table_8(grid: Grid, found: Lift, paper: Paper) -> Table:
    heads = [Head("of"), Head("task"), Head("ρ(raw, lift)", ".2f", sign=True), Head("exact p", P), Head("p of t", P),
             Head("lowest lift"), Head("highest lift"), Head("above 1")]  # fmt: skip
    rows: list[list[object]] = [
        [grid.here, task_title(r["task"]), r["rho"], r["p"], r["p_t"],
         *(f"{grid.names[r[end]]} {r[f'{end}_lift']:.2f}" for end in ("lowest", "highest")),
         f"{r['above']} of {r['n']}"]
        for _, r in found.tasks.iterrows()
    ]  # fmt: skip
    rows += [[PAPER, task_title(t["task"]), t["rho"], None, t["p"], t["lowest"], t["highest"], "–"]
             for t in paper.lifts()]  # fmt: skip
    return Table("codes-lift", "Correlation of raw score and lift across backbones", heads, rows)


def _each_lift(each: pd.DataFrame, order: Sequence[str]) -> Table:
    heads = [Head("backbone"), *(Head(name, form, over=task_title(task))
                                 for task in dict.fromkeys(each["task"])
                                 for name, form in (("raw", ".3f"), ("codes", ".3f"), ("lift", ".3f")))]  # fmt: skip
    rows: list[list[object]] = []
    for title in order:
        row: list[object] = [title]
        for task in dict.fromkeys(each["task"]):
            own = each[(each["task"] == task) & (each["title"] == title)]
            r = own.iloc[0] if len(own) else None
            row += [None] * 3 if r is None else [r["raw"], r["codes"], Spread(r["lift"], r["lift_std"])]
        rows.append(row)
    return Table(
        "codes-lift-backbones", "Raw features, codes, and lift ± standard deviation over settings", heads, rows
    )
