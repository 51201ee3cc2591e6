"""What sweeps were to train in a folder of runs, and how far each run is: ``sae-lightning runs``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from sae_lightning.damage import set_aside
from sae_lightning.features.ensure import looking_once
from sae_lightning.locks import Lock, held
from sae_lightning.saes.artefact import write_json
from sae_lightning.training.checkpoints import last_checkpoint
from sae_lightning.training.failed import FAILED, failure, in_words
from sae_lightning.training.identity import run_name
from sae_lightning.training.run import is_a_try, is_finished

PLAN = "planned.json"
MARKS = (".lock", "cfg.json", FAILED)  # what tells a run's folder from others


def note_plan(cfgs: Sequence[DictConfig], overrides: Sequence[Sequence[str]], sweep: Path) -> None:
    """Add the runs of a sweep to ``planned.json`` of their folder."""
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    folders: dict[Path, dict[str, Any]] = {}
    with looking_once():
        for cfg, chosen in zip(cfgs, overrides, strict=True):
            if is_a_try(cfg):
                continue
            folders.setdefault(Path(cfg.paths.runs), {})[run_name(cfg)] = {
                "overrides": list(chosen), "sweep": str(sweep), "planned": when,
            }  # fmt: skip
    for folder, runs in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder / f".{PLAN}.lock", f"planning a sweep in {folder}"):
            write_json(folder / PLAN, planned(folder) | runs)


def planned(folder: Path) -> dict[str, Any]:
    """Runs by name that sweeps have planned in ``folder``; none where the list is damaged, which is then set aside."""
    path = folder / PLAN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no list of runs")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        set_aside(path, str(error), "runs that were planned and not begun are no longer listed, all others are")
        return {}
    return found


class State(NamedTuple):
    """How far a run is: finished, failed, running, broken or planned; ``about`` is what there is to say of it."""

    name: str
    state: str
    about: str = ""
    scores: int = 0


def states(folder: Path) -> list[State]:
    """The runs in ``folder`` and those planned there, in the order of the plan, then by name."""
    found = [p.name for p in sorted(folder.iterdir()) if any((p / name).exists() for name in MARKS)]
    return [state_of(folder / name) for name in dict.fromkeys([*planned(folder), *found])]


def state_of(run: Path) -> State:
    """How far one run is; ``running`` where another process holds it."""
    if is_finished(run):
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        value = (result.get("val") or {}).get("explained_variance")
        said = [f"{result['seconds']:.0f} s", *([] if value is None else [f"expl. var. {value:.3f}"])]
        about = ", ".join([*said, *([in_words(result["in_part"])] if "in_part" in result else [])])
        return State(run.name, "finished", about, _parts_scored(run))
    if not run.is_dir():
        return State(run.name, "planned")
    if (why := failure(run)) is not None and not _held(run):
        return State(run.name, "failed", why)
    last = _last_step(run)
    about = "" if last is None else f"at step {last}"
    if _held(run):
        return State(run.name, "running", about)
    kept = last_checkpoint(run).is_file()
    return State(run.name, "broken", f"{about}, goes on from its checkpoint" if kept else "starts anew")


def _held(run: Path) -> bool:
    return (run / ".lock").exists() and Lock(run / ".lock").taken()


def _last_step(run: Path) -> int | None:
    """The step of the last row of history.csv."""
    path = run / "history.csv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if len(lines) < 2:
        return None
    return int(dict(zip(lines[0].split(","), lines[-1].split(","), strict=False))["step"])


def _parts_scored(run: Path) -> int:
    """Parts of the benchmark that the run has scores of."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(run / "scores.parquet", columns=["part"])
    except (FileNotFoundError, pa.ArrowException):
        return 0
    return len(set(table["part"].to_pylist()))
