"""The two sparse products with their gradients: values from the encoder's rows, reconstructions from the decoder's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_lightning.kernels import native, portable, reference
from sae_lightning.kernels import triton as on_triton
from sae_lightning.kernels.portable import rows_of
from sae_lightning.kernels.selection import Entries
from sae_lightning.registry import one_of

MODULES: dict[str, ModuleType] = {
    "reference": reference, "portable": portable, "native": native, "triton": on_triton,
}  # fmt: skip

DENSE_FROM = {"native": 0.35, "triton": 0.10, "portable": 0.01, "reference": 0.0}  # docs/decisions.md

_forced: list[str] = []


def choose(*tensors: Tensor, density: float = 0.0) -> ModuleType:
    """``native`` for float32 on the CPU, ``triton`` for float32 on CUDA, else ``portable``; ``reference``, which is
    dense, where the share of active entries (``density``) makes dense products faster."""
    if _forced:
        return MODULES[_forced[-1]]
    name = "portable"
    if native.available(*tensors):
        name = "native"
    elif on_triton.available(*tensors):
        name = "triton"
    return reference if density > DENSE_FROM[name] else MODULES[name]


@contextmanager
def forced(name: str):
    """Use one implementation whatever the tensors are; for tests and benchmarks."""
    one_of(name, MODULES, "kernels")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def _density(latents: Tensor, n: int, d_sae: int) -> float:
    return len(latents) / max(1, n * d_sae)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(latents, values, offsets, W)
        kernels = choose(values, W, density=_density(latents, len(offsets) - 1, len(W)))
        return kernels.decode(latents, values.contiguous(), offsets, W.detach(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latents, values, offsets, W = ctx.saved_tensors
        kernels = choose(values, W, density=_density(latents, len(offsets) - 1, len(W)))
        grad = grad.contiguous()
        grad_W, grad_values = kernels.decode_backward(latents, values.contiguous(), offsets, W, grad)
        return None, grad_values, None, grad_W, grad.sum(0) if ctx.needs_input_grad[4] else None


CACHE = 1 << 19  # bytes of levels that a CPU goes over several times before it goes on


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of all tensors, as many of the first [N, h, d] as a cache holds; all of them on a GPU."""
    first = tensors[0]
    each = CACHE // (first.element_size() * first[:1].numel() or 1) if first.device.type == "cpu" else len(first)
    return zip(*(t.split(max(1, each)) for t in tensors), strict=True)


class _NestedDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, bias: Tensor, h: int) -> Tensor:
        ctx.save_for_backward(latents, values, offsets, W)
        ctx.h = h
        out = choose(values, W).decode(latents, values.contiguous(), offsets, W.detach(), None)
        out = out.view(-1, h, W.shape[1])
        for (part,) in _blocks(out):
            part[:, 0] += bias
            for level in range(1, h):
                part[:, level] += part[:, level - 1]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latents, values, offsets, W = ctx.saved_tensors
        out = native.empty(tuple(grad.shape), grad)
        for part, given in _blocks(out, grad):
            part[:, -1] = given[:, -1]
            for level in range(ctx.h - 2, -1, -1):
                torch.add(given[:, level], part[:, level + 1], out=part[:, level])
        flat = out.view(-1, W.shape[1])
        grad_W, grad_values = choose(values, W).decode_backward(latents, values.contiguous(), offsets, W, flat)
        return None, grad_values, None, grad_W, out[:, 0].sum(0), None


class _DenseLevels(torch.autograd.Function):
    """Levels by rank of codes that are a matrix. The group with most entries is what all codes' dense product has
    beyond the other groups', of which sparse products are made; so it is with the gradients."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, W: Tensor, bias: Tensor, ks: Tensor) -> Tensor:
        device = W.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.most, latents, values, offsets = ranked(dense, ks)
        ctx.save_for_backward(dense, W, latents, values, offsets)
        out = choose(values, W).decode(latents, values, offsets, W.detach(), None).view(len(dense), -1, W.shape[1])
        for part, level in _blocks(out, torch.addmm(bias, dense, W).to(W.dtype)):
            for g in range(len(ks) - 1, ctx.most, -1):
                level, part[:, g] = level - part[:, g], level
            part[:, ctx.most] = level
            for g in range(ctx.most):
                part[:, g] += part[:, g - 1] if g else bias
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dense, W, latents, values, offsets = ctx.saved_tensors
        h, most = grad.shape[1], ctx.most
        out, whole = native.empty(tuple(grad.shape), grad), native.empty((len(grad), W.shape[1]), grad)
        for part, of_whole, given in _blocks(out, whole, grad):  # an entry's gradient less that of group ``most``
            torch.sum(given[:, most:], 1, out=of_whole)
            part[:, most] = 0
            for g in range(most - 1, -1, -1):
                torch.add(given[:, g], part[:, g + 1], out=part[:, g])
            for g in range(most + 1, h):
                torch.sub(part[:, g - 1], given[:, g - 1], out=part[:, g])
        with torch.autocast(*ctx.autocast):
            grad_dense, grad_W = (whole @ W.T).to(W.dtype), (dense.T @ whole).to(W.dtype)
        flat, kernels = out.view(-1, W.shape[1]), choose(values, W)
        if kernels is native:
            native.decode_backward(latents, values, offsets, W, flat, into=(grad_W, grad_dense))
        else:
            more_W, more = kernels.decode_backward(latents, values, offsets, W, flat)
            grad_W += more_W
            grad_dense.view(-1).index_add_(0, rows_of(offsets, len(latents)) // h * len(W) + latents, more)
        return grad_dense, grad_W, whole.sum(0) + (out[:, 0].sum(0) if most else 0), None


class _LevelErrors(torch.autograd.Function):
    """Mean squared error of each level, without keeping the differences."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(levels, x)
        sums = [(part - of_x.unsqueeze(1)).square_().sum((0, 2)) for part, of_x in _blocks(levels, x)]
        return torch.stack(sums).sum(0) / x.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        levels, x = ctx.saved_tensors
        out = native.empty(tuple(levels.shape), levels)
        scale = (2 / x.numel() * grad).unsqueeze(1)
        for part, given, of_x in _blocks(out, levels, x):
            torch.sub(given, of_x.unsqueeze(1), out=part).mul_(scale)
        return out, None


class _PreActs(torch.autograd.Function):
    """Attaches the gradient to values that a selection has already computed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b_pre: Tensor, W: Tensor, b_enc: Tensor, latents: Tensor, offsets: Tensor, values: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, b_pre, W, latents, offsets)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b_pre, W, latents, offsets = ctx.saved_tensors
        kernels = choose(x, W, density=_density(latents, len(x), len(W)))
        grad = grad.to(W.dtype).contiguous()
        grad_W, grad_b = kernels.scatter(latents, grad, offsets, (x - b_pre).contiguous(), len(W))
        grad_x = kernels.decode(latents, grad, offsets, W, None) if ctx.needs_input_grad[0] else None
        grad_pre = -(grad_b @ W) if ctx.needs_input_grad[1] else None
        return grad_x, grad_pre, grad_W, grad_b, None, None, None


def sparse_decode(latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum of ``values[e] * W[latents[e]]`` over each row's entries plus ``bias``: [N, d].

    ``latents`` [nnz] int64, ``values`` [nnz], ``offsets`` [N + 1] int64, ``W`` [d_sae, d], ``bias`` [d].
    Cost O(nnz * d) forward and backward; differentiable once, in values, W and bias.
    """
    return _Decode.apply(latents, values.to(W.dtype), offsets, W, bias)


def nested_decode(latents: Tensor, values: Tensor, offsets: Tensor, W: Tensor, bias: Tensor, h: int) -> Tensor:
    """Reconstructions [N, h, d] at h granularities from one decode of entries sorted by (sample, group).

    ``offsets`` [N · h + 1] counts every group of every sample; level l sums the groups 0 .. l, plus ``bias``.
    Each entry is decoded once, into its group's part, and the parts are added up; the gradient of an entry is
    that of all levels from its group on, added up the other way.
    """
    return _NestedDecode.apply(latents, values.to(W.dtype), offsets, W, bias, h)


def dense_levels(dense: Tensor, W: Tensor, bias: Tensor, ks: Tensor) -> Tensor:
    """Reconstructions [N, h, d] of codes ``dense`` [N, d_sae], those of level g from each row's ``ks[g]`` largest.

    Of the last level from all, which are those >= 0. Differentiable once, in the positive entries, W and bias.
    """
    return _DenseLevels.apply(dense.to(W.dtype).contiguous(), W, bias, ks)


def level_errors(levels: Tensor, x: Tensor) -> Tensor:
    """Mean squared error [h] of reconstructions ``levels`` [N, h, d] of ``x`` [N, d]; gradient for ``levels`` only."""
    return _LevelErrors.apply(levels, x)


def sparse_pre_acts(
    x: Tensor, b_pre: Tensor, W: Tensor, b_enc: Tensor, latents: Tensor, offsets: Tensor, values: Tensor | None = None
) -> Tensor:
    """The listed entries of ``(x - b_pre) Wᵀ + b_enc``, [nnz], differentiable once in the first four arguments.

    ``x`` [N, d], ``b_pre`` [d], ``W`` [d_sae, d], ``b_enc`` [d_sae]; ``values`` [nnz] are taken as the entries
    where a selection has computed them already.
    """
    if values is None:
        with torch.no_grad():
            kernels = choose(x, W, density=_density(latents, len(x), len(W)))
            values = kernels.exact(latents, offsets, (x - b_pre).contiguous(), W, b_enc)
    if not torch.is_grad_enabled():
        return values
    return _PreActs.apply(x, b_pre, W, b_enc, latents, offsets, values)


TYPES = (torch.float16, torch.bfloat16, torch.float32)


def normalize(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(features - mean) / std in float32; ``features`` [..., d] of any float type, ``mean`` [d] and ``std`` [] float32.

    Differentiable; a gradient, or a double, takes PyTorch's operators.
    """
    plain = features.dtype in TYPES and mean.dtype == torch.float32 and features.device == mean.device
    if not plain or (torch.is_grad_enabled() and features.requires_grad):
        return (features.to(mean.dtype) - mean) / std
    chosen = choose(mean, std)
    if chosen not in (native, on_triton):
        return (features.to(torch.float32) - mean) / std
    return chosen.normalize(features.contiguous(), mean.contiguous(), std)


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


def ranked(dense: Tensor, ks: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """The group with the most entries of ``dense`` [N, d_sae], and all others' entries sorted by (row, group).

    Groups are those of ``rank_groups`` over the positive entries of each row. Latents, values and offsets [N · h + 1]
    count every group of every row; in the group with the most entries they have none.
    """
    signs = torch.sign(dense, out=native.empty(tuple(dense.shape), dense))
    counts = signs.sum(1, keepdim=True, dtype=torch.float32).long()
    ends = counts.minimum(ks)
    ends[:, -1:] = counts
    sizes = ends.diff(dim=1, prepend=torch.zeros_like(counts))
    most = int(sizes.sum(0).argmax())
    sizes[:, most] = 0
    offsets = portable.offsets_of(sizes.flatten())
    if native.available(dense):
        return most, *native.ranked(dense, ks, most, offsets), offsets
    values, latents = dense.sort(dim=1, descending=True, stable=True)
    places = torch.arange(dense.shape[1], device=dense.device)
    group = torch.bucketize(places, ks, right=True).clamp_max(len(ks) - 1)
    wanted = (places < counts) & (group != most)
    return most, latents[wanted], values[wanted], offsets


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
