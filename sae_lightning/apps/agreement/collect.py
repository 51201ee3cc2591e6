"""The page on which people judge pairs of latents, offline: one file, no server, progress kept in the browser."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from sae_lightning.apps.agreement.judgements import COLUMNS
from sae_lightning.apps.codes import top_images
from sae_lightning.apps.opened import Opened
from sae_lightning.report.strips import GAP, data_uri, thumbnail
from sae_lightning.saes.artefact import write_text

COLLECT = "collect.html"


def sheet(images: list[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows of ``columns``, on one sheet."""
    side = images[0].width
    rows = -(-len(images) // columns)
    found = Image.new("RGBA", (columns * (side + GAP) - GAP, rows * (side + GAP) - GAP))
    for i, image in enumerate(images):
        found.paste(image.resize((side, side)), (i % columns * (side + GAP), i // columns * (side + GAP)))
    return found


def study_of(pairs: pd.DataFrame, opened: Mapping[str, Opened], split: str, n_images: int) -> dict[str, Any]:
    """What the page holds: ``id``, the ``columns`` of its csv, ``sheets`` of top images, ``pairs`` that name them.

    Neither scores nor names are in it, so that nobody can be led by them.
    """
    sheets: dict[str, str] = {}
    for run in opened:
        left, right = (pairs.loc[pairs[f"run_{side}"] == run, f"latent_{side}"] for side in ("left", "right"))
        images, top = opened[run].images(split), top_images(opened[run].codes(split), n_images)
        for latent in np.union1d(left, right).astype(int).tolist():
            pictures = [thumbnail(images[i]) for i in top[latent].tolist() if i >= 0]
            sheets[f"{run}/{latent}"] = data_uri(sheet(pictures, int(np.ceil(np.sqrt(n_images)))))
    shown = pairs.drop(columns="difference").to_dict("records")
    identity = hashlib.sha256(repr(shown).encode()).hexdigest()[:12]
    return {"id": identity, "columns": ["pair", *COLUMNS, "seconds"], "sheets": sheets, "pairs": shown}


def write_collecting_page(study: Mapping[str, Any], folder: Path) -> Path:
    """``collect.html`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("sae_lightning.report"), autoescape=True)
    html = environment.get_template("apps/agreement_collect.html").render(study=study)
    write_text(folder / COLLECT, html)
    return folder / COLLECT
