"""Codes of images read by latent: where each is strongest, its class, and which latents are shown."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_lightning.evaluation.image_codes import ImageCodes, LatentEntries
from sae_lightning.kernels import native
from sae_lightning.kernels.portable import offsets_of
from sae_lightning.metrics import MonoScore
from sae_lightning.saes import SparseCodes


class TopImages:
    """The ``n_top`` images of each latent by its activation on them, and on how many images it fires.

    ``update`` takes the codes of images, one sample each (those of patch tokens pooled by their maximum), in the
    store's order from image ``first`` on. Memory is O(n_top * d_sae): without compiled kernels, entries that may enter
    the list of their latent are collected and sorted in whenever they are as many as the lists hold.
    """

    def __init__(self, d_sae: int, n_top: int = 9, first: int = 0) -> None:
        self.n_top = n_top
        self.seen = first
        self.strength = torch.zeros(d_sae, n_top)
        self.image = torch.full((d_sae, n_top), -1)
        self.images_fired = torch.zeros(d_sae, dtype=torch.long)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # latents, strengths, images
        self._waiting_entries = 0

    def update(self, codes: SparseCodes) -> None:
        if native.available(codes.values):
            latents, values = codes.latents.contiguous(), codes.values.detach().contiguous()
            lists = (self.strength, self.image, self.images_fired)
            native.rank_samples(latents, values, codes.offsets, self.seen, *lists)
            self.seen += codes.n_samples
            return
        self.images_fired += torch.bincount(codes.latents, minlength=len(self.image))
        enters = codes.values > self.strength[codes.latents, -1]
        entries = (codes.latents[enters], codes.values[enters].float(), codes.rows()[enters] + self.seen)
        self.seen += codes.n_samples
        self._waiting.append(entries)
        self._waiting_entries += len(entries[0])
        if self._waiting_entries >= self.image.numel():
            self._sort_in()

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what another object saw of later images, as its ``state`` says."""
        self._sort_in()
        self.images_fired += state["images_fired"]
        latents, place = (state["image"] >= 0).nonzero(as_tuple=True)
        self._waiting.append((latents, state["strength"][latents, place], state["image"][latents, place]))
        self._sort_in()

    def state(self) -> dict[str, Tensor]:
        """All that it knows, as tensors."""
        self._sort_in()
        return {"strength": self.strength, "image": self.image, "images_fired": self.images_fired}

    def load(self, state: dict[str, Tensor], seen: int) -> None:
        """Go on from a ``state`` after image ``seen``."""
        self.strength, self.image, self.images_fired = (state[n] for n in ("strength", "image", "images_fired"))
        self.seen, self._waiting, self._waiting_entries = seen, [], 0

    def images(self) -> Tensor:
        """Image indices [d_sae, n_top], strongest first; -1 where a latent fires on fewer images."""
        self._sort_in()
        return self.image

    def strengths(self) -> Tensor:
        """The activations on them, [d_sae, n_top] float32; 0 where there is no image."""
        self._sort_in()
        return self.strength

    def peaks(self) -> Tensor:
        """Largest activation of each latent, [d_sae]; 0 for one that never fires."""
        return self.strengths()[:, 0]

    def _sort_in(self) -> None:
        """Put what waits into the lists of its latents, of equal activations the earlier image first."""
        if not self._waiting:
            return
        latents, strength, image = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._waiting_entries = [], 0
        touched, group = latents.unique(return_inverse=True)
        kept = torch.arange(len(touched)).repeat_interleave(self.n_top)
        group = torch.cat([kept, group])
        strength = torch.cat([self.strength[touched].flatten(), strength])
        image = torch.cat([self.image[touched].flatten(), image])
        order = strength.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        starts = offsets_of(torch.bincount(group, minlength=len(touched)))
        best = order[starts[:-1, None] + torch.arange(self.n_top)]
        self.strength[touched], self.image[touched] = strength[best], image[best]


def top_purity(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Most common label among each latent's top images [d_sae, n_top] and its share of them; (-1, 0) without images."""
    n_classes = int(labels.max()) + 1
    valid = images >= 0
    classes = torch.where(valid, labels[images.clamp_min(0)], n_classes)
    votes = torch.zeros(len(images), n_classes + 1).scatter_add(1, classes, torch.ones(classes.shape))[:, :n_classes]
    most, label = votes.max(1)
    share = most / valid.sum(1).clamp_min(1)
    return torch.where(most > 0, label, -1), share


def choose_latents(
    counts: Tensor, images_fired: Tensor, purity: Tensor, n: int = 12, seed: int = 0
) -> dict[str, Tensor]:
    """Latents to show: ``most used`` by firing count, ``random`` among the alive, ``purest`` by their top images.

    The random ones are drawn by ``seed``. The purest are those with the highest top-image purity among
    latents active on at least 10 images, of equals the less frequent first: a selection, and named so.
    """
    alive = (counts > 0).nonzero().squeeze(1)
    used = counts.argsort(descending=True, stable=True)[: min(n, len(alive))]
    generator = torch.Generator().manual_seed(seed)
    random = alive[torch.randperm(len(alive), generator=generator)[:n]]
    enough = (images_fired >= 10).nonzero().squeeze(1)
    key = purity[enough].double() - 1e-9 * images_fired[enough].double()
    purest = enough[key.argsort(descending=True, stable=True)[:n]]
    return {"most used": used, "random": random, "purest": purest}


def spread_of_moran(moran: Tensor, n: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Latents to show of a distribution of Moran's I [d_sae] (NaN: none) [ViSAEBench App. H].

    ``high Moran`` are drawn by ``seed`` from its top 5 %, ``low Moran`` from its lowest; ``mean Moran`` are the ones
    nearest to its mean.
    """
    known = (~moran.isnan()).nonzero().squeeze(1)
    order = known[moran[known].argsort(stable=True)]
    tail = min(len(order), max(n, -(-len(order) // 20)))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(tail, generator=generator)[:n]
    near = (moran[known] - moran[known].mean()).abs().argsort(stable=True)[:n]
    return {
        "high Moran": order[len(order) - tail :][drawn], "mean Moran": known[near], "low Moran": order[:tail][drawn]
    }  # fmt: skip


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
