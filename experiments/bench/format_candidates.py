"""Ways to keep features [n, P, D] float16 in files, for ``formats.py``: each writes them and reads images back.

A reader takes the first image, a number of images and a tensor [n, P, D] in memory into which it puts them; readers
are opened one for each thread. All shards are of 256 MiB, but lmdb's single file and litdata's chunks of 64 MB.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.bench.feature_peers import litdata, lmdb
from experiments.bench.feature_peers.synthetic import Features, note_shape, noted_shape, shards
from experiments.bench.peers.common import load

Reader = Callable[[int, int, Tensor], None]
IMAGES_A_RECORD = 16


@dataclass(frozen=True)
class Candidate:
    """``write(features, folder)`` and ``open(folder)``, which returns a reader."""

    write: Callable[[Features, Path], None]
    open: Callable[[Path], Reader]


def _over_shards(sizes: list[int], read: Callable[[int, int, Tensor], None]) -> Reader:
    """A reader of images out of shards of ``sizes``, given one that reads rows of one: shard, first row, out."""
    starts = np.cumsum([0, *sizes])

    def reader(first: int, count: int, out: Tensor) -> None:
        done = 0
        while done < count:
            shard = int(np.searchsorted(starts, first + done, side="right")) - 1
            rows = min(count - done, int(starts[shard + 1]) - first - done)
            read(shard, first + done - int(starts[shard]), out[done : done + rows])
            done += rows

    return reader


# --- safetensors ---------------------------------------------------------------------------------------------
def write_safetensors(features: Features, folder: Path) -> None:
    """``shard-*.safetensors`` with one tensor each."""
    for number, shard in enumerate(shards(features)):
        save_file({"patch": shard.contiguous()}, folder / f"shard-{number:05d}.safetensors")


def _safetensors(folder: Path) -> tuple[list[Path], list[int], list[tuple[int, ...]]]:
    """Files, where the tensor begins in each, and its shape."""
    paths, offsets, shapes = sorted(folder.glob("*.safetensors")), [], []
    for path in paths:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))["patch"]
        offsets.append(8 + length + entry["data_offsets"][0])
        shapes.append(tuple(entry["shape"]))
    return paths, offsets, shapes


def open_preadv(folder: Path) -> Reader:
    """The kernel copies straight into the tensor."""
    paths, offsets, shapes = _safetensors(folder)
    files = [path.open("rb", buffering=0) for path in paths]

    def read(shard: int, row: int, out: Tensor) -> None:
        view = memoryview(out.view(torch.uint8).numpy()).cast("B")
        offset, done = offsets[shard] + row * (len(view) // len(out)), 0
        while done < len(view):
            done += os.preadv(files[shard].fileno(), [view[done:]], offset + done)

    return _over_shards([shape[0] for shape in shapes], read)


def open_safetensors_map(folder: Path) -> Reader:
    """NumPy memory maps, copied out of."""
    parts = zip(*_safetensors(folder), strict=True)
    return _over_maps([np.memmap(path, np.float16, "r", offset, shape) for path, offset, shape in parts])


def _over_maps(maps: list[np.ndarray]) -> Reader:
    def read(shard: int, row: int, out: Tensor) -> None:
        np.copyto(out.numpy(), maps[shard][row : row + len(out)])

    return _over_shards([len(array) for array in maps], read)


# --- npy -----------------------------------------------------------------------------------------------------
def write_npy(features: Features, folder: Path) -> None:
    """``shard-*.npy``."""
    for number, shard in enumerate(shards(features)):
        np.save(folder / f"shard-{number:05d}.npy", shard.numpy())


def open_npy(folder: Path) -> Reader:
    """NumPy's own memory maps."""
    return _over_maps([np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))])


# --- Arrow ---------------------------------------------------------------------------------------------------
def write_arrow(features: Features, folder: Path) -> None:
    """IPC files with one column of fixed-size lists, a row an image, one record batch a shard."""
    _, patches, d_in = features.shape
    for number, shard in enumerate(shards(features)):
        rows = pa.FixedSizeListArray.from_arrays(pa.array(shard.flatten().numpy()), patches * d_in)
        batch = pa.record_batch([rows], names=["patch"])
        with pa.ipc.new_file(str(folder / f"shard-{number:05d}.arrow"), batch.schema) as file:
            file.write_batch(batch)
    note_shape(folder, features)


def open_arrow(folder: Path) -> Reader:
    """Memory-mapped, without a copy up to the numpy view."""
    shape = noted_shape(folder)[1:]
    files = [pa.ipc.open_file(pa.memory_map(str(path))) for path in sorted(folder.glob("*.arrow"))]
    columns = [file.get_batch(0).column(0) for file in files]
    return _over_maps([column.values.to_numpy(zero_copy_only=True).reshape(-1, *shape) for column in columns])


# --- lmdb ----------------------------------------------------------------------------------------------------
def write_lmdb_records(features: Features, folder: Path) -> None:
    """16 images a record."""
    n, patches, d_in = features.shape
    room = features.n_bytes + n * 8192 + 2**26
    with load("lmdb", "lmdb").open(str(folder), map_size=room, sync=False, metasync=False) as environment:
        for first, record in enumerate(shards(features, IMAGES_A_RECORD * patches * d_in * 2)):
            with environment.begin(write=True) as transaction:
                transaction.put(lmdb.key(first), record.view(torch.uint8).flatten().numpy().data, append=True)
        environment.sync(True)
    note_shape(folder, features)


@cache
def _environment(folder: Path) -> Any:
    """The one environment that a process may have open; threads share it."""
    return load("lmdb", "lmdb").open(str(folder), readonly=True, lock=False, meminit=False)


def _open_lmdb(images_a_record: int) -> Callable[[Path], Reader]:
    def opened(folder: Path) -> Reader:
        n, *shape = noted_shape(folder)
        transaction = _environment(folder).begin(buffers=True)
        warnings.filterwarnings("ignore", "The given buffer is not writable")

        def read(record: int, row: int, out: Tensor) -> None:
            value = np.frombuffer(transaction.get(lmdb.key(record)), np.float16).reshape(-1, *shape)
            np.copyto(out.numpy(), value[row : row + len(out)])

        sizes = [min(images_a_record, n - first) for first in range(0, n, images_a_record)]
        return _over_shards(sizes, read)

    return opened


# --- litdata -------------------------------------------------------------------------------------------------
def open_litdata(folder: Path) -> Reader:
    """``dataset[image]``, which maps a local chunk into memory, copied into the tensor."""
    images = load("litdata", "litdata").StreamingDataset(str(folder), batch_decode=0)

    def reader(first: int, count: int, out: Tensor) -> None:
        for place in range(count):
            out[place] = images[first + place]

    return reader


CANDIDATES: dict[str, Candidate] = {
    "safetensors preadv": Candidate(write_safetensors, open_preadv),
    "safetensors map": Candidate(write_safetensors, open_safetensors_map),
    "npy map": Candidate(write_npy, open_npy),
    "arrow map": Candidate(write_arrow, open_arrow),
    "lmdb": Candidate(lmdb.write, _open_lmdb(1)),
    "lmdb 16 a record": Candidate(write_lmdb_records, _open_lmdb(IMAGES_A_RECORD)),
    "litdata": Candidate(litdata.write, open_litdata),
}
