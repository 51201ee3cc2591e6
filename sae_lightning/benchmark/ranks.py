"""Several processes that score together: each streams a share of the images and computes parts of a share of runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

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
