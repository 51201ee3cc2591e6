"""The table at the end of ``finetune.py``: one row a run, for a single job as for a sweep over λ."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sae_lightning.training.closing_table import ClosingTable

COLUMNS = {
    "accuracy": ("accuracy", "{:.2%}"), "monoscore": ("MonoScore", "{:.4f}"), "purity": ("purity", "{:.3f}"),
    "weighted_purity": ("weighted", "{:.3f}"), "positive_images": ("images a unit", "{:.0f}"),
}  # fmt: skip


class FinetuneTable(ClosingTable):
    """Hydra callback: collects each job's run folder and prints their scores when the command ends."""

    def show(self, folders: list[Path]) -> None:
        print_table(folders)


def print_table(folders: list[Path], console: Console | None = None) -> None:
    """One row a finished run: λ, accuracy, and how monosemantic the layer's units are, on the held-out split."""
    if not folders:
        return
    from sae_lightning.finetuning.run import is_finished  # not at the top: Hydra imports this before anything runs

    table = Table(title="Fine-tuned models (scores on the held-out split)")
    titles = [title for title, _ in COLUMNS.values()]
    for column in ("run", "λ", *titles, "s an epoch"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for folder in folders:
        if not is_finished(folder):
            table.add_row(folder.name, "not finished", *[""] * (len(COLUMNS) + 1))
            continue
        cfg, result = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("cfg.json", "result.json"))
        found, seconds = result[cfg["config"]["held_out"]], result["seconds_an_epoch"]
        values = [
            shape.format(found[name]) if math.isfinite(found[name]) else "–" for name, (_, shape) in COLUMNS.items()
        ]
        table.add_row(folder.name, f"{cfg['mono_weight']:g}", *values, "–" if seconds is None else f"{seconds:.1f}")
    (console or Console(width=max(124, Console().width))).print(table)
