"""Features of any module of PyTorch, without an encoder's interface around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from tqdm.auto import tqdm

from sae_lightning.backbones.taps import BackboneError, Layout, Place, recorded, tensor_of
from sae_lightning.data import ImageData
from sae_lightning.features.importing import import_features, spooled
from sae_lightning.features.store import FeatureStore


def extract_module(
    images: ImageData, module: Module, layer: Any, transform: Any, prefix: int, batch_size: int, stores: Path,
    split: str,
) -> FeatureStore:  # fmt: skip
    """The store below ``stores`` of what ``module`` gives of ``images`` at the module ``layer`` (None: its output).

    It gives [n, d], tokens [n, T, d] of which the first ``prefix`` are no patches, or a map [n, d, h, w]. ``transform``
    makes its input [3, H, W] of a picture. The module is as before afterwards. BackboneError without a transform, and
    where there is no such module.
    """
    if transform is None:
        raise BackboneError("A module of your own needs transform, from a picture to its input [3, H, W].")
    places = dict(module.named_modules())
    if layer is not None and layer not in places:
        known = ", ".join(name for name, _ in module.named_children())
        raise BackboneError(f"{type(module).__name__} has no module {layer}; a path begins with one of {known}.")
    grid: list[tuple[int, int]] = []

    @torch.no_grad()
    def batches() -> Iterator[tuple[Tensor, list[str]]]:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        for start in range(0, len(images), batch_size):
            some = range(start, min(len(images), start + batch_size))
            pixels = torch.stack([transform(images[i]) for i in some]).to(device)
            with recorded({} if layer is None else {0: Place(places[layer])}) as seen:
                output = module(pixels)
            x = tensor_of(output) if layer is None else seen[0]
            if x.ndim == 4:
                grid[:] = [Layout().grid(x)]
                x = Layout().rows(x)
            yield x, [images.class_names[images.labels[i]] for i in some]

    stores.mkdir(parents=True, exist_ok=True)
    training = module.training
    module.eval()
    try:
        with spooled(tqdm(batches(), "Extracting", -(-len(images) // batch_size), unit="batch"), stores) as (x, labels):
            return import_features(
                x, stores, type(module).__name__, grid=grid[0] if grid else None, prefix=prefix, labels=labels,
                ids=images.image_ids, data=images.name, split=split, named=True,
            )  # fmt: skip
    finally:
        module.train(training)
