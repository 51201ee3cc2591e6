"""Memory that large results take again and again: fresh pages of a 40 MB gradient cost as much as computing it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

KEPT = 8  # storages of one size that are kept
STALE = 2000  # requests after which a size that nobody asked for is let go
_storages: dict[tuple, list[torch.UntypedStorage]] = {}
_asked: dict[tuple, int] = {}  # number of the last request for each size
_lock = Lock()
_uses = getattr(torch._C, "_storage_Use_Count", None)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``like``'s type and device, on memory that no other tensor uses any more.

    On the CPU, the storage of an earlier one is taken again once nothing refers to it (a parameter's ``grad`` that
    was set to None, say); CUDA's allocator does the same by itself.
    """
    if like.device.type != "cpu" or _uses is None:
        return like.new_empty(shape)
    with _lock:
        return _empty(_uses, shape, like)


def _empty(uses: Callable[[int], int], shape: tuple[int, ...], like: Tensor) -> Tensor:
    size = (shape, like.dtype)
    kept = _storages.setdefault(size, [])
    _asked[size] = now = max(_asked.values(), default=0) + 1
    for storage in kept:
        if uses(storage._cdata) == 1:
            return like.new_empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]
    for old in [other for other, last in _asked.items() if now - last > STALE]:
        del _storages[old], _asked[old]
    fresh = like.new_empty(shape)
    if len(kept) < KEPT and fresh.nbytes >= 1 << 20:
        kept.append(fresh.untyped_storage())
    return fresh
