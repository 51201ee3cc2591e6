"""What is said of an evaluated run, under the same names in every logger."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_lightning.benchmark.summary import SCORES
from sae_lightning.benchmark.table import read_rows
from sae_lightning.benchmark.visaebench import HEADLINES, headline

GOALS = {  # which way is better, of what runs are compared by
    "val/explained_variance": "maximize", "val/cosine": "maximize", "val/fvu": "minimize",
    "val/dead_share": "minimize", "train/loss": "minimize", "loss/*": "minimize",
    "test/explained_variance": "maximize", "test/fvu": "minimize", "test/monoscore": "maximize",
    **{f"test/{h.title[:2]}": "maximize" if h.better else "minimize" for h in HEADLINES},
}  # fmt: skip


def scores_of(run: Path) -> dict[str, float]:
    """``test/fvu`` and the other core metrics of ``scores.json``, and ``test/M1`` … ``test/M7`` where there are some.

    The prefix is the split that was scored.
    """
    scores = json.loads((run / SCORES).read_text(encoding="utf-8"))
    split = scores["split"]
    found = {f"{split}/{name}": float(value) for name, value in scores["metrics"].items()}
    rows = [row for row in read_rows(run) if row["split"] == split]
    found |= {f"{split}/{h.title[:2]}": headline(rows, h) for h in HEADLINES}
    return {name: value for name, value in found.items() if value == value}


def trained(run: Path) -> dict[str, Any]:
    """What a finished training says of itself: ``seconds``, ``steps``, … and ``val/…``."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    val = {f"val/{name}": value for name, value in result.pop("val").items()}
    return {name: value for name, value in result.items() if isinstance(value, int | float | str)} | val


def history_rows(run: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The rows of ``history.csv`` at the steps at which loggers count them, which begin with 0."""
    path = run / "history.csv"
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = {name: float(cell) for name, cell in row.items() if cell and name not in ("step", "epoch")}
            yield int(row["step"]) - 1, values
