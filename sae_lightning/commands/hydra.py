"""What Hydra is given beside the sweepers: the order of config folders, the closing table, and one GPU a process.

Hydra imports this file for every program that uses it, so nothing heavy stands at its top.
"""

from __future__ import annotations

import math
import os
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, flag_override, open_dict

from sae_lightning.commands.help import CONF, own_folder

if TYPE_CHECKING:
    from rich.console import Console

    from sae_lightning.files import Lock

POINTER = "run_folders"  # written by a command into Hydra's job folder; launchers share only the file system
COMMAND = "SAE_LIGHTNING_COMMAND"  # environment of jobs: whose they are, as two sweeps may have one folder
VISIBLE = "CUDA_VISIBLE_DEVICES"


class OwnConfigsFirst(SearchPathPlugin):
    """A user's files in ``--config-dir`` come before ours of the same name; Hydra would look there last."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        ours, own = SearchPathQuery(provider="main", path=str(CONF)), own_folder()
        if own is not None and any(element.path == ours.path for element in search_path.get_path()):
            search_path.prepend("own", f"file://{own.absolute()}", ours)


# --- the table at the end ---------------------------------------------------------------------------
class ClosingTable(Callback):
    """Hydra callback: collects each job's run folder and prints a row for each when the command ends.

    For a single job as for a sweep on any launcher. ``columns`` maps titles to what they show of a finished run: a
    template of its ``cfg.json``, its ``result.json``, and ``scores``, those of the split that was held out.
    """

    def __init__(self, title: str, columns: Mapping[str, str]) -> None:
        self.title, self.columns = title, columns

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

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status == JobStatus.FAILED:
            from rich.console import Console

            Console(stderr=True).print(f"[red]A job failed:[/] {' '.join(job_return.overrides or [])}")

    def show(self, folders: Sequence[Path], console: Console | None = None) -> None:
        """Print the table of these runs, and why some have failed or were trained in part."""
        if not folders:
            return
        from rich.console import Console

        from sae_lightning.rendering.table import Head, Table

        found = {folder.name: self.row(folder) for folder in folders}
        scores = ["scores[" in shown for shown in self.columns.values()]  # what else there is a run's name holds too
        before = [""] * (scores.index(True) if True in scores else 0)
        rows = [[name, *(cells if len(cells) == len(scores) else [*before, *cells, *[""] * len(scores)][: len(scores)])]
                for name, (cells, _) in found.items()]  # fmt: skip
        heads = [Head("run"), *(Head(title, drop=int(not s)) for title, s in zip(self.columns, scores, strict=True))]
        console = console or Console()
        Table("runs", self.title, heads, rows).show(console)
        for name, (_, remark) in found.items():
            if remark:
                console.print(f"{name}: {remark}", markup=False, soft_wrap=True)

    def row(self, folder: Path) -> tuple[list[str], str]:
        """The cells of a run, one in words where it is not finished, and what is to be said of it below the table."""
        from sae_lightning.files import read_json, whole
        from sae_lightning.saes.artefact import ArtefactError

        files = [folder / name for name in ("cfg.json", "result.json")]  # the second is written last
        if not all(map(whole, files)):
            from sae_lightning.runs.state import failure

            why = failure(folder)
            return (["not finished"], "") if why is None else (["failed"], f"failed. {why}")
        try:
            made, result = (read_json(file, "train the run again", ArtefactError) for file in files)
        except ArtefactError as error:
            return [str(error)], ""
        scores = result[made["config"].get("held_out", "val")]
        cells = [_Cell().format(shown, **(made | result), scores=scores) for shown in self.columns.values()]
        if "in_part" not in result:
            return cells, ""
        from sae_lightning.runs.state import in_words

        return cells, in_words(result["in_part"])


class _Cell(string.Formatter):
    """Formats a cell; what is no number reads –."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "–"
        return format(value, format_spec)


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


# --- one run a GPU ----------------------------------------------------------------------------------
class OneGPU(Callback):
    """Hydra callback: a sweep starts as many processes as there are GPUs, and each shows its jobs one of them.

    A process takes its GPU at its first job and keeps it until it ends, by a lock file in the sweep's folder.
    RuntimeError when there are more processes than GPUs. Without GPUs it changes nothing.
    """

    def __init__(self) -> None:
        self.gpus: list[str] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.gpus = visible_gpus()
        if self.gpus and config.hydra.launcher.n_jobs == -1:
            with open_dict(config):
                config.hydra.launcher.n_jobs = len(self.gpus)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.gpus:
            os.environ[VISIBLE] = take(self.gpus, Path(config.hydra.sweep.dir) / ".gpus")


_taken: list[tuple[str, Lock]] = []  # by this process


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get(VISIBLE)
    if named is None:
        import torch

        return [str(i) for i in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip()]


def take(gpus: list[str], folder: Path) -> str:
    """One of ``gpus`` that no other process which uses ``folder`` has; the same again in later calls."""
    from filelock import Timeout

    from sae_lightning.files import Lock

    if _taken:
        return _taken[0][0]
    folder.mkdir(parents=True, exist_ok=True)
    for gpu in gpus:
        lock = Lock(folder / f"{gpu.replace('/', '-')}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _taken.append((gpu, lock))
        return gpu
    raise RuntimeError(
        f"All {len(gpus)} GPUs ({', '.join(gpus)}) are taken by other processes of this sweep; lower "
        "hydra.launcher.n_jobs to the number of GPUs."
    )
