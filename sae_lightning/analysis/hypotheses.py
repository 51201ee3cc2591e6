"""H1–H4 of ViSAEBench: which metric of the SAEs should go with which downstream task, fixed in advance [§4.5]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import NamedTuple

import pandas as pd

from sae_lightning.analysis.correlation import Correlation
from sae_lightning.analysis.grid import METRICS, tasks
from sae_lightning.analysis.metric_tasks import across_backbones, stands_in, task_column

SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable"
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
    testable) and ``reason``. ρ is across backbones, of means over configurations [§4.5]. The downstream number is that
    of raw features (App. P.1 says so of segmentation, and ρ = 0.30 of H2 and 0.60 of H3 are those of the raw
    accuracies and recalls that the paper prints), but for sparse probing, which is the codes' own.
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
    else:
        holds = found.rho >= h.threshold - 1e-9
        verdict = SUPPORTED if holds else NOT_SUPPORTED
        reason = f"ρ = {found.rho:.2f} {'≥' if holds else '<'} {h.threshold:g}"
    return {
        "name": h.name, "metric": h.metric, "task": task or "", "given": column.rpartition("/")[2],
        "stand_in": task is not None and _other(table, h, task), "check": check, "threshold": h.threshold,
        "rho": found.rho, "p": found.p, "p_t": found.p_t, "n": found.n, "verdict": verdict, "reason": reason,
    }  # fmt: skip
