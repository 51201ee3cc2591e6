"""From ``explore.py``'s config to finished applications."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from glob import glob
from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from sae_lightning.apps.opened import Opened
from sae_lightning.apps.result import Result
from sae_lightning.benchmark.evaluate import finished_runs

EACH = ("naming", "search", "bias", "steering")  # one run after another: run(opened, cfg) -> Result
TOGETHER = ("stability", "agreement", "explorer")  # all runs at once: run(all_opened, cfg) -> Result | None


def explore(cfg: DictConfig) -> list[Result]:
    """The application ``cfg.app.name`` over the runs that ``cfg.run`` names; what each left behind.

    FileNotFoundError when there is no such run; ValueError, DataError and the like with a sentence for what does not
    fit the application.
    """
    name = cfg.app.name
    if name not in EACH + TOGETHER:
        raise ValueError(f"Unknown app={name}; choose one of {', '.join(EACH + TOGETHER)}.")
    application: Callable = import_module(f"sae_lightning.apps.{name}.app").run
    opened = [Opened(folder) for folder in chosen_runs(cfg.run, Path(cfg.paths.runs))]
    if name in TOGETHER:
        result = application(opened, cfg)
        return [] if result is None else [result]
    return [application(run, cfg) for run in opened]


def chosen_runs(wanted: str | Iterable[str], folder: Path) -> list[Path]:
    """The finished runs that ``wanted`` names: folders or patterns of them, or names or patterns of names below
    ``folder``; one or several.

    FileNotFoundError with a sentence when one names no finished run.
    """
    several = list(wanted) if isinstance(wanted, (list, tuple, ListConfig)) else [str(wanted)]
    found: list[Path] = []
    for one in several:
        paths = sorted(Path(path) for path in glob(one) if (Path(path) / "result.json").is_file())
        if not paths and Path(one).is_absolute():
            raise FileNotFoundError(f"No finished run is {one}; give the folder of one that train.py has finished.")
        found += paths or finished_runs(one, folder)
    return list(dict.fromkeys(found))
