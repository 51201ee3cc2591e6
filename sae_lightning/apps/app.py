"""What an application leaves behind: ``app.json`` with its headline figures, a page, and tables beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sae_lightning import __version__
from sae_lightning.files import write_json, write_text
from sae_lightning.registry import one_of
from sae_lightning.rendering.page import render
from sae_lightning.runs.results import RECORD, Result
from sae_lightning.runs.run import Opened, chosen_runs


def leave(
    result: Result, about: str, settings: Mapping[str, Any], context: Mapping[str, Any], numbers: Mapping[str, Any]
) -> Result:
    """Write ``page.html`` from the template ``apps/<app>.html`` and then ``app.json``.

    ``about`` names the run or runs, ``settings`` what was asked for, ``numbers`` further figures (JSON), ``context``
    what the template shows beside ``about``, ``headlines`` and ``title``.
    """
    result.folder.mkdir(parents=True, exist_ok=True)
    shown = {"title": result.title, "about": about, "headlines": result.headlines, **context}
    write_text(result.page, render(f"apps/{result.app}.html", shown))
    record = {
        "app": result.app, "title": result.title, "about": about, "version": __version__, "settings": dict(settings),
        "headlines": [asdict(headline) for headline in result.headlines], **numbers,
    }  # fmt: skip
    write_json(result.folder / RECORD, record)
    return result


EACH = ("naming", "search", "bias", "steering")  # one run after another: run(opened, cfg) -> Result

TOGETHER = ("stability", "agreement", "explorer")  # all runs at once: run(all_opened, cfg) -> Result | None


def explore(cfg: DictConfig) -> list[Result]:
    """The application ``cfg.app.name`` over the runs that ``cfg.run`` names; what each left behind.

    FileNotFoundError when there is no such run; ValueError, DataError and the like with a sentence for what does not
    fit the application.
    """
    name = cfg.app.name
    one_of(name, EACH + TOGETHER, "app")
    application: Callable = import_module(f"sae_lightning.apps.{name}.app").run
    opened = [Opened(folder) for folder in chosen_runs(cfg.run, Path(cfg.paths.runs))]
    if name in TOGETHER:
        result = application(opened, cfg)
        return [] if result is None else [result]
    return [application(run, cfg) for run in opened]
