"""The table at the end of ``train.py``: one row a run, for a single job as for a sweep on any launcher."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, flag_override
from rich.console import Console
from rich.table import Table

POINTER = "run_folders"  # written by train.py into Hydra's job folder; launchers share only the file system
COMMAND = "SAE_LIGHTNING_COMMAND"  # environment of jobs: whose they are, as two sweeps may have one folder


class ClosingTable(Callback):
    """Hydra callback: collects each job's run folder and prints their scores when the command ends."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with flag_override(config.hydra, ["readonly", "struct"], False):
            config.hydra.job.env_set[COMMAND] = f"command-{uuid4().hex}"  # never read as a number

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.on_run_start(config)
        with flag_override(config.hydra, ["readonly", "struct"], False):  # jobs are composed anew from these
            config.hydra.overrides.hydra.append(f"++hydra.job.env_set.{COMMAND}={config.hydra.job.env_set[COMMAND]}")

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.show(run_folders(Path(config.hydra.run.dir), config.hydra.job.env_set.get(COMMAND) or ""))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.show(run_folders(Path(config.hydra.sweep.dir), config.hydra.job.env_set.get(COMMAND) or ""))

    def show(self, folders: list[Path]) -> None:
        """Print the table of these runs."""
        print_table(folders)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status == JobStatus.FAILED:
            Console(stderr=True).print(f"[red]A job failed:[/] {' '.join(job_return.overrides or [])}")


def point_to(output: Path, folders: Iterable[Path]) -> None:
    """Note in a job's folder which runs it trains, for the table of the command that started the job."""
    output.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{folder}\n" for folder in folders)
    (output / _pointer(os.environ.get(COMMAND, ""))).write_text(lines, encoding="utf-8")


def run_folders(outputs: Path, command: str = "") -> list[Path]:
    """The run folders that the jobs of ``command`` below ``outputs`` point to, in the order of their job numbers."""
    pointers = sorted(outputs.rglob(_pointer(command)), key=lambda p: (len(p.parent.name), p.parent.name))
    lines = (line for pointer in pointers for line in pointer.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(map(Path, lines)))


def _pointer(command: str) -> str:
    return f"{POINTER}-{command}.txt"


def print_table(folders: list[Path], console: Console | None = None) -> None:
    """One row a finished run: what it is, how well it reconstructs the val split, how long it took."""
    if not folders:
        return
    from sae_lightning.saes.artefact import ArtefactError  # not at the top: Hydra imports this before anything runs
    from sae_lightning.training.failed import failure, in_words
    from sae_lightning.training.run import is_finished, load_record

    table = Table(title="Runs (scores on the val split)")
    for column in ("run", "backbone", "k of d_in", "d_sae", "expl. var.", "L0", "dead", "time"):
        table.add_column(column, justify="left" if column in ("run", "backbone") else "right", no_wrap=True)
    partly: dict[str, str] = {}
    for folder in folders:
        if not is_finished(folder):
            table.add_row(folder.name, "not finished" if failure(folder) is None else "failed", *[""] * 6)
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
        if "in_part" in result:
            partly[row["name"]] = in_words(result["in_part"])
    console = console or Console(width=max(124, Console().width))
    console.print(table)
    for name, sentence in {**partly, **{f.name: f"failed. {why}" for f in folders if (why := failure(f))}}.items():
        console.print(f"{name}: {sentence}", markup=False, soft_wrap=True)
