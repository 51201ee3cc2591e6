"""Pages: sections of prose, tables, figures and cards, and the one template that shows them all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from sae_lightning import __version__
from sae_lightning.rendering.table import Head, Table

TRAIN = "python train.py -m experiment=visaebench_grid"

EVALUATE = "python evaluate.py metrics=visaebench"


@dataclass(frozen=True)
class Note:
    """A paragraph in grey; with ``lacks`` set apart, as what is missing and which command makes it."""

    text: str
    lacks: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading within a section, with an ``aside`` in grey; a link where there is an ``href``."""

    text: str
    aside: str = ""
    href: str = ""


@dataclass(frozen=True)
class Picture:
    """An inline SVG with a ``title`` and a ``caption``; ``wide`` as wide as the page."""

    svg: str
    title: str = ""
    caption: str = ""
    wide: bool = False

    @property
    def width(self) -> float:
        """Its width as drawn, px."""
        found = re.search(r'width="([\d.]+)pt"', self.svg)
        return float(found[1]) * 96 / 72 if found else 600.0


@dataclass(frozen=True)
class Key:
    """What colours stand for: titles by colour, in pairs; behind a click where there are many."""

    colours: Sequence[tuple[str, str]]
    more: Sequence[tuple[str, str]] = ()  # dashes of lines, and what they stand for
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Strip:
    """A row of pictures, a data URI, ``share`` of the card's width, with what stands ``left`` and ``right`` of it."""

    uri: str
    alt: str
    share: float = 1.0
    left: str = ""
    right: str = ""


@dataclass(frozen=True)
class Card:
    """Strips below a ``title`` (bold), an ``aside`` and what stands at the ``right``, above a ``footer``."""

    title: str
    strips: Sequence[Strip]
    aside: str = ""
    right: str = ""
    footer: str = ""


@dataclass(frozen=True)
class Cards:
    """Cards side by side: as many as there is room for at the ``least`` width in pixels, or ``columns``."""

    cards: Sequence[Card]
    columns: int = 0
    least: int = 0


class Number(NamedTuple):
    """A figure as text, and what it is."""

    text: str
    what: str


@dataclass(frozen=True)
class Numbers:
    """Some figures, large, side by side."""

    numbers: Sequence[Number]


@dataclass(frozen=True)
class Beside:
    """Columns of blocks, side by side where there is room: ``widths`` as of a CSS grid."""

    columns: Sequence[Sequence[Any]]
    widths: str = ""


@dataclass(frozen=True)
class Fold:
    """Blocks behind a ``title``, with an ``aside`` in grey and maybe a dot of ``colour``, seen after a click."""

    title: str
    blocks: Sequence[Any]
    aside: str = ""
    colour: str = ""
    open: bool = False


Block = Any  # str (a paragraph), Markup, Note, Heading, Picture, Table, Key, Cards, Numbers, Beside or Fold


class Section:
    """A ``title`` and its ``blocks`` in order; lists of them are laid out, and what is empty is left out."""

    def __init__(self, title: str, *blocks: Block | Sequence[Block]) -> None:
        self.title, self.blocks = title, tuple(_flat(blocks))

    @property
    def anchor(self) -> str:
        """The name that links in the page use."""
        return slug(self.title)

    @property
    def about(self) -> list[str]:
        """Its paragraphs."""
        return [block for block in self.blocks if isinstance(block, str)]

    @property
    def tables(self) -> list[Table]:
        """All its tables."""
        return [block for block in _all(self.blocks) if isinstance(block, Table)]

    @property
    def pictures(self) -> list[Picture]:
        """All its figures."""
        return [block for block in _all(self.blocks) if isinstance(block, Picture)]

    @property
    def missing(self) -> str:
        """What it says is missing."""
        return next((block.text for block in self.blocks if isinstance(block, Note) and block.lacks), "")


def lacking(text: str) -> Note:
    """In place of what there is nothing to show of: what is missing, and which command makes it."""
    return Note(text, lacks=True)


def _flat(blocks: Iterable[Any]) -> Iterator[Any]:
    for block in blocks:
        if isinstance(block, list | tuple):
            yield from _flat(block)
        elif block:
            yield block


def _all(blocks: Iterable[Any]) -> Iterator[Any]:
    """Blocks with those inside of others."""
    for block in blocks:
        yield block
        if isinstance(block, Fold):
            yield from _all(_flat(block.blocks))
        elif isinstance(block, Beside):
            yield from _all(_flat(block.columns))


def laid_out(blocks: Iterable[Any]) -> list[tuple[str, list[Any]]]:
    """Blocks by kind, those of one kind that follow each other together: figures stand side by side."""
    return [(kind, list(same)) for kind, same in groupby(_flat(blocks), lambda b: type(b).__name__.lower())]


def slug(text: str) -> str:
    """``"Codes lift, ρ"`` as ``codes-lift-ρ``."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def plural(n: int, one: str, many: str = "") -> str:
    """``2 runs``, ``1 run``."""
    return f"{n} {one if n == 1 else many or f'{one}s'}"


def prose(text: str) -> Markup:
    """Text as HTML: what stands between backticks is code; markup stays."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def pictured(uri: str, alt: str, *lines: str, width: int = 76, frame: str = "") -> Markup:
    """A cell of a table: a picture, in a ``frame`` of that colour, above ``lines`` of small text."""
    style = f"width:{width}px;image-rendering:pixelated;display:block" + (f";border:3px solid {frame}" if frame else "")
    image = Markup('<img src="{}" alt="{}" style="{}">').format(uri, alt, style)
    return image + Markup("").join(Markup("<small>{}</small><br>").format(line) for line in lines)


def some(items: list[str], most: int = 8) -> str:
    """The first ``most`` items joined by commas, with the number of the others."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def headlines(lines: Iterable[Any], title: str = "") -> Table:
    """Headline figures of an application beside their baselines."""
    heads = [Head(""), Head("value", ".3g"), Head("95 % interval"), Head("baseline", ".3g"), Head("of")]
    rows = [
        [line.what, line.ours, "{:.3g} to {:.3g}".format(*line.interval) if line.interval else "",
         line.baseline, line.against]
        for line in lines
    ]  # fmt: skip
    return Table("", title, heads, rows)


@cache
def environment() -> jinja2.Environment:
    """Where all pages' templates are read from."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("sae_lightning.rendering"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"prose": prose, "laid_out": laid_out}
    made.globals |= {"version": __version__, "plural": plural}
    return made


def render(template: str, context: Mapping[str, Any]) -> str:
    """A template filled in."""
    return environment().get_template(template).render(context)


def page(title: str, lead: Sequence[Block], sections: Sequence[Section], tables: str = "", heading: str = "") -> str:
    """A page of ``sections`` below a ``lead``, with links to each; self-contained HTML.

    ``tables`` names the folder beside it in which the tables are as csv and LaTeX; ``heading`` is shown for the title.
    """
    shown = {"title": title, "heading": heading or title, "lead": lead, "sections": sections, "tables": tables}
    return render("page.html", shown)
