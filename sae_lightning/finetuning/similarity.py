"""The frozen encoder's image embeddings that say which images are alike, in the order of a data set's images."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_lightning.data import ImageData
from sae_lightning.features.ensure import ensure_store, plain
from sae_lightning.features.store import FeatureStore
from sae_lightning.finetuning.errors import FinetuneError


def similarity_store(cfg: DictConfig, split: str) -> FeatureStore:
    """The store of ``cfg.features`` of ``split`` by the encoder ``cfg.similarity``, extracted now if it is missing.

    Or the folder ``cfg.similarity_store.<split>``, made by whatever encoder. Raises FinetuneError for features of
    more than one vector an image, and what ``ensure_store`` raises.
    """
    given = cfg.similarity_store.get(split)
    if given is not None:
        store = FeatureStore.open(Path(given))
    else:
        sections = {key: plain(cfg[key]) for key in ("data", "extract", "paths")}
        store = ensure_store(OmegaConf.create(sections | {"backbone": plain(cfg.similarity)}), split, str(cfg.features))
    if store.n_patches != 1:
        raise FinetuneError(
            f"{store.folder} holds {store.n_patches} vectors an image ({store.kind}); similarity needs one: set "
            "features=embedding, pooled or cls."
        )
    return store


def align(store: FeatureStore, images: ImageData) -> Tensor:
    """Embeddings [n, d] of ``images`` in their order, in the store's type; FinetuneError names an image without one."""
    rows, missing = store.find(images.image_ids)
    if missing:
        raise FinetuneError(
            f"{store.folder} holds no embedding of {len(missing)} of the {len(images)} {images.split} images of "
            f"'{images.name}', '{missing[0]}' among them; name the store of these images, or delete it and run again "
            "so that it is extracted anew."
        )
    return store.features(rows).flatten(1)
