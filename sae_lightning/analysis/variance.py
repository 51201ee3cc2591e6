"""How much of a metric's variance the backbone and the SAE's settings explain [ViSAEBench §5.7, Table 3]."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from scipy import stats

from sae_lightning.analysis.grid import CELL, METRICS, Grid, configuration_names, missing_cells, over_seeds, section
from sae_lightning.analysis.paper import PAPER, Paper
from sae_lightning.rendering.figures import figure
from sae_lightning.rendering.page import EVALUATE, TRAIN, Block, Picture, lacking
from sae_lightning.rendering.table import Head, P, Table

# terms by name, each the factors that it is made of
TWO_WAY = {"backbone": ("backbone",), "hp": ("configuration",)}

FINE = {"backbone": ("backbone",), "expansion": ("expansion",), "k": ("k",), "interaction": ("expansion", "k")}

SILENT = 1e-12  # a smaller share of the whole sum of squares, or of the values, is rounding


@dataclass(frozen=True)
class Effect:
    """One factor's sum of squares ``ss`` with its degrees of freedom, ``eta`` = ss / ss_total, F-test and p."""

    ss: float
    df: int
    eta: float
    F: float
    p: float


@dataclass(frozen=True)
class Anova:
    """A metric's analysis of variance over ``n`` runs.

    In a ``balanced`` grid, every cell with as many runs as any other, the effects and the residual add up to
    ``ss_total``; otherwise their sum may fall short of it or exceed it. ``missing`` cells have no value. ``note`` says
    what could not be computed.
    """

    n: int
    effects: Mapping[str, Effect]
    ss_residual: float
    df_residual: int
    ss_total: float
    balanced: bool
    missing: int
    note: str = ""

    @property
    def eta_residual(self) -> float:
        """The share that no factor explains."""
        return self.ss_residual / self.ss_total if self.ss_total else math.nan


def anova(table: pd.DataFrame, metric: str, terms: Mapping[str, Sequence[str]] = TWO_WAY) -> Anova:
    """Type II analysis of variance of one column by ``terms``; in a balanced grid that of type I as well.

    The sum of squares of a term is what it adds to all terms that do not contain it, by least squares (statsmodels).
    Terms of a factor with a single level, and values that are constant or missing, leave NaN and a ``note``.
    """
    factors = _factors(table)
    known = table[metric].notna() if metric in table else pd.Series(False, index=table.index)
    data = factors[known].assign(y=table.loc[known, metric] if known.any() else [])
    missing = len(missing_cells(table)) + _cells(factors) - _cells(data)
    balanced = not missing and data.groupby(["backbone", "configuration"]).size().nunique() == 1
    used = {name: of for name, of in terms.items() if all(data[f].nunique() > 1 for f in of)}
    notes = [f"one {of[0]} only" for name, of in terms.items() if len(of) == 1 and name not in used and len(data)]
    y = data["y"].to_numpy(dtype=float)
    constant = len(y) > 0 and np.ptp(y) <= SILENT * np.abs(y).max()
    if len(y) < 2 or constant or not used:
        notes = ["no value" if not len(y) else "one value" if len(y) < 2 else "constant" if constant else notes[0]]
        none = {name: Effect(math.nan, 0, math.nan, math.nan, math.nan) for name in terms}
        return Anova(len(y), none, math.nan, 0, math.nan, balanced, missing, notes[0])
    total = float(((y - y.mean()) ** 2).sum())
    rss, df = _residual(data, used)
    rss = 0.0 if rss < SILENT * total else rss
    effects = {}
    for name in terms:
        if name not in used:
            effects[name] = Effect(math.nan, 0, math.nan, math.nan, math.nan)
            continue
        ss, ss_df = _added(data, used, name)
        effects[name] = Effect(ss, ss_df, ss / total if ss_df else math.nan, *_f_test(ss, ss_df, rss, df))
        if not ss_df:
            notes.append(f"{name} cannot be told apart from the other factors")
    if not df:
        notes.append("no runs left for a residual")
    return Anova(len(y), effects, rss, df, total, balanced, missing, "; ".join(notes))


def variance(
    table: pd.DataFrame, of: Sequence[str] = tuple(METRICS), without: Collection[str] = (),
    terms: Mapping[str, Sequence[str]] = TWO_WAY,
) -> pd.DataFrame:  # fmt: skip
    """Table 3: one row a metric with ``eta_backbone``, ``eta_hp``, ``eta_residual`` and F and p of each term.

    Further columns: ``metric``, ``n``, ``balanced``, ``missing``, ``note``, as of ``Anova``. ``without`` leaves
    backbones out (the paper: MAE); ``terms=FINE`` splits hp into expansion, k and their interaction.
    """
    rows = table[~table["backbone"].isin(list(without))]
    found = {metric: anova(rows, metric, terms) for metric in of}
    return pd.DataFrame(
        [
            {"metric": metric, "n": a.n}
            | {f"eta_{name}": effect.eta for name, effect in a.effects.items()}
            | {"eta_residual": a.eta_residual}
            | {f"F_{name}": effect.F for name, effect in a.effects.items()}
            | {f"p_{name}": effect.p for name, effect in a.effects.items()}
            | {"balanced": a.balanced, "missing": a.missing, "note": a.note}
            for metric, a in found.items()
        ]
    )


def _factors(table: pd.DataFrame) -> pd.DataFrame:
    """Each row's levels as text, so that a missing k is a level too."""
    return pd.DataFrame(
        {
            "backbone": table["backbone"].astype(str), "configuration": configuration_names(table).astype(str),
            "expansion": table["expansion"].map("{:g}".format), "k": table["k"].map("{:g}".format),
        }
    )  # fmt: skip


def _cells(data: pd.DataFrame) -> int:
    return len(data[["backbone", "configuration"]].drop_duplicates())


def _added(data: pd.DataFrame, terms: Mapping[str, Sequence[str]], name: str) -> tuple[float, int]:
    """What a term adds to those that do not contain it: sum of squares and degrees of freedom."""
    beside = {other: of for other, of in terms.items() if not set(terms[name]) <= set(of)}
    (without, df_without), (with_it, df_with) = _residual(data, beside), _residual(data, beside | {name: terms[name]})
    return max(0.0, without - with_it), df_without - df_with


def _residual(data: pd.DataFrame, terms: Mapping[str, Sequence[str]]) -> tuple[float, int]:
    """The residual sum of squares and its degrees of freedom of a linear model with ``terms``."""
    formula = " + ".join(["1", *(":".join(f"C({f})" for f in of) for of in terms.values())])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The design matrix is rank-deficient")  # cells that no run has; ssr is unique
        fit = smf.ols(f"y ~ {formula}", data).fit()
    return float(fit.ssr), int(fit.df_resid)


def _f_test(ss: float, df: int, rss: float, df_residual: int) -> tuple[float, float]:
    if not df or not df_residual:
        return math.nan, math.nan
    F = ss / df / (rss / df_residual) if rss else math.inf if ss else math.nan
    return F, float(stats.f.sf(F, df, df_residual))


def spread(table: pd.DataFrame, of: Sequence[str] = tuple(METRICS)) -> pd.DataFrame:
    """One row a metric with sample standard deviations: over ``seeds`` of a cell (pooled over the cells that have
    several), over ``configurations`` of a backbone (of means over seeds, pooled over backbones), and of the
    ``backbones``' means. ``repeated`` counts the cells with several seeds; NaN where nothing is repeated.
    """
    cells = over_seeds(table, of)
    groups = table.groupby(CELL, dropna=False)
    of_backbones = cells.groupby(level="backbone")
    repeated = groups[list(of)].count()
    return pd.DataFrame(
        [
            {
                "metric": m, "seeds": _pooled(groups[m]), "configurations": _pooled(of_backbones[m]),
                "backbones": of_backbones[m].mean().std(), "repeated": int((repeated[m] > 1).sum()),
            }
            for m in of
        ]
    )  # fmt: skip


def _pooled(groups: pd.api.typing.SeriesGroupBy) -> float:
    """The standard deviation within groups: variances weighted by their degrees of freedom."""
    freedom = groups.count() - 1
    freedom = freedom[freedom > 0]
    return math.sqrt((groups.var()[freedom.index] * freedom).sum() / freedom.sum()) if len(freedom) else math.nan


SHARES = {  # of a metric's variance: title and colour of each factor
    "backbone": ("backbone", "#1b6ca8"), "hp": ("expansion × k", "#e08e1b"), "residual": ("residual", "#c9cdd6"),
}  # fmt: skip

PARTS = tuple(SHARES)

OUTLIER = "mae"  # which the paper leaves out to show that the finding does not rest on it


@section("Variance decomposition")
def decomposition(grid: Grid, paper: Paper) -> Block:
    """η² of backbone, settings and the rest, as bars and tables, with the paper's."""
    found = variance(grid.main).set_index("metric")
    found = found[found[["eta_backbone", "eta_hp"]].notna().all(axis=1)]
    if found.empty:
        return lacking("A decomposition needs several backbones, each with several expansions or k: "
                       f"`{TRAIN}`, then `{EVALUATE}`.")  # fmt: skip
    own = {METRICS[m].title: _parts(row) for m, row in found.iterrows()}
    theirs = {METRICS[m].title: parts for m, parts in paper.variance().items() if m in found.index}
    return [
        _about(found), Picture(shares(own, theirs), caption=_caption(bool(theirs))),
        _table_3(grid, found, paper), _tests(grid, found), _seeds(grid),
    ]  # fmt: skip


def shares(parts: Mapping[str, Mapping[str, float]], paper: Mapping[str, Mapping[str, float]]) -> str:
    """η² of a metric's factors as stacked bars, ``parts`` by metric's title; thin and paler below, the paper's."""
    with figure(6.4, 0.7 + 0.47 * len(parts)) as drawing:
        axis = drawing.axis
        for y, (title, own) in enumerate(list(parts.items())[::-1]):
            _stack(axis, own, y + (0.12 if title in paper else 0), 0.42, 1.0)
            if title in paper:
                _stack(axis, paper[title], y - 0.27, 0.2, 0.5)
        axis.set_yticks(range(len(parts)), list(parts)[::-1])
        axis.tick_params(axis="y", length=0)
        axis.grid(False, axis="y")
        axis.set_xlim(0, 1)
        axis.set_ylim(-0.55, len(parts) - 0.4)
        axis.set_xlabel("share of the variance, η²")
    return drawing.svg


def _stack(axis: Any, own: Mapping[str, float], y: float, height: float, alpha: float) -> None:
    left = 0.0
    for name, (_, colour) in SHARES.items():
        width = own.get(name, math.nan)
        if not math.isfinite(width):
            continue
        axis.barh(y, width, height, left=left, color=colour, alpha=alpha, lw=0)
        if width > 0.07 and height > 0.3:
            ink = "#222" if name == "residual" else "#fff"
            axis.text(left + width / 2, y, f"{width:.2f}", ha="center", va="center", color=ink, fontsize=8)
        left += width


def _parts(row: pd.Series) -> dict[str, float]:
    return {name: float(row[f"eta_{name}"]) for name in PARTS}


def _caption(with_paper: bool) -> str:
    beside = f" Thin and pale: {PAPER}." if with_paper else ""
    return "Blue: backbone; orange: expansion and k; grey: what neither explains." + beside


def _about(found: pd.DataFrame) -> tuple[str, ...]:
    says = ["Two-way analysis of variance of each metric, with backbone and setting (expansion and k together) as "
            "factors; η² is a factor’s share of the whole sum of squares."]  # fmt: skip
    uneven = found[~found["balanced"].astype(bool)]
    if len(uneven):
        says.append(f"The grid is not complete for {', '.join(map(str, uneven.index))}: up to "
                    f"{int(uneven['missing'].max())} cells lack a value, and shares need not add up to 1.")  # fmt: skip
    notes = [f"{', '.join(map(str, own.index))}: {note}." for note, own in found.groupby("note") if note]
    return (*says, *notes)


def _table_3(grid: Grid, found: pd.DataFrame, paper: Paper) -> Table:
    theirs = paper.variance()
    heads = [Head("metric"), *(Head(title, over=f"η², {grid.here}") for title, _ in SHARES.values()),
             *(Head(title, over=f"η², {PAPER}") for title, _ in SHARES.values() if theirs)]  # fmt: skip
    rows = []
    for m, row in found.sort_values("eta_backbone", ascending=False).iterrows():
        other = [theirs.get(str(m), {}).get(name) for name in PARTS] if theirs else []
        rows.append([METRICS[str(m)].title, *_parts(row).values(), *other])
    note = "The paper’s M6 is preservation on iNaturalist alone." if theirs else ""
    return Table("variance", "Shares of variance η² by factor, sorted by that of the backbone", heads, rows, note)


def _tests(grid: Grid, found: pd.DataFrame) -> Table:
    """F-tests, hp split into its parts, and backbones without the outlier."""
    fine = variance(grid.main, terms=FINE).set_index("metric")
    fewer = variance(grid.main, without=[OUTLIER]).set_index("metric")
    left_out = OUTLIER in set(grid.main["backbone"])
    heads = [Head("metric"), Head("runs", ".0f"),
             *(Head(sign, form, over=title) for name, (title, _) in SHARES.items() if name != "residual"
               for sign, form in (("F", ".1f"), ("p", P))),
             *(Head(name, over="η² of expansion × k, split") for name in ("expansion", "k", "interaction")),
             *([Head("backbone", over=f"η² without {OUTLIER.upper()}")] if left_out else [])]  # fmt: skip
    rows = [
        [METRICS[str(m)].title, row["n"], row["F_backbone"], row["p_backbone"], row["F_hp"], row["p_hp"],
         *(fine.at[m, f"eta_{name}"] for name in ("expansion", "k", "interaction")),
         *([fewer.at[m, "eta_backbone"]] if left_out else [])]
        for m, row in found.iterrows()
    ]  # fmt: skip
    return Table("variance-tests", "F-tests of the factors, and expansion and k apart", heads, rows)


def _seeds(grid: Grid) -> list[Table]:
    """How far scores move with the seed; no table where no cell has several."""
    found = spread(grid.main)
    if not found["repeated"].any():
        return []
    heads = [Head("metric"), Head("seeds of a cell", ".4f"), Head("settings of a backbone", ".4f"),
             Head("backbones", ".4f"), Head("cells with several seeds", ".0f")]  # fmt: skip
    rows = [[METRICS[r["metric"]].title, r["seeds"], r["configurations"], r["backbones"], r["repeated"]]
            for _, r in found.iterrows()]  # fmt: skip
    return [Table("seeds", "Standard deviations over seeds, settings and backbones", heads, rows)]
