"""What a section of the page over a grid consists of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape

from sae_lightning.rendering.table import Table

TRAIN = "python train.py -m experiment=visaebench_grid"

EVALUATE = "python evaluate.py metrics=visaebench"


class Picture(NamedTuple):
    """An inline SVG with a ``title`` and a ``caption``."""

    svg: str
    title: str = ""
    caption: str = ""

    @property
    def width(self) -> float:
        """Its width as drawn, px."""
        found = re.search(r'width="([\d.]+)pt"', self.svg)
        return float(found[1]) * 96 / 72 if found else 600.0


@dataclass(frozen=True)
class Section:
    """``about`` are paragraphs; ``missing`` says in a line what lacks and which command makes it.

    ``keys`` asks for the legend of the backbones' colours.
    """

    title: str
    about: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    missing: str = ""
    keys: bool = False

    @property
    def anchor(self) -> str:
        """The name that links in the page use."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def plural(n: int, one: str, many: str = "") -> str:
    """``2 runs``, ``1 run``."""
    return f"{n} {one if n == 1 else many or f'{one}s'}"


def prose(text: str) -> Markup:
    """Text as HTML: what stands between backticks is code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def some(items: list[str], most: int = 8) -> str:
    """The first ``most`` items joined by commas, with the number of the others."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
