"""Applications: functions over opened runs, by name, and how what they find is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from omegaconf import DictConfig, OmegaConf

from sae_lightning import __version__
from sae_lightning.files import write_json, write_text
from sae_lightning.registry import Registry, import_plugins, one_of
from sae_lightning.rendering.page import Note, headlines, page
from sae_lightning.runs.results import RECORD, Result
from sae_lightning.runs.run import Run, chosen_runs, shared_results

Application = Callable[[Sequence[Run], DictConfig], Result | None]

APPS: Registry[Application] = Registry("app")
TOGETHER: set[str] = set()  # those that take all runs at once
OURS = [module.name for module in iter_modules([str(Path(__file__).parent)]) if module.ispkg]  # a folder each


def app(name: str, together: bool = False) -> Callable[[Application], Application]:
    """A decorator that makes ``run(runs, cfg)`` the application ``name``.

    It is called for one run after another, or with ``together`` once for all, and returns what is to be written, None
    for nothing. The options of ``cfg.app`` stand in conf/app/<name>.yaml.
    """

    def add(run: Application) -> Application:
        if together:
            TOGETHER.add(name)
        return APPS.add(name, run)

    return add


def load_app(name: str) -> Application:
    """The application ``name``, ours or another package's; ValueError for an unknown one."""
    if name in OURS:
        import_module(f"sae_lightning.apps.{name}.app")
    elif name not in APPS:
        import_plugins()
        one_of(name, dict.fromkeys([*OURS, *APPS]), "app")
    return APPS[name]


def explore(cfg: DictConfig) -> list[Result]:
    """What the application ``cfg.app.name`` finds of the runs that ``cfg.run`` names, written.

    FileNotFoundError when there is no such run; ValueError, DataError and the like with a sentence for what does not
    fit the application.
    """
    load_app(cfg.app.name)
    return results_of([Run(folder) for folder in chosen_runs(cfg.run, Path(cfg.paths.runs))], cfg)


def results_of(runs: Sequence[Run], cfg: DictConfig) -> list[Result]:
    """What ``cfg.app`` finds of ``runs``, written."""
    name = cfg.app.name
    run, found = load_app(name), []
    for some in [runs] if name in TOGETHER else [[one] for one in runs]:
        result = run(some, cfg)
        if result is not None:
            found.append(write_result(result, some, cfg))
    return found


def write_result(result: Result, runs: Sequence[Run], cfg: DictConfig) -> Result:
    """Write tables, texts, ``page.html`` and then ``app.json`` into ``apps/<app>`` of the run, or beside several."""
    name = cfg.app.name
    folder = shared_results(runs, name, cfg.paths.runs) if name in TOGETHER else runs[0].results(name)
    about = result.about or (runs[0].label if len(runs) == 1 else f"{len(runs)} runs")
    result = replace(result, app=name, folder=folder, about=about)
    folder.mkdir(parents=True, exist_ok=True)
    for file, table in result.tables.items():
        table.to_parquet(folder / file, index=False)
    for file, text in result.texts.items():
        write_text(folder / file, text)
    lead = [Note(about), *result.lead, *([headlines(result.headlines)] if result.headlines else [])]
    write_text(result.page, page(f"{result.title} · {about}", lead, result.sections, heading=result.title))
    asked = OmegaConf.to_container(cfg.app, resolve=False)
    record = {
        "app": name, "title": result.title, "about": about, "version": __version__,
        "settings": {**dict(asked), "split": cfg.split, "seed": cfg.seed},  # type: ignore[arg-type]
        "headlines": [asdict(headline) for headline in result.headlines], **result.numbers,
    }  # fmt: skip
    write_json(folder / RECORD, record)
    return result
