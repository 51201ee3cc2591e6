"""The obvious dense form of every sparse product: what the others are tested against, and what serves dense codes."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.kernels.portable import rows_of


def to_dense(latents: Tensor, values: Tensor, offsets: Tensor, d_sae: int) -> Tensor:
    """[N, d_sae] with the entries at their places."""
    n = len(offsets) - 1
    rows = rows_of(offsets, len(latents))
    return values.new_zeros(n * d_sae).scatter(0, rows * d_sae + latents, values).view(n, d_sae)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b in their own type, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def decode(latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """[N, d]: dense codes times W, plus ``bias``."""
    out = _product(to_dense(latents, values, offsets, len(W)), W)
    return out if bias is None else out + bias


def exact(latents: Tensor, offsets: Tensor, x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """[nnz]: the listed entries of x Wᵀ + bias."""
    return (_product(x, W.T) + bias)[rows_of(offsets, len(latents)), latents]


def decode_backward(latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``decode`` by two dense products."""
    grad_W = _product(to_dense(latents, values, offsets, len(W)).T, grad)
    return grad_W, _product(grad, W.T)[rows_of(offsets, len(latents)), latents]


def scatter(latents: Tensor, values: Tensor, offsets: Tensor, x: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Dense codesᵀ times x, and the codes' sums."""
    dense = to_dense(latents, values, offsets, d_sae)
    return _product(dense.T, x), dense.sum(0)


def topk(pre: Tensor, k: int) -> Tensor:
    """Mask [N, d_sae] of the k largest positive entries of each row; of equal ones those of lower latents first."""
    order = torch.argsort(pre, dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(pre, dtype=torch.bool).scatter(1, order, True) & (pre > 0)
