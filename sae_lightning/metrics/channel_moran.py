"""Moran's I of the features' own channels: how much spatial order there is before an SAE [ViSAEBench App. G]."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.kernels import sparse_decode
from sae_lightning.metrics.moran import Moran, Weights

PART = 1 << 20  # numbers held at once, so that they stay in the processor's cache


def channel_morans_i(features: Tensor, weights: Weights, min_variance: float = 1e-8) -> Tensor:
    """Moran's I [n, d_in] float64 of every channel on every image of ``features`` [n, P, d_in], any float type.

    NaN where the variance over the image's patches is at most ``min_variance``. All patches count, whatever their sign.
    The products are taken of centred values in float32, or float64 if the features are. ValueError when P is not the
    number of patches of the weights' grid.
    """
    patches = len(weights.reach)
    if features.ndim != 3 or features.shape[1] != patches:
        raise ValueError(f"Expected features [n, {patches}, d_in] of {patches} patches; got {list(features.shape)}.")
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    start, near, weight = (t.to(features.device) for t in weights[:3])
    found = torch.empty(len(features), features.shape[2], dtype=torch.float64, device=features.device)
    images = max(1, PART // max(1, patches * features.shape[2]))
    for part, out in zip(features.split(images), found.split(images), strict=True):
        maps = part.transpose(0, 1).to(dtype).reshape(patches, -1)  # [P, n * d_in]
        maps = maps - maps.mean(0)
        around = sparse_decode(near, weight.to(dtype), start, maps)
        spread = maps.square().sum(0).double()
        i = patches / weights.whole * (maps * around).sum(0).double() / spread
        out.copy_(torch.where(spread / patches > min_variance, i, torch.nan).view_as(out))
    return found


class ChannelMoran(Moran):
    """The mean of Moran's I of each channel over the images on which it varies: the counterpart of ``Moran``.

    Each raw channel is a map over the patches. Where ``Moran`` asks for active patches, this asks only for a variance
    above ``min_variance``. ``compute`` gives the same scalars over channels, named ``channel_moran`` (their mean),
    ``channel_moran_median``, … and ``channel_moran_z``.
    """

    def __init__(
        self, d_in: int, grid: tuple[int, int], contiguity: str = "queen", row_standardized: bool = False,
        min_variance: float = 1e-8, min_images: int = 50,
    ) -> None:  # fmt: skip
        super().__init__(d_in, grid, contiguity, row_standardized, 0, min_variance, min_images)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:  # type: ignore[override]
        """Add the features [n, P, d_in] of n images, patches in the grid's order."""
        if features.shape[-1] != self.d_sae:
            raise ValueError(f"Expected features of {self.d_sae} channels; got {features.shape[-1]}.")
        i = channel_morans_i(features, self.weights, self.min_variance)
        self.images += (~i.isnan()).sum(0)
        self.total += i.nansum(0)
        self.squares += i.square().nansum(0)

    def compute(self) -> dict[str, Tensor]:
        return {f"channel_{name}": value for name, value in super().compute().items()}
