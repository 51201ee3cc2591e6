"""The sparse products in PyTorch's operators: any device, any float type, no compiler.

Entries are listed row after row: row i owns ``offsets[i]:offsets[i + 1]`` of ``latents`` and ``values``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PART = 1 << 16  # entries whose gathered rows are held at once


def rows_of(offsets: Tensor, nnz: int) -> Tensor:
    """The row of each entry, [nnz]."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=nnz)


def offsets_of(counts: Tensor) -> Tensor:
    """Where each group of entries starts and the last one ends, [n + 1] int64, from how many each has, [n]."""
    offsets = torch.zeros(len(counts) + 1, dtype=torch.long, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def decode(latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """[N, d]: ``bias`` plus the sum of ``values[e] * W[latents[e]]`` over each row's entries."""
    out = F.embedding_bag(latents, W, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)
    return out if bias is None else out + bias


def exact(latents: Tensor, offsets: Tensor, x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """[nnz]: pre-activations ``x[row] · W[latent] + bias[latent]`` of the listed entries alone."""
    return _dots(rows_of(offsets, len(latents)), latents, x, W) + bias[latents]


def _dots(rows: Tensor, latents: Tensor, x: Tensor, W: Tensor) -> Tensor:
    parts = zip(rows.split(PART), latents.split(PART), strict=True)
    dots = [(x[r] * W[latent]).sum(1) for r, latent in parts]
    return torch.cat(dots) if dots else x.new_empty(0)


def by_latent(latents: Tensor, offsets: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries sorted by latent: ``starts`` [d_sae + 1], ``order`` [nnz] (entry) and ``rows`` [nnz] of each place."""
    order = torch.argsort(latents, stable=True)
    starts = offsets_of(torch.bincount(latents, minlength=d_sae))
    return starts, order, rows_of(offsets, len(latents))[order]


def decode_backward(latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``decode``: of W [d_sae, d] and of values [nnz]."""
    grad_W, _ = scatter(latents, values, offsets, grad, len(W))
    return grad_W, _dots(rows_of(offsets, len(latents)), latents, grad, W)


def scatter(latents: Tensor, values: Tensor, offsets: Tensor, x: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """[d_sae, d] sums of ``values[e] * x[row]`` over each latent's entries, and [d_sae] sums of values."""
    starts, order, rows = by_latent(latents, offsets, d_sae)
    out = F.embedding_bag(rows, x, starts, mode="sum", per_sample_weights=values[order], include_last_offset=True)
    return out, values.new_zeros(d_sae).index_add(0, latents, values)


def above(
    pre: Tensor, bias: Tensor, cuts: Tensor, slack: Tensor | None = None, norms: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, values and offsets of the entries of ``pre + bias`` at or above their latent's cut.

    ``pre`` [n, d_sae]; ``cuts`` [d_sae], lowered by ``slack[row] * norms[latent]`` where given.
    """
    pre = pre.to(bias.dtype) + bias
    limit = cuts if slack is None or norms is None else cuts - slack[:, None] * norms
    rows, latents = (pre >= limit).nonzero(as_tuple=True)
    return latents, pre[rows, latents], offsets_of(torch.bincount(rows, minlength=len(pre)))


def topk(pre: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest positive entries of each row: latents ascending and values [n, k], filled from the left, counts."""
    values, latents = torch.relu(pre.to(bias.dtype) + bias).topk(k, dim=1)
    missing = values <= 0
    latents, order = latents.masked_fill(missing, pre.shape[1]).sort(dim=1)
    return latents, values.gather(1, order), (~missing).sum(1)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of ``values`` [n], a scalar tensor."""
    if values.device.type == "cpu":
        return values.kthvalue(len(values) - k + 1).values
    return values.topk(k, sorted=False).values.min()
