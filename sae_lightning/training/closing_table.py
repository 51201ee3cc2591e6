"""The table at the end of ``train.py``: one row a run, for a single job as for a sweep on any launcher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from sae_lightning.saes.artefact import ArtefactError
from sae_lightning.training.identity import run_name
from sae_lightning.training.run import is_finished, load_record

POINTER = "run_folders.txt"  # written by train.py into Hydra's job folder; launchers share only the file system


class ClosingTable(Callback):
    """Hydra callback: collects each job's run folder and prints their scores when the command ends."""

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.show(run_folders(Path(config.hydra.run.dir)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.show(run_folders(Path(config.hydra.sweep.dir)))

    def show(self, folders: list[Path]) -> None:
        """Print the table of these runs."""
        print_table(folders)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status == JobStatus.FAILED:
            Console(stderr=True).print(f"[red]A job failed:[/] {' '.join(job_return.overrides or [])}")


def point_to(output: Path, cfgs: Sequence[DictConfig]) -> None:
    """Note in a job's folder which runs it trains."""
    output.mkdir(parents=True, exist_ok=True)
    folders = [(Path(cfg.paths.runs) / run_name(cfg)).resolve() for cfg in cfgs]
    (output / POINTER).write_text("".join(f"{folder}\n" for folder in folders))


def run_folders(outputs: Path) -> list[Path]:
    """The run folders that the jobs below ``outputs`` point to, in the order of their job numbers."""
    pointers = sorted(outputs.rglob(POINTER), key=lambda p: (len(p.parent.name), p.parent.name))
    return list(dict.fromkeys(Path(line) for p in pointers for line in p.read_text().splitlines()))


def print_table(folders: list[Path], console: Console | None = None) -> None:
    """One row a finished run: what it is, how well it reconstructs the val split, how long it took."""
    if not folders:
        return
    table = Table(title="Runs (scores on the val split)")
    for column in ("run", "backbone", "k of d_in", "d_sae", "expl. var.", "L0", "dead", "time"):
        table.add_column(column, justify="left" if column in ("run", "backbone") else "right", no_wrap=True)
    for folder in folders:
        if not is_finished(folder):
            table.add_row(folder.name, "not finished", *[""] * 6)
            continue
        try:
            row = load_record(folder)
        except ArtefactError as error:
            table.add_row(folder.name, str(error), *[""] * 6)
            continue
        scores, result = row["result"]["val"], row["result"]
        k = "–" if row["k"] is None else f"{row['k']:g}"
        table.add_row(
            row["name"], row["backbone"], f"{k} of {row['d_in']}", str(row["d_sae"]),
            *(
                format(scores[name], form) if math.isfinite(scores[name]) else "–"
                for name, form in (("explained_variance", ".3f"), ("l0", ".1f"), ("dead_share", ".1%"))
            ),
            f"{result['seconds']:.0f} s",
        )  # fmt: skip
    (console or Console(width=max(124, Console().width))).print(table)
