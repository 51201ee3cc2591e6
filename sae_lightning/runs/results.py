"""What an application finds of a run or several, and leaves behind: ``app.json`` with its headline figures, a page, and
tables beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

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
    """What an application found.

    ``about`` names the run or runs (by default their label or number); ``lead`` are the blocks of the page's head and
    ``sections`` what follows (see ``rendering.page``). ``tables`` and ``texts`` are written under their names beside
    the page, ``numbers`` (JSON) into app.json. ``app`` and ``folder`` say whose it is and where it lies once written.
    """

    title: str
    headlines: Sequence[Headline] = ()
    lead: Sequence[Any] = ()
    sections: Sequence[Any] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    app: str = ""
    folder: Path = Path()

    @property
    def page(self) -> Path:
        return self.folder / PAGE


def read_result(folder: Path) -> Result:
    """The headline figures of the result in ``folder``; FileNotFoundError when there is none."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    headlines = [Headline(**line) for line in record["headlines"]]
    return Result(record["title"], headlines, app=record["app"], folder=folder)
