"""Codes of images read by latent: where each is strongest, its class, and which latents are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.evaluation.image_codes import ImageCodes, LatentEntries
from sae_lightning.kernels import native
from sae_lightning.kernels.portable import offsets_of
from sae_lightning.metrics import MonoScore
from sae_lightning.metrics.part import TopImages
from sae_lightning.saes import SparseCodes


@torch.no_grad()
def strongest(batches: Iterable[SparseCodes], d_sae: int, n: int) -> TopImages:
    """The ``n`` images of each latent by its activation on them, of equals the earlier, and on how many it fires.

    ``batches`` are codes of consecutive images, one sample each (those of patch tokens pooled by their maximum).
    """
    values, images = torch.zeros(d_sae, n), torch.full((d_sae, n), -1)
    fired, first = torch.zeros(d_sae, dtype=torch.long), 0
    for codes in batches:
        latents, activations = codes.latents.contiguous(), codes.values.contiguous()
        if native.available(activations):
            native.rank_samples(latents, activations, codes.offsets, first, values, images, fired)
        else:
            fired += torch.bincount(latents, minlength=d_sae)
            enters = activations > values[latents, -1]
            _sort_in(values, images, latents[enters], activations[enters].float(), codes.rows()[enters] + first)
        first += codes.n_samples
    return TopImages(images, values, fired)


def _sort_in(values: Tensor, images: Tensor, latents: Tensor, strength: Tensor, image: Tensor) -> None:
    """Put entries of later images into the lists ``values`` and ``images`` [d_sae, n] of their latents."""
    n_top = values.shape[1]
    touched, group = latents.unique(return_inverse=True)
    group = torch.cat([torch.arange(len(touched)).repeat_interleave(n_top), group])
    strength = torch.cat([values[touched].flatten(), strength])
    image = torch.cat([images[touched].flatten(), image])
    order = strength.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    starts = offsets_of(torch.bincount(group, minlength=len(touched)))
    best = order[starts[:-1, None] + torch.arange(n_top)]
    values[touched], images[touched] = strength[best], image[best]


def top_purity(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Most common label among each latent's top images [d_sae, n_top] and its share of them; (-1, 0) without images."""
    n_classes = int(labels.max()) + 1
    valid = images >= 0
    classes = torch.where(valid, labels[images.clamp_min(0)], n_classes)
    votes = torch.zeros(len(images), n_classes + 1).scatter_add(1, classes, torch.ones(classes.shape))[:, :n_classes]
    most, label = votes.max(1)
    share = most / valid.sum(1).clamp_min(1)
    return torch.where(most > 0, label, -1), share


ENOUGH = 10  # images on which a latent fires that is shown for what it stands for


def choose_latents(
    counts: Tensor, images_fired: Tensor, purity: Tensor, n: int = 12, seed: int = 0
) -> dict[str, Tensor]:
    """Latents to show: ``most used`` by firing count, ``random`` among the alive, ``purest`` by their top images.

    The random ones are drawn by ``seed`` among latents active on at least 10 images, or if there are none among the
    alive. The purest have the highest top-image purity of those, of equals the less frequent first: a selection, and
    named so.
    """
    alive = (counts > 0).nonzero().squeeze(1)
    used = counts.argsort(descending=True, stable=True)[: min(n, len(alive))]
    enough = (images_fired >= ENOUGH).nonzero().squeeze(1)
    drawn = enough if len(enough) else alive
    random = drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))[:n]]
    key = purity[enough].double() - 1e-9 * images_fired[enough].double()
    purest = enough[key.argsort(descending=True, stable=True)[:n]]
    return {"most used": used, "random": random, "purest": purest}


BANDS = ("top", "middle", "bottom")


def bands(codes: ImageCodes | ImagesOfLatents, latents: Tensor, n: int = 8) -> tuple[Tensor, Tensor]:
    """``images`` [m, 3, n] int64 and their activations [m, 3, n] float32 of ``latents`` [m]; -1 and 0 where none.

    All images on which a latent is positive are sorted by activation, descending, of equals the earlier first. The
    top band is the first n of them, the bottom band the last n, the middle band the n in the middle. Where fewer than
    3n fire, the sorted images are cut into thirds instead (a remainder goes to the upper ones), so that no image is
    shown twice.
    """
    entries = codes.of_latents(latents)
    images = torch.full((len(latents), len(BANDS), n), -1)
    values = torch.zeros(images.shape)
    for i in range(len(latents)):
        own = slice(int(entries.offsets[i]), int(entries.offsets[i + 1]))
        strength, order = entries.values[own].sort(descending=True, stable=True)
        for band, (start, stop) in enumerate(_spans(len(order), n)):
            images[i, band, : stop - start] = entries.images[own][order[start:stop]]
            values[i, band, : stop - start] = strength[start:stop]
    return images, values


def _spans(count: int, n: int) -> list[tuple[int, int]]:
    """Start and stop of the three bands among ``count`` sorted images."""
    if count >= 3 * n:
        middle = (count - n) // 2
        return [(0, n), (middle, middle + n), (count - n, count)]
    first, second = -(-count // 3), -(-(count - -(-count // 3)) // 2)
    return [(0, first), (first, first + second), (first + second, count)]


def ranked(monoscores: Tensor) -> Tensor:
    """Latents by MonoScore [d_sae], descending, of equals the lower latent first."""
    return monoscores.argsort(descending=True, stable=True)


def spread_ranks(d_sae: int, n: int, seed: int = 0) -> Tensor:
    """``n`` ranks (all if there are fewer), one drawn by ``seed`` from each of n equal parts of 0 … d_sae - 1.

    They depend on nothing but d_sae, so that the runs of a comparison show the same ranks.
    """
    edges = torch.linspace(0, d_sae, min(n, d_sae) + 1, dtype=torch.float64).long()
    draw = torch.rand(len(edges) - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return edges[:-1] + (draw * edges.diff()).long()


class ImagesOfLatents:
    """The images that each latent fires on by ``codes`` [n, d_sae], strongest first, of equals the earlier."""

    def __init__(self, codes: csr_matrix) -> None:
        columns = codes.tocsc()
        self.offsets = columns.indptr.astype(np.int64)
        owner = np.repeat(np.arange(codes.shape[1]), np.diff(self.offsets))
        order = np.lexsort((columns.indices, -columns.data, owner))
        self.images, self.values = columns.indices[order].astype(np.int64), columns.data[order].astype(np.float32)

    def of_latents(self, latents: Tensor) -> LatentEntries:
        """All images on which ``latents`` [m] fire, with the values there."""
        spans = [slice(*self.offsets[i : i + 2]) for i in latents.tolist()]
        offsets = torch.tensor([0, *(s.stop - s.start for s in spans)]).cumsum(0)
        images, values = (
            torch.from_numpy(np.concatenate([of[:0], *(of[s] for s in spans)])) for of in (self.images, self.values)
        )
        return LatentEntries(images, values, offsets)

    def top(self, n: int) -> np.ndarray:
        """The first ``n`` images [d_sae, n] int64 of every latent; -1 where it fires on fewer."""
        place = self.offsets[:-1, None] + np.arange(n)
        return np.append(self.images, -1)[np.where(place < self.offsets[1:, None], place, -1)]

    def bands(self, latent: int, n: int) -> list[tuple[str, list[tuple[int, float]]]]:
        """Its top, middle and bottom ``n`` images with their activations; bands without any are left out."""
        images, values = bands(self, torch.tensor([latent]), n)
        rows = zip(BANDS, images[0].tolist(), values[0].tolist(), strict=True)
        found = [(name, [(i, v) for i, v in zip(own, strength, strict=True) if i >= 0]) for name, own, strength in rows]
        return [(name, shown) for name, shown in found if shown]

    def histogram(self, latent: int, bins: int = 24) -> list[int]:
        """How many images fall into each of ``bins`` equal parts of 0 … its peak; only images on which it fires."""
        own = self.values[slice(*self.offsets[latent : latent + 2])]
        return np.histogram(own, bins=bins, range=(0, float(own.max())))[0].tolist() if len(own) else [0] * bins


def top_images(codes: csr_matrix, n: int, latents: np.ndarray | None = None) -> np.ndarray:
    """The up to ``n`` images [m, n] int64 on which each of ``latents`` [m] (None: all) is strongest, strongest first.

    -1 where it fires on fewer; of equals the earlier image first.
    """
    return ImagesOfLatents(codes if latents is None else codes[:, latents]).top(n)


def dominant(codes: csr_matrix, labels: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each latent the class with most of its activation, that class's share of it, and the images it fires on.

    ``codes`` [n, d_sae] pooled to images, ``labels`` [n]; three arrays [d_sae]: int64, float64 and int64; -1, 0 and 0
    where a latent never fires. Of equal classes the first. ValueError when labels and codes differ in number.
    """
    if codes.shape[0] != len(labels):
        raise ValueError(f"Expected one label for each of {codes.shape[0]} images; got {len(labels)}.")
    rows = (np.ones(len(labels)), labels, np.arange(len(labels) + 1))
    mass = (codes.T.astype(np.float64) @ csr_matrix(rows, (len(labels), n_classes))).tocsr()
    total = np.asarray(mass.sum(1)).ravel()
    label = np.asarray(mass.argmax(1)).ravel().astype(np.int64)
    top = mass.max(1).toarray().ravel()
    images = np.bincount(codes.indices[codes.data > 0], minlength=codes.shape[1])
    fired = total > 0
    return np.where(fired, label, -1), np.divide(top, total, out=np.zeros_like(top), where=fired), images


BATCH = 4096  # images


def scored_latents(metric: MonoScore, codes: csr_matrix, embeddings: Callable[[slice], Tensor]) -> np.ndarray:
    """What ``metric`` gives each latent [d_sae] by the ``codes`` [n, d_sae] of images; NaN where it gives none.

    ``embeddings`` of a range of images [b, d] tell how alike these are.
    """
    for start in range(0, codes.shape[0], BATCH):
        some = slice(start, min(start + BATCH, codes.shape[0]))
        metric.update(SparseCodes.of_csr(codes[some]), embeddings(some))
    return np.where(metric.scored().numpy(), metric.scores().numpy(), np.nan)
