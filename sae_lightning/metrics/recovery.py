"""Progressive recovery: how much of the features a sample's strongest latents alone give back [MSAE §4.7]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sae_lightning.kernels import nested_decode
from sae_lightning.kernels.products import grouped, rank_groups
from sae_lightning.metrics.base import Score, SumMetric, of_one_rank, require_samples
from sae_lightning.metrics.cknna import alignment, neighbours, samples_of
from sae_lightning.metrics.part import Options, Part, ScoredRun, register
from sae_lightning.metrics.reconstruction import Reconstruction
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.sae import SAE

BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BLOCK = 1 << 20  # numbers of reconstructions held at once, so that they stay in the processor's cache


def budgets_of(budgets: Sequence[int], d_sae: int) -> list[int]:
    """``budgets`` below ``d_sae``, and d_sae itself: all latents. ValueError unless they are positive and ascend."""
    if any(b < 1 for b in budgets) or sorted(set(budgets)) != list(budgets):
        raise ValueError(f"budgets={list(budgets)} must be positive numbers of latents that ascend.")
    return [*(int(b) for b in budgets if b < d_sae), d_sae]


class Recovery(SumMetric):
    """Scores of ``sae``'s reconstructions from each sample's n strongest latents, for n in ``budgets`` and for all.

    The reconstructions are sums over disjoint ranks of the same codes, so that each active latent is decoded once, not
    once a budget. The strongest are those of the largest activation, of equal ones the lower latents.

    ``budgets`` [h] ends with d_sae. ``compute`` gives float64 [h] tensors: ``recovery_fvu`` and
    ``recovery_explained_variance`` and ``recovery_cosine`` as of ``Reconstruction`` about ``center`` [d_in] (the
    features' mean; by default the normaliser's), ``recovery_l0``, the active latents a sample, and ``recovery_dead``,
    the latents that are among no sample's n strongest. The last entries are those of the whole codes. ValueError when
    no sample was seen.
    """

    count: Tensor
    total: Tensor
    squares: Tensor
    residual: Tensor
    cosines: Tensor
    active: Tensor
    fired: Tensor
    center: Tensor
    ks: Tensor

    def __init__(self, sae: SAE, budgets: Sequence[int] = BUDGETS, center: Tensor | None = None) -> None:
        super().__init__()
        self._sae = (sae,)  # in a tuple, lest its weights become the metric's
        self.budgets = budgets_of(budgets, sae.d_sae)
        h = len(self.budgets)
        self.register_buffer("ks", torch.tensor(self.budgets), persistent=False)
        self.add_center(sae.d_in, sae.normalizer.mean if center is None else center)
        self.add_sum("count", dtype=torch.long)
        self.add_sum("total", sae.d_in)
        self.add_sum("squares")
        self.add_sum("residual", h)
        self.add_sum("cosines", h)
        self.add_sum("active", h, dtype=torch.long)
        self.add_sum("fired", h, sae.d_sae, dtype=torch.long)  # by rank: within budget g, but not g - 1

    @torch.no_grad()
    def update(self, codes: SparseCodes, features: Tensor) -> None:
        """Add N samples: their codes, as the SAE encodes them, and raw features [N, d_in]. ValueError if they differ.

        Memory beside the codes is bounded, whatever N.
        """
        sae, h = self._sae[0], len(self.budgets)
        if tuple(features.shape) != (codes.n_samples, sae.d_in) or codes.d_sae != sae.d_sae:
            raise ValueError(
                f"Expected codes of {sae.d_sae} latents and features [N, {sae.d_in}] of the same samples; got "
                f"{codes.n_samples} samples of {codes.d_sae} latents and features {list(features.shape)}."
            )
        group = rank_groups(codes.values.detach(), codes.offsets, self.ks)
        places = group * sae.d_sae + codes.latents
        self.fired.view(-1).index_add_(0, places, torch.ones_like(places))
        self.active += torch.bincount(group, minlength=h).cumsum(0)
        samples = max(1, BLOCK // (h * sae.d_in))
        sums = [Reconstruction(sae.d_in, self.center).to(features.device) for _ in self.budgets]
        for start in range(0, codes.n_samples, samples):
            stop = min(codes.n_samples, start + samples)
            ranks = group[int(codes.offsets[start]) : int(codes.offsets[stop])]
            rebuilt = levels(sae, samples_of(codes, start, stop), ranks, h)
            for of_level, level in zip(sums, rebuilt.unbind(1), strict=True):
                of_level.update(features[start:stop], level)
        self.residual += torch.stack([of_level.residual.sum() for of_level in sums])
        self.cosines += torch.stack([of_level.cosines for of_level in sums])
        self.count += codes.n_samples
        self.total += sums[0].total
        self.squares += sums[0].squares.sum()

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.count, self)
        variance = (self.squares - self.total.square().sum() / self.count).clamp_min(0)
        fvu = torch.where(variance > 0, self.residual / variance, torch.nan)
        return {
            "recovery_fvu": fvu, "recovery_explained_variance": 1 - fvu, "recovery_cosine": self.cosines / self.count,
            "recovery_l0": self.active.double() / self.count,
            "recovery_dead": (self.fired.cumsum(0) == 0).sum(1).double(),
        }  # fmt: skip


def levels(sae: SAE, codes: SparseCodes, group: Tensor, h: int) -> Tensor:
    """Raw-space reconstructions [N, h, d_in]: level g from the entries of ``codes`` in the groups 0 … g of h.

    ``group`` [nnz] int64 is each entry's; every entry is decoded once.
    """
    entries = grouped(codes.latents, codes.values, codes.offsets, group, h)
    x = nested_decode(*entries, sae.W_dec, sae.b_pre, h)
    if codes.frame is not None:
        x = x * codes.frame[1][:, None] + codes.frame[0][:, None]
    return sae.normalizer.denormalize(x)


def recovery_cknna(
    codes: SparseCodes, features: Tensor, budgets: Sequence[int] = BUDGETS, k: int = 10, form: str = "unbiased",
    normalize: bool = True,
) -> list[float]:  # fmt: skip
    """CKNNA of ``features`` [n, d] with each sample's strongest latents, for every budget and for all latents, [h]."""
    near = neighbours(features, k, normalize)
    each = budgets_of(budgets, codes.d_sae)
    kept = [codes.top(budget) for budget in each[:-1]] + [codes]
    return [alignment(near, neighbours(part, k, normalize), form) for part in kept]


def recovery(run: ScoredRun, options: Options) -> list[Score]:
    """Reconstruction from each token's n strongest latents, of some images."""
    store, sae, budgets = run.store(), run.sae, options["budgets"]
    rng = np.random.default_rng(options["seed"])
    chosen = np.sort(rng.permutation(len(store))[: options["images"]])
    kept = np.sort(rng.permutation(len(chosen) * store.n_patches)[: options["samples"]])  # tokens for CKNNA
    metric, tokens, seen = of_one_rank(Recovery(sae, budgets, store.mean)), [], 0
    for images in np.array_split(chosen, -(-len(chosen) * store.n_patches // 4096)):
        features = store.features(images).reshape(-1, sae.d_in).float()
        metric.update(sae.encode(features), features)
        first, last = np.searchsorted(kept, (seen, seen + len(features)))
        tokens.append(features[kept[first:last] - seen])
        seen += len(features)
    names = [f"n={budget}" for budget in budgets_of(budgets, sae.d_sae)[:-1]] + ["n=all"]
    found = metric.compute().items()
    scores = [Score(name, float(v), n) for name, values in found for n, v in zip(names, values, strict=True)]
    some = torch.cat(tokens)
    if len(some) > 10:
        near = recovery_cknna(sae.encode(some), run.frame.normalize(some), budgets)
        scores += [Score("recovery_cknna", value, n) for n, value in zip(names, near, strict=True)]
    return scores


PART = register(Part("recovery", recovery))
