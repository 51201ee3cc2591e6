"""What the page on agreement with people shows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from markupsafe import Markup

from sae_lightning.apps.agreement.study import SCORES
from sae_lightning.rendering.figures import COLOURS, figure
from sae_lightning.rendering.page import Picture, Section, prose
from sae_lightning.rendering.table import Head, Table

LEAD = """Two latents side by side, each by its top images: which is more of one concept? A score of monosemanticity is
worth something if it prefers the side that people choose."""

SIMULATED = Markup(
    '<p class="panel"><b>Simulated judges: these choices were made up from class labels to try the analysis out. No '
    "person judged, and nothing here says what people think.</b></p>"
)


def collecting(pairs: pd.DataFrame) -> Section:
    """What to do with the page on which people judge."""
    least, most = pairs["difference"].min(), pairs["difference"].max()
    about = prose(
        f" beside this page shows {len(pairs)} pairs with differences in MS score from {least:.3f} to {most:.3f}, in "
        "random order and without scores or names. Give that one file to each judge; it works offline, goes on where "
        "it was left, and saves a csv. Analyse the files with `python explore.py app=agreement "
        "app.judgements=[a.csv,b.csv]` on the same runs."
    )
    return Section("Collecting", Markup('<p><a href="collect.html">collect.html</a>{}</p>').format(about))


def analysis(
    judgements: pd.DataFrame, table: pd.DataFrame, bins: pd.DataFrame, raters: Mapping[str, float], whose: str
) -> list[Section]:
    """Agreement of scores with the judgements, by difference, and of judges with each other."""
    unsure = (judgements["choice"] == "unsure").mean()
    heads = [Head("score"), Head("of"), Head("agreement"), Head("95 % interval"), Head("choices", ".0f"),
             Head("ties of the score", ".0f"), Head("p", ".2g")]  # fmt: skip
    scores = [
        [SCORES[row.score], row.of, row.agreement, f"{row.low:.3f} to {row.high:.3f}", row.n, row.ties, row.p]
        for row in table.itertuples()
    ]
    ranges = [
        [SCORES[row["score"]], row["from"], row["to"], row["agreement"], f"{row['low']:.3f} to {row['high']:.3f}",
         row["n"]]
        for row in bins.to_dict("records")
    ]  # fmt: skip
    by_range = [Head("score"), Head("from", "g"), Head("to", "g"), *heads[2:5]]
    counted = ("judges", "pairs", "pairs_of_several", "pairwise", "alpha", "fleiss")
    between = [Head("judges", ".0f"), Head("pairs of latents", ".0f"), Head("judged by several", ".0f"),
               Head("equal choices"), Head("Krippendorff's α"), Head("Fleiss' κ")]  # fmt: skip
    return [
        Section(
            f"Agreement of scores with {whose}",
            f"{len(judgements)} choices, {100 * unsure:.0f} % of them unsure and left out. Wilson intervals of 95 %; p "
            "is that of a two-sided binomial test against 50 %. Choices of several judges on one pair depend on each "
            "other, so the test that counts is that on the majority, one choice a pair. Where a score does not tell "
            "the sides apart it counts as a coin.",
            Table("agreement", "", heads, scores),
        ),
        Section(
            "By difference in score",
            Picture(bins_figure(bins), wide=True),
            Table("by_difference", "", by_range, ranges),
        ),
        Section(
            "Agreement of judges with each other",
            Table("judges", "", between, [[raters[name] for name in counted]]),
        ),
    ]


def bins_figure(bins: pd.DataFrame) -> str:
    """Agreement by difference in score, one line of marks a score with Wilson intervals, SVG."""
    with figure(8.6, 3.0) as drawing:
        axis = drawing.axis
        edges = sorted(set(zip(bins["from"], bins["to"], strict=True)))
        names = list(dict.fromkeys(bins["score"]))
        for i, name in enumerate(names):
            part = bins[bins["score"] == name]
            at = np.array([edges.index(edge) for edge in zip(part["from"], part["to"], strict=True)])
            error = np.abs(part[["low", "high"]].to_numpy() - part[["agreement"]].to_numpy()).T
            axis.errorbar(at + 0.12 * (i - (len(names) - 1) / 2), part["agreement"], yerr=error, fmt="o", ms=4.5,
                          lw=1.2, color=COLOURS[i], label=SCORES[name])  # fmt: skip
        axis.axhline(0.5, color="#555", lw=1, ls="--", label="chance")
        axis.set_xticks(range(len(edges)), [f"{start:g} to {stop:g}" for start, stop in edges])
        axis.set_ylim(0, 1.02)
        axis.grid(axis="x", visible=False)
        axis.set_xlabel("difference in score")
        axis.set_ylabel("agreement")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return drawing.svg
