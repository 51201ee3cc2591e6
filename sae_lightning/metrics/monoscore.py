"""MonoScore: how alike the images are that activate a latent, exactly, in one pass and linear time."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.kernels import native, portable
from sae_lightning.metrics.base import Score, SumMetric, require_samples
from sae_lightning.metrics.intervals import averaged
from sae_lightning.saes.codes import DenseCodes, SparseCodes


class MonoScore(SumMetric):
    """The MonoScore of each latent [MonoLoss §3.1, eq. 2; Pach et al. 2025, there MS].

    With ã the activations min–max scaled over all images and s the cosine of two images' embeddings it is
    Σ_{n<m} ã_n ã_m s_nm / Σ_{n<m} ã_n ã_m: the mean similarity of image pairs, weighted by how strongly both activate
    the latent. The scale cancels and the shift is applied at the end: the states are Σa, Σa² and Σa·h [d_sae, d] of
    unit embeddings h, Σh, and each latent's least and two largest activations. One pass, in float64, O(nnz · d) for
    codes and O(N · M · d) for matrices; memory d_sae · d · 8 bytes whatever the number of images.

    A latent has no score unless at least two images lie above its minimum: one that is constant (never active, too) or
    that a single image activates. ``scores()`` gives 0 for it, as the paper's algorithm does.

    ``compute`` gives float64 scalars: ``monoscore``, the mean over all latents (the paper's figure, in which latents
    without a score count 0), ``monoscore_scored``, over those with one (NaN without any), ``scored_share``, and
    ``similarity_baseline``, the mean cosine of all pairs of images, which a latent that is equally active on all of
    them would have.
    """

    inputs = ("image_codes", "embeddings")
    count: Tensor
    listed: Tensor
    total: Tensor
    squares: Tensor
    weighted: Tensor
    embedding: Tensor
    least: Tensor
    largest: Tensor

    def __init__(self, d_sae: int, d: int) -> None:
        super().__init__()
        self.d_sae, self.d = d_sae, d
        self.add_sum("count", dtype=torch.long)
        self.add_sum("listed", d_sae, dtype=torch.long)  # activations given; all others are zero
        self.add_sum("total", d_sae)
        self.add_sum("squares", d_sae)
        self.add_sum("weighted", d_sae, d)
        self.add_sum("embedding", d)
        infinite = torch.full((d_sae,), torch.inf, dtype=torch.float64)
        self.add_state("least", infinite, dist_reduce_fx="min")
        self.add_state("largest", -infinite.expand(2, -1).clone(), dist_reduce_fx=_two_largest)

    @torch.no_grad()
    def update(self, activations: SparseCodes | Tensor, embeddings: Tensor) -> None:
        """Add N images: their codes, or activations [N, d_sae] of any sign, and their embeddings [N, d].

        ValueError when the shapes do not fit, or for an embedding that is zero or not finite and so has no cosine.
        """
        if isinstance(activations, DenseCodes):
            activations = activations.dense
        self._check_shapes(activations, embeddings)
        if embeddings.dtype != torch.float64:
            embeddings = embeddings.float()
        x, of_batch = embeddings.contiguous(), torch.zeros_like(self.embedding)
        if native.available(x):
            norms = native.unit_rows(x, of_batch)
        else:
            norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
            of_batch += (x / norms[:, None]).sum(0)
        bad = ~((norms > 0) & norms.isfinite())
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ValueError(f"The embedding of image {first} of this batch is zero or not finite: it has no cosine.")
        self.count += len(x)
        self.embedding += of_batch
        if isinstance(activations, SparseCodes):
            self._add_codes(activations, x, norms)
        else:
            self._add_matrix(activations.double(), x / norms[:, None])

    def _check_shapes(self, activations: SparseCodes | Tensor, embeddings: Tensor) -> None:
        sparse = isinstance(activations, SparseCodes)
        n, width = (activations.n_samples, activations.d_sae) if sparse else activations.shape  # type: ignore[union-attr]
        if tuple(embeddings.shape) != (n, self.d) or width != self.d_sae:
            raise ValueError(
                f"Expected activations of {self.d_sae} latents and embeddings [N, {self.d}]; got {n} images of {width} "
                f"latents and embeddings {list(embeddings.shape)}."
            )

    def _add_codes(self, codes: SparseCodes, x: Tensor, norms: Tensor) -> None:
        latents, values = codes.latents, codes.values.contiguous()
        if native.available(values, x):
            states = (self.listed, self.total, self.squares, self.least, self.largest, self.weighted)
            native.add_activations(latents, values, codes.offsets, x, 1 / norms, states)
            return
        values = values.double()
        self.listed += torch.bincount(latents, minlength=self.d_sae)
        self.total.index_add_(0, latents, values)
        self.squares.index_add_(0, latents, values.square())
        self.least.scatter_reduce_(0, latents, values, "amin")
        self.largest = _two_largest(torch.stack([self.largest, _largest(latents, values, self.d_sae)]))
        self.weighted += portable.scatter(latents, values, codes.offsets, x / norms[:, None], self.d_sae)[0]

    def _add_matrix(self, activations: Tensor, unit: Tensor) -> None:
        self.listed += len(unit)
        self.total += activations.sum(0)
        self.squares += activations.square().sum(0)
        self.weighted.addmm_(activations.T, unit)
        if len(unit):
            self.least = torch.minimum(self.least, activations.amin(0))
            top = activations.topk(min(2, len(unit)), dim=0).values
            self.largest = torch.cat([self.largest, top]).topk(2, dim=0).values

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """The least activation of each latent and the second largest; those that were not listed are zero."""
        unlisted = self.count - self.listed
        least = torch.where(unlisted > 0, self.least.clamp_max(0), self.least)
        zeros = torch.where(torch.stack([unlisted > 0, unlisted > 1]), 0.0, -torch.inf).to(self.largest)
        second = torch.cat([self.largest, zeros]).topk(2, dim=0).values[1]
        return least, second

    def minimum(self) -> Tensor:
        """The least activation of each latent over all images, [d_sae] float64: 0 unless it is active on every one."""
        return self._bounds()[0]

    def scored(self) -> Tensor:
        """Which latents have a score, [d_sae] bool."""
        least, second = self._bounds()
        return second > least

    def scores(self) -> Tensor:
        """[d_sae] float64, within [-1, 1]; 0 where there is none."""
        require_samples(self.count, self)
        least, second = self._bounds()
        scored = second > least
        m = torch.where(scored, least, 0)
        u = self.total - self.count * m
        v = self.squares - 2 * m * self.total + self.count * m.square()
        w = self.weighted - m[:, None] * self.embedding if bool(m.any()) else self.weighted
        numerator, denominator = w.square().sum(1) - v, u.square() - v
        return torch.where(scored, numerator / torch.where(scored, denominator, 1), 0)

    def of_latents(self) -> dict[str, Tensor]:
        return {"monoscore": self.scores(), "scored": self.scored()}

    def sure(self) -> dict[str, Score]:
        scores, scored = self.scores(), self.scored()
        each = {"monoscore": scores, "monoscore_scored": scores[scored], "scored_share": scored}
        return {name: averaged(name, values.cpu(), unit="latents") for name, values in each.items()}

    def baseline(self) -> Tensor:
        """Mean cosine of all pairs of images, a float64 scalar; NaN for fewer than two."""
        pairs = self.count.double() * (self.count - 1)
        return (self.embedding.square().sum() - self.count) / torch.where(pairs > 0, pairs, torch.nan)

    def compute(self) -> dict[str, Tensor]:
        scores, scored = self.scores(), self.scored()
        return {
            "monoscore": scores.mean(),
            "monoscore_scored": scores.sum() / scored.sum(),
            "scored_share": scored.double().mean(),
            "similarity_baseline": self.baseline(),
        }


class MSScore(MonoScore):
    """The MS of Pach et al. [ms-score-vlm], by its conventions: DINOv2 embeddings, and undefined latents left out.

    ``scores()`` is NaN where there is none; ``compute`` gives ``ms_peak``, the best latent's score that the paper's
    tables compare, and ``ms_mean``, the mean over latents with a score.
    """

    def scores(self) -> Tensor:
        """[d_sae] float64, NaN where there is none."""
        return torch.where(self.scored(), super().scores(), torch.nan)

    def compute(self) -> dict[str, Tensor]:
        scores = self.scores()
        peak = scores.nan_to_num(-torch.inf).max()
        return {"ms_peak": torch.where(peak.isfinite(), peak, torch.nan), "ms_mean": scores.nanmean()}


def monoscore(activations: Tensor | SparseCodes, embeddings: Tensor) -> Tensor:
    """MonoScore [M] float64 of all activations [N, M] (or codes) and embeddings [N, d]; 0 where there is none."""
    width = activations.d_sae if isinstance(activations, SparseCodes) else activations.shape[1]
    metric = MonoScore(width, embeddings.shape[1]).to(embeddings.device)
    metric.update(activations, embeddings)
    return metric.scores()


def _two_largest(states: Tensor) -> Tensor:
    """[2, M] the two largest of ``states`` [n, 2, M]."""
    return states.flatten(0, 1).topk(2, dim=0).values


def _largest(latents: Tensor, values: Tensor, d_sae: int) -> Tensor:
    """The two largest values of each latent, [2, d_sae]; -inf where there are fewer."""
    nothing = values.new_full((d_sae,), -torch.inf)
    first = nothing.scatter_reduce(0, latents, values, "amax")
    is_first = values == first[latents]
    ties = torch.zeros_like(nothing).index_add_(0, latents, is_first.to(values.dtype))
    rest = nothing.scatter_reduce(0, latents, torch.where(is_first, -torch.inf, values), "amax")
    return torch.stack([first, torch.where(ties > 1, first, rest)])
