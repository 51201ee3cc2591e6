"""Band grids: latents of equal MonoScore rank in two runs, from their strongest to their weakest images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sae_lightning.data import ImageData
from sae_lightning.evaluation.by_latent import BANDS
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.source import Source
from sae_lightning.rendering.pictures import heat, overlay, strip, thumbnail
from sae_lightning.rendering.table import NOTHING, number
from sae_lightning.report.benchmark import Scored, by_backbone
from sae_lightning.runs.run import BAND_IMAGES, LATENTS, TOP_IMAGES
from sae_lightning.saes.artefact import read_tensors


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


GROUPS = {
    "most used": "The latents that fire on the most patches.",
    "random": "Drawn at random from all latents that fire.",
    "purest": "Selected: the highest top-9 class purity among latents active on at least 10 images.",
    "high Moran": "Drawn from the top 5 % of Moran's I among the latents that have one: connected regions.",
    "mean Moran": "The latents whose Moran's I is nearest to the mean.",
    "low Moran": "Drawn from the lowest 5 % of Moran's I: scattered patches.",
}

MORAN = " Moran"  # how the names of those groups end

AUDITED = 8  # backbones whose latents of high, mean and low Moran's I are set side by side


def latent_groups(
    run: Mapping[str, Any], images: ImageData, ends: str = "", n_cards: int | None = None, n_images: int | None = None
) -> list[dict[str, Any]]:
    """The cards of a run's chosen latents, grouped; strips are drawn from the images' own pixels.

    Only groups whose name ``ends`` so, with the first ``n_cards`` latents and ``n_images`` images of each.
    """
    t, metadata = read_tensors(run["folder"] / TOP_IMAGES)
    moran = read_tensors(run["folder"] / LATENTS)[0].get("moran")
    names, ids = metadata["groups"].split("|"), json.loads(metadata["image_ids"])
    height, width = map(int, metadata["grid"].split("x"))
    place = dict(zip(ids, images.index_of(list(ids.values())).tolist(), strict=True))  # rows of the store
    groups = []
    for g, name in enumerate(names):
        cards: list[dict[str, Any]] = []
        members = (t["group"] == g).nonzero().squeeze(1).tolist()
        if not name.endswith(ends) or not members:
            continue
        for i in members[:n_cards]:
            chosen = [place[str(int(x))] for x in t["images"][i] if x >= 0][:n_images]
            if not chosen:
                continue
            pictures = [thumbnail(images[x]) for x in chosen]
            maps = t["maps"][i].float().numpy().reshape(-1, height, width)
            peak = float(t["peak"][i])
            lit = [heat(p, m) if name.endswith(MORAN) else overlay(p, m, peak)
                   for p, m in zip(pictures, maps, strict=False)]  # fmt: skip
            label, count = int(t["label"][i]), len(chosen)
            cards.append({
                "latent": int(t["latents"][i]), "plain": strip(pictures), "lit": strip(lit),
                "share": float(t["firing_share"][i]), "peak": peak,
                "fired": int(t["images_fired"][i]), "shown": count,
                "makeup": f"{round(float(t['purity'][i]) * count)}/{count} {images.class_names[label]}",
                "purity": float(t["purity"][i]),
                "moran": NOTHING if moran is None else number(float(moran[int(t["latents"][i])])),
                "alt": ", ".join(images.class_names[images.labels[x]] for x in chosen),
            })  # fmt: skip
        groups.append({
            "name": name, "title": name[0].upper() + name[1:], "about": GROUPS.get(name, ""), "cards": cards,
            "heat": name.endswith(MORAN),
        })  # fmt: skip
    return groups


def pictures(run: Mapping[str, Any]) -> ImageData | None:
    """The pictures that a run was scored on; None where the config names only a store, or a stream of images.

    StoreError when they, or the backbone, have changed since.
    """
    source = Source.of(run["cfg"]["config"])
    if source.given:
        return None
    images = source.images(run["split"])
    if source.fingerprint(images) != run["store"]:
        raise StoreError(
            f"The images or the backbone of {run['name']} are not those it was scored on; evaluate it again."
        )
    return images if isinstance(images, ImageData) else None


def audit(saes: Sequence[Scored]) -> list[dict[str, Any]]:
    """A latent each of high, mean and low Moran's I of one SAE a backbone, the first that has them [App. H, Fig. 5]."""
    rows = []
    for title, members in list(by_backbone(saes).items())[:AUDITED]:
        for sae in members:
            found = pictures(sae.run)
            cells = [] if found is None else latent_groups(sae.run, found, MORAN, n_cards=1, n_images=6)
            cells = [cell for cell in cells if cell["cards"]]
            if cells:
                rows.append({"title": title, "label": sae.label, "cells": cells})
                break
    return rows
