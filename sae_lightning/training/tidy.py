"""Removing runs, what of a folder of runs is left over, and in which settings two runs differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_lightning.locks import held
from sae_lightning.saes.artefact import ArtefactError, read_cfg, write_json
from sae_lightning.training.identity import RULES, settings_of
from sae_lightning.training.leaves import leaves_of
from sae_lightning.training.plan import PLAN, planned, state_of, states

LEFT_OVER = ("resolved.yaml", "meeting.json")  # of a finished run


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
    return [
        path for run in finished for path in sorted(run.iterdir())
        if path.name in LEFT_OVER or path.name.endswith(".partial")
    ]  # fmt: skip


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
        raise ArtefactError(f"{run / 'cfg.json'} holds no config: that SAE was not trained here.")
    return made


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
