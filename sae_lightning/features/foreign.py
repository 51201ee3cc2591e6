"""Features that other programs have left, whatever they lie in, as pieces that can be read from any row on."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load as safetensors_of
from torch import Tensor

from sae_lightning.data.tar_index import members
from sae_lightning.features.arrays import (
    FEATURES,
    IDS,
    LABELS,
    Piece,
    as_tensor,
    called,
    check_numbers,
    listed,
    of_array,
    of_npy,
    of_pt,
    of_safetensors,
    of_tensors,
    own,
    sampled,
)
from sae_lightning.features.manifest import StoreError

SUFFIXES = (".npy", ".pt", ".pth", ".safetensors", ".parquet", ".tar")


@dataclass(frozen=True)
class Known:
    """What a format says of its features itself; fields as in the store's manifest."""

    backbone: str | None = None
    layer: int | None = None
    kind: str | None = None
    prefix: int = 0


def pieces_of(source: Any, layer: int | None = None) -> tuple[list[Piece], Known]:
    """The pieces of an array, a tensor, a file, a folder, or a list of them, in their order, and what is said of them.

    Files are ``.npy``, ``.pt`` (a tensor, or a dict with one called ``features``), ``.safetensors``, ``.parquet`` (a
    column of lists) and ``.tar`` (WebDataset: a ``.npy``, ``.pt`` or ``.safetensors`` a sample, and its ``.cls``);
    folders hold such files, shards of saev, of which ``layer`` is taken, or an LMDB of float32 rows. Nothing pickled is
    loaded. StoreError for what cannot be read.
    """
    if isinstance(source, np.ndarray | Tensor):
        return [of_array(source)], Known()
    if isinstance(source, list | tuple):
        if not source:
            raise StoreError("There are no features: the list of sources is empty.")
        found = [pieces_of(each, layer) for each in source]
        return [piece for pieces, _ in found for piece in pieces], found[0][1]
    path = Path(source)
    if path.is_dir():
        return _folder(path, layer)
    if not path.is_file():
        raise StoreError(f"There is no file or folder {path} with features.")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise StoreError(f"{path} is none of {', '.join(SUFFIXES)}, nor a folder of saev's shards or of an LMDB.")
    try:
        return reader(path), Known()
    except StoreError:
        raise
    except Exception as error:  # whatever a library raises for a file that is broken or of another kind
        raise StoreError(f"{path} cannot be read as {path.suffix}: {str(error).splitlines()[0]}.") from error


def _folder(path: Path, layer: int | None) -> tuple[list[Piece], Known]:
    if (path / "metadata.json").is_file():
        return _saev(path, layer)
    if (path / "data.mdb").is_file():
        return [_lmdb(path)], Known()
    files = sorted((f for f in path.iterdir() if f.suffix in SUFFIXES), key=lambda f: _natural(f.name))
    if not files:
        raise StoreError(f"{path} holds no features: neither {', '.join(SUFFIXES)}, nor saev's shards, nor an LMDB.")
    return pieces_of(files, layer)


def _natural(name: str) -> list[Any]:
    """Sorts ``part-10`` after ``part-9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# --- files of many samples ------------------------------------------------------------------------------
def _parquet(path: Path) -> list[Piece]:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    name = next((n for n in FEATURES if n in names), None)
    if name is None:
        raise StoreError(f"{path} has the columns {listed(names)} and none called {FEATURES[0]}; rename the one it is.")
    extra = {
        which: next((pq.read_table(path, columns=[n])[n].to_pylist() for n in words if n in names), None)
        for which, words in (("labels", LABELS), ("ids", IDS))
    }
    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
    kept: dict[int, Tensor] = {}  # the row group that was read last

    def group(i: int) -> Tensor:
        if i not in kept:
            kept.clear()
            column = file.read_row_group(i, columns=[name]).column(0).combine_chunks()
            rows = len(column)
            inner = []
            while hasattr(column, "flatten") and not column.type.equals(column.flatten().type):
                column, before = column.flatten(), len(column)
                inner.append(len(column) // max(before, 1))
            values = column.to_numpy(zero_copy_only=False)
            if values.dtype == object or values.size != rows * int(np.prod(inner)):
                raise StoreError(f"{path}: the rows of column {name} are of different lengths.")
            check_numbers(f"{path}: column {name}", values.dtype)
            kept[i] = as_tensor(values.reshape(rows, *inner))
        return kept[i]

    def read(first: int, last: int) -> Tensor:
        parts = []
        while first < last:
            i = int(np.searchsorted(starts, first, "right")) - 1
            end = min(last, starts[i + 1])
            parts.append(group(i)[first - starts[i] : end - starts[i]])
            first = end
        return torch.cat(parts)

    shape = tuple(group(0).shape[1:]) if counts and counts[0] else ()
    ids = None if extra["ids"] is None else [str(i) for i in extra["ids"]]
    return [Piece(str(path), int(starts[-1]), shape, read, sampled(path), extra["labels"], ids)]


def _tar(path: Path) -> list[Piece]:
    """A sample's features are its first member that is an array; its ``.cls`` or ``.json`` gives the label."""
    samples: dict[str, dict[str, Any]] = {}
    for member in members(path):
        folder, _, name = member.name.rpartition("/")
        key, _, suffix = name.partition(".")
        samples.setdefault(f"{folder}/{key}" if folder else key, {})[suffix] = member
    rows = {
        key: next((parts[s] for s in parts if f".{s.rpartition('.')[2]}" in SUFFIXES[:4]), None)
        for key, parts in samples.items()
    }
    if not rows or None in rows.values():
        without = next((key for key, member in rows.items() if member is None), "")
        raise StoreError(f"{path}: sample '{without}' has no .npy, .pt or .safetensors.")
    places: list[Any] = list(rows.values())

    def one(i: int) -> Tensor:
        member = places[i]
        with path.open("rb") as file:
            file.seek(member.offset)
            return _decoded(f"{path}: {member.name}", member.name, file.read(member.size))

    with path.open("rb") as file:
        labels = [_label(file, samples[key]) for key in rows]
    shape = tuple(one(0).shape)

    def read(first: int, last: int) -> Tensor:
        parts = [one(i) for i in range(first, last)]
        other = next((i for i, x in enumerate(parts) if tuple(x.shape) != shape), None)
        if other is not None:
            raise StoreError(
                f"{path}: '{places[first + other].name}' has the shape {tuple(parts[other].shape)}, the first {shape}."
            )
        return torch.stack(parts)

    return [Piece(str(path), len(places), shape, read, sampled(path), None if None in labels else labels, list(rows))]


def _decoded(where: str, name: str, data: bytes) -> Tensor:
    if name.endswith(".npy"):
        x = np.load(io.BytesIO(data), allow_pickle=False)
        check_numbers(where, x.dtype)
        return as_tensor(x)
    if name.endswith(".safetensors"):
        piece = of_tensors(Path(name), safetensors_of(data), b"-")
    else:
        piece = of_tensors(Path(name), torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), b"-")
    return piece.read(0, piece.n)


def _label(file: Any, parts: Mapping[str, Any]) -> str | None:
    for suffix in ("cls", "cls.txt", "label", "json"):
        if suffix in parts:
            file.seek(parts[suffix].offset)
            text = file.read(parts[suffix].size).decode("utf-8").strip()
            found = called(json.loads(text), LABELS) if suffix == "json" else text
            if found is not None:
                return str(found)
    return None


def _lmdb(path: Path) -> Piece:
    """Rows of float32 bytes under the keys 0, 1, …, with ``__len__`` and ``__shape__``, as MonoLoss has them."""
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise StoreError(f"{path} is an LMDB; install the package lmdb to read it.") from error
    env = lmdb.open(str(path), readonly=True, lock=False, readahead=True, meminit=False)
    with env.begin() as txn:
        length, shape_text = txn.get(b"__len__"), txn.get(b"__shape__")
        if length is None or shape_text is None:
            raise StoreError(f"{path} has no __len__ and __shape__, which say how its rows are to be read.")
        shape = ast.literal_eval(shape_text.decode("ascii"))
    shape = tuple(shape) if isinstance(shape, tuple | list) else (int(shape),)

    def read(first: int, last: int) -> Tensor:
        with env.begin() as txn:
            rows: list[Any] = [txn.get(str(i).encode("ascii")) for i in range(first, last)]
        missing = next((i for i, row in enumerate(rows) if row is None or len(row) != 4 * np.prod(shape)), None)
        if missing is not None:
            raise StoreError(f"{path}: row {first + missing} is missing or is not {shape} of float32.")
        return torch.from_numpy(np.frombuffer(b"".join(rows), np.float32).reshape(last - first, *shape).copy())

    return Piece(str(path), int(length), shape, read, sampled(path / "data.mdb"))


def _saev(path: Path, layer: int | None) -> tuple[list[Piece], Known]:
    """Shards of saev's protocols 1.0 to 2.1: [images, layers, tokens, d] float32, the class token first."""
    try:
        about = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        shards = json.loads((path / "shards.json").read_text(encoding="utf-8"))
        get = lambda *names: next(about[name] for name in names if name in about)  # noqa: E731
        layers, cls = list(get("layers")), bool(get("cls_token"))
        tokens = int(get("content_tokens_per_example", "n_patches_per_img")) + cls
        d, family, ckpt = int(get("d_model", "d_vit")), get("family", "vit_family"), get("ckpt", "vit_ckpt")
        dtype = np.dtype(about.get("dtype", "float32"))
        counts = [
            (shard["name"], int(shard["n_examples"] if "n_examples" in shard else shard["n_imgs"])) for shard in shards
        ]
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise StoreError(
            f"{path} is not a folder of saev's shards: {error!r} in metadata.json or shards.json."
        ) from error
    if layer is None and len(layers) > 1:
        raise StoreError(f"{path} holds the layers {layers}; choose one with --layer.")
    layer = layers[0] if layer is None else layer
    if layer not in layers:
        raise StoreError(f"{path} holds the layers {layers}, not {layer}; choose one of them with --layer.")
    at, row = layers.index(layer), len(layers) * tokens * d

    def read(file: Path, first: int, last: int) -> Tensor:
        values = np.fromfile(file, dtype, (last - first) * row, offset=first * row * dtype.itemsize)
        return own(values.reshape(last - first, len(layers), tokens, d)[:, at])

    pieces = []
    for name, n in counts:
        file = path / name
        if not file.is_file() or file.stat().st_size < n * row * dtype.itemsize:
            raise StoreError(f"{file} is missing or shorter than shards.json says; copy it again.")
        pieces.append(Piece(str(file), n, (tokens, d), partial(read, file), sampled(file) + f":{layer}".encode()))
    return pieces, Known(f"{family} {ckpt}", layer, "tokens" if cls else "patch", int(cls))


READERS: dict[str, Callable[[Path], list[Piece]]] = {
    ".npy": of_npy, ".pt": of_pt, ".pth": of_pt, ".safetensors": of_safetensors, ".parquet": _parquet, ".tar": _tar,
}  # fmt: skip
