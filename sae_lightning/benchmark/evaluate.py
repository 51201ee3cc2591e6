"""Scores of a finished run on a held-out store, in one streaming pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.benchmark.image_codes import ImageCodes
from sae_lightning.benchmark.latents import (
    BAND_IMAGES,
    LATENTS,
    TOP_IMAGES,
    save_bands,
    save_top_images,
    write_tensors,
)
from sae_lightning.benchmark.similarity import Judge, Similarity
from sae_lightning.benchmark.top_images import TopImages, choose_latents, top_purity
from sae_lightning.data.labels import UNLABELLED
from sae_lightning.features.ensure import ensure_store
from sae_lightning.features.store import FeatureStore, StoreError
from sae_lightning.metrics import FVU, L0, R2, Cosine, Firing, MonoScore, Purity, decoder_cosine
from sae_lightning.saes import SAE
from sae_lightning.saes.artefact import read_cfg, write_json

SCORES = "scores.json"
SCHEMA = 2  # 1 had no MonoScore, R² and purity
FILES = (SCORES, LATENTS, TOP_IMAGES, BAND_IMAGES)  # what scoring leaves in the run's folder
ABOVE = (0.25, 0.5, 0.75)


def evaluate_run(
    run: Path, split: str = "test", batch_tokens: int = 4096, latents_shown: int = 12,
    similarity: Similarity | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Score the SAE in ``run`` on ``split`` of its own data; extracts the store if it is missing.

    ``similarity`` judges how alike images are (by default the SAE's own features); ``options`` are those of ``score``.
    """
    config = read_cfg(run)["config"]
    similarity = similarity or Similarity()
    store = ensure_store(OmegaConf.create(config), split)
    judge = Judge(store, similarity.open(config, split), similarity.key(config))
    return score(run, store, batch_tokens, latents_shown, judge, **options)


@torch.no_grad()
def score(
    run: Path, store: FeatureStore, batch_tokens: int = 4096, latents_shown: int = 12, judge: Judge | None = None,
    above: Sequence[float] = ABOVE, band_ranks: int = 24, band_images: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Write ``scores.json``, ``latents.safetensors``, ``top_images.safetensors`` and ``bands.safetensors``.

    They go into ``run``; the first is returned. MonoScore and purity work on codes of images: of patch tokens the
    maximum over an image's patches. ``judge`` gives the images' embeddings (by default their own features). ``above``
    are the MonoScores from which the share of latents is counted; ``band_ranks`` latents get ``band_images`` images a
    band. Raises StoreError when the store is of another backbone, layer or width than the SAE.
    """
    cfg, sae = read_cfg(run), SAE.load(run)
    made_for = (cfg["backbone"], cfg["features"], cfg["layer"], cfg["d_in"])
    found = (store.backbone, store.kind, store.layer, store.d_in)
    if made_for != found:
        raise StoreError(
            f"{run.name} was trained on (backbone, features, layer, d_in) = {made_for}; the store {store.folder} holds "
            f"{found}. Evaluate it on a store of its own backbone."
        )
    judge = judge or Judge(store)
    mean = sae.normalizer.mean
    reconstruction = [FVU(sae.d_in, center=mean), R2(sae.d_in, center=mean), Cosine(center=mean)]
    firing, mono = Firing(sae.d_sae), MonoScore(sae.d_sae, judge.d)
    sparsity = [L0(), firing]
    purity = Purity(sae.d_sae, len(store.class_names)) if labelled(store) else None
    top = TopImages(sae.d_sae)
    images = max(1, batch_tokens // store.n_patches)
    with ImageCodes(sae.d_sae, run) as image_codes:
        for start in tqdm(range(0, len(store), images), desc=f"Scoring {run.name}", unit="batch", leave=False):
            span = slice(start, start + images)
            read = store.features(span)
            features = read.reshape(-1, store.d_in).float()
            codes = sae.encode(features)
            rebuilt = sae.decode(codes)
            for metric in reconstruction:
                metric.update(features, rebuilt)
            for metric in sparsity:
                metric.update(codes)
            pooled = codes.pool(store.n_patches, "max")
            mono.update(pooled, judge.embeddings(span, read))
            if purity is not None:
                purity.update(pooled, store.labels[span])
            top.update(pooled)
            image_codes.append(pooled)
        save_bands(run, store, image_codes, mono.scores(), band_ranks, band_images)
    metrics: dict[str, float] = {}
    for metric in (*reconstruction, *sparsity, mono, *([] if purity is None else [purity])):
        metrics |= {name: float(value) for name, value in metric.compute().items()}
    baseline = metrics.pop("similarity_baseline")  # says something of the judge, not of the SAE
    metrics |= shares_above(mono.scores(), above) | decoder_cosine(sae.W_dec)
    label, top_share = top_purity(top.images(), store.labels)
    enough = top.images_fired >= 10
    metrics["top_purity"] = float(top_share[enough].mean()) if enough.any() else 0.0
    chosen = choose_latents(firing.counts, top.images_fired, top_share, latents_shown)
    save_top_images(run, sae, store, top, firing.counts, top_share, label, chosen)
    _save_latents(run, mono, purity, firing, top)
    scores = {
        "schema": SCHEMA, "split": store.split, "store": store.fingerprint, "n_images": len(store),
        "n_tokens": store.n_tokens, "similarity": judge.about() | {"baseline": baseline},
        "metrics": metrics,
    }  # fmt: skip
    write_json(run / SCORES, scores)
    return scores


def labelled(store: FeatureStore) -> bool:
    """Whether the images have classes, without which there is no purity."""
    return store.class_names != [UNLABELLED]


def shares_above(scores: Tensor, above: Sequence[float]) -> dict[str, float]:
    """The share of all latents whose MonoScore [d_sae] lies above each of ``above``."""
    return {above_name(t): float((scores > t).double().mean()) for t in above}


def above_name(threshold: float) -> str:
    """The name of the share of latents above a MonoScore."""
    return f"monoscore_above_{threshold:g}"


def _save_latents(run: Path, mono: MonoScore, purity: Purity | None, firing: Firing, top: TopImages) -> None:
    """Per latent [d_sae]: MonoScore and whether it has one, purities and dominant class, images and tokens fired on."""
    tensors: dict[str, Tensor] = {
        "monoscore": mono.scores(), "scored": mono.scored(), "images_fired": top.images_fired, "counts": firing.counts
    }  # fmt: skip
    if purity is not None:
        found = purity.per_latent()
        tensors |= {
            "purity": found.purity, "weighted_purity": found.weighted_purity, "dominant_class": found.dominant
        }  # fmt: skip
    write_tensors(run / LATENTS, tensors)


def stored_scores(
    run: Path, split: str, names: Iterable[str], similarity: Similarity | None = None
) -> dict[str, Any] | None:
    """The scores of ``run`` on ``split``; None unless whole, newer than the SAE, with every metric in ``names`` and,
    where ``similarity`` is given, judged by it.
    """
    path = run / SCORES
    if not all((run / name).is_file() for name in FILES):
        return None
    if path.stat().st_mtime < (run / "sae.safetensors").stat().st_mtime:
        return None
    scores = json.loads(path.read_text())
    if scores.get("schema") != SCHEMA or scores["split"] != split or not set(names) <= set(scores["metrics"]):
        return None
    if similarity is not None and scores["similarity"]["key"] != similarity.key(read_cfg(run)["config"]):
        return None
    return scores


def finished_runs(patterns: str | Iterable[str], folder: Path) -> list[Path]:
    """Finished run folders below ``folder`` whose names match ``patterns`` (one or several), sorted.

    Raises FileNotFoundError with a sentence when there is none.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    found = {p for pattern in patterns for p in folder.glob(pattern) if (p / "result.json").is_file()}
    if not found:
        raise FileNotFoundError(f"No finished run in {folder} matches {', '.join(patterns)}; train one with train.py.")
    return sorted(found)
