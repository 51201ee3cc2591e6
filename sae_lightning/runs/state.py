"""What sweeps were to train in a folder of runs, and how far each run is: ``sae-lightning runs``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from sae_lightning.features.source import looking_once
from sae_lightning.files import Lock, half_files, held, read_json, set_aside, write_json
from sae_lightning.runs.identity import RULES, leaves_of, run_name, settings_of
from sae_lightning.runs.run import CFG, CHECKPOINTS, FAILED, HISTORY, LAST, LOCK, NOTES, RESULT, is_finished
from sae_lightning.runs.scores import read_rows
from sae_lightning.saes.artefact import ArtefactError, read_cfg

PLAN = "planned.json"  # in the folder of all runs

MARKS = (LOCK, CFG, FAILED)  # what tells a run's folder from others


def last_checkpoint(run: Path) -> Path:
    """Where the checkpoint lies that ``run`` goes on from."""
    return run / CHECKPOINTS / LAST


def failure(folder: Path) -> str | None:
    """Why the run in ``folder`` has failed; None where it has not."""
    path = folder / FAILED
    return read_json(path, "delete it")["about"] if path.is_file() else None


def in_words(part: Mapping[str, Any]) -> str:
    """``in part: limit_train_batches=3``; empty for a whole training."""
    said = [f"{name}={value}" if name != "stopped_early" else f"stopped {value}" for name, value in part.items()]
    return f"in part: {', '.join(said)}" if said else ""


def is_a_try(cfg: DictConfig) -> bool:
    """Whether this is Lightning's ``fast_dev_run``, which leaves nothing behind."""
    return bool(cfg.trainer.get("fast_dev_run"))


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
        result = read_json(run / RESULT, "train the run again")
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
    return (run / LOCK).exists() and Lock(run / LOCK).taken()


def _last_step(run: Path) -> int | None:
    """The step of the last row of history.csv."""
    path = run / HISTORY
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if len(lines) < 2:
        return None
    return int(dict(zip(lines[0].split(","), lines[-1].split(","), strict=False))["step"])


def _parts_scored(run: Path) -> int:
    """Parts of the benchmark that the run has scores of."""
    return len({row["part"] for row in read_rows(run)})


class Difference(NamedTuple):
    """A ``setting`` that differs, its two values, and ``reason`` why it is no other run for that; None where it is."""

    setting: str
    first: Any
    second: Any
    reason: str | None


def matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Names of the runs in ``folder``, planned ones included, that ``patterns`` (or paths) name, in their order.

    FileNotFoundError for a pattern that names none.
    """
    there = [state.name for state in states(folder)] if folder.is_dir() else []
    found: list[str] = []
    for pattern in patterns:
        name = Path(pattern).name if Path(pattern).parent.resolve() == folder.resolve() else pattern
        named = [run for run in there if Path(run).match(name)]
        if not named:
            raise FileNotFoundError(
                f"No run in {folder} is called {pattern}; `sae-lightning runs {folder}` lists them."
            )
        found += [run for run in named if run not in found]
    return found


def remove(folder: Path, names: Sequence[str]) -> None:
    """Remove runs with all that is in their folders, and from the plan."""
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=not (folder / name).exists())
    if (folder / PLAN).is_file():
        with held(folder / f".{PLAN}.lock", f"removing runs from the plan of {folder}"):
            write_json(folder / PLAN, {name: entry for name, entry in planned(folder).items() if name not in names})


def without_use(folder: Path) -> list[str]:
    """Runs that hold nothing to go on from: failed ones, and those that would start anew."""
    found = [state for state in states(folder) if state.state in ("failed", "broken")]
    return [s.name for s in found if s.state == "failed" or s.about.endswith("starts anew")]


def left_over(folder: Path) -> list[Path]:
    """What finished runs no longer need: notes for ranks, and files that were being written."""
    finished = [folder / state.name for state in states(folder) if state.state == "finished"]
    found = [[*half_files(run), *run.glob("*.partial"), *(run / name for name in NOTES)] for run in finished]
    return [path for paths in found for path in paths if path.exists()]


def is_running(run: Path) -> bool:
    """Whether another process trains this run."""
    return state_of(run).state == "running"


def differences(first: Path, second: Path) -> Iterator[Difference]:
    """In which leaves two runs differ, first those that make them different runs.

    ArtefactError for a folder without a cfg.json that says its config.
    """
    made = [_made(run) for run in (first, second)]
    own = [dict(leaves_of(one["config"])) for one in made]
    counted = [settings_of(one) for one in made]
    found = []
    for leaf in dict.fromkeys([*counted[0], *counted[1], *own[0], *own[1]]):
        values = [whole.get(leaf, kept.get(leaf)) for whole, kept in zip(own, counted, strict=True)]
        if counted[0].get(leaf) != counted[1].get(leaf):
            found.append(Difference(leaf, values[0], values[1], None))
        elif values[0] != values[1]:
            reason = RULES.reason(leaf, made[0]["config"]) or RULES.reason(leaf, made[1]["config"])
            found.append(Difference(leaf, values[0], values[1], reason or "it means the same"))
    yield from sorted(found, key=lambda difference: difference.reason is not None)


def _made(run: Path) -> Mapping[str, Any]:
    made = read_cfg(run)
    if "config" not in made:
        raise ArtefactError(f"{run / CFG} holds no config: that SAE was not trained here.")
    return made


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
