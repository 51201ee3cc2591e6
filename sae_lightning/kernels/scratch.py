"""Memory that large results take again and again: fresh pages of a 40 MB gradient cost as much as computing it."""

from __future__ import annotations

import torch
from torch import Tensor

KEPT = 8  # storages of one size that are kept
_storages: dict[tuple, list[torch.UntypedStorage]] = {}
_uses = getattr(torch._C, "_storage_Use_Count", None)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``like``'s type and device, on memory that no other tensor uses any more.

    On the CPU, the storage of an earlier one is taken again once nothing refers to it (a parameter's ``grad`` that
    was set to None, say); CUDA's allocator does the same by itself.
    """
    if like.device.type != "cpu" or _uses is None:
        return like.new_empty(shape)
    kept = _storages.setdefault((shape, like.dtype), [])
    for storage in kept:
        if _uses(storage._cdata) == 1:
            return like.new_empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]
    fresh = like.new_empty(shape)
    if len(kept) < KEPT and fresh.nbytes >= 1 << 20:
        kept.append(fresh.untyped_storage())
    return fresh
