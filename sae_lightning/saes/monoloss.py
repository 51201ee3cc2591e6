"""MonoLoss: 1 minus the mean MonoScore of a batch's active latents [MonoLoss §3.3], differentiable in activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_lightning.distributed.ranks import least_over_ranks, sum_over_ranks, world_size
from sae_lightning.kernels import native
from sae_lightning.kernels.portable import rows_of
from sae_lightning.kernels.products import choose
from sae_lightning.saes.codes import DenseCodes, SparseCodes

NOTHING = 1e-6  # a denominator below this share of (Σ ã)² is numerically zero


@dataclass
class Memory:
    """What earlier batches leave: sums ``w`` [d_sae, d] of a·h, ``u`` of a and ``v`` of a² [d_sae] over all ranks.

    Each batch adds its own and then lets all fade as if every activation were multiplied by ``decay``, so that an image
    of m batches ago counts with decay^m of its activation: an exponential moving MonoScore.
    """

    decay: float
    w: Tensor
    u: Tensor
    v: Tensor

    @classmethod
    def empty(cls, decay: float, d_sae: int, d: int, like: Tensor) -> Memory:
        """A memory of nothing, of ``like``'s type and device."""
        return cls(decay, like.new_zeros(d_sae, d), like.new_zeros(d_sae), like.new_zeros(d_sae))

    def add(self, w: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums with a batch's; faded, they are what is remembered."""
        w, u, v = w + self.w, u + self.u, v + self.v
        self.w.copy_(self.decay * w)
        self.u.copy_(self.decay * u)
        self.v.copy_(self.decay**2 * v)
        return w, u, v


def _differentiable_minimum(least: Tensor, at_minimum: Tensor, count: Tensor) -> Tensor:
    """The global minimum ``least`` [M], whose gradient goes in equal parts to the entries of all ranks that hold it.

    ``at_minimum`` [M] is the sum of this rank's such entries, ``count`` [M] how many of them there are.
    """
    if world_size() > 1:
        count = count.clone()
        dist.all_reduce(count)
    share = sum_over_ranks(at_minimum / count.clamp_min(1))
    return least + (share - share.detach())


def dense_mono_loss(activations: Tensor, embeddings: Tensor, through_embeddings: bool = False) -> Tensor:
    """MonoLoss of ``activations`` [N, M] of any sign, from the images' ``embeddings`` [N, d]; a scalar.

    Activations are min–max scaled over the batch and similarities are cosines. Cost O(N · M · d). The gradient goes
    through the activations, and through the embeddings too if asked. Units with fewer than two images above their
    minimum (numerically: (Σã)² - Σã² ≤ 1e-6 (Σã)²) are left out, and images whose embedding is zero; 1 when no unit
    remains. Under DDP every rank gets the loss of the global batch, and the mean of the ranks' gradients is its
    gradient.
    """
    like = embeddings if through_embeddings else embeddings.detach()
    unit = F.normalize(like.to(activations.dtype), dim=1, eps=1e-12)
    least = least_over_ranks(activations.amin(0))
    lowest = activations.detach() == least
    raised = activations - _differentiable_minimum(least, (activations * lowest).sum(0), lowest.sum(0))
    raised = raised * (unit.detach() != 0).any(1, keepdim=True)
    w = sum_over_ranks(raised.T @ unit)  # [M, d]
    u, v = sum_over_ranks(torch.stack([raised.sum(0), raised.square().sum(0)]))
    return mean_score_loss(w.square().sum(1) - v, u.square() - v, u)  # |h|² = 1 makes Σ ã² |h|² = Σ ã²


def mean_score_loss(numerator: Tensor, denominator: Tensor, u: Tensor) -> Tensor:
    """1 - mean of numerator / denominator [M] over units whose denominator is not numerically zero; 1 without any."""
    valid = denominator > NOTHING * u.square()
    scores = torch.where(valid, numerator, 0) / torch.where(valid, denominator, 1)
    return 1 - scores.sum() / valid.sum().clamp_min(1)


def mono_loss(codes: SparseCodes, embeddings: Tensor, memory: Memory | None = None) -> Tensor:
    """MonoLoss of ``codes`` of N images (or tokens), from their ``embeddings`` [N, d]; a scalar.

    As ``dense_mono_loss`` on the same activations, at O(nnz · d): gradient through the codes alone. The loss is
    computed from sums over each latent's entries, and its gradient with it: one pass over the rows of ``embeddings``
    in the CPU's kernel. With a ``memory``, earlier batches count as further images, which are given no gradient, and
    activations are taken as they are, without their minimum; this batch is then remembered.
    """
    if isinstance(codes, DenseCodes) and memory is None and world_size() == 1:  # ranks must agree on the way
        return dense_mono_loss(codes.dense, embeddings)
    embeddings = embeddings.detach()
    norms = torch.linalg.vector_norm(embeddings, dim=1, dtype=torch.promote_types(embeddings.dtype, torch.float32))
    inverse = torch.where(norms > 0, 1 / norms, 0)
    values = codes.values if memory is not None else _raised(codes)
    if not bool((norms > 0).all()):
        values = values * (norms > 0)[codes.rows()]
    return _SparseMonoLoss.apply(values, codes.latents, codes.offsets, embeddings, inverse, codes.d_sae, memory)


def _raised(codes: SparseCodes) -> Tensor:
    """The values above their latent's minimum over the global batch: 0 unless it is active on every sample."""
    n = codes.n_samples
    with torch.no_grad():
        listed = torch.bincount(codes.latents, minlength=codes.d_sae)
        if world_size() > 1:
            total = torch.cat([listed, listed.new_tensor([n])])
            dist.all_reduce(total)
            listed, n = total[:-1], int(total[-1])
        always = listed == n
        if not bool(always.any()):
            return codes.values
    values, latents = codes.values, codes.latents
    nothing = values.new_zeros(codes.d_sae)
    least = least_over_ranks((nothing + torch.inf).scatter_reduce(0, latents, values.detach(), "amin"))
    least = torch.where(always, least, 0)
    lowest = values.detach() == least[latents]
    count = nothing.index_add(0, latents, lowest.to(values.dtype))
    least = _differentiable_minimum(least, nothing.index_add(0, latents, values * lowest), count)
    return values - torch.where(always, least, 0)[latents]


class _SparseMonoLoss(torch.autograd.Function):
    """The loss from entries whose values are already raised above their latent's minimum."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, latents: Tensor, offsets: Tensor, embeddings: Tensor, inverse: Tensor, d_sae: int,
        memory: Memory | None,
    ) -> Tensor:  # fmt: skip
        values = values.contiguous()
        fused = world_size() == 1 and native.available(values) and embeddings.device.type == "cpu"
        scored = _fused if fused else _two_products
        loss, grad = scored(values, latents, offsets, embeddings, inverse, d_sae, memory)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (by_value,) = ctx.saved_tensors
        return (grad * world_size() * by_value, *[None] * 6)


def _fused(
    values: Tensor, latents: Tensor, offsets: Tensor, h: Tensor, inverse: Tensor, d_sae: int, memory: Memory | None
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient by each value; every latent's rows are read once."""
    h = h if h.dtype == torch.float16 and native.takes_half() else h.float()
    carried = (memory.w, memory.u, memory.v) if memory is not None else None
    scores, valid, grad = native.mono_rows(
        latents, values, offsets, h.contiguous(), inverse, d_sae, NOTHING, carried, memory.decay if memory else 0.0
    )
    n = valid.sum().clamp_min(1)
    return 1 - scores.sum() / n, grad.div_(-n)


def _two_products(
    values: Tensor, latents: Tensor, offsets: Tensor, h: Tensor, inverse: Tensor, d_sae: int, memory: Memory | None
) -> tuple[Tensor, Tensor]:
    """The same from one sparse product each way, with the sums of all ranks between them."""
    h = h.to(values.dtype).contiguous()
    inverse = inverse.to(values.dtype)
    rows = rows_of(offsets, len(values))
    density = len(values) / max(1, len(h) * d_sae)
    kernels = choose(values, h, density=density)
    w, _ = kernels.scatter(latents, values * inverse[rows], offsets, h, d_sae)
    exact = values.double()
    u, v = exact.new_zeros(2, d_sae).index_add(1, latents, torch.stack([exact, exact.square()]))
    if world_size() > 1:
        for total in (w, u, v):
            dist.all_reduce(total)
    if memory is not None:
        w, u, v = memory.add(w, u, v)
    denominator = u.square() - v
    here = torch.bincount(latents, minlength=d_sae)
    if world_size() > 1:
        dist.all_reduce(here)
    valid = (denominator > NOTHING * u.square()) & (here > 0)
    denominator = torch.where(valid, denominator, 1)
    scores = torch.where(valid, (w.double().square().sum(1) - v) / denominator, 0)
    n = valid.sum().clamp_min(1)
    like = kernels.exact(latents, offsets, h, w, w.new_zeros(d_sae)) * inverse[rows]
    slope = 2 * (like - exact - scores[latents] * (u[latents] - exact)) / denominator[latents]
    return (1 - scores.sum() / n).to(values.dtype), torch.where(valid[latents], -slope / n, 0).to(values.dtype)
