"""MonoScore and purity over explained variance: the batch form of MonoLoss against sums that remember.

    python train.py -m experiment=monoloss/memory paths.runs=runs/memory
    python evaluate.py paths.runs=runs/memory
    python -m experiments.monoloss.frontier --runs runs/memory --out experiments/monoloss/frontier.png

One mark a weight (mean over seeds, bars of one standard deviation), one line a memory; prints the table too.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from sae_lightning.report.monoloss import shown, summary
from sae_lightning.runs.identity import monoloss_of
from sae_lightning.runs.run import SCORES, find_runs
from sae_lightning.saes.artefact import read_cfg

AXES = {"monoscore": "MonoScore", "purity": "class purity"}
Marks = dict[tuple[float, float], list[dict[str, float]]]  # (memory, weight) → metrics of each seed


def collect(folder: Path) -> Marks:
    """Metrics of the evaluated runs in ``folder``; FileNotFoundError for one without scores."""
    marks: Marks = defaultdict(list)
    for run in find_runs("*", folder):
        if not (run / SCORES).is_file():
            raise FileNotFoundError(f"{run.name} has no scores yet; run evaluate.py paths.runs={folder}.")
        weight, options = monoloss_of(read_cfg(run)["config"])
        marks[(float(options.get("memory", 0.0)), weight)].append(
            json.loads((run / SCORES).read_text(encoding="utf-8"))["metrics"]
        )
    return dict(sorted(marks.items()))


def draw(marks: Marks, out: Path) -> None:
    """The figure: one panel a metric."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, (metric, label) in zip(figure.subplots(1, len(AXES)), AXES.items(), strict=True):
        for memory in dict.fromkeys(memory for memory, weight in marks if weight):
            here = [(weight, runs) for (m, weight), runs in marks.items() if m == memory or weight == 0]
            x = [summary(run["explained_variance"] for run in runs) for _, runs in sorted(here)]
            y = [summary(run[metric] for run in runs) for _, runs in sorted(here)]
            name = f"memory {memory:g}" if memory else "batch alone (the paper's)"
            bars = {"xerr": [sd or 0 for _, sd, _ in x], "yerr": [sd or 0 for _, sd, _ in y]}
            xs, ys = ([mean for mean, *_ in points] for points in (x, y))
            axis.errorbar(xs, ys, **bars, fmt="o-", ms=4, lw=1.2, capsize=2, label=name)
            for (weight, _), (ev, *_), (score, *_) in zip(sorted(here), x, y, strict=True):
                axis.annotate(f"{weight:g}", (ev, score), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.set(xlabel="explained variance (test)", ylabel=label)
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=130)


def table(marks: Marks) -> str:
    """Markdown: one row a memory and weight."""
    lines = ["| memory | weight | seeds | explained variance | MonoScore | purity |", "|---|---|---|---|---|---|"]
    for (memory, weight), runs in marks.items():
        cells = []
        for metric in ("explained_variance", *AXES):
            cells.append(shown(summary(run[metric] for run in runs)))
        lines.append(f"| {memory:g} | {weight:g} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/memory"))
    parser.add_argument("--out", type=Path, default=Path("experiments/monoloss/frontier.png"))
    args = parser.parse_args()
    marks = collect(args.runs)
    draw(marks, args.out)
    print(table(marks))


if __name__ == "__main__":
    main()
