"""Norming each sample by itself before the encoder, and giving the norm back after the decoder."""

from __future__ import annotations

from torch import Tensor

INPUT_NORMS = ("none", "layer", "unit")


def input_norm(kind: str, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """``x`` [N, d_in] normed by sample, and the (shift, scale) [N, 1] that undo it; None for "none".

    "layer": zero mean and unit variance over dimensions [Gao et al. 2024, §A.1]. "unit": L2 norm √d_in, which is
    the unit norm of MonoLoss's features up to a factor that keeps deviations near 1.
    """
    if kind == "none":
        return x, None
    shift = x.mean(1, keepdim=True) if kind == "layer" else x.new_zeros(len(x), 1)
    scale = (x - shift).square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
    return (x - shift) / scale, (shift, scale)
