"""Making a feature store of what another program has left."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.backbones.taps import KINDS
from sae_lightning.data.splits import UNLABELLED, class_name
from sae_lightning.features.arrays import Piece, as_tensor
from sae_lightning.features.codec import DELIVERED
from sae_lightning.features.foreign import pieces_of
from sae_lightning.features.manifest import MANIFEST, StoreError, read_record
from sae_lightning.features.shard import FLOAT16
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.writer import StoreWriter
from sae_lightning.files import held

SHARD_BYTES, SHARDS = 256 << 20, 8  # at most, and so many where that leaves them smaller

BLOCK_BYTES = 4 << 20  # of float32 rows that are read at once: larger ones leave the caches

COPIES = 6  # of a block of float32 rows, at most, that reading, checking and writing it keep in memory


def import_features(
    source: Any, folder: Path, backbone: str | None = None, *, kind: str | None = None, layer: int | None = None,
    grid: tuple[int, int] | None = None, prefix: int | None = None, labels: Any = None,
    ids: Sequence[str] | None = None, data: str = "imported", split: str = "train", dtype: str = "float16",
    memory_gb: float = 1.0, named: bool = False,
    progress: Callable[[int, int], object] = lambda done, all_: None,
) -> FeatureStore:  # fmt: skip
    """A sealed store in ``folder`` of the features in ``source``, whatever ``features/foreign.py`` reads.

    Rows [d] become one token an image, or with a ``grid`` (rows, columns) its patches in turn; rows [P, d] are an
    image's tokens, the first ``prefix`` of which are no patches. ``labels`` and ``ids`` are one an image, else those of
    the source; ``kind`` and ``layer`` say what they are of ``backbone``. Blocks of rows are read so that about
    ``memory_gb`` is enough. An import that was killed goes on from its last finished shard; one that fails leaves
    nothing. With ``named`` the store lies below ``folder`` under a name of its own, and is opened where it is there.
    ``progress(done, all)`` counts images. The store's fingerprint is that of the stored rows.

    StoreError, in a sentence, for a source that is empty, not numbers, not finite (naming file and row), too large for
    ``dtype``, or of rows, labels or ids that do not fit together.
    """
    if not named and (folder / MANIFEST).exists():
        raise StoreError(f"{folder} exists; name another folder to import into.")
    found, known = pieces_of(source, layer)
    prefix = (known.prefix if grid or known.prefix else 0) if prefix is None else prefix
    pieces = [as_images(piece, grid, prefix) for piece in found]
    n = _check_alike(pieces)
    patches, d_in = pieces[0].shape
    about: dict[str, Any] = {
        "data": data, "split": split, "backbone": backbone or known.backbone or "unknown",
        "kind": _kind(kind or known.kind, patches, prefix), "layer": known.layer if layer is None else layer,
        "grid": grid or _square(patches - prefix), "class_names": None, "site": "block", "prefix": prefix,
    }  # fmt: skip
    names = _one_each(ids, "ids", pieces, n) or _names(pieces)
    if len(set(names)) != n:
        raise StoreError(f"The {n:,} ids name {len(set(names)):,} images; each needs its own.")
    classes = _one_each(labels, "labels", pieces, n)
    if classes is None:
        about["class_names"] = [UNLABELLED]
    a_shard = max(1, min(SHARD_BYTES // (2 * patches * d_in), math.ceil(n / SHARDS)))
    rows = max(1, min(a_shard, int(min(BLOCK_BYTES, memory_gb * 2**30 / COPIES)) // (4 * patches * d_in)))
    wanted = _digest(about, names, classes, dtype, [piece.content.hex() for piece in pieces])
    folder = folder / f"{split}-{wanted[:8]}" if named else folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder.with_name(f".{folder.name}.import.lock"), f"importing into {folder}"):
        if (folder / MANIFEST).exists():
            return FeatureStore.open(folder)
        writer = StoreWriter(folder, wanted, about, a_shard, dtype)
        try:
            _write(writer, pieces, names, classes, rows, n, progress)
            shards = [read_record(folder, i).shard.sha256 for i in range(math.ceil(n / writer.images_per_shard))]
            writer.fingerprint = _digest(about, names, classes, shards)
            writer.seal(len(shards))
        except ValueError:  # of ours: what is wrong stays wrong; a killed process leaves its shards instead
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return FeatureStore.open(folder)


def _digest(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _write(
    writer: StoreWriter, pieces: Sequence[Piece], names: Sequence[str], classes: Sequence[str] | None, rows: int,
    n: int, progress: Callable[[int, int], object],
) -> None:  # fmt: skip
    """All shards that are missing, one after the other."""
    size, index = writer.images_per_shard, writer.count()
    done = min(n, index * size)
    progress(done, n)
    shard = None
    for piece, first, x in blocks(pieces, done, rows, size):
        if shard is None:
            shard = writer.begin(index)
        x = x if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x.float()
        try:
            shard.append(x, list(names[done : done + len(x)]))
        except StoreError:
            _check(piece, first, x, writer.dtype)
            raise
        done += len(x)
        progress(done, n)
        if done % size == 0 or done == n:
            part = slice(index * size, done)
            labels: list[Any] = [0] * (done - part.start) if classes is None else list(classes[part])
            writer.finish(index, shard, list(names[part]), labels)
            shard, index = None, index + 1


def _check(piece: Piece, first: int, x: Tensor, dtype: str) -> None:
    """StoreError naming file and row for what cannot be stored."""
    limit = FLOAT16 if DELIVERED[dtype] == torch.float16 else float(torch.finfo(torch.bfloat16).max)
    bad = (~(x.abs() <= limit)).nonzero()
    if not len(bad):
        return
    row, token, dimension = bad[0].tolist()
    value = float(x[row, token, dimension])
    at = f"row {first + row}" + (f", token {token}" if x.shape[1] > 1 else "")
    if math.isfinite(value):
        raise StoreError(
            f"{piece.name}: {at} holds {value:,.0f} in dimension {dimension}, too large for {dtype}; "
            "give --dtype=bfloat16."
        )
    raise StoreError(f"{piece.name}: {at} holds {value} in dimension {dimension}; features must be finite numbers.")


@contextmanager
def counted(title: str, shown: bool = True) -> Iterator[Callable[[int, int], object]]:
    """A bar with a ``title`` for ``progress`` of ``import_features``, if it is to be ``shown``."""
    with tqdm(desc=title, unit="image", mininterval=0.5, disable=not shown) as bar:

        def move(done: int, all_: int) -> None:
            bar.total = all_
            bar.update(done - bar.n)

        yield move


@contextmanager
def spooled(source: Any, folder: Path) -> Iterator[tuple[Any, list[Any] | None]]:
    """A ``source`` that can only be gone through (a DataLoader of features, or of features and labels) as an array that
    lies in ``folder`` meanwhile, and its labels; any other source as it is.

    StoreError for batches that are no features or of different shapes.
    """
    if isinstance(source, str | Path | np.ndarray | Tensor | list | tuple) or not isinstance(source, Iterable):
        yield source, None
        return
    labels: list[Any] = []
    shape: tuple[int, ...] | None = None
    with TemporaryFile(dir=folder) as file:
        for number, batch in enumerate(source):
            x, y = batch[:2] if isinstance(batch, list | tuple) and len(batch) > 1 else (batch, None)
            x = x[0] if isinstance(x, list | tuple) else x
            if not isinstance(x, np.ndarray | Tensor) or x.ndim < 2 or (shape is not None and x.shape[1:] != shape):
                found = f"shape {list(x.shape)}" if hasattr(x, "shape") else type(x).__name__
                raise StoreError(
                    f"Batch {number} is of {found}; a loader gives features [n, {'d' if shape is None else shape}], "
                    "or these and labels."
                )
            shape = tuple(x.shape[1:])
            file.write(as_tensor(x).float().contiguous().numpy().data)
            labels += [] if y is None else as_tensor(y).tolist() if isinstance(y, np.ndarray | Tensor) else list(y)
        if shape is None:
            raise StoreError("There are no features: the loader gives no batch.")
        yield np.memmap(file, np.float32, "r").reshape(-1, *shape), labels or None


def column_of(path: Path) -> list[Any]:
    """One value an image from a ``.npy`` of numbers or text, or from the lines of a text file; StoreError without."""
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False).tolist()
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as .npy or as lines of text: {error}.") from error


# --- what is told, and what fits ------------------------------------------------------------------------
def _check_alike(pieces: Sequence[Piece]) -> int:
    """The number of images; StoreError where there are none or their rows differ."""
    n = sum(piece.n for piece in pieces)
    if not n or not all(math.prod(piece.shape) for piece in pieces if piece.n):
        raise StoreError(f"There are no features in {pieces[0].name}: it is empty.")
    first = next(piece for piece in pieces if piece.n)
    other = next((piece for piece in pieces if piece.n and piece.shape != first.shape), None)
    if other is not None:
        raise StoreError(
            f"{other.name} has rows of shape {list(other.shape)}, {first.name} of {list(first.shape)}; "
            "import them apart."
        )
    return n


def _kind(kind: str | None, patches: int, prefix: int) -> str:
    if kind is None:
        return "pooled" if patches == 1 else "tokens" if prefix else "patch"
    if kind not in KINDS:
        raise StoreError(f"features={kind} is none of {', '.join(KINDS)}.")
    return kind


def _square(patches: int) -> tuple[int, int]:
    """The grid of so many patches where it is square; else one row of them."""
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else (1, patches)


def _names(pieces: Sequence[Piece]) -> list[str]:
    """Ids of the source, else file and row."""
    if all(piece.ids is not None for piece in pieces):
        return [str(i) for piece in pieces for i in piece.ids or ()]
    shown = [Path(piece.name).name for piece in pieces]
    shown = shown if len(set(shown)) == len(shown) else [f"{i}-{name}" for i, name in enumerate(shown)]
    return [f"{name}:{row}" for name, piece in zip(shown, pieces, strict=True) for row in range(piece.n)]


def _one_each(values: Any, what: str, pieces: Sequence[Piece], n: int) -> list[str] | None:
    """``values``, else those of the source, as text, one an image; None where there are none."""
    if values is None:
        own = [getattr(piece, what) for piece in pieces]
        if any(each is None for each in own):
            return None
        values = [value for each in own for value in each]
    values = values.tolist() if isinstance(values, np.ndarray | Tensor) else list(values)
    if len(values) != n:
        raise StoreError(f"There are {len(values):,} {what} for {n:,} images; give one for each.")
    return [class_name(value) if what == "labels" else str(value) for value in values]


# --- as images of tokens --------------------------------------------------------------------------------
def as_images(piece: Piece, grid: tuple[int, int] | None, prefix: int = 0) -> Piece:
    """``piece`` with rows [P, d], one an image: rows of ``d`` are one token each, or with a ``grid`` its cells in turn.

    Rows [h, w, d] and [d, h, w] are maps, which a ``grid`` tells from each other. StoreError where it does not fit.
    """
    name, shape = piece.name, piece.shape
    cells = grid[0] * grid[1] + prefix if grid else 0
    if len(shape) == 1 and cells > 1:
        if piece.n % cells:
            raise StoreError(
                f"{name} has {piece.n:,} tokens, which are no whole images of {grid[0]} x {grid[1]}"  # type: ignore[index]
                f"{f' and {prefix} more' if prefix else ''}; give another --grid, or none for one token an image."
            )
        read = lambda a, b: piece.read(a * cells, b * cells).reshape(b - a, cells, *shape)  # noqa: E731
        every = None if piece.labels is None else piece.labels[::cells]
        ids = None if piece.ids is None else piece.ids[::cells]
        return replace(piece, n=piece.n // cells, shape=(cells, *shape), read=read, labels=every, ids=ids)
    if len(shape) == 1:
        return replace(piece, shape=(1, *shape), read=lambda a, b: piece.read(a, b).unsqueeze(1))
    if len(shape) == 2 and grid and shape[0] != cells:
        raise StoreError(
            f"{name} has {shape[0]} tokens an image, and --grid={grid[0]}x{grid[1]} has {cells}; give another grid"
            f"{', or --prefix for the tokens before the patches' if shape[0] > cells else ''}."
        )
    if len(shape) == 2:
        return piece
    if len(shape) == 3 and grid and grid in (shape[:2], shape[1:]):
        last = shape[:2] == grid
        flat = (shape[0] * shape[1], shape[2]) if last else (shape[1] * shape[2], shape[0])

        def of_map(first: int, end: int) -> Tensor:
            x = piece.read(first, end)
            return x.flatten(1, 2) if last else x.flatten(2).transpose(1, 2)

        return replace(piece, shape=flat, read=of_map)
    raise StoreError(
        f"{name} has rows of shape {list(shape)}; rows are features [d], tokens [P, d], or with --grid a map "
        "[h, w, d] or [d, h, w]."
    )


def blocks(pieces: Sequence[Piece], start: int, rows: int, ends: int) -> Iterator[tuple[Piece, int, Tensor]]:
    """From image ``start`` of all pieces on: the piece, its row, and at most ``rows`` images [m, P, d] from there.

    No block goes over a multiple of ``ends`` images. The next one is read meanwhile.
    """
    with ThreadPoolExecutor(1) as pool:
        ahead: tuple[Piece, int, Future[Tensor]] | None = None
        for piece, first, last in _spans(pieces, start, rows, ends):
            ready, ahead = ahead, (piece, first, pool.submit(piece.read, first, last))
            if ready is not None:
                yield ready[0], ready[1], ready[2].result()
        if ahead is not None:
            yield ahead[0], ahead[1], ahead[2].result()


def _spans(pieces: Sequence[Piece], start: int, rows: int, ends: int) -> Iterator[tuple[Piece, int, int]]:
    at = 0
    for piece in pieces:
        first = max(0, start - at)
        while first < piece.n:
            last = min(piece.n, first + rows, first + ends - (at + first) % ends)
            yield piece, first, last
            first = last
        at += piece.n
