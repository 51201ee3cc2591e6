"""What is written of every evaluated SAE once its pass is done: scores.json, single latents, and images to show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lightning.evaluation.by_latent import ENOUGH, bands, choose_latents, ranked, spread_ranks, top_purity
from sae_lightning.evaluation.image_codes import ImageCodes
from sae_lightning.evaluation.scoring_pass import ScoringPass
from sae_lightning.evaluation.similarity import ImageEmbeddings, SimilarityEncoder
from sae_lightning.features.store import FeatureStore
from sae_lightning.files import read_json, write_json, write_tensors
from sae_lightning.metrics import core, decoder_cosine
from sae_lightning.metrics.base import SumMetric
from sae_lightning.metrics.part import Streamed, TopImages
from sae_lightning.runs.run import BAND_IMAGES, FILES, LATENTS, SCORES, TOP_IMAGES, Run
from sae_lightning.saes import SAE
from sae_lightning.saes.artefact import ArtefactError, put_tensors, tensor_names


def save_top_images(
    run: Path, sae: SAE, store: FeatureStore, top: TopImages, counts: Tensor, purity: Tensor, label: Tensor,
    chosen: dict[str, Tensor],
) -> None:  # fmt: skip
    """The chosen latents with their ``top`` images and the patch activations there (fp16)."""
    latents = torch.cat(list(chosen.values()))
    images = top.images[latents]
    tensors = {
        "latents": latents,
        "group": torch.cat([torch.full((len(v),), i) for i, v in enumerate(chosen.values())]),
        "images": images,
        "maps": activation_maps(sae, store, latents, images).half(),
        "firing_share": counts[latents] / store.n_tokens,
        "images_fired": top.fired[latents],
        "peak": top.values[latents, 0],
        "purity": purity[latents],
        "label": label[latents],
        "counts": counts,
    }
    metadata = {
        "groups": "|".join(chosen), "grid": "x".join(map(str, store.grid)), "image_ids": _ids(store, images)
    }  # fmt: skip
    write_tensors(run / TOP_IMAGES, tensors, metadata)


def save_bands(
    run: Path, store: FeatureStore, codes: ImageCodes, monoscores: Tensor, n_ranks: int, n_images: int
) -> None:
    """The top, middle and bottom images of the latents at ``n_ranks`` MonoScore ranks spread over all of them.

    ``ranks`` and ``latents`` [r], ``monoscore`` [r], ``images`` and ``values`` [r, 3, n_images]; images as rows of the
    store, -1 where there is none.
    """
    ranks = spread_ranks(len(monoscores), n_ranks)
    latents = ranked(monoscores)[ranks]
    images, values = bands(codes, latents, n_images)
    tensors = {
        "ranks": ranks, "latents": latents, "monoscore": monoscores[latents], "images": images, "values": values
    }  # fmt: skip
    write_tensors(run / BAND_IMAGES, tensors, {"image_ids": _ids(store, images)})


def activation_maps(sae: SAE, store: FeatureStore, latents: Tensor, images: Tensor) -> Tensor:
    """Activations [n, m, P] of each of ``latents`` [n] on the patches of its ``images`` [n, m] (-1: none, zeros)."""
    maps = torch.zeros(*images.shape, store.n_patches - store.prefix)
    columns, column_of = latents.unique(return_inverse=True)  # a latent may be named twice
    column = torch.full((sae.d_sae,), -1)
    column[columns] = torch.arange(len(columns))
    for some in images[images >= 0].unique().split(64):
        codes = sae.encode(store.features(some))
        here = column[codes.latents] >= 0
        part = torch.zeros(len(some) * store.n_patches, len(columns))
        part[codes.rows()[here], column[codes.latents[here]]] = codes.values[here].float()
        part = part.view(len(some), store.n_patches, len(columns))[:, store.prefix :]
        n, m = torch.isin(images, some).nonzero(as_tuple=True)
        maps[n, m] = part[torch.searchsorted(some, images[n, m]), :, column_of[n]]
    return maps


def _ids(store: FeatureStore, images: Tensor) -> str:
    """Ids of the images (rows of the store, -1 none) as JSON, by row."""
    return json.dumps({str(i): store.image_ids[i] for i in images[images >= 0].unique().tolist()})


SCHEMA = 2  # 1 had no MonoScore, R² and purity

ABOVE = (0.25, 0.5, 0.75)

SHOWN = 9  # top images of a latent


def write_summary(
    scored: ScoringPass, latents_shown: int = 12, above: Sequence[float] = ABOVE, band_ranks: int = 24,
    band_images: int = 8, anew: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Write ``scores.json``, ``latents.safetensors``, ``top_images.safetensors`` and ``bands.safetensors``.

    They go into the run's folder, or the pass's ``out``; the first is returned. ``above`` are the MonoScores from which
    the share of latents is counted; ``band_ranks`` latents get ``band_images`` images a band. ``anew``: what other
    parts said of single latents goes.
    """
    run, store, sae, top = scored.out, scored.store, scored.sae, scored.top(SHOWN)
    latents = {name: t.cpu() for metric in scored.metrics.values() for name, t in metric.of_latents().items()}
    monoscores, counts = latents["monoscore"], latents["counts"]
    found = [scored.metrics[name].compute() for name in core.NAMES if name in scored.metrics]
    metrics = {name: float(value) for each in found for name, value in each.items()}
    baseline = metrics.pop("similarity_baseline")  # says something of the judge, not of the SAE
    metrics |= {f"monoscore_above_{t:g}": float((monoscores > t).double().mean()) for t in above}
    metrics |= decoder_cosine(sae.W_dec)
    label, top_share = top_purity(top.images, store.labels)
    enough = top.fired >= ENOUGH
    known = store.labelled and bool(enough.any())
    metrics["top_purity"] = float(top_share[enough].mean()) if known else float("nan")
    chosen = choose_latents(counts, top.fired, top_share, latents_shown)
    for metric in scored.metrics.values():
        chosen |= metric.shown(latents_shown)
    save_top_images(run, sae.cpu(), store, top, counts, top_share, label, chosen)
    save_bands(run, store, scored.codes, monoscores, band_ranks, band_images)
    put_tensors(run / LATENTS, {**latents, "images_fired": top.fired}, anew)
    scores = {
        "schema": SCHEMA, "split": store.split, "store": store.fingerprint, "n_images": len(store),
        "n_tokens": store.n_tokens, "similarity": scored.judge.about() | {"baseline": baseline},
        "metrics": metrics,
    }  # fmt: skip
    write_json(run / SCORES, scores)
    return scores


def core_metrics(sae: SAE, store: FeatureStore, judge: ImageEmbeddings) -> dict[str, SumMetric]:
    """What a pass must stream for it."""
    return core.streams(Streamed(sae, store, judge.d), {})


def stored_scores(
    run: Path, split: str, names: Iterable[str], similarity: SimilarityEncoder | None = None, out: Path | None = None
) -> dict[str, Any] | None:
    """The scores of ``run`` on ``split``; None unless whole, newer than the SAE, with every metric in ``names`` and,
    where ``similarity`` is given, judged by it. ``out``: of another data set's, in that folder.
    """
    out = out or run
    path = out / SCORES
    if not path.is_file() or not all(tensor_names(out / name) for name in FILES if name != SCORES):
        return None
    if not (run / "sae.safetensors").is_file() or path.stat().st_mtime < (run / "sae.safetensors").stat().st_mtime:
        return None
    try:
        scores = Run(run).scores if out == run else read_json(path, "score it again", ArtefactError)
    except ArtefactError:
        return None
    if scores.get("schema") != SCHEMA or scores["split"] != split or not set(names) <= set(scores["metrics"]):
        return None
    if similarity is not None and scores["similarity"]["key"] != similarity.key(Run(run).source):
        return None
    return scores
