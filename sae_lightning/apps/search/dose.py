"""Dose curves of concept arithmetic: does turning a class's latent up bring that class among the neighbours?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.apps.edits import WholeImages, edited, whole_images
from sae_lightning.apps.search.neighbours import neighbours, precision
from sae_lightning.apps.statistics import fires_alike, mean_interval
from sae_lightning.evaluation.by_latent import dominant
from sae_lightning.runs.run import Run
from sae_lightning.saes import SAE

SCALE_IMAGES = 64  # that tell the mean scale of an input norm


def spread(sae: SAE, features: Tensor) -> float:
    """The magnitude that moves an image as far as images lie from their mean (root mean square).

    ``features`` [n, P, d_in] raw. Latents' own activations are no common measure: dictionaries with many active
    latents use small ones, and turning by multiples of these moves nothing.
    """
    pooled = features.float().mean(1)
    far = (pooled - pooled.mean(0)).square().sum(1).mean().sqrt()
    return float(far / (sae.normalizer.std * whole_images(sae, [features[:SCALE_IMAGES]]).room.mean()))


LATENT, OTHER, RANDOM, MEANS = (
    "latent of the class", "random latent, as often active", "random direction", "difference of class means (labels)"
)  # fmt: skip

ARMS = (LATENT, OTHER, RANDOM, MEANS)

SPREAD_IMAGES = 1024  # that tell how far images lie from their mean

FIRES = 20  # training images that a latent must fire on


def class_latents(codes: csr_matrix, labels: np.ndarray, n_classes: int, each: int) -> list[tuple[int, int]]:
    """For every class ``each`` of the latents that it dominates, as (latent, class), strongest first.

    Strength is the mean code on the class's images less that on all others: how far the latent moves images of the
    class. The purest latents would be no choice: in dictionaries with many active latents they are of tiny activation,
    along directions in which images hardly differ. Only latents that fire on at least 20 of the images count.
    """
    label, _, images = dominant(codes, labels, n_classes)
    total, chosen = np.asarray(codes.sum(0, dtype=np.float64)).ravel(), []
    for c in np.unique(labels).tolist():
        here = labels == c
        own = np.asarray(codes[here].sum(0, dtype=np.float64)).ravel()
        excess = own / here.sum() - (total - own) / max(1, (~here).sum())
        mine = np.flatnonzero((label == c) & (images >= FIRES) & (excess > 0))
        chosen += [(int(i), c) for i in mine[np.argsort(-excess[mine], kind="stable")[:each]]]
    return chosen


def dose_table(
    opened: Run, split: str, each: int, n_images: int, doses: Sequence[float], k: int, seed: int
) -> pd.DataFrame:
    """The share of a latent's class among the ``k`` nearest images when it is turned, one row a latent, arm and dose.

    ``each`` latents a class, see ``class_latents``, of the training images; turned to ``doses`` spreads, up on
    ``n_images`` images of other classes (``of`` "others"), down on as many of their own ("own"). The arms move the
    images by the same length: along the latent, along a random latent that fires as often, in a random direction, and
    along the difference of the class's mean from that of all others, which needs labels. ``before`` is the share
    around the images decoded as they are. Empty where no latent can be chosen.
    """
    images = opened.images(split)
    train = opened.codes("train")
    label, purity, fires = dominant(train, opened.images("train").labels, len(images.class_names))
    chosen = class_latents(train, opened.images("train").labels, len(images.class_names), each)
    unit = spread_of(opened)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    gallery, rows = opened.features(split), []
    for own in (False, True):
        members = [np.flatnonzero((images.labels == c) == own) for c in range(len(images.class_names))]
        queries = [rng.permutation(some)[:n_images] for some in members]
        decoded = {c: _decode(opened, split, queries[c]) for c in {c for _, c in chosen} if len(queries[c])}
        wanted = [dose for dose in doses if (dose <= 0 if own else dose >= 0)]
        for latent, c in chosen:
            if c not in decoded:
                continue
            ways = _ways(opened, latent, fires_alike(latent, label != label[latent], fires, rng), c, generator)
            to = [dose * unit for dose in wanted]
            moved = [edited(opened.sae, decoded[c], latent, to, along.numpy()) for along in ways.values()]
            every = np.concatenate([decoded[c].decoded.astype(np.float32)[None], *moved])
            where = np.tile(queries[c], len(every))
            found = neighbours(every.reshape(len(where), -1), gallery, k, "cosine", where).images
            shares = precision(found, np.full(len(found), c), images.labels, k).reshape(len(every), -1).mean(1)
            cells = [(arm, dose) for arm in ways for dose in wanted]
            rows += [
                {"latent": latent, "class": images.class_names[c], "purity": purity[latent],
                 "of": "own" if own else "others", "arm": arm, "dose": dose, "share": share, "before": shares[0]}
                for (arm, dose), share in zip(cells, shares[1:], strict=True)
            ]  # fmt: skip
    return pd.DataFrame(rows)


def dose_means(table: pd.DataFrame) -> pd.DataFrame:
    """Mean share over latents with its 95 % bootstrap interval, one row for each ``of``, arm and dose."""
    rows = []
    for (of, arm, dose), part in table.groupby(["of", "arm", "dose"], sort=True):
        low, high = mean_interval(part["share"].to_numpy())
        rows.append({"of": of, "arm": arm, "dose": dose, "share": part["share"].mean(), "low": low, "high": high,
                     "before": part["before"].mean(), "latents": len(part)})  # fmt: skip
    return pd.DataFrame(rows)


def spread_of(opened: Run) -> float:
    """The magnitude that moves an image by the spread of the run's training images, see ``spread``."""
    store = opened.store("train")
    some = np.linspace(0, len(store) - 1, min(len(store), SPREAD_IMAGES)).astype(np.int64)
    return spread(opened.sae, store.features(torch.from_numpy(some)))


def _decode(opened: Run, split: str, index: np.ndarray) -> WholeImages:
    return whole_images(opened.sae, [opened.store(split).features(torch.from_numpy(np.asarray(index)))])


def _ways(opened: Run, latent: int, other: int, c: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The direction of each arm [d_in], as long as the latent's decoder row."""
    rows = opened.sae.W_dec.detach()
    ways = {LATENT: rows[latent], RANDOM: torch.randn(rows.shape[1], generator=generator)}
    if other >= 0:
        ways[OTHER] = rows[other]
    labels, features = opened.images("train").labels, opened.features("train")
    if (labels != c).any():
        ways[MEANS] = torch.from_numpy(features[labels == c].mean(0) - features[labels != c].mean(0))
    length = rows[latent].norm()
    return {arm: ways[arm] * (length / ways[arm].norm()) for arm in ARMS if arm in ways}
