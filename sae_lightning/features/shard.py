"""One shard of a store: a safetensors file that is written batch by batch and takes its name when it is whole."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import threading
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_lightning.features.codec import ALIGN, DELIVERED, Frame, decode, encode, header, layout
from sae_lightning.features.manifest import CHUNK, Moments, Shard, StoreError, merge
from sae_lightning.files import cause, partial_name, sync_folder
from sae_lightning.kernels.native import load_native

EDGE = 4096  # bytes of each end that are checked at every opening

PIECE = 1 << 24  # bytes turned into int8 at a time

FLOAT16 = 65504  # its largest number

NEAR = 0.5  # share of it from which a warning is said: other pictures may go beyond

_told: set[Path] = set()  # stores of which it was


class ShardFile:
    """A shard being written: ``append`` batches, then ``finish`` or ``abort``.

    Until it is finished its bytes lie in ``.<name>.<host>-<pid>`` beside it; for int8 as they came, since only the
    whole shard tells the deviation of each dimension. StoreError for features that are NaN or infinite, or too large
    for float16, and when the disk is full; the file is then gone.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self.partial = partial_name(path)
        self.images = 0
        self.shape = (0, 0)  # patches, d_in; known from the first batch on
        self._kind, self._device = torch.float32, torch.device("cpu")  # of the features, as they come
        self._moments: list[Moments] = []
        self._hash = hashlib.sha256()
        try:
            self._file = self.partial.open("wb+", buffering=0)
            self._file.seek(ALIGN)
        except OSError as error:
            raise self._failed(error) from error

    def append(self, x: Tensor, image_ids: list[str]) -> None:
        """Add the features ``x`` [n, P, d] of the n images ``image_ids`` (which errors name)."""
        if len(x) != len(image_ids):
            self.abort()
            raise StoreError(
                f"Features of shape {tuple(x.shape)} for {len(image_ids)} images; the backbone must give one row for "
                "each. Nothing of this shard was kept."
            )
        if not self.images:
            self.shape = (x.shape[1], x.shape[2])
        if x.shape[1:] != self.shape:
            self.abort()
            raise StoreError(f"Features of shape {tuple(x.shape[1:])} in a shard of {self.shape}.")
        self._check(x, image_ids)
        if self.dtype == "int8":
            self._kind, self._device = x.dtype, x.device
            self._moments.append(Moments.of(x))
            self._write(x)
        else:
            kept = encode(x, self.dtype)["features"]
            self._moments.append(Moments.of(kept, lost(x, kept)))
            self._write(kept)
        self.images += len(x)

    def _check(self, x: Tensor, image_ids: list[str]) -> None:
        limit = FLOAT16 if DELIVERED[self.dtype] == torch.float16 else torch.finfo(torch.bfloat16).max
        low, high = torch.aminmax(x)
        top = torch.maximum(-low, high)
        if not bool(top <= limit):  # NaN is not below either
            bad, _, dimension = (~(x.abs() <= limit)).nonzero()[0].tolist()
            self.abort()
            if not bool(x[bad].isfinite().all()):
                why, advice = "NaN or infinite", "check the image, and set extract.precision=32 or bf16"
            else:
                why, advice = f"{float(top):,.0f} at most, too large for {self.dtype}", "set extract.dtype=bfloat16"
            raise StoreError(
                f"The features of image '{image_ids[bad]}' are {why}, in dimension {dimension} of {x.shape[-1]}; "
                f"{advice}. Nothing of this shard was kept."
            )
        if limit == FLOAT16 and float(top) > NEAR * limit and self.path.parent not in _told:
            _told.add(self.path.parent)
            dimension = int(x.abs().flatten(0, -2).amax(0).argmax())
            print(
                f"{self.path.parent}: warning: features reach {float(top):,.0f} in dimension {dimension}, and "
                f"{self.dtype} ends at {limit:,}; extract.dtype=bfloat16 does not end an extraction late.", flush=True,
            )  # fmt: skip

    def _to_int8(self) -> None:
        """Turn the features in the file into int8, from its start on: what is written never reaches what is unread."""
        frame, scales, (patches, d_in) = Frame.of(merge(self._moments), self._device), [], self.shape
        self._moments, self._hash = [], hashlib.sha256()
        self._file.seek(ALIGN)
        one = patches * d_in * self._kind.itemsize
        for first in range(0, self.images, step := max(1, PIECE // one)):
            n = min(step, self.images - first)
            data = bytearray(os.pread(self._file.fileno(), n * one, ALIGN + first * one))
            x = torch.frombuffer(data, dtype=self._kind).reshape(n, patches, d_in).to(self._device)
            stored = encode(x, "int8", frame)
            kept = decode(stored["features"], stored["scale"], frame)
            self._moments.append(Moments.of(kept, lost(x, kept)))
            scales.append(stored["scale"].cpu())
            self._write(stored["features"])
        self._file.truncate()
        for tensor in (torch.cat(scales), frame.shift, frame.spread):
            self._write(tensor)

    def _write(self, tensor: Tensor) -> None:
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._hash.update(data)
        try:
            while len(data):
                data = data[self._file.write(data) :]
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> tuple[Shard, Moments]:
        """Write the header, sync, and give the file its name; what the manifest says of it and its moments."""
        try:
            if self.dtype == "int8":
                self._to_int8()
            start = header(self.images, *self.shape, self.dtype)
            if os.pwrite(self._file.fileno(), start, 0) < len(start):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
            size = os.fstat(self._file.fileno()).st_size
            edges = edge_checksum(self._file.fileno(), len(start), size)
            self._file.close()
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error
        return Shard(self.path.name, self.images, size, self._hash.hexdigest(), edges), merge(self._moments)

    def abort(self) -> None:
        """Remove what was written."""
        if hasattr(self, "_file"):
            self._file.close()
        self.partial.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> StoreError:
        self.abort()
        return StoreError(
            f"Writing {self.path} failed: {cause(error)}. Free space or set paths.stores to another disk; finished "
            "shards are kept and the same command goes on from them."
        )


def lost(x: Tensor, kept: Tensor) -> Tensor:
    """Summed squared difference [d] between features ``x`` [n, P, d] and what is ``kept`` of them."""
    if kept.dtype == x.dtype:
        return torch.zeros(x.shape[-1])
    found, rows = torch.zeros(x.shape[-1], device=x.device), x.reshape(-1, x.shape[-1])
    step = max(1, CHUNK.get(x.device.type, len(rows) * x.shape[-1]) // x.shape[-1])
    for some, of_them in zip(rows.split(step), kept.reshape(rows.shape).split(step), strict=True):
        found += (some.float() - of_them).square_().sum(0)
    return found


def edge_checksum(fd: int, start: int, end: int) -> int:
    """CRC-32 of the first and the last 4096 bytes between ``start`` and ``end`` of an open file."""
    first = os.pread(fd, min(EDGE, end - start), start)
    return zlib.crc32(os.pread(fd, min(EDGE, end - start), max(start, end - EDGE)), zlib.crc32(first))


def check_shard(path: Path, shard: Shard, n_patches: int, d_in: int, dtype: str) -> None:
    """The cheap checks: size, header, and both edges; StoreError names the file. A shard without images has none."""
    if shard.images == 0:
        return
    advice = "Run extract.py again, which redoes this shard alone, or skip it with stream.damaged=skip."
    start = header(shard.images, n_patches, d_in, dtype)
    expected = len(start) + layout(shard.images, n_patches, d_in, dtype)["end"][2]
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                raise StoreError(f"{path} has {size} bytes instead of {shard.bytes}: it was cut or changed. {advice}")
            if shard.bytes != expected or os.pread(file.fileno(), len(start), 0) != start:
                raise StoreError(f"The header of {path} is not what its manifest says. {advice}")
            if edge_checksum(file.fileno(), len(start), size) != shard.edges:
                raise StoreError(f"{path} was changed or never wholly written. {advice}")
    except FileNotFoundError as error:
        raise StoreError(f"There is no file {path}. {advice}") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error}). {advice}") from error


STAGE = 1 << 20  # bytes; fits the second-level cache of most processors

_local = threading.local()


def read_rows(path: Path, offset: int, out: np.ndarray, places: np.ndarray | None, count: int) -> None:
    """``count`` rows of ``out.shape[1]`` bytes from ``path`` at byte ``offset`` into ``out`` [n, bytes] uint8.

    Row i goes to ``out[places[i]]`` (int64), or to ``out[i]`` where ``places`` is None. StoreError when the file
    ends before, OSError when it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        got = _in_order(fd, offset, out[:count]) if places is None else _scatter(fd, offset, out, places[:count])
    finally:
        os.close(fd)
    if got < count:
        raise StoreError(f"{path} ends {count - got} rows before it should: it was cut while it was being read.")


def _in_order(fd: int, offset: int, out: np.ndarray) -> int:
    view = memoryview(out.reshape(-1))  # type: ignore[arg-type]
    at = 0
    while at < len(view):
        got = os.preadv(fd, [view[at:]], offset + at)
        if got == 0:
            break
        at += got
    return at // out.shape[1]


def _scatter(fd: int, offset: int, out: np.ndarray, places: np.ndarray) -> int:
    read = _native_scatter()
    row = out.shape[1]
    stage = _stage(row)
    if read is None:
        return _portable_scatter(fd, offset, out, places, stage)
    places = np.ascontiguousarray(places, dtype=np.int64)
    got = read(fd, offset, row, places.ctypes.data, len(places), out.ctypes.data, stage.ctypes.data, len(stage) // row)
    if got < 0:
        raise OSError(-got, os.strerror(-got))
    return got


def _portable_scatter(fd: int, offset: int, out: np.ndarray, places: np.ndarray, stage: np.ndarray) -> int:
    row = out.shape[1]
    done = 0
    while done < len(places):
        rows = stage[: min(len(stage) // row, len(places) - done) * row].reshape(-1, row)
        got = _in_order(fd, offset + done * row, rows)
        out[places[done : done + got]] = rows[:got]
        done += got
        if got < len(rows):
            break
    return done


def _stage(row: int) -> np.ndarray:
    """This thread's scratch memory: at least one row, about ``STAGE`` bytes."""
    wanted = max(STAGE // row, 1) * row
    stage: np.ndarray | None = getattr(_local, "stage", None)
    if stage is None or len(stage) < wanted:
        stage = _local.stage = np.empty(wanted, np.uint8)
    return stage[:wanted]


@cache
def _native_scatter() -> ctypes._NamedFuncPointer | None:
    library = load_native()
    if library is None:
        return None
    function = library.read_rows
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [word, word, word, pointer, word, pointer, pointer, word]
    function.restype = word
    return function
