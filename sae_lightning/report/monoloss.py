"""MonoScores of all runs; which runs differ only by MonoLoss, and what it changes, in tables, figures and latents."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sae_lightning.rendering.figures import COLOURS, figure
from sae_lightning.rendering.page import Beside, Block, Fold, Heading, Key, Note, Picture, Section
from sae_lightning.rendering.table import NOTHING, Head, Spread, Table, number
from sae_lightning.report.latents import band_grid, pictures
from sae_lightning.runs.identity import monoloss_of, same_but
from sae_lightning.runs.run import LATENTS
from sae_lightning.saes.artefact import read_tensors

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


def spread(value: tuple[float, float | None, int]) -> Spread:
    """What ``summary`` gives, as a cell of a table."""
    return Spread(*value[:2])


def shown(value: tuple[float, float | None, int], sign: bool = False) -> str:
    """``0.312 ± 0.004``; without the deviation where there is none."""
    return Head("", sign=sign).text(spread(value))


def comparison(group: Group) -> Table:
    """What each weight changes: means and deviations over seeds, and differences, a line a metric."""
    found = [{row["title"]: row for row in rows(group, arm)} for arm in group.with_loss]

    def seeds(label: str, arm: Arm) -> Head:
        return Head(f"{label}, {len(arm.runs)} seeds" if len(arm.runs) > 1 else label)

    heads = [Head(""), seeds("without", group.without)]
    for arm in group.with_loss:
        heads += [seeds(group.label(arm), arm), Head("difference", sign=True)]
    lines = [
        [title, spread(row["without"]), *(spread(t[title][side]) for t in found for side in ("with", "difference"))]
        for title, row in found[0].items() if all(title in t for t in found)
    ]  # fmt: skip
    return Table("", "", heads, lines)


def as_csv(groups: Sequence[Group]) -> str:
    """One line a group, weight and metric, with unrounded numbers; empty cells where there is no deviation."""
    about, lines = ("data", "backbone", "features", "variant", "expansion", "k"), []
    for group, arm in ((each, arm) for each in groups for arm in each.with_loss):
        run = next(iter(arm.runs.values()))
        fixed = {name: run["cfg"].get(name) for name in about} | {
            "split": run["split"], "similarity": run["similarity"]["title"], "monoloss": group.label(arm),
        }  # fmt: skip
        for row in rows(group, arm):
            figures = {f"{which}_{what}": x for which in ("without", "with", "difference")
                       for what, x in zip(("mean", "sd", "seeds"), row[which], strict=True)}  # fmt: skip
            lines.append(fixed | {"metric": row["metric"]} | figures)
    return str(pd.DataFrame(lines, dtype=object).to_csv(index=False, lineterminator="\n"))


def as_markdown(groups: Sequence[Group], metrics: Sequence[str] = HEADLINES) -> str:
    """One line a group and weight, as in the paper's tables: without → with (difference), means over seeds."""
    lines = []
    for group, arm in ((each, arm) for each in groups for arm in each.with_loss):
        found = {row["metric"]: row for row in rows(group, arm)}
        cells = [
            f"{shown(found[m]['without'])} → {shown(found[m]['with'])} ({shown(found[m]['difference'], sign=True)})"
            if m in found else NOTHING for m in metrics
        ]  # fmt: skip
        lines.append([group.title, group.label(arm), f"{len(group.without.runs)} / {len(arm.runs)}", *cells])
    heads = [Head(title) for title in ("SAE", "MonoLoss", "seeds", *(METRICS[name] for name in metrics))]
    return Table("", "", heads, lines).markdown()


POINTS = 201  # of a curve, so that a page of many runs stays small

WITHOUT = "#8a8f99"


def profile(scores: np.ndarray, points: int = POINTS) -> np.ndarray:
    """MonoScores [d_sae] sorted descending, read at ``points`` even places of the normalised index 0 … 1."""
    ordered = np.sort(scores)[::-1]
    return np.interp(np.linspace(0, 1, points), np.linspace(0, 1, len(ordered)), ordered)


def monoscores(folder: Path) -> np.ndarray:
    """MonoScore of each latent of an evaluated run, [d_sae]; 0 where there is none."""
    return read_tensors(folder / LATENTS)[0]["monoscore"].numpy()


def profiles(runs: Sequence[Mapping[str, Any]]) -> str:
    """Scores over the normalised latent index, their distribution, and their mean against R², for every run; SVG.

    Dotted is the mean similarity of all pairs of images, the score of a latent that is equally active on all of them.
    """
    with figure(11, 3.1, 1, 3) as drawing:
        left, right, last = drawing.axes[0]
        baselines = {round(run["similarity"]["baseline"], 4) for run in runs}
        edges = _edges(runs)
        for run in runs:
            scores = monoscores(run["folder"])
            left.plot(np.linspace(0, 1, POINTS), profile(scores), color=run["colour"], lw=1.4)
            share = np.histogram(scores, edges)[0] / len(scores)
            right.stairs(share, edges, color=run["colour"], lw=1.2)
            last.scatter(run["metrics"]["r2"], run["metrics"]["monoscore"], s=34, color=run["colour"])
            if len(baselines) > 1:
                _baseline(left, run["similarity"]["baseline"], run["colour"])
        if len(baselines) == 1:
            _baseline(left, baselines.pop(), "#444")
        _frame(left)
        right.set_xlabel("MonoScore (0: also those without)")
        right.set_ylabel("share of latents")
        right.set_ylim(bottom=0)
        last.set_xlabel("R²")
        last.xaxis.set_major_locator(MaxNLocator(5))
        last.set_ylabel("mean MonoScore")
    return drawing.svg


def group_profile(group: Group) -> str:
    """The curves of one group: grey without MonoLoss, coloured with it; the mean over seeds and their range; SVG."""
    with figure(5.4, 3.6) as drawing:
        axis = drawing.axis
        _curve(axis, group.without, WITHOUT, "without")
        for i, arm in enumerate(group.with_loss):
            _curve(axis, arm, COLOURS[i % len(COLOURS)], group.label(arm))
        first = next(iter(group.without.runs.values()))
        _baseline(axis, first["similarity"]["baseline"], "#444")
        _frame(axis)
        axis.legend(frameon=False, fontsize=8)
    return drawing.svg


def _curve(axis: Axes, arm: Arm, colour: str, label: str) -> None:
    curves = np.stack([profile(monoscores(run["folder"])) for run in arm.runs.values()])
    x = np.linspace(0, 1, POINTS)
    axis.plot(x, curves.mean(0), color=colour, lw=1.6, label=label)
    if len(curves) > 1:
        axis.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)


def _baseline(axis: Axes, value: float, colour: str) -> None:
    axis.axhline(value, color=colour, lw=1.1, ls=":")


def _frame(axis: Axes) -> None:
    axis.set_xlabel("latents, highest first (share of d_sae)")
    axis.set_ylabel("MonoScore")
    axis.set_xlim(0, 1)
    low, high = axis.get_ylim()
    axis.set_ylim(min(0.0, low), max(high, 0.05))


def _edges(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Bins of width 0.02 over all runs' scores."""
    found = [monoscores(run["folder"]) for run in runs]
    low = min(0.0, *(float(scores.min()) for scores in found))
    high = max(0.02, *(float(scores.max()) for scores in found))
    return np.arange(np.floor(low / 0.02), np.ceil(high / 0.02 + 1e-9) + 1) * 0.02


def keys(runs: Sequence[Mapping[str, Any]], says: Sequence[str] = ()) -> Key:
    """The runs' colours; with what is said of each."""
    said = says or [""] * len(runs)
    return Key([(run["label"] + more, run["colour"]) for run, more in zip(runs, said, strict=True)])


def monosemanticity(runs: Sequence[Mapping[str, Any]], groups: Sequence[Group], grids: int) -> Section:
    """MonoScores of all runs, and what MonoLoss changes in each of ``groups``, of the first ``grids`` with latents."""
    judges = {run["similarity"]["title"]: run["similarity"]["baseline"] for run in runs}
    named = "; ".join(f"{title} (mean of all pairs {number(mean)}, dotted)" for title, mean in judges.items())
    says = []
    for metrics in (run["metrics"] for run in runs):
        says.append(f": {number(metrics['monoscore'])}")
        if 0 < metrics["scored_share"] < 0.9995:
            scored = f"{100 * metrics['scored_share']:.1f} %"
            says[-1] += f", {number(metrics['monoscore_scored'])} over the {scored} with a score"
    blocks: list[Block] = [
        "The MonoScore of a latent is the mean similarity of image pairs, each pair weighted by how strongly both "
        "images activate the latent. Where a run sees patch tokens, an image's activation is the largest of its "
        f"patches. Similarity is the cosine of image embeddings, here by {named}."
    ]  # fmt: skip
    if len(judges) > 1:
        blocks.append(Note("Scores by different judges have different scales: compare each with its own dotted line."))
    blocks += [Picture(profiles(runs), wide=True), keys(runs, says)]
    for i, group in enumerate(groups):
        blocks.append(Heading(f"With and without MonoLoss: {group.title}"))
        drawn = [comparison(group)], [Picture(group_profile(group))]
        blocks += [Beside(drawn, "minmax(0, 1fr) minmax(340px, 560px)")] if len(group.with_loss) == 1 else [*drawn]
        for arm in group.with_loss if i < grids else ():
            without, with_loss = pair = group.first_pair(arm)
            images = pictures(without), pictures(with_loss)
            if images[0] is None or images[1] is None:
                continue
            about = Note(
                "Latents sorted by MonoScore, at ranks spread over the dictionary and fixed in advance, of those at "
                "which both runs fire. Images sorted by activation (numbers at the right): the strongest, those in the "
                "middle, the weakest.")  # fmt: skip
            found = band_grid(pair, (images[0], images[1]))
            beside = f"without MonoLoss beside {group.label(arm)}"
            blocks.append(Fold("Latents of the same rank", [about, *found], beside, open=arm is group.with_loss[0]))
    return Section("Monosemanticity", blocks)
