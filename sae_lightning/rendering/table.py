"""Tables: one description, shown as HTML and in the terminal, and written as csv, Markdown and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "–"


def number(value: float, form: str = ".3f") -> str:
    """A number as text; – for one that is not finite."""
    return format(value, form).replace("%", " %") if math.isfinite(value) else NOTHING


Cell = Any  # str, a number, Spread, Measured, Unknown, Keyed or None

MARKED = "The best value of a column is marked, with those within its 95 % interval; none where all are."

P = "p"  # the form of p-values, of which small ones read <0.001

LINE = 26  # letters of a cell that are not broken into lines


class Spread(NamedTuple):
    """A mean with the standard deviation of what it is of; None or NaN where there is none."""

    mean: float
    std: float | None


class Measured(NamedTuple):
    """A number with its 95 % interval, over ``n`` of a ``unit``, such as pictures."""

    value: float
    low: float
    high: float
    n: int
    unit: str

    @property
    def of(self) -> str:
        """What it is over, such as 1,000 pictures."""
        return f"{self.n:,} {self.unit}"


class Unknown(NamedTuple):
    """A cell without a number, and ``why``."""

    why: str


class Keyed(NamedTuple):
    """A name, with the ``colour`` that it has in figures."""

    text: str
    colour: str


class Head(NamedTuple):
    """A column: its ``title``, the ``form`` of its numbers, whether more is ``better``, and a heading ``over`` it.

    ``better`` None marks no best cell. ``sign`` shows the plus of positive numbers. ``about`` is a tooltip. Where a
    terminal is too narrow, columns of the largest ``drop`` go first. Only the texts of a column that ``wraps`` are
    broken into lines there.
    """

    title: str
    form: str = ".3f"
    better: bool | None = None
    over: str = ""
    sign: bool = False
    about: str = ""
    drop: int = 0
    wraps: bool = False

    @property
    def heading(self) -> str:
        """The title with an arrow in the better direction."""
        return self.title + ("" if self.better is None else "\N{NO-BREAK SPACE}" + ("↑" if self.better else "↓"))

    @property
    def whole(self) -> str:
        """The title after what stands over it."""
        return ": ".join(filter(None, (self.over, self.title)))

    def text(self, cell: Cell) -> str:
        """What a cell reads; – where there is nothing."""
        if isinstance(cell, str | Keyed):
            return cell if isinstance(cell, str) else cell.text
        if isinstance(cell, Spread):
            known = cell.std is not None and math.isfinite(cell.std) and math.isfinite(cell.mean)
            return self._number(cell.mean) + (f" ± {number(cell.std or 0.0, self.form)}" if known else "")
        return self._number(plain(cell))

    def _number(self, value: float) -> str:
        if self.form == P:
            return "<0.001" if value < 0.001 else number(value, ".3f")
        text = number(value, ("+" if self.sign else "") + self.form)
        return text if any(digit in text for digit in "123456789") else text.lstrip("+-")


class Group(NamedTuple):
    """The next ``size`` rows belong together: their ``title``, the ``colour`` of it in figures, and a ``note``."""

    title: str
    size: int
    colour: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of ``rows`` under ``heads``; ``name`` is that of its files, ``across`` the better direction in a row.

    ``groups`` of all rows, in order, are of what the heading ``of`` says. ``styles`` are those of rows in a terminal.
    ValueError for a row of another length than the heads.
    """

    name: str
    title: str
    heads: Sequence[Head]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    across: bool | None = None
    groups: Sequence[Group] = ()
    of: str = ""
    styles: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.heads):
                raise ValueError(f"A row of table {self.name} has {len(row)} cells, its heads are {len(self.heads)}.")

    def texts(self) -> list[list[str]]:
        """All cells as text."""
        return [[head.text(cell) for head, cell in zip(self.heads, row, strict=True)] for row in self.rows]

    def words(self) -> list[bool]:
        """Which columns hold text."""
        return [any(isinstance(row[c], str | Keyed) for row in self.rows) for c in range(len(self.heads))]

    def best(self, rows: range | None = None) -> set[tuple[int, int]]:
        """Places (row, column) of the best numbers of columns, or of rows where better is ``across``; all that read
        the same as the best or lie within its interval, none where all numbers do. Of some ``rows`` alone where given.
        """
        found: set[tuple[int, int]] = set()
        of = range(len(self.rows)) if rows is None else rows
        for c, head in enumerate(self.heads):
            if head.better is not None:
                found |= _best([(r, c) for r in of], self, head.better)
        for r in of:
            if self.across is not None:
                found |= _best([(r, c) for c in range(len(self.heads))], self, self.across)
        return found

    def flat(self) -> Table:
        """The same without groups: their titles are its first column."""
        if not self.groups:
            return self
        titles = [group.title for group in self.groups for _ in range(group.size)]
        rows = [[title, *row] for title, row in zip(titles, self.rows, strict=True)]
        return replace(self, heads=[Head(self.of), *self.heads], rows=rows, groups=())

    def view(self) -> dict[str, Any]:
        """What the pages' template shows: heads, and groups of lines of cells.

        A cell's ``mark`` is ``best``, or ``own`` for the best of a group among several; ``why`` says why it is –, or
        its interval.
        """
        best, texts, own, start = self.best(), self.texts(), set(), 0
        for group in self.groups if len(self.groups) > 1 else ():
            own |= self.best(range(start, start + group.size))
            start += group.size
        lines = [
            [{"text": text, "mark": "best" if (r, c) in best else "own" if (r, c) in own else "",
              "words": _words(cell), "why": _about(cell, self.heads[c]),
              "colour": cell.colour if isinstance(cell, Keyed) else ""}
             for c, (text, cell) in enumerate(zip(texts[r], row, strict=True))]
            for r, row in enumerate(self.rows)
        ]  # fmt: skip
        left = iter(lines)
        return {
            "overs": [(over, len(list(same))) for over, same in groupby(head.over for head in self.heads)],
            "words": self.words(), "lines": lines,
            "groups": [(group, [next(left) for _ in range(group.size)])
                       for group in self.groups or (Group("", len(lines)),)],
        }  # fmt: skip

    def csv(self) -> str:
        """Unrounded numbers, more columns for standard deviations and intervals; an empty cell where there is none."""
        import pandas as pd

        table, columns = self.flat(), []
        for c, head in enumerate(table.heads):
            cells = [row[c] for row in table.rows]
            columns.append((head.whole, [_raw(cell) for cell in cells]))
            if any(isinstance(cell, Spread) for cell in cells):
                deviations = [_unrounded(cell.std) if isinstance(cell, Spread) else "" for cell in cells]
                columns.append((f"{head.whole} (std)", deviations))
            for name in Measured._fields[1:] if any(isinstance(cell, Measured) for cell in cells) else ():
                ends = [_raw(getattr(cell, name)) if isinstance(cell, Measured) else "" for cell in cells]
                columns.append((f"{head.whole} ({name})", ends))
        rows = list(zip(*(cells for _, cells in columns), strict=True))
        frame = pd.DataFrame(rows, columns=[title for title, _ in columns], dtype=object)
        return str(frame.to_csv(index=False, lineterminator="\n"))

    def markdown(self) -> str:
        """A Markdown table, the best numbers bold."""
        table = self.flat()
        best, words = table.best(), table.words()
        lines = [[head.whole + head.heading.removeprefix(head.title) for head in table.heads]]
        lines += [[f"**{text}**" if (r, c) in best else text for c, text in enumerate(line)]
                  for r, line in enumerate(table.texts())]  # fmt: skip
        made = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
        return "\n".join([made[0], "|" + "".join("---|" if text else "---:|" for text in words), *made[1:]]) + "\n"

    def latex(self) -> str:
        """A ``table`` environment with booktabs' rules, the best numbers bold; needs ``\\usepackage{booktabs}``."""
        import pandas as pd

        table = self.flat()
        best, heads = table.best(), [tex(head.heading) for head in table.heads]
        cells = [
            [rf"\textbf{{{tex(text)}}}" if (r, c) in best else tex(text) for c, text in enumerate(line)]
            for r, line in enumerate(table.texts())
        ]
        over = any(head.over for head in table.heads)
        columns: Any = pd.MultiIndex.from_arrays([[tex(h.over) for h in table.heads], heads]) if over else heads
        return str(pd.DataFrame(cells, columns=columns, dtype=object).style.hide(axis="index").to_latex(
            hrules=True, column_format="".join("l" if text else "r" for text in table.words()), multicol_align="c",
            position="t", position_float="centering", caption=tex(table.title), label=f"tab:{table.name}",
        ))  # fmt: skip

    def show(self, console: Console | None = None) -> None:
        """Print it, the best numbers bold, with its note and why numbers are not there.

        Where a terminal is too narrow, columns are left out and named below: those of the largest ``drop`` first, among
        equals the last first, never the first column. A file gets all of them.
        """
        from rich import table as drawing
        from rich.console import Console
        from rich.text import Text

        console, table = console or Console(), self.flat()
        heads = [f"{head.over}\n{head.heading}" if head.over else head.heading for head in table.heads]
        texts, best = table.texts(), table.best()
        figures = [all(line[c][:1] in ("", NOTHING) or re.match(r"[<+-]?\d", line[c]) for line in texts)
                   for c in range(len(heads))]  # fmt: skip
        widths = [_widths(head, [title, *(line[c] for line in texts)], wraps=head.wraps)
                  for c, (head, title) in enumerate(zip(table.heads, heads, strict=True))]  # fmt: skip
        shown = _fitting(table.heads, [least for least, _ in widths], console.width if console.is_terminal else 10**6)
        most = 1 + sum(3 + widths[c][1] for c in shown)
        least = 1 + sum(3 + widths[c][0] for c in shown)
        wide = max(least, min(most, console.width)) if any(table.heads[c].wraps for c in shown) else most
        drawn = drawing.Table(title=table.title or None, width=wide, show_header=any(heads))
        for c in shown:
            wraps = table.heads[c].wraps
            drawn.add_column(Text(heads[c]), justify="right" if figures[c] and not wraps else "left",
                             no_wrap=not wraps, min_width=widths[c][0], overflow="fold")  # fmt: skip
        for r, line in enumerate(texts):
            cells = (Text(line[c], "bold" if (r, c) in best else "") for c in shown)
            drawn.add_row(*cells, style=table.styles[r] if table.styles else None)
        console.print(drawn, crop=False)
        left = [head.whole for c, head in enumerate(table.heads) if c not in shown]
        whys = {f"{NOTHING} {table.heads[c].whole}: {cell.why}.": None for row in table.rows
                for c, cell in enumerate(row) if c in shown and isinstance(cell, Unknown) and cell.why}  # fmt: skip
        narrow = f"The terminal is too narrow for: {', '.join(left)}." if left else ""
        for said in (table.note, *whys, _widest(table, shown), narrow):
            if said:
                console.print(Text(said, "dim"), soft_wrap=True)


def _widths(head: Head, texts: Iterable[str], wraps: bool) -> tuple[int, int]:
    """The least width in letters that a column needs, and the one at which nothing is broken."""
    from rich.cells import cell_len

    most = max(cell_len(line) for text in texts for line in (text.splitlines() or [""]))
    return (min(most, LINE) if wraps else most), most


def _fitting(heads: Sequence[Head], widths: Sequence[int], room: int) -> list[int]:
    """The columns, by number, that a terminal ``room`` letters wide has space for."""
    shown = list(range(len(heads)))
    for c in sorted(shown[1:], key=lambda c: (heads[c].drop, c), reverse=True):
        if 1 + sum(3 + widths[i] for i in shown) <= room:
            break
        shown.remove(c)
    return shown


def plain(cell: Cell) -> float:
    """The number of a cell; NaN for text or nothing."""
    if isinstance(cell, Spread | Measured):
        return float(cell[0])
    return math.nan if cell is None or isinstance(cell, str | Keyed | Unknown) else float(cell)


def _best(places: Iterable[tuple[int, int]], table: Table, better: bool) -> set[tuple[int, int]]:
    known = {(r, c): value for r, c in places if math.isfinite(value := plain(table.rows[r][c]))}
    shown = {(r, c): table.heads[c].text(table.rows[r][c]).partition(" ±")[0] for r, c in known}
    if len(set(shown.values())) < 2:
        return set()
    r, c = (max if better else min)(known, key=lambda place: known[place])
    first = table.rows[r][c]
    low, high = first[1:3] if isinstance(first, Measured) else (known[r, c],) * 2
    found = {place for place, text in shown.items() if text == shown[r, c] or low <= known[place] <= high}
    return found if len(found) < len(known) else set()


def _about(cell: Cell, head: Head) -> str:
    """What hovering over a cell says: why it is –, or its interval."""
    if isinstance(cell, Measured):
        low, high = (number(end, head.form) for end in cell[1:3])
        return f"95 %: {low} to {high}, of {cell.of}"
    return cell.why if isinstance(cell, Unknown) else ""


def _widest(table: Table, columns: Iterable[int]) -> str:
    """The widest interval of each of the ``columns`` that have some."""
    said = []
    for c in columns:
        cells = [row[c] for row in table.rows if isinstance(row[c], Measured)]
        if cells:
            widest = max(cells, key=lambda cell: cell.high - cell.low)
            half = number((widest.high - widest.low) / 2, table.heads[c].form)
            said.append(f"{table.heads[c].whole} ± {half} ({widest.of})")
    return f"95 % intervals, the widest: {', '.join(said)}." if said else ""


def _words(cell: Cell) -> str:
    """How a cell of text is set: short ones in one line."""
    text = cell.text if isinstance(cell, Keyed) else cell
    return "" if not isinstance(text, str) else "words" if len(text) <= LINE else "words long"


def _raw(cell: Cell) -> str | float | int:
    return cell if isinstance(cell, str) else cell.text if isinstance(cell, Keyed) else _unrounded(plain(cell))


def _unrounded(value: float | None) -> float | int | str:
    if value is None or not math.isfinite(value):
        return ""
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(value)


SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$",
    "ρ": r"$\rho$", "η": r"$\eta$", "α": r"$\alpha$", "β": r"$\beta$", "Δ": r"$\Delta$", "²": "$^2$", "±": r"$\pm$",
    "×": r"$\times$", "·": r"$\cdot$", "≥": r"$\geq$", "≤": r"$\leq$", "−": "$-$", "→": r"$\to$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--", "…": r"\dots{}", "’": "'", "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip


def tex(text: str) -> str:
    """Text as LaTeX: signs escaped, Greek letters and operators as maths."""
    return "".join(SIGNS.get(sign, sign) for sign in text)


def files(tables: Iterable[Table]) -> dict[str, str]:
    """The texts of the tables' files by name, csv and LaTeX of each; ValueError where two tables have one name."""
    found: dict[str, str] = {}
    for table in tables:
        if f"{table.name}.csv" in found:
            raise ValueError(f"Two tables are called {table.name}; give them different names.")
        found |= {f"{table.name}.csv": table.csv(), f"{table.name}.tex": table.latex()}
    return found
