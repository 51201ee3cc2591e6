"""Band grids: latents of equal MonoScore rank in two runs, from their strongest to their weakest images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sae_lightning.benchmark.bands import BANDS
from sae_lightning.benchmark.latents import BAND_IMAGES, read_tensors
from sae_lightning.data import ImageData
from sae_lightning.report.strips import strip, thumbnail


def common_ranks(without: Mapping[str, Tensor], with_loss: Mapping[str, Tensor], n: int = 6) -> list[int]:
    """``n`` ranks kept for both runs at which both latents fire, spread evenly over all of these, ascending.

    Nothing but the ranks and whether a latent fires at all decides; ranks below are dead in one run.
    """
    fires = [set(t["ranks"][(t["images"] >= 0).flatten(1).any(1)].tolist()) for t in (without, with_loss)]
    both = sorted(fires[0] & fires[1])
    return [both[i] for i in np.unique(np.linspace(0, len(both) - 1, n).round().astype(int))] if both else []


def band_grid(
    runs: tuple[Mapping[str, Any], Mapping[str, Any]], images: tuple[ImageData, ImageData], n: int = 6
) -> list[dict[str, Any]]:
    """One row a rank: the latent without and the one with MonoLoss, each with three strips of pictures."""
    read = [read_tensors(run["folder"] / BAND_IMAGES) for run in runs]
    grid = []
    for rank in common_ranks(read[0][0], read[1][0], n):
        sides = [_side(t, metadata, pictures, rank) for (t, metadata), pictures in zip(read, images, strict=True)]
        grid.append({"rank": rank, "sides": sides})
    return grid


def _side(t: dict[str, Tensor], metadata: dict[str, str], images: ImageData, rank: int) -> dict[str, Any]:
    """What a grid shows of the latent at ``rank`` of one run."""
    i = int((t["ranks"] == rank).nonzero()[0])
    shown = json.loads(metadata["image_ids"])
    bands = []
    for name, row, values in zip(BANDS, t["images"][i], t["values"][i], strict=True):
        own = row[row >= 0]
        if not len(own):
            continue
        places = images.index_of([shown[str(int(x))] for x in own]).tolist()
        bands.append({
            "name": name, "strip": strip([thumbnail(images[x]) for x in places]), "share": len(own) / len(row),
            "high": float(values[0]), "low": float(values[len(own) - 1]),
            "alt": ", ".join(images.class_names[images.labels[x]] for x in places),
        })  # fmt: skip
    return {"latent": int(t["latents"][i]), "monoscore": float(t["monoscore"][i]), "bands": bands}
