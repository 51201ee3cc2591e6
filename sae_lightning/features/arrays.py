"""Arrays of features, in memory and in files, as pieces that can be read from any row on."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sae_lightning.features.manifest import StoreError

FEATURES = ("features", "feature", "activations", "acts", "embeddings", "embedding", "x", "states")  # names of tensors
LABELS = ("labels", "label", "classes", "class", "y", "targets")
IDS = ("image_ids", "image_id", "ids", "id", "keys", "key", "__key__")

SAMPLED, BLOCK = 256, 4096  # blocks of a file that its fingerprint reads, and the bytes of each


@dataclass(frozen=True)
class Piece:
    """``n`` rows of ``shape`` each; ``read(first, last)`` gives [last - first, *shape] as a tensor of any number type.

    ``name`` is the file for sentences, ``labels`` and ``ids`` one a row where the file has them, ``content`` something
    that changes with the rows.
    """

    name: str
    n: int
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    content: bytes
    labels: Sequence[Any] | None = None
    ids: Sequence[str] | None = None


def sampled(path: Path) -> bytes:
    """Size and checksum of evenly spaced blocks of a file: what a whole read would cost too much for."""
    size = path.stat().st_size
    crc = 0
    with path.open("rb", buffering=0) as file:
        for start in np.unique(np.linspace(0, max(0, size - BLOCK), SAMPLED, dtype=np.int64)).tolist():
            file.seek(start)
            crc = zlib.crc32(file.read(BLOCK), crc)
    return f"{path.name}:{size}:{crc}".encode()


def of_array(x: np.ndarray | Tensor) -> Piece:
    check_numbers("The array", x.dtype)
    n = len(x) if x.ndim else 0
    return Piece("array", n, tuple(x.shape[1:]), lambda a, b: as_tensor(x[a:b]), _digest(x, n))


def _digest(x: np.ndarray | Tensor, n: int, rows: int = 1 << 14) -> bytes:
    """SHA-256 of the shape, the type and the bytes of an array; of one that is mapped from a file, of some rows."""
    digest = hashlib.sha256(f"{tuple(x.shape)} {x.dtype}".encode())
    pieces: Iterator[Any]
    if isinstance(x, np.memmap):
        pieces = (x[i : i + 1] for i in np.unique(np.linspace(0, max(n - 1, 0), SAMPLED, dtype=np.int64)))
    else:
        pieces = (x[first : first + rows] for first in range(0, n, rows))
    for piece in pieces:
        digest.update(as_tensor(piece).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def as_tensor(x: Any) -> Tensor:
    """A copy in memory as a tensor, whatever its number type."""
    if isinstance(x, Tensor):
        return x.detach().cpu()
    return own(np.array(x))


def own(x: np.ndarray) -> Tensor:
    """An array that nobody else has, as a tensor; unsigned numbers that PyTorch hardly knows as float64."""
    if x.dtype.kind == "u" and x.dtype.itemsize > 1:
        x = x.astype(np.float64)
    return torch.from_numpy(x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("=")))


def check_numbers(name: str, dtype: Any) -> None:
    """StoreError for a type that is no number."""
    if isinstance(dtype, torch.dtype):
        fine = dtype.is_floating_point or dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    else:
        fine = np.dtype(dtype).kind in "fiu"
    if not fine:
        raise StoreError(f"{name} has the type {dtype}, which is no real number; convert it to float16 or float32.")


def of_npy(path: Path) -> list[Piece]:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        start = file.tell()
    check_numbers(str(path), dtype)
    row = int(np.prod(shape[1:], dtype=np.int64))
    if shape and path.stat().st_size < start + shape[0] * row * dtype.itemsize:
        raise StoreError(f"{path} is shorter than its header says: it was cut; copy it again.")
    if fortran:
        mapped = np.load(path, mmap_mode="r")
        return [Piece(str(path), len(mapped), mapped.shape[1:], lambda a, b: as_tensor(mapped[a:b]), sampled(path))]

    def read(first: int, last: int) -> Tensor:  # no map, whose pages would count as memory of this process
        values = np.fromfile(path, dtype, (last - first) * row, offset=start + first * row * dtype.itemsize)
        return own(values.reshape(last - first, *shape[1:]))

    return [Piece(str(path), shape[0] if shape else 0, tuple(shape[1:]), read, sampled(path))]


def of_pt(path: Path) -> list[Piece]:
    try:
        return [of_tensors(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))]
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return [of_tensors(path, torch.load(path, map_location="cpu", weights_only=True))]  # of an old torch


def of_tensors(path: Path, found: Any, content: bytes | None = None) -> Piece:
    """Of a tensor, or of a mapping in which one is called like features; beside it labels and ids."""
    tensors: Mapping[str, Any] = found if isinstance(found, Mapping) else {"features": found}
    x = called(tensors, FEATURES)
    if x is None and len(tensors) == 1:
        x = next(iter(tensors.values()))
    if not isinstance(x, Tensor):
        raise StoreError(f"{path} has {listed(tensors)} and no tensor called {' or '.join(FEATURES[:3])}; rename one.")
    check_numbers(str(path), x.dtype)
    labels, ids = called(tensors, LABELS), called(tensors, IDS)
    return Piece(
        str(path), len(x) if x.ndim else 0, tuple(x.shape[1:]), lambda a, b: x[a:b].clone(), content or sampled(path),
        None if labels is None else list(_plain(labels)), None if ids is None else [str(i) for i in _plain(ids)],
    )  # fmt: skip


def called(tensors: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((tensors[name] for name in names if tensors.get(name) is not None), None)


def _plain(values: Any) -> Any:
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else values


def listed(names: Any) -> str:
    names = list(map(str, names))
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") or "nothing"


def of_safetensors(path: Path) -> list[Piece]:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        name = next((n for n in FEATURES if n in names), names[0] if len(names) == 1 else None)
        if name is None:
            raise StoreError(f"{path} has {listed(names)} and no tensor called {FEATURES[0]}; rename it.")
        shape = tuple(file.get_slice(name).get_shape())
        labels = next((file.get_tensor(n).tolist() for n in LABELS if n in names), None)
        check_numbers(str(path), file.get_slice(name)[:0].dtype)

    def read(first: int, last: int) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_slice(name)[first:last]

    return [Piece(str(path), shape[0] if shape else 0, shape[1:], read, sampled(path), labels)]
