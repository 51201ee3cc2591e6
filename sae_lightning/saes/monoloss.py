"""MonoLoss: 1 minus the mean MonoScore of a batch's active latents [MonoLoss §3.3], differentiable in activations."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sae_lightning.saes.ranks import world_size

NOTHING = 1e-6  # a denominator below this share of (Σ ã)² is numerically zero


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor; its gradient is that of all ranks' losses together."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        total = grad.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of ``value`` over all ranks, differentiable; itself without DDP."""
    return _SumOverRanks.apply(value) if world_size() > 1 else value


class _MinOverRanks(torch.autograd.Function):
    """The least of every rank's values; the gradient of all ranks' losses goes to those that hold it, in equal parts."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        least = value.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        ctx.here = value == least  # type: ignore[attr-defined]
        return least

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        here = ctx.here  # type: ignore[attr-defined]
        total = torch.stack([grad, here.to(grad.dtype)])
        dist.all_reduce(total)
        return total[0] / total[1] * here


def dense_mono_loss(activations: Tensor, embeddings: Tensor, through_embeddings: bool = False) -> Tensor:
    """MonoLoss of ``activations`` [N, M] of any sign, from the images' ``embeddings`` [N, d]; a scalar.

    Activations are min–max scaled over the batch and similarities are cosines. Cost O(N · M · d). The gradient goes
    through the activations, and through the embeddings too if asked. Units with fewer than two images above their
    minimum (numerically: (Σã)² - Σã² ≤ 1e-6 (Σã)²) are left out; 1 when none remains. Under DDP every rank gets the
    loss of the global batch, and the mean of the ranks' gradients is its gradient.
    """
    unit = F.normalize(embeddings if through_embeddings else embeddings.detach(), dim=1, eps=1e-12)
    unit = unit.to(activations.dtype)
    least = activations.amin(0)
    raised = activations - (_MinOverRanks.apply(least) if world_size() > 1 else least)
    w = sum_over_ranks(raised.T @ unit)  # [M, d]
    squares = raised.square()
    own = (squares * unit.square().sum(1, keepdim=True)).sum(0)  # |h|² is 1, or 0 for an embedding of zeros
    u, v, own = sum_over_ranks(torch.stack([raised.sum(0), squares.sum(0), own]))
    return mean_score_loss(w.square().sum(1) - own, u.square() - v, u)


def mean_score_loss(numerator: Tensor, denominator: Tensor, u: Tensor) -> Tensor:
    """1 - mean of numerator / denominator [M] over units whose denominator is not numerically zero; 1 without any."""
    valid = denominator > NOTHING * u.square()
    scores = torch.where(valid, numerator, 0) / torch.where(valid, denominator, 1)
    return 1 - scores.sum() / valid.sum().clamp_min(1)
