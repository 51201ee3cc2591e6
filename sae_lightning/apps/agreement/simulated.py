"""Judges made up from class labels, to try the analysis out; never evidence of what people think."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sae_lightning.apps.agreement.judgements import SIMULATED

SHARPNESS = 8.0  # log odds of preferring images of one class to images of none in common
UNSURE = 0.05  # difference in purity below which a judge is unsure half of the time


def simulated_judgements(pairs: pd.DataFrame, scores: pd.DataFrame, judges: int, seed: int) -> pd.DataFrame:
    """Choices of ``judges`` simulated judges on all ``pairs``, in the columns of a collected csv.

    Each sees the images shown of both latents as their labels and prefers the side with the larger share of one class,
    at odds that grow with the difference.
    """
    rng = np.random.default_rng(seed)
    seen = scores.set_index(["run", "latent"])["top_purity"]
    left, right = (
        seen.loc[list(zip(pairs[f"run_{side}"], pairs[f"latent_{side}"], strict=True))].to_numpy()
        for side in ("left", "right")
    )
    tables = []
    for judge in range(judges):
        prefers_left = rng.random(len(pairs)) < 1 / (1 + np.exp(-SHARPNESS * (left - right)))
        unsure = (abs(left - right) < UNSURE) & (rng.random(len(pairs)) < 0.5)
        choice = np.where(unsure, "unsure", np.where(prefers_left, "left", "right"))
        tables.append(pairs.drop(columns="difference").assign(judge=f"{SIMULATED} {judge + 1}", choice=choice))
    return pd.concat(tables, ignore_index=True)
