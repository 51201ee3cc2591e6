"""What an application leaves behind: ``app.json`` with its headline figures, a page, and tables beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from sae_lightning import __version__
from sae_lightning.saes.artefact import write_json, write_text

RECORD, PAGE = "app.json", "page.html"


@dataclass(frozen=True)
class Headline:
    """One figure beside its baseline: ``what`` was measured, ``ours``, the ``baseline``'s figure and its ``against``.

    ``interval`` is the 95 % confidence interval of ``ours``, or of the difference where ``what`` says so.
    """

    what: str
    ours: float
    baseline: float | None = None
    against: str = ""
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Result:
    """One finished application: where its files lie, and what it found."""

    app: str
    title: str
    folder: Path
    headlines: Sequence[Headline]

    @property
    def page(self) -> Path:
        return self.folder / PAGE


def leave(
    result: Result, about: str, settings: Mapping[str, Any], context: Mapping[str, Any], numbers: Mapping[str, Any]
) -> Result:
    """Write ``page.html`` from the template ``apps/<app>.html`` and then ``app.json``.

    ``about`` names the run or runs, ``settings`` what was asked for, ``numbers`` further figures (JSON), ``context``
    what the template shows beside ``about``, ``headlines`` and ``title``.
    """
    result.folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sae_lightning.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template(f"apps/{result.app}.html").render(
        title=result.title, about=about, headlines=result.headlines, version=__version__, **context
    )
    write_text(result.page, html)
    record = {
        "app": result.app, "title": result.title, "about": about, "version": __version__, "settings": dict(settings),
        "headlines": [asdict(headline) for headline in result.headlines], **numbers,
    }  # fmt: skip
    write_json(result.folder / RECORD, record)
    return result


def read_result(folder: Path) -> Result:
    """The result in ``folder``; FileNotFoundError when there is none."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return Result(record["app"], record["title"], folder, [Headline(**line) for line in record["headlines"]])
