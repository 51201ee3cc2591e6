"""One W&B run a training, which never holds the training up and goes on where an earlier attempt ended."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from sae_lightning.training import wandb_service

if TYPE_CHECKING:
    from wandb import Run

STEP = "trainer/global_step"
_open: set[str] = set()  # ids of the runs of this process
_starting = threading.Lock()  # trainings that share a process open their runs in threads


def open_run(
    options: Mapping[str, Any], folder: Path, config: Mapping[str, Any], tags: Sequence[str] = ()
) -> Run | None:
    """The W&B run of the training in ``folder``, whose name is its id; ``options`` are those of conf/logger/wandb.yaml.

    Online where ``options.offline`` is auto and the service answers; else offline, below ``folder``, with one line
    that says why and how to upload later. Several may be open in one process. None with WANDB_MODE=disabled, or where
    W&B cannot even write files. ConnectionError for ``offline: false`` where the service cannot be reached.
    """
    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    offline = options["offline"] is True
    if not offline:
        why = wandb_service.trouble(options["patience"])
        run = None
        if not why:
            run, why = _init("online", options, folder, config, tags)
        if run is not None:
            return run
        if options["offline"] is False:
            raise ConnectionError(f"{why}, but logger.wandb.offline=false; log in, or choose offline=auto.")
        later = f"upload later with `wandb sync {folder / 'wandb'}`"
        print(f"{folder.name}: {why}: logging offline; {later}.", flush=True)
    run, why = _init("offline", options, folder, config, tags)
    if run is None:
        print(f"{folder.name}: {why}: going on without; `evaluate.py logger=wandb` logs it later.", flush=True)
    return run


def _init(
    mode: Literal["online", "offline"], options: Mapping[str, Any], folder: Path, config: Mapping[str, Any],
    tags: Sequence[str],
) -> tuple[Run | None, str]:  # fmt: skip
    """The run, or None and the reason."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=options["patience"], finish_timeout=options["finish"]
    )
    run_id = folder.name + options["suffix"]
    about: dict[str, Any] = {
        "project": options["project"], "entity": options["entity"], "group": options["group"], "id": run_id,
        "name": run_id, "config": dict(config), "tags": [*dict.fromkeys((*tags, *options["tags"]))],
    }  # fmt: skip
    resume: Any = "allow" if mode == "online" else None
    try:
        with _starting:
            run = wandb.init(**about, dir=folder, mode=mode, resume=resume, reinit="create_new", settings=settings)
            _open.add(run_id)
    except Exception as error:  # whatever it is, it is no reason not to train
        with _starting:
            _release()
        why = f"W&B failed to start a run ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        if mode == "online":
            wandb_service.remember(why)
        return None, why
    run.define_metric(STEP, hidden=True)
    run.define_metric("*", step_metric=STEP)
    return run, ""


def _release() -> None:
    """Restart W&B's service, which holds on to the id of a run that did not start; not while other runs are open."""
    import wandb

    if not _open:
        with contextlib.suppress(Exception):
            wandb.teardown()


class WandbRun(WandbLogger):
    """Lightning's logger around an open run.

    W&B's step is the trainer's; what a resumed training logs again is left out. After an error the run ends as failed.
    An error of W&B itself is said once and ends the logging, not the training.
    """

    def __init__(self, run: Run | None, folder: Path) -> None:
        super().__init__(experiment=run, save_dir=folder, project=run.project if run else None)
        self.run = run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.run is None or (step is not None and step < self.run.starting_step):
            return
        try:
            self.run.log({**metrics} if step is None else {**metrics, STEP: step}, step=step)
        except Exception as error:
            print(f"W&B stopped logging ({error}); history.csv goes on.", flush=True)
            self.run = None

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if status == "failed":
            finish(self.run, 1)
            self.run = None


def finish(run: Run | None, exit_code: int = 0) -> None:
    """End the run; at most ``logger.wandb.finish`` seconds of waiting for its uploads."""
    if run is not None:
        try:
            run.finish(exit_code)
        except Exception as error:
            print(f"W&B did not finish ({error}); send the rest: `wandb sync {run.settings.sync_dir}`.", flush=True)
        _open.discard(run.id)


def log_artefact(run: Run, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Log ``sae.safetensors`` and ``cfg.json`` as an artifact of type sae."""
    import wandb

    artifact = wandb.Artifact(f"sae-{folder.name}", type="sae", metadata=dict(metadata))
    for name in (name for name in ("sae.safetensors", "cfg.json") if (folder / name).is_file()):
        artifact.add_file(str(folder / name), policy="immutable")  # not copied to a place in the home folder
    run.log_artifact(artifact)
