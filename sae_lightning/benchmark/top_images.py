"""For every latent the images on which it is strongest, kept while the codes stream by."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.kernels.portable import offsets_of
from sae_lightning.saes import SparseCodes


class TopImages:
    """The ``n_top`` images of each latent by its activation on them, and on how many images it fires.

    ``update`` takes the codes of images, one sample each (those of patch tokens pooled by their maximum), in the
    store's order. Memory is O(n_top * d_sae); an update sorts the entries that enter the list of their latent.
    """

    def __init__(self, d_sae: int, n_top: int = 9) -> None:
        self.n_top = n_top
        self.seen = 0
        self.strength = torch.zeros(d_sae, n_top)
        self.image = torch.full((d_sae, n_top), -1)
        self.images_fired = torch.zeros(d_sae, dtype=torch.long)

    def update(self, codes: SparseCodes) -> None:
        self.images_fired += torch.bincount(codes.latents, minlength=len(self.image))
        enters = codes.values > self.strength[codes.latents, -1]
        strength, image = codes.values[enters].float(), codes.rows()[enters] + self.seen
        touched, group = codes.latents[enters].unique(return_inverse=True)
        self.seen += codes.n_samples
        # the lists of the touched latents with what enters them, sorted within each: the first n_top stay
        kept = torch.arange(len(touched)).repeat_interleave(self.n_top)
        group = torch.cat([kept, group])
        strength = torch.cat([self.strength[touched].flatten(), strength])
        image = torch.cat([self.image[touched].flatten(), image])
        order = strength.argsort(descending=True, stable=True)  # of equals the earlier image
        order = order[group[order].argsort(stable=True)]
        starts = offsets_of(torch.bincount(group, minlength=len(touched)))
        best = order[starts[:-1, None] + torch.arange(self.n_top)]
        self.strength[touched], self.image[touched] = strength[best], image[best]

    def images(self) -> Tensor:
        """Image indices [d_sae, n_top], strongest first; -1 where a latent fires on fewer images."""
        return self.image

    def peaks(self) -> Tensor:
        """Largest activation of each latent, [d_sae]; 0 for one that never fires."""
        return self.strength[:, 0]


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
