"""Which runs differ only by MonoLoss, and tables of what it changes: pure functions of configs and scores."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_lightning.report.visaebench_tables import NOTHING, number
from sae_lightning.training.identity import monoloss_of, same_but

METRICS = {
    "monoscore": "MonoScore", "monoscore_scored": "MonoScore, scored latents", "r2": "R²",
    "explained_variance": "explained variance", "l0": "L0", "dead_share": "dead share", "purity": "purity",
    "weighted_purity": "weighted purity",
}  # fmt: skip
ABOVE = "monoscore_above_"  # and a threshold: the share of latents above it
HEADLINES = ("r2", "monoscore", "purity", "weighted_purity")


@dataclass
class Arm:
    """The runs of one weight (0: without MonoLoss), by seed."""

    weight: float
    options: dict[str, Any]
    runs: dict[int, Mapping[str, Any]] = field(default_factory=dict)


@dataclass
class Group:
    """Runs that differ only by seed and by MonoLoss: those ``without``, and those with it, by ascending weight."""

    title: str
    without: Arm
    with_loss: list[Arm]

    def label(self, arm: Arm) -> str:
        """``weight 0.1``, with the other options where another arm has the same weight."""
        same = [other for other in self.with_loss if other.weight == arm.weight]
        differing = {k: v for k, v in arm.options.items() if any(other.options.get(k) != v for other in same)}
        return ", ".join([f"weight {arm.weight:g}", *(f"{k} {v}" for k, v in sorted(differing.items()))])

    def first_pair(self, arm: Arm) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """One run without and one with, of the lowest seed that both have, else of the lowest of each."""
        common = sorted(self.without.runs.keys() & arm.runs.keys())
        a, b = (common[0], common[0]) if common else (min(self.without.runs), min(arm.runs))
        return self.without.runs[a], arm.runs[b]


def first_of_settings(runs: Sequence[Mapping[str, Any]], each: int, total: int) -> list[str]:
    """Names of the runs to show in detail: the first ``each`` of those that differ only by seed, at most ``total``."""
    seen: dict[str, int] = {}
    names = []
    for run in runs:
        key = same_but(run["cfg"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= each:
            names.append(run["name"])
    return names[:total]


def groups_of(runs: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Groups that have runs both with and without MonoLoss, in the order of their first runs.

    ValueError when the runs of one were scored on different splits or judged by different similarities.
    """
    found: dict[str, dict[str, Arm]] = {}
    for run in runs:
        config = run["cfg"]["config"]
        weight, options = monoloss_of(config)
        arms = found.setdefault(same_but(run["cfg"], "seed", "callbacks.MonoLoss*"), {})
        arm = arms.setdefault(json.dumps([weight, options], sort_keys=True), Arm(weight, options))
        arm.runs.setdefault(int(run["cfg"]["seed"]), run)
    groups = []
    for arms in found.values():
        without = [arm for arm in arms.values() if arm.weight == 0]
        with_loss = sorted((arm for arm in arms.values() if arm.weight != 0), key=lambda arm: arm.weight)
        if without and with_loss:
            members = [run for arm in arms.values() for run in arm.runs.values()]
            _require_one_judge(members)
            groups.append(Group(members[0]["title"], without[0], with_loss))
    return groups


def _require_one_judge(runs: Sequence[Mapping[str, Any]]) -> None:
    judged = {(run["split"], run["similarity"]["key"]): run for run in runs}
    if len(judged) > 1:
        (split_a, _), (split_b, _) = list(judged)[:2]
        a, b = list(judged.values())[:2]
        raise ValueError(
            f"{a['name']} was scored on the {split_a} split by {a['similarity']['title']}, {b['name']} on the "
            f"{split_b} split by {b['similarity']['title']}; their MonoScores cannot be compared. Evaluate both in one "
            "call of evaluate.py."
        )


def rows(group: Group, arm: Arm) -> list[dict[str, Any]]:
    """One row a metric that all runs have: means and standard deviations over seeds, and their difference.

    ``without``, ``with`` and ``difference`` are (mean, sd, n); the deviation is that of a sample, None for n < 2. The
    difference is taken seed by seed over seeds that both have; where they share none it is that of the means, with
    n = 0.
    """
    table = []
    common = _metrics(group, arm)
    thresholds = {k: f"latents above {k.removeprefix(ABOVE)}" for k in common if k.startswith(ABOVE)}
    for name, title in (METRICS | thresholds).items():
        if name not in common:
            continue
        a = {seed: run["metrics"][name] for seed, run in group.without.runs.items()}
        b = {seed: run["metrics"][name] for seed, run in arm.runs.items()}
        differences = [b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())]
        before, after = summary(a.values()), summary(b.values())
        table.append({
            "metric": name, "title": title, "without": before, "with": after,
            "difference": summary(differences) if differences else (after[0] - before[0], None, 0),
        })  # fmt: skip
    return table


def _metrics(group: Group, arm: Arm) -> list[str]:
    """Names of the metrics that all runs of both arms have, in the first one's order."""
    runs = [*group.without.runs.values(), *arm.runs.values()]
    return [name for name in runs[0]["metrics"] if all(name in run["metrics"] for run in runs)]


def summary(values: Any) -> tuple[float, float | None, int]:
    """Mean, standard deviation of a sample (None for fewer than two values) and number of ``values``."""
    listed = list(values)
    return statistics.fmean(listed), statistics.stdev(listed) if len(listed) > 1 else None, len(listed)


def shown(value: tuple[float, float | None, int], sign: bool = False) -> str:
    """``0.312 ± 0.004``; without the deviation where there is none."""
    mean, deviation, _ = value
    text = number(mean, "+.3f" if sign else ".3f")
    return text if deviation is None or text == NOTHING else f"{text} ± {deviation:.3f}"


def as_csv(groups: Sequence[Group]) -> str:
    """One line a group, weight and metric, with unrounded numbers; empty cells where there is no deviation."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    three = ("without", "with", "difference")
    columns = [f"{which}_{what}" for which in three for what in ("mean", "sd", "seeds")]
    about = ("data", "backbone", "features", "variant", "expansion", "k")
    writer.writerow([*about, "split", "similarity", "monoloss", "metric", *columns])
    for group in groups:
        for arm in group.with_loss:
            run = next(iter(arm.runs.values()))
            fixed = [run["cfg"].get(name) for name in about] + [run["split"], run["similarity"]["title"]]
            for row in rows(group, arm):
                numbers = ["" if x is None else x for which in three for x in row[which]]
                writer.writerow([*fixed, group.label(arm), row["metric"], *numbers])
    return buffer.getvalue()


def as_markdown(groups: Sequence[Group], metrics: Sequence[str] = HEADLINES) -> str:
    """One line a group and weight, as in the paper's tables: without → with (difference), means over seeds."""
    lines = ["| SAE | MonoLoss | seeds | " + " | ".join(METRICS[name] for name in metrics) + " |"]
    lines.append("|---|---|---|" + "---|" * len(metrics))
    for group in groups:
        for arm in group.with_loss:
            found = {row["metric"]: row for row in rows(group, arm)}
            cells = [group.title, group.label(arm), f"{len(group.without.runs)} / {len(arm.runs)}"]
            for name in metrics:
                if name not in found:
                    cells.append("–")
                    continue
                before, after, change = (found[name][which] for which in ("without", "with", "difference"))
                cells.append(f"{shown(before)} → {shown(after)} ({shown(change, sign=True)})")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
