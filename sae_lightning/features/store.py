"""Reading a feature store: one folder of fp16 safetensors shards for one split, memory-mapped.

```
stores/demo/dinov2-tiny-L4-1a2b3c4d/train/
    manifest.json            counts, shapes, checksums, fingerprint; written last
    statistics.safetensors   mean [d_in], deviation [d_in], both float64
    images.parquet           image_id, label
    shard-00000.safetensors  patch [n, P, d_in], pooled [n, d_pooled]
```
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_lightning.features.manifest import Manifest, StoreError

Index = slice | Tensor | np.ndarray
NUMPY = {"F16": np.float16, "F32": np.float32}


class FeatureStore:
    """A sealed store. ``open`` checks the schema and every file's size; ``verify`` also every checksum."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        statistics = load_file(folder / "statistics.safetensors")
        self.mean: Tensor = statistics["mean"].float()
        self.deviation: Tensor = statistics["deviation"].float()
        self.std: float = manifest.std
        table = pq.read_table(folder / "images.parquet")
        self.image_ids: list[str] = table["image_id"].to_pylist()
        self.labels: Tensor = torch.from_numpy(table["label"].to_numpy().copy())
        self.class_names, self.fingerprint = manifest.class_names, manifest.fingerprint
        self.backbone, self.layer = manifest.backbone, manifest.layer
        self.data, self.split, self.grid = manifest.data, manifest.split, manifest.grid
        self.n_patches, self.d_in = manifest.n_patches, manifest.d_in
        maps = [memory_map(folder / shard.file) for shard in manifest.shards]
        for shard, arrays in zip(manifest.shards, maps, strict=True):
            expected = (shard.images, manifest.n_patches, manifest.d_in)
            if arrays["patch"].shape != expected or arrays["patch"].dtype != np.dtype(manifest.dtype):
                raise StoreError(
                    f"{folder / shard.file} holds {arrays['patch'].dtype} {arrays['patch'].shape}; "
                    f"its manifest says {manifest.dtype} {expected}. Extract again."
                )
        self._maps = maps
        self._starts = np.cumsum([0, *(shard.images for shard in manifest.shards)])

    @classmethod
    def open(cls, folder: str | Path) -> FeatureStore:
        """The store in ``folder``; StoreError says what is missing, truncated or of another schema."""
        folder = Path(folder)
        manifest = Manifest.read(folder)
        sizes = {shard.file: shard.bytes for shard in manifest.shards}
        for name in [*sizes, *manifest.files]:
            path = folder / name
            if not path.is_file():
                raise StoreError(f"{folder} lacks {name}; delete the folder and extract again.")
            if name in sizes and path.stat().st_size != sizes[name]:
                raise StoreError(
                    f"{path} has {path.stat().st_size} bytes instead of {sizes[name]}: it is truncated or was "
                    "changed. Delete the folder and extract again."
                )
        return cls(folder, manifest)

    def verify(self) -> None:
        """Read every file and compare its SHA-256; StoreError names the first that differs."""
        expected = {shard.file: shard.sha256 for shard in self.manifest.shards} | self.manifest.files
        for name, digest in expected.items():
            if file_sha256(self.folder / name) != digest:
                raise StoreError(
                    f"{self.folder / name} does not match its checksum; delete the folder and extract again."
                )

    def __len__(self) -> int:
        return self.manifest.n_images

    @property
    def n_tokens(self) -> int:
        """Patch tokens of all images."""
        return len(self) * self.n_patches

    def patches(self, index: Index) -> Tensor:
        """Raw patch tokens [n, P, d_in] of images, in the store's dtype; a copy."""
        return self._read("patch", index)

    def pooled(self, index: Index) -> Tensor:
        """Raw pooled features [n, d_pooled] of images."""
        return self._read("pooled", index)

    def _read(self, name: str, index: Index) -> Tensor:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._range(name, start, max(start, stop))
            index = np.arange(start, stop, step)
        rows = np.asarray(index, dtype=np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"Images {rows.min()} to {rows.max()} of a store of {len(self)}.")
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        first = self._maps[0][name]
        out = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for s in np.unique(shard):
            mine = shard == s
            out[mine] = self._maps[s][name][rows[mine] - self._starts[s]]
        return torch.from_numpy(out)

    def _range(self, name: str, start: int, stop: int) -> Tensor:
        first = self._maps[0][name]
        out = np.empty((stop - start, *first.shape[1:]), first.dtype)
        for s, begin in enumerate(self._starts[:-1]):
            low, high = max(start, begin), min(stop, self._starts[s + 1])
            if low < high:
                out[low - start : high - start] = self._maps[s][name][low - begin : high - begin]
        return torch.from_numpy(out)


def memory_map(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file as a read-only memory map; StoreError when the file is cut short."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StoreError(f"{path} is no safetensors file ({error}); extract again.") from error
    arrays: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            offset = 8 + length + entry["data_offsets"][0]
            arrays[name] = np.memmap(path, NUMPY[entry["dtype"]], "r", offset, tuple(entry["shape"]))
    return arrays


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
