"""How well features are reconstructed: FVU (M2 of ViSAEBench), explained variance, R² and cosine, in one look."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.kernels import native
from sae_lightning.metrics.base import Score, SumMetric, deviation, require_pair, require_samples
from sae_lightning.metrics.intervals import averaged

GROUPS = 64  # of images, each counted by its place, over which intervals are drawn

CONSTANT = 1e-12  # a variance below this share of the mean square about the center is rounding


class Reconstruction(SumMetric):
    """FVU, explained variance, R² and cosine of features x and their reconstructions x̂, from sums over samples.

    - ``fvu`` = E‖x - x̂‖² / E‖x - x̄‖², x̄ the mean over the evaluated set [ViSAEBench §4.2, eq. 4], and
      ``explained_variance`` = 1 - fvu. NaN when all samples are the same.
    - ``r2``, the mean over dimensions of 1 - Σ (x_d - x̂_d)² / Σ (x_d - x̄_d)² [MonoLoss App. B]: every dimension weighs
      the same, whereas those of FVU share one denominator. A dimension that is constant on the evaluated set, up to
      1e-12 of its mean square about the center, is left out (scikit-learn's ``r2_score`` counts it 1 or 0).
    - ``cosine``, the mean over samples of x·x̂ / (‖x‖ ‖x̂‖) about the center; 0 for a sample where a norm is 0.

    The fixed ``center`` c [d_in] (zero if None) must be the same for all ranks. Variances are Σ y² - (Σ y)² / n of
    y = x - c, the same for every c; one near the mean, such as the store's, keeps them free of cancellation. Without it
    their relative error is about 1e-16 · x̄² / Var(x), harmless up to means a million times the deviation.

    ``patches`` rows are an image, if all come whole: FVU's and the cosine's intervals are over images.
    ``compute`` gives float64 scalars. ValueError for shapes that do not fit, or when no sample was seen.
    """

    inputs = ("features", "reconstruction")
    count: Tensor
    residual: Tensor
    total: Tensor
    squares: Tensor
    cosines: Tensor
    center: Tensor
    groups: Tensor
    spread: Tensor

    def __init__(self, d_in: int, center: Tensor | None = None, patches: int = 1) -> None:
        super().__init__()
        self.d_in, self.patches = d_in, patches
        self.add_center(d_in, center)
        self.add_sum("count", dtype=torch.long)
        self.add_sum("cosines")
        for name in ("residual", "total", "squares"):
            self.add_sum(name, d_in)
        self.add_sum("groups", 4, GROUPS)  # of images: ‖x - x̂‖², ‖x - c‖², cosines, rows
        self.add_sum("spread", 3)  # over samples: relative errors, their squares, squares of cosines

    @torch.no_grad()
    def update(self, features: Tensor, reconstruction: Tensor) -> None:
        """Add features and their reconstruction, both [N, d_in], any float type."""
        require_pair(features, reconstruction, self.d_in)
        rows = torch.arange(len(features), device=features.device) + self.count
        group = rows.div(self.patches, rounding_mode="floor") % GROUPS
        self.count += len(features)
        if native.available(features, reconstruction):
            sums = (self.residual, self.total, self.squares)
            x, y = features.contiguous(), reconstruction.contiguous()
            self._add(group, x, y, native.reconstruction_sums(x, y, self.center, sums))
            return
        exact = features.double()
        self.residual += (exact - reconstruction).square_().sum(0)
        exact = exact - self.center
        rebuilt = reconstruction.double() - self.center
        norms = exact.norm(dim=1) * rebuilt.norm(dim=1)
        self._add(group, features, reconstruction, torch.where(norms > 0, (exact * rebuilt).sum(1) / norms, 0.0))
        self.total += exact.sum(0)
        self.squares += exact.square_().sum(0)

    def _add(self, group: Tensor, features: Tensor, reconstruction: Tensor, cosines: Tensor) -> None:
        self.cosines += cosines.sum()
        residual = torch.linalg.vector_norm(features - reconstruction, dim=1).square()
        spread = torch.linalg.vector_norm(features - self.center.to(features), dim=1).square()
        relative = torch.where(spread > 0, residual / spread, 0).double()
        self.spread += torch.stack([relative.sum(), relative.square().sum(), cosines.double().square().sum()])
        self.groups.index_add_(1, group, torch.stack([residual, spread, cosines, torch.ones_like(cosines)]).double())

    def sure(self) -> dict[str, Score]:
        residual, spread, cosines, rows = self.groups.cpu().numpy()
        images, filled = int(self.count) // self.patches, rows > 0
        figures = {"fvu": (residual, spread), "explained_variance": (spread - residual, spread),
                   "cosine": (cosines, rows)}  # fmt: skip
        return {name: averaged(name, top[filled], of=of[filled], n=images) for name, (top, of) in figures.items()}

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.count, self)
        variance = (self.squares - self.total.square() / self.count).clamp_min(0)
        whole = variance.sum()
        fvu = torch.where(whole > 0, self.residual.sum() / whole, torch.nan)
        r2 = torch.where(variance > CONSTANT * self.squares, 1 - self.residual / variance, torch.nan)
        return {
            "fvu": fvu, "explained_variance": 1 - fvu, "r2": r2.nanmean(), "cosine": self.cosines / self.count
        }  # fmt: skip

    def deviations(self) -> dict[str, Tensor]:
        """``fvu_std`` and ``cosine_std``, over samples [MSAE's tables].

        Of ‖x - x̂‖² / ‖x - c‖² (0 for a sample at the center c) and of the cosine.
        """
        return {
            "fvu_std": deviation(self.spread[0], self.spread[1], self.count),
            "cosine_std": deviation(self.cosines, self.spread[2], self.count),
        }


class WholeFVU(SumMetric):
    """FVU as the released package of ViSAEBench has it, from sums over all numbers of all samples alike.

    (Σ r² / n − (Σ r / n)²) / (Σ y² / n − (Σ y / n)²) of y = x − c and r = x − x̂, where Σ runs over n samples and their
    dimensions. It is eq. 4 where the means of y and of r vanish. NaN when all numbers are the same.
    """

    inputs = ("features", "reconstruction")
    count: Tensor
    sums: Tensor
    center: Tensor

    def __init__(self, d_in: int, center: Tensor | None = None) -> None:
        super().__init__()
        self.d_in = d_in
        self.add_center(d_in, center)
        self.add_sum("count", dtype=torch.long)
        self.add_sum("sums", 4)

    @torch.no_grad()
    def update(self, features: Tensor, reconstruction: Tensor) -> None:
        """Add features and their reconstruction, both [N, d_in], any float type."""
        require_pair(features, reconstruction, self.d_in)
        y, r = features.double() - self.center, features.double() - reconstruction
        self.count += len(features)
        self.sums += torch.stack([r.square().sum(), r.sum(), y.square().sum(), y.sum()])

    def compute(self) -> dict[str, Tensor]:
        require_samples(self.count, self)
        residual, rest, whole, total = self.sums / self.count
        variance = whole - total.square()
        return {"fvu": torch.where(variance > 0, (residual - rest.square()) / variance, torch.nan)}
