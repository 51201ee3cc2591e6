"""Dictionaries that nothing is trained for: drawn, or taken from a sample by a solver, then read at a given L0.

What an SAE must beat [Heap et al. 2025, arXiv 2501.17727; Korznikov et al. 2026, arXiv 2602.14111]. All but k-means
choose their active latents by BatchTopK's rule, with a threshold calibrated to k a sample on held-out data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_lightning.saes.batchtopk import BatchTopK
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.saes.topk import TopK

Bar = Callable[[Sequence[Any]], Iterable[Any]]


def _own_rows(variant: str, options: dict[str, Any], tied: bool) -> None:
    """ValueError for an encoder's start and, unless the decoder's rows are the encoder's (``tied``), for ties."""
    if options.get("encoder_norm", 1) != 1 or (options.get("tied") and not tied):
        raise ValueError(
            f"sae.name={variant} does not start from an encoder of its own; leave out sae.settings.encoder_norm"
            + ("." if tied else " and sae.settings.tied.")
        )


class Random(BatchTopK):
    """Random unit rows, which are the encoder's too; fits nothing. Others of this file put their rows there."""

    variant = "random"
    fitted = True
    restarts = False
    rows_tied = True  # whether the encoder's rows are the decoder's

    def __init__(self, d_in: int, d_sae: int, k: float, k_per: str = "sample", **options: Any) -> None:
        super().__init__(d_in, d_sae, k=k, k_per=k_per, **options)
        _own_rows(self.variant, options, self.rows_tied)
        if k_per != "sample":
            raise ValueError(f"k_per={k_per}: sae.name={self.variant} is calibrated to k a sample; leave k_per out.")

    @torch.no_grad()
    def put(self, rows: Tensor) -> None:
        """Let ``rows`` [d_sae, d_in] of unit norm read and write."""
        self.W_dec.copy_(rows)
        self.W_enc.copy_(rows)


class Neurons(Random):
    """The backbone's own channels: latents are how far each lies above ``b_pre``, with 2 · d_in also how far below."""

    variant = "neurons"

    def __init__(self, d_in: int, d_sae: int, k: float, **options: Any) -> None:
        super().__init__(d_in, d_sae, k=k, **options)
        if d_sae not in (d_in, 2 * d_in):
            raise ValueError(
                f"d_sae={d_sae}: sae.name=neurons has a latent a channel, or two of either sign; set expansion=1 or 2 "
                f"(d_sae={d_in} or {2 * d_in})."
            )

    def fit(self, x: Tensor, seed: int, bar: Bar = iter) -> None:
        self.put(_signed(torch.eye(self.d_in), self.d_sae))


class PCA(Random):
    """The d_sae / 2 first principal axes of the sample, each as two latents of either sign: k-sparse by magnitude."""

    variant = "pca"

    def __init__(self, d_in: int, d_sae: int, k: float, **options: Any) -> None:
        super().__init__(d_in, d_sae, k=k, **options)
        if d_sae % 2 or d_sae > 2 * d_in:
            raise ValueError(
                f"d_sae={d_sae}: sae.name=pca has two latents, of either sign, for each of at most d_in={d_in} axes; "
                f"set expansion=2, or d_sae to an even number up to {2 * d_in}."
            )

    def fit(self, x: Tensor, seed: int, bar: Bar = iter) -> None:
        from sklearn import decomposition  # which takes a second to import

        axes = decomposition.PCA(self.d_sae // 2, svd_solver="covariance_eigh").fit(x.double().numpy()).components_
        self.put(_signed(torch.from_numpy(axes.copy()), self.d_sae))


def _signed(rows: Tensor, n: int) -> Tensor:
    """``rows``, and after them their opposites, of which ``n`` are kept."""
    return torch.cat([rows, -rows])[:n].float()


BATCH = 4096  # samples at a time
ROUNDS = 20  # of semi-NMF
TOKENS, ENTRIES = 8, 2**28  # that its codes are found for: a latent, and at most so many codes


class NMF(Random):
    """Semi-NMF [Ding et al. 2010]: x - b_pre ≈ codes · decoder with codes >= 0, by alternating multiplicative updates.

    Its codes have no encoder, so the encoder is the linear map that predicts them best: least squares, with a bias.
    """

    variant = "nmf"
    rows_tied = False

    @torch.no_grad()
    def fit(self, x: Tensor, seed: int, bar: Bar = iter) -> None:
        n = min(len(x), TOKENS * self.d_sae, max(self.d_sae, ENTRIES // self.d_sae))
        generator = torch.Generator().manual_seed(seed)
        x = x[torch.randperm(len(x), generator=generator)[:n]] - self.b_pre
        codes, rows = semi_nmf(x, self.W_dec.clone(), bar)
        norms = rows.norm(dim=1).clamp_min(1e-8)
        self.W_dec.copy_(rows / norms[:, None])
        inputs = torch.cat([x, x.new_ones(len(x), 1)], 1)
        read = torch.linalg.lstsq(inputs.T @ inputs, inputs.T @ (codes * norms), driver="gelsd").solution
        self.W_enc.copy_(read[:-1].T)
        self.b_enc.copy_(read[-1])


def semi_nmf(x: Tensor, rows: Tensor, bar: Bar = iter, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """Codes [N, n] >= 0 and rows [n, d] with x ≈ codes · rows, from a start of ``rows``; no round raises the error."""
    codes = torch.relu(x @ rows.T) + 1e-3
    for _ in bar(range(rounds)):
        gram = codes.T @ codes
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        rows = torch.linalg.solve(gram, codes.T @ x)
        gram = rows @ rows.T
        above, below = gram.clamp_min(0), gram.clamp_max(0).neg()
        for part, inputs in zip(codes.split(BATCH), x.split(BATCH), strict=True):
            fits = inputs @ rows.T
            lower = fits.clamp_max(0).neg() + part @ above
            part.mul_(((fits.clamp_min(0) + part @ below) / lower.clamp_min(1e-12)).sqrt_())
    return codes, rows


PASSES = 3  # of k-means over the sample


class KMeans(TopK):
    """k-means: a sample is its nearest of d_sae centres; with k > 1 a mixture of its k nearest, each weighted by the
    inverse of its squared distance, which are the memberships of fuzzy c-means [Bezdek 1981, m = 2] among these.

    A code is a centre's weight times its distance from ``b_pre``, so that k = 1 reconstructs the centre itself.
    """

    variant = "kmeans"
    fitted = True
    restarts = False

    def __init__(self, d_in: int, d_sae: int, k: int, inference: str = "topk", **options: Any) -> None:
        super().__init__(d_in, d_sae, k=k, inference=inference, **options)
        _own_rows(self.variant, options, tied=False)
        if inference != "topk":
            raise ValueError(f"inference={inference}: sae.name=kmeans has k latents a sample; leave inference out.")

    @torch.no_grad()
    def fit(self, x: Tensor, seed: int, bar: Bar = iter) -> None:
        from sklearn.cluster import MiniBatchKMeans

        x, generator = x - self.b_pre, torch.Generator().manual_seed(seed)
        if len(x) < self.d_sae:
            raise ValueError(f"d_sae={self.d_sae} centres need as many tokens, and the sample has {len(x)}; lower it.")
        solver = MiniBatchKMeans(self.d_sae, n_init=1, random_state=seed)
        size = max(BATCH, 2 * self.d_sae)
        batches = [part for _ in range(PASSES) for part in torch.randperm(len(x), generator=generator).split(size)]
        for part in bar([part for part in batches if len(part) >= self.d_sae]):  # which the solver asks for
            solver.partial_fit(x[part].numpy())
        centres = torch.from_numpy(solver.cluster_centers_).float()
        self.W_enc.copy_(centres)
        self.W_dec.copy_(F.normalize(centres, dim=1))
        self.b_enc.copy_(-centres.square().sum(1) / 2)

    def code(self, x: Tensor) -> SparseCodes:
        near = self.pre_acts(x)  # half the squared norm less half the squared distance, which is zero at a centre
        best, latents = near.topk(self.k, dim=1)
        squares = (x - self.b_pre).square().sum(1, keepdim=True) - 2 * best
        weights = F.normalize(1 / squares.clamp_min(1e-6), p=1, dim=1) * self.W_enc.norm(dim=1)[latents]
        codes = torch.zeros_like(near).scatter(1, latents, weights)
        return SparseCodes.select(codes, codes.detach() > 0)

    def inference_forms(self) -> tuple[str, ...]:
        return ()
