"""Raw features to normalised float32 in one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.kernels import dispatch, native
from sae_lightning.kernels import triton as on_triton

TYPES = (torch.float16, torch.bfloat16, torch.float32)


def normalize(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(features - mean) / std in float32; ``features`` [..., d] of any float type, ``mean`` [d] and ``std`` [] float32.

    Differentiable; a gradient, or a double, takes PyTorch's operators.
    """
    plain = features.dtype in TYPES and mean.dtype == torch.float32 and features.device == mean.device
    if not plain or (torch.is_grad_enabled() and features.requires_grad):
        return (features.to(mean.dtype) - mean) / std
    chosen = dispatch.choose(mean, std)
    if chosen not in (native, on_triton):
        return (features.to(torch.float32) - mean) / std
    return chosen.normalize(features.contiguous(), mean.contiguous(), std)
