"""What is written of an SAE once its pass is done: scores.json, figures of single latents, and images to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sae_lightning.benchmark.latents import LATENTS, put_tensors, save_bands, save_top_images
from sae_lightning.benchmark.scoring_pass import ScoringPass, labelled
from sae_lightning.benchmark.top_images import choose_latents, spread_of_moran, top_purity
from sae_lightning.metrics import Firing, MonoScore, Moran, Purity, decoder_cosine
from sae_lightning.saes.artefact import write_json

SCORES = "scores.json"
SCHEMA = 2  # 1 had no MonoScore, R² and purity
ABOVE = (0.25, 0.5, 0.75)
SHOWN = 9  # top images of a latent


def write_summary(
    scored: ScoringPass, latents_shown: int = 12, above: Sequence[float] = ABOVE, band_ranks: int = 24,
    band_images: int = 8, anew: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Write ``scores.json``, ``latents.safetensors``, ``top_images.safetensors`` and ``bands.safetensors``.

    They go into the run's folder; the first is returned. ``above`` are the MonoScores from which the share of latents
    is counted; ``band_ranks`` latents get ``band_images`` images a band.
    """
    run, store, sae, top = scored.run, scored.store, scored.sae, scored.top
    mono, firing = scored.metrics["mono"], scored.metrics["firing"]
    assert isinstance(mono, MonoScore)
    assert isinstance(firing, Firing)
    monoscores, counts = mono.scores().cpu(), firing.counts.cpu()
    metrics = core_scores(scored)
    baseline = metrics.pop("similarity_baseline")  # says something of the judge, not of the SAE
    metrics |= shares_above(monoscores, above) | decoder_cosine(sae.W_dec)
    images = top.images()[:, :SHOWN]
    label, top_share = top_purity(images, store.labels)
    enough = top.images_fired >= 10
    known = labelled(store) and bool(enough.any())
    metrics["top_purity"] = float(top_share[enough].mean()) if known else float("nan")
    chosen = choose_latents(counts, top.images_fired, top_share, latents_shown)
    moran = scored.metrics.get("moran")
    if isinstance(moran, Moran):
        chosen |= spread_of_moran(moran.scores().cpu(), -(-latents_shown // 2))
    save_top_images(run, sae.cpu(), store, images, top, counts, top_share, label, chosen)
    save_bands(run, store, scored.codes, monoscores, band_ranks, band_images)
    put_tensors(run / LATENTS, per_latent(scored), anew)
    scores = {
        "schema": SCHEMA, "split": store.split, "store": store.fingerprint, "n_images": len(store),
        "n_tokens": store.n_tokens, "similarity": scored.judge.about() | {"baseline": baseline},
        "metrics": metrics,
    }  # fmt: skip
    write_json(run / SCORES, scores)
    return scores


def core_scores(scored: ScoringPass) -> dict[str, float]:
    """What the core metrics' ``compute`` give."""
    names = ("reconstruction", "l0", "firing", "mono", "purity")
    found = [scored.metrics[name].compute() for name in names if name in scored.metrics]
    return {name: float(value) for each in found for name, value in each.items()}


def shares_above(scores: Tensor, above: Sequence[float]) -> dict[str, float]:
    """The share of all latents whose MonoScore [d_sae] lies above each of ``above``."""
    return {above_name(t): float((scores > t).double().mean()) for t in above}


def above_name(threshold: float) -> str:
    """The name of the share of latents above a MonoScore."""
    return f"monoscore_above_{threshold:g}"


def per_latent(scored: ScoringPass) -> dict[str, Tensor]:
    """[d_sae] each: MonoScore and whether there is one, images and tokens fired on, purities and dominant class, and
    Moran's I with the images it is a mean of.
    """
    m = scored.metrics
    mono, firing, purity, moran = m["mono"], m["firing"], m.get("purity"), m.get("moran")
    assert isinstance(mono, MonoScore)
    assert isinstance(firing, Firing)
    tensors: dict[str, Tensor] = {
        "monoscore": mono.scores(), "scored": mono.scored(), "images_fired": scored.top.images_fired,
        "counts": firing.counts,
    }  # fmt: skip
    if isinstance(purity, Purity):
        found = purity.per_latent()
        tensors |= {
            "purity": found.purity, "weighted_purity": found.weighted_purity, "dominant_class": found.dominant
        }  # fmt: skip
    if isinstance(moran, Moran):
        tensors |= {"moran": moran.scores(), "moran_images": moran.images}
    return {name: torch.as_tensor(tensor).cpu() for name, tensor in tensors.items()}
