"""Tables of the page over a grid: one description, shown as HTML, written as csv and as LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd

NOTHING = "–"


def number(value: float, form: str = ".3f") -> str:
    """A number as text; – for one that is not finite."""
    return format(value, form).replace("%", " %") if math.isfinite(value) else NOTHING


Cell = Any  # str, float, Spread or None

P = "p"

LINE = 26  # letters of a cell that are not broken into lines


class Spread(NamedTuple):
    """A mean with the standard deviation of what it is of."""

    mean: float
    std: float


class Head(NamedTuple):
    """A column: its ``title``, the ``form`` of its numbers, whether more is ``better``, and a heading ``over`` it.

    ``better`` None marks no best cell. ``sign`` shows the plus of positive numbers. The form ``P`` is that of p-values,
    of which small ones read <0.001.
    """

    title: str
    form: str = ".3f"
    better: bool | None = None
    over: str = ""
    sign: bool = False

    @property
    def heading(self) -> str:
        """The title with an arrow in the better direction."""
        return self.title + ("" if self.better is None else "\N{NO-BREAK SPACE}" + ("↑" if self.better else "↓"))

    def text(self, cell: Cell) -> str:
        """What a cell reads; – where there is nothing."""
        if isinstance(cell, str):
            return cell
        if isinstance(cell, Spread):
            spread = f" ± {number(cell.std, self.form)}" if math.isfinite(cell.std) else ""
            return self._number(cell.mean) + spread
        return self._number(math.nan if cell is None else float(cell))

    def _number(self, value: float) -> str:
        if self.form == P:
            return "<0.001" if value < 0.001 else number(value, ".3f")
        text = number(value, ("+" if self.sign else "") + self.form)
        return text if any(digit in text for digit in "123456789") else text.lstrip("+-")


@dataclass(frozen=True)
class Table:
    """A table of ``rows`` under ``heads``; ``name`` is that of its files, ``across`` the better direction in a row.

    ValueError for a row of another length than the heads.
    """

    name: str
    title: str
    heads: Sequence[Head]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    across: bool | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.heads):
                raise ValueError(f"A row of table {self.name} has {len(row)} cells, its heads are {len(self.heads)}.")

    def texts(self) -> list[list[str]]:
        """All cells as text."""
        return [[head.text(cell) for head, cell in zip(self.heads, row, strict=True)] for row in self.rows]

    def best(self) -> set[tuple[int, int]]:
        """Places (row, column) of the best numbers of columns, or of rows where better is ``across``; ties all."""
        found: set[tuple[int, int]] = set()
        for c, head in enumerate(self.heads):
            if head.better is not None:
                found |= _best([(r, c) for r in range(len(self.rows))], self, head.better)
        for r in range(len(self.rows)):
            if self.across is not None:
                found |= _best([(r, c) for c in range(len(self.heads))], self, self.across)
        return found


def plain(cell: Cell) -> float:
    """The number of a cell; NaN for text or nothing."""
    if isinstance(cell, Spread):
        return float(cell.mean)
    return math.nan if cell is None or isinstance(cell, str) else float(cell)


def _best(places: Iterable[tuple[int, int]], table: Table, better: bool) -> set[tuple[int, int]]:
    known = {(r, c): value for r, c in places if math.isfinite(value := plain(table.rows[r][c]))}
    if len(set(known.values())) < 2:
        return set()
    target = (max if better else min)(known.values())
    shown = {(r, c): table.heads[c].text(table.rows[r][c]).partition(" ±")[0] for r, c in known}
    first = next(shown[place] for place, value in known.items() if value == target)
    return {place for place, text in shown.items() if text == first}


def view(table: Table) -> dict[str, Any]:
    """What the page's template shows of a table."""
    best = table.best()
    return {
        "name": table.name, "title": table.title, "note": table.note, "heads": table.heads,
        "overs": [(over, len(list(same))) for over, same in groupby(head.over for head in table.heads)],
        "lines": [
            [{"text": text, "mark": "best" if (r, c) in best else "",
              "words": _words(table.rows[r][c])} for c, text in enumerate(line)]
            for r, line in enumerate(table.texts())
        ],
    }  # fmt: skip


def _words(cell: Cell) -> str:
    """How a cell of text is set: short ones in one line."""
    return "" if not isinstance(cell, str) else "words" if len(cell) <= LINE else "words long"


def as_csv(table: Table) -> str:
    """Unrounded numbers, a column more for each standard deviation; an empty cell where there is none."""
    spread = [any(isinstance(row[c], Spread) for row in table.rows) for c in range(len(table.heads))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    titles = [": ".join(filter(None, (head.over, head.title))) for head in table.heads]
    writer.writerow([t for title, s in zip(titles, spread, strict=True) for t in ([title, f"{title} (std)"][: 1 + s])])
    for row in table.rows:
        cells: list[Any] = []
        for cell, s in zip(row, spread, strict=True):
            cells.append(cell if isinstance(cell, str) else _unrounded(plain(cell)))
            if s:
                cells.append(_unrounded(cell.std) if isinstance(cell, Spread) else "")
        writer.writerow(cells)
    return buffer.getvalue()


def _unrounded(value: float) -> float | int | str:
    if not math.isfinite(value):
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


def as_latex(table: Table) -> str:
    """A ``table`` environment with booktabs' rules, the best numbers bold; needs ``\\usepackage{booktabs}``."""
    best = table.best()
    cells = [
        [rf"\textbf{{{tex(text)}}}" if (r, c) in best else tex(text) for c, text in enumerate(line)]
        for r, line in enumerate(table.texts())
    ]
    heads = [tex(head.heading) for head in table.heads]
    over = any(head.over for head in table.heads)
    columns: Any = pd.MultiIndex.from_arrays([[tex(h.over) for h in table.heads], heads]) if over else heads
    words = [any(isinstance(row[c], str) for row in table.rows) for c in range(len(heads))]
    return str(pd.DataFrame(cells, columns=columns, dtype=object).style.hide(axis="index").to_latex(
        hrules=True, column_format="".join("l" if text else "r" for text in words), multicol_align="c",
        position="t", position_float="centering", caption=tex(table.title), label=f"tab:{table.name}",
    ))  # fmt: skip


def files(tables: Iterable[Table]) -> dict[str, str]:
    """The texts of the tables' files by name, csv and LaTeX of each; ValueError where two tables have one name."""
    found: dict[str, str] = {}
    for table in tables:
        if f"{table.name}.csv" in found:
            raise ValueError(f"Two tables are called {table.name}; give them different names.")
        found |= {f"{table.name}.csv": as_csv(table), f"{table.name}.tex": as_latex(table)}
    return found
