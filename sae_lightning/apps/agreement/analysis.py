"""How often a score agrees with people's choices, and people with each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

from sae_lightning.apps.agreement.study import CHOICES
from sae_lightning.apps.statistics import share_interval

LATENTS = ["run_left", "latent_left", "run_right", "latent_right"]


def with_scores(judgements: pd.DataFrame, scores: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The judgements with ``<score>_left`` and ``<score>_right`` of every score in ``names``."""
    found = judgements
    for side in ("left", "right"):
        of_side = scores[["run", "latent", *names]].rename(columns={name: f"{name}_{side}" for name in names})
        found = found.merge(
            of_side, how="left", left_on=[f"run_{side}", f"latent_{side}"], right_on=["run", "latent"]
        ).drop(columns=["run", "latent"])
    return found


def on_one_side(judgements: pd.DataFrame) -> pd.DataFrame:
    """Judgements with the two latents of each pair always in the same order, whichever side they were shown on."""
    table = judgements.copy()
    left, right = (list(zip(table[f"run_{side}"], table[f"latent_{side}"], strict=True)) for side in ("left", "right"))
    swap = np.array([a > b for a, b in zip(left, right, strict=True)], dtype=bool)
    for a, b in (("run_left", "run_right"), ("latent_left", "latent_right")):
        table.loc[swap, [a, b]] = table.loc[swap, [b, a]].to_numpy()
    table.loc[swap, "choice"] = table.loc[swap, "choice"].map({"left": "right", "right": "left", "unsure": "unsure"})
    return table


def majority(judgements: pd.DataFrame) -> pd.DataFrame:
    """One row a pair with the side that most of those chose who were sure; pairs with a tie are left out."""
    sure = on_one_side(judgements[judgements["choice"] != "unsure"])
    if not len(sure):
        return sure[[*LATENTS, "choice"]]
    lean = sure.assign(lean=np.where(sure["choice"] == "left", 1, -1)).groupby(LATENTS, as_index=False)["lean"].sum()
    lean = lean[lean["lean"] != 0]
    return lean.assign(choice=np.where(lean["lean"] > 0, "left", "right")).drop(columns="lean").reset_index(drop=True)


def agreement(scored: pd.DataFrame, name: str) -> dict[str, float | int]:
    """Agreement of the score ``name`` with the choices that are sure: its larger side is the one chosen.

    A pair whose sides score the same, or have no score, counts a half: a coin would decide. ``agreement`` with the
    95 % Wilson interval ``low``, ``high``; ``n`` choices, of them ``ties``; ``p`` of the two-sided binomial test of the
    others against 50 %. NaN where there is none.
    """
    sure = scored[scored["choice"] != "unsure"]
    gap = (sure[f"{name}_left"] - sure[f"{name}_right"]).fillna(0).to_numpy()
    chosen = np.where(sure["choice"] == "left", 1, -1)
    n, hits, ties = len(sure), int((gap * chosen > 0).sum()), int((gap == 0).sum())
    if not n:
        return {"agreement": np.nan, "low": np.nan, "high": np.nan, "n": 0, "ties": 0, "p": np.nan}
    agreed = hits + ties / 2
    low, high = share_interval(agreed, n)
    p = stats.binomtest(hits, n - ties).pvalue if n > ties else 1.0
    return {"agreement": agreed / n, "low": low, "high": high, "n": n, "ties": ties, "p": float(p)}


def by_difference(scored: pd.DataFrame, name: str, bins: Sequence[float]) -> pd.DataFrame:
    """``agreement`` for each range of the difference in score, one row a range [from, to) with any choice.

    The last range includes its end.
    """
    gap = (scored[f"{name}_left"] - scored[f"{name}_right"]).abs()
    rows = []
    for i, (start, stop) in enumerate(pairwise(bins)):
        last = i == len(bins) - 2
        found = agreement(scored[(gap >= start) & ((gap <= stop) if last else (gap < stop))], name)
        if found["n"]:
            rows.append({"score": name, "from": start, "to": stop} | found)
    return pd.DataFrame(rows)


def raters(judgements: pd.DataFrame) -> dict[str, float | int]:
    """How judges agree with each other, over left, right and unsure as three categories.

    ``pairwise``, the mean over pairs of latents with two judges or more of the share of judges' pairs that agree;
    Krippendorff's ``alpha`` (nominal), which allows for missing judgements; ``fleiss`` kappa over those that all
    judged. NaN where fewer than two judged, and where all judgements are one category.
    """
    table = on_one_side(judgements).pivot_table(index=LATENTS, columns="judge", values="choice", aggfunc="last")
    counts = np.stack([(table == choice).sum(1).to_numpy() for choice in CHOICES], axis=1)  # [pairs, categories]
    judged = counts.sum(1)
    several, m = counts[judged > 1], judged[judged > 1]
    result = {"judges": table.shape[1], "pairs": len(table), "pairs_of_several": len(several),
              "pairwise": np.nan, "alpha": np.nan, "fleiss": np.nan}  # fmt: skip
    if not len(several):
        return result
    result["pairwise"] = float(((several * (several - 1)).sum(1) / (m * (m - 1))).mean())
    result["alpha"] = krippendorff(several)
    complete = table.dropna()
    if table.shape[1] > 1 and len(complete):
        codes = complete.apply(lambda column: column.map(CHOICES.index)).to_numpy()
        result["fleiss"] = _kappa(aggregate_raters(codes, n_cat=len(CHOICES))[0])
    return result


def krippendorff(counts: np.ndarray) -> float:
    """Krippendorff's alpha for categories, 1 - D_observed / D_expected; NaN where only one category was ever chosen.

    ``counts`` [units, categories] judgements, at least two a unit.
    """
    m = counts.sum(1, keepdims=True)
    total, chosen = counts.sum(), counts.sum(0)
    observed = ((counts * (m - counts)) / (m - 1)).sum() / total
    expected = (chosen * (total - chosen)).sum() / (total * (total - 1))
    return float(1 - observed / expected) if expected > 0 else np.nan


def _kappa(table: np.ndarray) -> float:
    """Fleiss' kappa; NaN where chance alone would agree always."""
    if (table.sum(0) > 0).sum() < 2:
        return np.nan
    return float(fleiss_kappa(table))
