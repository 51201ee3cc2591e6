"""One name a latent, for whatever shows latents: those that naming found, else the class it mostly fires on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sae_lightning.data import DataError
from sae_lightning.evaluation.by_latent import dominant
from sae_lightning.runs.run import Run

TABLE = "naming.parquet"  # of the application naming; ``shown`` is the name, "" where there is none
PURE, IMAGES = 0.5, 20  # least share of one class in a latent's activation, and images it fires on, to be called so


def names_of(opened: Run) -> list[str]:
    """One name for each of d_sae latents, "" where there is none.

    Of the application naming where it has been run, else the class with at least half of the latent's activation over
    the train images. All "" for data without classes or pictures.
    """
    found = opened.results("naming") / TABLE
    if found.is_file():
        table = pd.read_parquet(found, columns=["latent", "shown"]).sort_values("latent")
        if len(table) == opened.sae.d_sae:
            return table["shown"].tolist()
    try:
        data = opened.images("train")
    except DataError:
        return [""] * opened.sae.d_sae
    classes = data.class_names
    label, purity, images = dominant(opened.codes("train"), data.labels, len(classes))
    return label_names(label, purity, images, classes)


def called(latent: int, names: Sequence[str]) -> str:
    """``12 ship``: the latent and its name."""
    return f"{latent} {names[latent]}".strip()


def label_names(
    label: np.ndarray,
    purity: np.ndarray,
    images: np.ndarray,
    classes: list[str],
    pure: float = PURE,
    least: int = IMAGES,
) -> list[str]:
    """The names of the classes ``label`` [d_sae]; "" where ``purity`` is below ``pure`` or ``images`` below ``least``.

    A data set with a single class tells nothing, so its name is given to none.
    """
    told = (purity >= pure) & (images >= least) & (len(classes) > 1) & (label >= 0)
    return [classes[c] if ok else "" for c, ok in zip(label.tolist(), told.tolist(), strict=True)]
