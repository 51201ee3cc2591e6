"""For every latent the images on which it is strongest, kept while the codes stream by."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.saes import SparseCodes


class TopImages:
    """The ``n_top`` images of each latent by its largest patch activation, and on how many images it fires.

    ``update`` takes the codes of whole images, ``n_patches`` samples each, in the store's order. Memory
    is O(n_top * d_sae), and O(images * d_sae) for the images of one update.
    """

    def __init__(self, d_sae: int, n_patches: int, n_top: int = 9) -> None:
        self.n_patches, self.n_top, self.d_sae = n_patches, n_top, d_sae
        self.seen = 0
        self.strength = torch.zeros(0, d_sae)
        self.image = torch.zeros(0, d_sae, dtype=torch.long)
        self.images_fired = torch.zeros(d_sae, dtype=torch.long)

    def update(self, codes: SparseCodes) -> None:
        count = codes.n_samples // self.n_patches
        place = codes.rows() // self.n_patches * self.d_sae + codes.latents
        peak = torch.zeros(count * self.d_sae).scatter_reduce(0, place, codes.values.float(), "amax")
        peak = peak.view(count, self.d_sae)
        self.images_fired += (peak > 0).sum(0)
        own = torch.arange(self.seen, self.seen + count).unsqueeze(1).expand(-1, self.d_sae)
        strength, image = torch.cat([self.strength, peak]), torch.cat([self.image, own])
        best = strength.topk(min(self.n_top, len(strength)), dim=0)
        self.strength, self.image = best.values, image.gather(0, best.indices)
        self.seen += count

    def images(self) -> Tensor:
        """Image indices [d_sae, n_top], strongest first; -1 where a latent fires on fewer images."""
        return torch.where(self.strength > 0, self.image, -1).T.contiguous()

    def peaks(self) -> Tensor:
        """Largest activation of each latent, [d_sae]; 0 for one that never fires."""
        return self.strength[0]


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
