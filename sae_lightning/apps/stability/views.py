"""What stability needs of each run: its dictionary, and its latents' activations on images that all runs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from scipy.sparse import csr_matrix

from sae_lightning.apps.opened import Opened
from sae_lightning.apps.stability.matching import Activations, activations
from sae_lightning.training.identity import same_but
from sae_lightning.training.leaves import short_hash

SAME_START = ", same start"


@dataclass(frozen=True)
class View:
    """A run as stability sees it.

    ``space`` is what its decoder's rows live in (backbone, layer, kind of features). ``fired`` [d_sae] int64 counts the
    images of the matching split that a latent fires on. ``latents`` [m] are those matched by activation, and ``fit``
    and ``held_out`` their activations on the matching and on the held-out split.
    """

    opened: Opened
    label: str
    space: tuple[Any, ...]
    recipe: str
    fired: np.ndarray
    latents: np.ndarray
    fit: Activations
    held_out: Activations

    @property
    def name(self) -> str:
        return self.opened.name


def relation(one: View, two: View) -> str:
    """How two runs differ: in "seed", "expansion" or "settings", else in their "backbone", layer or features.

    Two of the same seed are "expansion, same start" or "settings, same start": a dictionary's first directions are
    drawn by the seed, those of a smaller one are the first of a larger one's, and training may leave them near.
    """
    if one.space != two.space:
        return "backbone"
    seeds = [view.opened.made["seed"] for view in (one, two)]
    start = SAME_START if seeds[0] is not None and seeds[0] == seeds[1] else ""
    for name, ignored in {"seed": ("seed",), "expansion": ("seed", "expansion", "d_sae")}.items():
        if same_but(one.opened.made, *ignored) == same_but(two.opened.made, *ignored):
            return name + start
    return "settings" + start


def views_of(
    opened: Sequence[Opened], fit: str, held_out: str, images: int, min_images: int, latents: int | None,
    rng: np.random.Generator,
) -> tuple[list[View], dict[str, list[str]]]:  # fmt: skip
    """Every run on the images of both splits that all runs share, at most ``images`` of each, and their ids by split.

    A latent is matched by activation where it fires on ``min_images`` images of ``fit`` or more, and is among the
    ``latents`` of its run that fire most often. ValueError where the runs have no image in common, or one has no such
    latent.
    """
    ids = {split: shared_images(opened, split, images, rng) for split in (fit, held_out)}
    views = []
    for run, label in zip(opened, labels_of(opened), strict=True):
        codes = {split: codes_of(run, split, ids[split]) for split in ids}
        fired = np.bincount(codes[fit].indices[codes[fit].data > 0], minlength=codes[fit].shape[1])
        often = np.argsort(-fired, kind="stable")[:latents]
        kept = np.sort(often[fired[often] >= min_images])
        if not len(kept):
            raise ValueError(
                f"No latent of {run.name} fires on {min_images} of {len(ids[fit])} images of {fit}; lower "
                "app.min_images, or give more images (app.images)."
            )
        parts = []
        for split in ids:
            store = run.store(split)
            labels = store.labels.numpy()[store.find(ids[split])[0]]
            parts.append(activations(codes[split][:, kept], labels))
        views.append(View(run, label, space_of(run), recipe_of(run), fired, kept, *parts))
    return views, ids


def shared_images(opened: Sequence[Opened], split: str, at_most: int, rng: np.random.Generator) -> list[str]:
    """Ids of the images of ``split`` that all runs have, in the first run's order; at most so many, drawn by ``rng``.

    Images of different data sets differ, whatever their ids. ValueError with two runs that have none in common.
    """
    first = opened[0].store(split)
    ids = list(first.image_ids)
    for run in opened[1:]:
        store = run.store(split)
        here = set(store.image_ids) if store.data == first.data else set()
        ids = [image_id for image_id in ids if image_id in here]
        if not ids:
            raise ValueError(
                f"{opened[0].name} ({first.data}) and {run.name} ({store.data}) have no image of {split} in common, by "
                "which latents are matched; give runs on the same data (run=…)."
            )
    if len(ids) > at_most:
        ids = [ids[i] for i in np.sort(rng.choice(len(ids), at_most, replace=False))]
    return ids


def codes_of(run: Opened, split: str, image_ids: Sequence[str]) -> csr_matrix:
    """Codes [n, d_sae] of these images, pooled by maximum, in this order; only these are encoded."""
    store = run.store(split)
    places = store.find(image_ids)[0]
    if len(places) == len(store):
        return run.codes(split)[places]
    return run.encode_images(store, places)


def space_of(run: Opened) -> tuple[Any, ...]:
    """Backbone, layer, kind of features and d_in: what must be the same for directions to be comparable."""
    return tuple(run.made[name] for name in ("backbone", "layer", "features", "d_in"))


def recipe_of(run: Opened) -> str:
    """A hash of what the SAE is, beside the features that it was trained on and its seed."""
    sae = OmegaConf.to_container(run.config.sae, resolve=True)
    kept = {name: run.made[name] for name in ("variant", "expansion", "k", "features")}
    return short_hash(kept | {"sae": sae})


def labels_of(opened: Sequence[Opened]) -> list[str]:
    """A short name of each run, different for each: with its k, seed or full name where others are called alike."""
    found = [run.label for run in opened]
    for sign, values in {
        " k": [run.made["k"] for run in opened], " s": [run.made["seed"] for run in opened],
        " ": [run.name for run in opened],
    }.items():  # fmt: skip
        alike: dict[str, set[Any]] = {}
        for label, value in zip(found, values, strict=True):
            alike.setdefault(label, set()).add(value)
        found = [
            f"{label}{sign}{value}" if len(alike[label]) > 1 else label
            for label, value in zip(found, values, strict=True)
        ]
    return found
