"""The similarity encoder, which says how alike two images are: the SAE's own features, or those of another encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_lightning.backbones.registry import identity
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.source import Source
from sae_lightning.features.store import FeatureStore


@dataclass(frozen=True)
class SimilarityEncoder:
    """The choice of a similarity encoder, before its store is found.

    ``backbone`` is a backbone config, whose interpolations are resolved in the config of the run that is scored; None
    is the run's own backbone. ``features`` is the kind of its features: by default ``pooled`` of another backbone, and
    of the own one those that the SAE was trained on. ``store`` is the folder of a store to take instead.
    """

    backbone: Mapping[str, Any] | None = None
    features: str | None = None
    store: str | None = None

    @property
    def own(self) -> bool:
        """Whether images are as alike as the features that are scored."""
        return self.backbone is None and self.features is None and self.store is None

    def key(self, source: Source) -> str:
        """What tells similarity encoders of a run with features of ``source`` apart: equal keys, equal similarities."""
        if self.own:
            return "own"
        if self.store is not None:
            return f"store:{FeatureStore.open(self.store).fingerprint}"
        encoder = self.of(source)
        return f"{identity(encoder.backbone)}|{encoder.tap}"

    def open(self, source: Source, split: str) -> FeatureStore | None:
        """The encoder's store of ``split``, extracted if it is missing; None where it is the scored features' own.

        Raises StoreError, DataError or BackboneError with a sentence.
        """
        if self.own:
            return None
        if self.store is not None:
            return FeatureStore.open(Path(self.store))
        encoder = self.of(source)
        if encoder.given and self.backbone is not None:
            raise StoreError(
                "The data of this run are given as a store, so that no other encoder can read its images. Name the "
                f"folder of a store of {encoder.backbone['name']} with similarity_store=…, with the same image ids."
            )
        return encoder.store(split)

    def of(self, source: Source) -> Source:
        """The encoder's features of the images of ``source``."""
        if self.backbone is None:
            return source.replace(features=self.features or source.features)
        return source.replace(backbone=self.backbone, features=self.features or "pooled")


class ImageEmbeddings:
    """Embeddings [n, d] of the images of ``store``: their own features, or those in the store ``other``.

    An image's embedding is the mean of its patch features, or the feature itself where there is one an image; as
    stored, with the mean over images left in. The two stores are aligned by image id; StoreError when ``other`` lacks
    an image.
    """

    def __init__(self, store: FeatureStore, other: FeatureStore | None = None, key: str = "own") -> None:
        self.store, self.other, self.key = store, other, key
        self.d = (other or store).d_in
        self.places: Tensor | None = None
        if other is None or other.image_ids == store.image_ids:
            return
        places, missing = other.find(store.image_ids)
        if missing:
            raise StoreError(
                f"{other.folder} lacks {len(missing)} of the {len(store)} images of {store.folder} (first: "
                f"'{missing[0]}'). Similarities need features of the same images: extract them from the same data set "
                "and split."
            )
        self.places = torch.from_numpy(places)

    def embeddings(self, images: slice, features: Tensor) -> Tensor:
        """Embeddings [n, d] float32 of ``images``, whose own ``features`` [n, P, d_in] are already read."""
        if self.other is not None:
            features = self.other.features(images if self.places is None else self.places[images])
        return features.float().mean(1)

    def about(self) -> dict[str, Any]:
        """What ``scores.json`` says of the similarity encoder."""
        store = self.other or self.store
        kind = store.kind if store.layer is None else f"{store.kind} L{store.layer}"
        title = f"{store.backbone} {kind}" + (" (mean of an image)" if store.n_patches > 1 else "")
        return {
            "key": self.key, "title": title + (", the scored features" if self.other is None else ""),
            "backbone": store.backbone, "features": store.kind, "layer": store.layer, "store": store.fingerprint,
        }  # fmt: skip


def similarity_of(cfg: DictConfig) -> SimilarityEncoder:
    """The one that ``evaluate.py`` was asked for; interpolations of its backbone stay for the run's config."""
    chosen = cfg.get("similarity")
    backbone = None if chosen is None else OmegaConf.to_container(chosen, resolve=False)
    return SimilarityEncoder(backbone, cfg.similarity_features, cfg.similarity_store)  # type: ignore[arg-type]
