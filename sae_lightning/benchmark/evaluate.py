"""Scores of a finished run on a held-out store, in one streaming pass."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.benchmark.top_images import TopImages, choose_latents, top_purity
from sae_lightning.features.ensure import ensure_store
from sae_lightning.features.store import FeatureStore, StoreError
from sae_lightning.metrics import FVU, L0, Cosine, Firing, decoder_cosine
from sae_lightning.saes import SAE
from sae_lightning.saes.artefact import read_cfg, write_json

SCORES, TOP_IMAGES = "scores.json", "top_images.safetensors"


def evaluate_run(run: Path, split: str = "test", batch_tokens: int = 4096, latents_shown: int = 12) -> dict[str, Any]:
    """Score the SAE in ``run`` on ``split`` of its own data; extracts the store if it is missing."""
    cfg = read_cfg(run)
    store = ensure_store(OmegaConf.create(cfg["config"]), split)
    return score(run, store, batch_tokens, latents_shown)


@torch.no_grad()
def score(run: Path, store: FeatureStore, batch_tokens: int = 4096, latents_shown: int = 12) -> dict[str, Any]:
    """Write ``scores.json`` and ``top_images.safetensors`` into ``run``; returns the former.

    Raises StoreError when the store is of another backbone, layer or width than the SAE.
    """
    cfg, sae = read_cfg(run), SAE.load(run)
    made_for = (cfg["backbone"], cfg["features"], cfg["layer"], cfg["d_in"])
    found = (store.backbone, store.kind, store.layer, store.d_in)
    if made_for != found:
        raise StoreError(
            f"{run.name} was trained on (backbone, features, layer, d_in) = {made_for}; the store {store.folder} holds "
            f"{found}. Evaluate it on a store of its own backbone."
        )
    mean = sae.normalizer.mean
    reconstruction = [FVU(sae.d_in, center=mean), Cosine(center=mean)]
    firing = Firing(sae.d_sae)
    sparsity = [L0(), firing]
    top = TopImages(sae.d_sae, store.n_patches)
    images = max(1, batch_tokens // store.n_patches)
    for start in tqdm(range(0, len(store), images), desc=f"Scoring {run.name}", unit="batch", leave=False):
        features = store.features(slice(start, start + images)).reshape(-1, store.d_in).float()
        codes = sae.encode(features)
        rebuilt = sae.decode(codes)
        for metric in reconstruction:
            metric.update(features, rebuilt)
        for metric in sparsity:
            metric.update(codes)
        top.update(codes)
    metrics: dict[str, float] = {}
    for metric in (*reconstruction, *sparsity):
        metrics |= {name: float(value) for name, value in metric.compute().items()}
    metrics |= decoder_cosine(sae.W_dec)
    label, purity = top_purity(top.images(), store.labels)
    metrics["top_purity"] = float(purity[top.images_fired >= 10].mean()) if (top.images_fired >= 10).any() else 0.0
    chosen = choose_latents(firing.counts, top.images_fired, purity, latents_shown)
    _save_top_images(run, sae, store, top, firing.counts, purity, label, chosen)
    scores = {
        "schema": 1, "split": store.split, "store": store.fingerprint, "n_images": len(store),
        "n_tokens": store.n_tokens, "metrics": metrics,
    }  # fmt: skip
    write_json(run / SCORES, scores)
    return scores


def _save_top_images(
    run: Path, sae: SAE, store: FeatureStore, top: TopImages, counts: Tensor, purity: Tensor, label: Tensor,
    chosen: dict[str, Tensor],
) -> None:  # fmt: skip
    """The chosen latents with their top images [n, 9] and patch activations [n, 9, P] (fp16)."""
    latents = torch.cat(list(chosen.values()))
    images = top.images()[latents]
    tensors = {
        "latents": latents,
        "group": torch.cat([torch.full((len(v),), i) for i, v in enumerate(chosen.values())]),
        "images": images,
        "maps": activation_maps(sae, store, latents, images).half(),
        "firing_share": counts[latents] / store.n_tokens,
        "images_fired": top.images_fired[latents],
        "peak": top.peaks()[latents],
        "purity": purity[latents],
        "label": label[latents],
        "counts": counts,
    }
    partial = run / (TOP_IMAGES + ".partial")
    ids = {str(i): store.image_ids[i] for i in images[images >= 0].unique().tolist()}
    metadata = {"groups": "|".join(chosen), "grid": "x".join(map(str, store.grid)), "image_ids": json.dumps(ids)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=metadata)
    os.replace(partial, run / TOP_IMAGES)


def activation_maps(sae: SAE, store: FeatureStore, latents: Tensor, images: Tensor) -> Tensor:
    """Activations [n, m, P] of each of ``latents`` [n] on the patches of its ``images`` [n, m] (-1: none, zeros)."""
    maps = torch.zeros(*images.shape, store.n_patches)
    wanted = images[images >= 0].unique()
    for some in wanted.split(64):
        codes = sae.encode(store.features(some))
        rows, place = codes.rows(), {int(image): i for i, image in enumerate(some)}
        for n, latent in enumerate(latents.tolist()):
            mine = codes.latents == latent
            for m, image in enumerate(images[n].tolist()):
                if image in place:
                    here = mine & (rows // store.n_patches == place[image])
                    maps[n, m, rows[here] % store.n_patches] = codes.values[here].float()
    return maps


def stored_scores(run: Path, split: str, names: Iterable[str]) -> dict[str, Any] | None:
    """The scores of ``run`` on ``split``; None unless whole, newer than the SAE and with every metric in ``names``."""
    path = run / SCORES
    if not (path.is_file() and (run / TOP_IMAGES).is_file()):
        return None
    if path.stat().st_mtime < (run / "sae.safetensors").stat().st_mtime:
        return None
    scores = json.loads(path.read_text())
    return scores if scores["split"] == split and set(names) <= set(scores["metrics"]) else None


def finished_runs(patterns: str | Iterable[str], folder: Path) -> list[Path]:
    """Finished run folders below ``folder`` whose names match ``patterns`` (one or several), sorted.

    Raises FileNotFoundError with a sentence when there is none.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    found = {p for pattern in patterns for p in folder.glob(pattern) if (p / "result.json").is_file()}
    if not found:
        raise FileNotFoundError(f"No finished run in {folder} matches {', '.join(patterns)}; train one with train.py.")
    return sorted(found)
