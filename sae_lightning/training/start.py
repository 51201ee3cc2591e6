"""Before the first step: where b_pre and thresholds start, and whether the features fit the normaliser."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.features.manifest import SEVERE
from sae_lightning.features.store import FeatureStore
from sae_lightning.registry import one_of
from sae_lightning.saes import SAE

SAMPLE = 8192  # tokens
EACH, NUMBERS = 128, 2**26  # tokens a latent that a dictionary is fitted to, and at most so many numbers in them
B_PRE = ("mean", "geometric_median", "zero")


def sample(store: FeatureStore, tokens: int = SAMPLE) -> Tensor:
    """About ``tokens`` raw features [n, d_in] of evenly spaced images."""
    step = max(1, len(store) * store.n_patches // tokens)
    images = torch.arange(0, len(store), step)
    return torch.cat([store.features(slice(int(i), int(i) + 1)).reshape(-1, store.d_in).float() for i in images])


def geometric_median(x: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point [d] with the least sum of distances to the rows of ``x`` [N, d].

    Weiszfeld's iteration, with Vardi and Zhang's step away from a row that the point lies on.
    """
    point = x.mean(0)
    for _ in range(steps):
        distance = (x - point).norm(dim=1)
        here = distance < 1e-9
        weights = torch.where(here, 0, 1 / distance.clamp_min(1e-9))
        if float(weights.sum()) == 0:
            return point
        target = (weights[:, None] * x).sum(0) / weights.sum()
        pull = float((weights.sum() * (target - point)).norm())
        stay = min(1.0, float(here.sum()) / pull) if pull > 0 else 1.0
        moved = (1 - stay) * target + stay * point
        if float((moved - point).norm()) < tolerance * (1 + float(point.norm())):
            return moved
        point = moved
    return point


@torch.no_grad()
def prepare(sae: SAE, store: FeatureStore, b_pre: str, l0: float | None) -> None:
    """Set ``b_pre`` (to the data's mean, geometric median, or raw features' origin) and what the variant starts from.

    ``l0`` is the number of active latents a sample that it is to start at. ValueError for an
    unknown choice.
    """
    one_of(b_pre, B_PRE, "init.b_pre")
    x, _ = sae.inputs(sample(store))
    if b_pre == "geometric_median":
        sae.b_pre.copy_(geometric_median(x))
    elif b_pre == "zero":
        sae.b_pre.copy_(-sae.normalizer.mean / sae.normalizer.std if sae.input_norm == "none" else 0 * sae.b_pre)
    elif sae.input_norm != "none":
        sae.b_pre.copy_(x.mean(0))
    else:
        sae.b_pre.copy_((store.mean - sae.normalizer.mean) / sae.normalizer.std)
    sae.start(x, l0)


def fit_dictionary(sae: SAE, store: FeatureStore, seed: int, shown: bool) -> None:
    """Let a ``fitted`` variant take its dictionary from a sample of the store, with a progress bar where ``shown``."""
    parts = sample(store, min(EACH * sae.d_sae, NUMBERS // store.d_in)).split(SAMPLE)
    x = torch.cat([sae.inputs(part)[0] for part in parts])
    sae.fit(x, seed, partial(tqdm, desc=f"Fitting {sae.variant}", leave=False, disable=not shown))


@torch.no_grad()
def dead_at_start(sae: SAE, store: FeatureStore) -> float:
    """Share of latents that fire on no token of a sample of the store, with the weights as they are."""
    was_training = sae.training
    sae.train(sae.k is not None)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    before = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    for part in sample(store).split(2048):
        fired |= sae.forward_pass(sae.inputs(part)[0]).codes.fired()
    for name, buffer in sae.named_buffers():
        buffer.copy_(before[name])
    sae.train(was_training)
    return 1 - float(fired.float().mean())


def warnings_for(store: FeatureStore, dead: float, normalize: str, b_pre: str) -> list[str]:
    """Sentences about a start that will leave most latents dead, or does not centre severe features; what to set."""
    gamma = store.manifest.severity
    if dead <= 0.5 and not (b_pre == "zero" and gamma > SEVERE):
        return []
    cause = (
        f"The store's severity γ = ‖μ‖/‖σ‖ is {gamma:.1f}: single dimensions lie far off zero, and latents that point "
        "away from them never fire. "
        if gamma > SEVERE
        else ""
    )
    advice = []
    if b_pre == "zero":
        advice.append("init.b_pre=mean (or geometric_median), which centres [arXiv 2605.31518]")
    elif normalize == "none":
        advice.append("normalize=standard")
    if dead > 0.5:
        advice.append("resample.every=500, or loss.aux=0.03125")
    return [f"{dead:.0%} of the latents fire on no token of a sample before training. {cause}Set {'; '.join(advice)}."]
