"""Sums over the global batch: what a loss or an activation needs to know of the other DDP ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, distributed


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


T = TypeVar("T")

PATIENCE = timedelta(days=2)  # one rank may extract a store, or fit probes, while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process's ``rank`` among ``world``."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which decides for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world > 1:
            distributed.barrier()

    def share(self, what: T) -> T:
        """What rank 0 has."""
        if self.world == 1:
            return what
        box = [what]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def span(self, images: int) -> range:
        """This rank's share of the images, a run of consecutive ones."""
        return range(images * self.rank // self.world, images * (self.rank + 1) // self.world)

    def device(self, wanted: str) -> str:
        """``wanted``, or this rank's GPU where that is "auto" or "cuda", the CPU for "auto" where there is none."""
        if wanted not in ("auto", "cuda") or (wanted == "auto" and not torch.cuda.is_available()):
            return "cpu" if wanted == "auto" else wanted
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks of this job (one where it has no others), connected."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks()
        return
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), world)
    finally:
        distributed.destroy_process_group()
