"""Centring and scaling of features, kept inside the SAE so that it takes raw encoder features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sae_lightning.kernels import normalize as kernels


class Normalizer(nn.Module):
    """Subtract a per-dimension mean [d_in] and divide by one scalar deviation (ViSAEBench Table 1).

    Raises ValueError when the mean is not finite or the deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, d_in: int, mean: Tensor | None = None, std: float | Tensor = 1.0) -> None:
        super().__init__()
        mean = torch.zeros(d_in) if mean is None else torch.as_tensor(mean, dtype=torch.float32).clone()
        std = torch.as_tensor(std, dtype=torch.float32).clone()
        if mean.shape != (d_in,) or not bool(mean.isfinite().all()):
            raise ValueError(f"The normaliser needs a finite mean of shape [{d_in}]; it got {tuple(mean.shape)}.")
        if not (float(std) > 0 and bool(std.isfinite())):
            raise ValueError(
                f"The normaliser needs a positive deviation; it got {float(std)}. Are all features the same?"
            )
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def normalize(self, features: Tensor) -> Tensor:
        """Raw features [..., d_in] of any float type to float32, centred and scaled."""
        return kernels.normalize(features, self.mean, self.std)

    def denormalize(self, features: Tensor) -> Tensor:
        """The inverse, [..., d_in]."""
        return features * self.std + self.mean
