"""Sorting a sample's entries into groups, by latent or by rank."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_lightning.kernels import native, portable
from sae_lightning.kernels.portable import rows_of
from sae_lightning.kernels.selection import Entries


def rank_groups(values: Tensor, offsets: Tensor, ks: Tensor) -> Tensor:
    """The group of each entry, [nnz]: g where it is among its row's ``ks[g]`` largest but not its ``ks[g - 1]``.

    ``ks`` [h] int64 ascends; entries beyond the last belong to the last group. Of equal values the earlier
    entry (the lower latent) ranks first.
    """
    if native.available(values):
        return native.rank_groups(values.contiguous(), offsets, ks)
    rows = rows_of(offsets, len(values))
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - offsets[rows]
    return torch.bucketize(rank, ks, right=True).clamp_max(len(ks) - 1)


def grouped(latents: Tensor, values: Tensor, offsets: Tensor, group: Tensor, n_groups: int) -> Entries:
    """The entries sorted by (row, group), ``offsets`` [N · n_groups + 1] then counting every group of every row."""
    bag = rows_of(offsets, len(latents)) * n_groups + group
    n_bags = (len(offsets) - 1) * n_groups
    sort = native.by_latent if native.available(values.detach()) else portable.by_latent
    starts, order, _ = sort(bag, torch.tensor([0, len(bag)], device=bag.device), n_bags)
    return latents[order], values[order], starts


def union(latents: Tensor, offsets: Tensor, each: int, d_sae: int) -> Entries:
    """Which latents are active in each group of ``each`` rows, ascending, with offsets and each entry's place there.

    The latents of group g are ``pooled[starts[g]:starts[g + 1]]``; entry e's latent is ``pooled[place[e]]``.
    """
    if native.available(torch.empty(0, device=latents.device)):
        return native.union(latents.contiguous(), offsets, each, d_sae)
    n_groups = (len(offsets) - 1) // each
    key, place = torch.unique(
        rows_of(offsets, len(latents)) // each * d_sae + latents, sorted=True, return_inverse=True
    )
    return key % d_sae, portable.offsets_of(torch.bincount(key // d_sae, minlength=n_groups)), place
