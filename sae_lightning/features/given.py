"""Stores that the user names by folder: no pictures and no encoder are needed to train on them."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from sae_lightning.backbones import Tap, folder_name
from sae_lightning.features.manifest import MANIFEST, Manifest
from sae_lightning.features.store import FeatureStore, StoreError


def given_store(cfg: DictConfig, split: str, tap: Tap | None = None) -> FeatureStore:
    """The store ``cfg.data.<split>``; where val or test is null, a stratified share ``held_out`` of ``data.train``.

    Labels have the numbers that their classes have in train's store.
    StoreError when it holds another kind of feature, layer or backbone than the config names.
    """
    stream = cfg.get("stream") or {}
    options = (stream.get("damaged", "refuse"), stream.get("verify", False))
    missing = [s for s in ("val", "test") if cfg.data.get(s) is None]
    if cfg.data.get(split) is not None and not (split == "train" and missing):
        store = _fits(FeatureStore.open(Path(cfg.data[split]), *options), cfg, tap)
        train = Path(cfg.data.train)
        numbered = split != "train" and (train / MANIFEST).is_file()
        return store.numbered_as(Manifest.read(train).class_names) if numbered else store
    whole = _fits(FeatureStore.open(Path(cfg.data.train), *options), cfg, tap)
    shares = {"train": 1 - cfg.data.held_out * len(missing)} | dict.fromkeys(missing, cfg.data.held_out)
    return whole.parts(shares, cfg.data.seed)[split]


def _fits(store: FeatureStore, cfg: DictConfig, tap: Tap | None) -> FeatureStore:
    name = folder_name(store.backbone.split(" ")[0])
    if name != cfg.backbone.name:
        raise StoreError(
            f"{store.folder} holds features of {store.backbone}, but backbone={cfg.backbone.name}. Set "
            f"backbone={name}, or name another store."
        )
    if tap is not None and (store.kind, store.layer) != (tap.kind, tap.layer):
        found = f"{store.kind} features of layer {store.layer}" if store.layer is not None else store.kind
        raise StoreError(
            f"{store.folder} holds {found}; the config asks for {tap}. Set features={store.kind}"
            + (f" and backbone.layer={store.layer}." if store.layer is not None else ".")
        )
    return store
