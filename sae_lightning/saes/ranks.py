"""Sums over the global batch: what a loss or an activation needs to know of the other DDP ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sae_lightning.kernels import selection


def world_size() -> int:
    """Ranks that train together; 1 without DDP."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without DDP."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of ``value`` over all ranks, without gradient; itself without DDP."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value / world_size()


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor; its gradient is that of all ranks' losses together."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return _all_reduced(value)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _all_reduced(grad)


def _all_reduced(value: Tensor) -> Tensor:
    total = value.clone()
    dist.all_reduce(total)
    return total


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of ``value`` over all ranks, differentiable; itself without DDP.

    Its gradient adds up those of all ranks' losses, so that where every rank has the same loss of the sum, the mean of
    the ranks' gradients is the loss's own.
    """
    return _SumOverRanks.apply(value) if world_size() > 1 else value


@torch.no_grad()
def least_over_ranks(value: Tensor) -> Tensor:
    """The element-wise minimum of ``value`` over all ranks, without gradient; a copy without DDP."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return value


@torch.no_grad()
def any_over_ranks(mask: Tensor) -> Tensor:
    """Element-wise or of a bool ``mask`` over all ranks; itself without DDP."""
    if world_size() == 1:
        return mask
    marks = mask.float()
    dist.all_reduce(marks, op=dist.ReduceOp.MAX)
    return marks > 0


@torch.no_grad()
def kth_largest_over_ranks(values: Tensor, k: int) -> Tensor:
    """The k-th largest of all ranks' ``values`` [n], of each rank the k largest at least; the least of all if fewer.

    A scalar; infinity where no rank has any. Every rank sends its k largest.
    """
    if world_size() > 1:
        if len(values) > k:
            values = values[values >= selection.kth_largest(values, k)][:k]
        padded = values.new_full((k,), float("-inf"))
        padded[: len(values)] = values
        gathered = values.new_empty(world_size() * k)
        dist.all_gather_into_tensor(gathered, padded)
        values = gathered[gathered.isfinite()]
    return kth_largest(values, k)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of ``values`` [n], a scalar; the least of all if there are fewer, infinity if there is none."""
    if len(values) < k:
        return values.min() if len(values) else values.new_tensor(float("inf"))
    return selection.kth_largest(values, k)


@torch.no_grad()
def kth_positive_over_ranks(values: Tensor, k: int) -> Tensor:
    """The k-th largest of all ranks' positive ``values`` [n] as a scalar, exactly; 0 where there are fewer than k.

    Without DDP by selection. Over ranks by bisection of the numbers' bits, which are in the order of the numbers: the
    ranks add up counts, 31 times (63 in float64), and no rank holds the values of another.
    """
    if world_size() == 1:
        return selection.kth_largest(values, k) if len(values) >= k else values.new_zeros(())
    whole = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits, low, high = values.contiguous().view(whole), 0, torch.iinfo(whole).max  # ``low`` or above are k at least
    while high - low > 1:
        middle = (low + high) // 2
        enough = int(sum_over_ranks((bits >= middle).sum())) >= k
        low, high = (middle, high) if enough else (low, middle)
    return torch.tensor(low, dtype=whole, device=values.device).view(values.dtype)
