"""Which latents are set against each other: pairs spread over the differences in score."""

from __future__ import annotations

import numpy as np
import pandas as pd

CANDIDATES = 50_000  # pairs that are drawn from
SIDES = ("left", "right")


def draw_pairs(scores: pd.DataFrame, n: int, strata: int, n_images: int, seed: int, by: str = "ms") -> pd.DataFrame:
    """About ``n`` pairs of latents in random order and on random sides, as many from each range of differences.

    The ranges divide the differences in the score ``by`` that candidates have into ``strata`` equal parts; one that
    holds too few gives what it has, and the others make up for it. Columns ``pair``, ``run_left``, ``latent_left``,
    ``run_right``, ``latent_right``, ``difference``. Only latents with a score that fire on ``n_images`` images count;
    ValueError when there are not two.
    """
    live = scores[scores[by].notna() & (scores["images"] >= n_images)].reset_index(drop=True)
    if len(live) < 2:
        raise ValueError(
            f"{len(live)} latents fire on at least {n_images} images of the split and have a score; two are needed. "
            "Lower app.images, or choose runs with more active latents."
        )
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.integers(0, len(live), (CANDIDATES, 2)), axis=1)
    drawn = np.unique(drawn[drawn[:, 0] != drawn[:, 1]], axis=0)
    drawn = rng.permutation(drawn)
    values = live[by].to_numpy()
    gap = abs(values[drawn[:, 0]] - values[drawn[:, 1]])
    stratum = np.minimum((gap / max(gap.max(), 1e-12) * strata).astype(int), strata - 1)
    turn = pd.Series(stratum).groupby(stratum).cumcount().to_numpy()  # first, second … of its range
    chosen = rng.permutation(np.argsort(turn, kind="stable")[:n])
    sides = rng.permuted(drawn[chosen], axis=1)
    left, right = (live.iloc[sides[:, i]].reset_index(drop=True) for i in (0, 1))
    return pd.DataFrame({
        "pair": np.arange(len(chosen)), "run_left": left["run"], "latent_left": left["latent"],
        "run_right": right["run"], "latent_right": right["latent"], "difference": gap[chosen],
    })  # fmt: skip
