"""What an application leaves behind: ``app.json`` with its headline figures, a page, and tables beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def read_result(folder: Path) -> Result:
    """The result in ``folder``; FileNotFoundError when there is none."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return Result(record["app"], record["title"], folder, [Headline(**line) for line in record["headlines"]])
