"""How much of a metric's variance the backbone and the SAE's settings explain [ViSAEBench §5.7, Table 3]."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from scipy import stats

from sae_lightning.analysis.cells import configuration_names, missing_cells
from sae_lightning.analysis.grid import METRICS

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
