"""Writing a feature store shard by shard, by one process or by many at once.

A folder without a manifest is unfinished. ``plan.json`` says what is being made; each shard is claimed with a lock that
the system drops when its holder dies, written under another name, moved to its own, and counts as finished when its
record is there. Whoever finds all records seals: statistics, table of images, and last the manifest.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from sae_lightning.features.codec import check_dtype
from sae_lightning.features.manifest import MANIFEST, SCHEMA, Manifest, StoreError, write_atomically
from sae_lightning.features.moments import merge
from sae_lightning.features.record import RECORDS, Record, read_record, record_path, shard_name, write_record
from sae_lightning.features.shard import ShardFile, data_sha256, sync_folder

VERSIONS = ("torch", "timm", "transformers", "safetensors")
PLAN, CLAIMS = "plan.json", "claims"


class StoreWriter:
    """One store being made.

    ``about`` holds the manifest's descriptive fields (data, split, backbone, kind, layer, grid, class_names). Images
    i · ``images_per_shard`` … make shard i. An extraction that was begun with another ``images_per_shard`` keeps it.
    Raises StoreError when the folder holds something else's beginnings.
    """

    def __init__(self, folder: Path, fingerprint: str, about: dict[str, Any], images_per_shard: int,
                 dtype: str = "float16") -> None:  # fmt: skip
        if images_per_shard < 1:
            raise StoreError(f"extract.images_per_shard={images_per_shard} must be at least 1.")
        self.folder, self.fingerprint, self.about, self.dtype = folder, fingerprint, about, check_dtype(dtype)
        self.images_per_shard = images_per_shard
        if not self.sealed:
            self._plan()

    @property
    def sealed(self) -> bool:
        """Whether the store is finished."""
        return (self.folder / MANIFEST).is_file()

    def _plan(self) -> None:
        try:
            (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
            (self.folder / CLAIMS).mkdir(exist_ok=True)
            with FileLock(self.folder / CLAIMS / "plan.lock"):
                path = self.folder / PLAN
                if not path.is_file():
                    plan = {"schema": SCHEMA, "fingerprint": self.fingerprint, "dtype": self.dtype,
                            "images_per_shard": self.images_per_shard}  # fmt: skip
                    write_atomically(path, json.dumps(plan))
                plan = json.loads(path.read_text())
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be written ({error}); set paths.stores to another disk.") from error
        if (plan["schema"], plan["fingerprint"], plan["dtype"]) != (SCHEMA, self.fingerprint, self.dtype):
            raise StoreError(f"{self.folder} holds the beginnings of another extraction; delete it.")
        self.images_per_shard = plan["images_per_shard"]

    # --- shards -------------------------------------------------------------------------------------
    def has(self, index: int) -> bool:
        """Whether shard ``index`` is finished."""
        return record_path(self.folder, index).is_file() or self.sealed

    def claim(self, index: int | str) -> FileLock | None:
        """A held lock on shard ``index``, or None while another process holds it. Release it when done."""
        lock = FileLock(self.folder / CLAIMS / f"{index}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def begin(self, index: int) -> ShardFile:
        """A new shard ``index`` to append to; hold its claim."""
        return ShardFile(self.folder / shard_name(index), self.dtype)

    def finish(
        self, index: int, shard: ShardFile, image_ids: list[str], labels: list[int] | list[str],
        captions: list[str] | None = None, skipped: list[str] | None = None, state: dict | None = None,
    ) -> None:  # fmt: skip
        """Close the shard and write its record; only now does it count."""
        shape = shard._shape
        if shape is None:
            shard.abort()
            raise StoreError(f"No image of shard {index} of {self.folder} could be read; check the images.")
        about, moments = shard.finish()
        record = Record(about, shape, moments, image_ids, labels, captions, skipped or [], state)
        try:
            write_record(self.folder, index, record)
        except OSError as error:
            raise StoreError(
                f"Writing the record of {shard.path} failed ({error}). Free space; the same command goes on."
            ) from error

    def count(self) -> int:
        """Finished shards before the first missing one."""
        index = 0
        while record_path(self.folder, index).is_file():
            index += 1
        return index

    # --- the end ------------------------------------------------------------------------------------
    def seal(self, n_shards: int) -> None:
        """Write statistics, table and manifest; StoreError when a shard is missing. A sealed store is left as it is."""
        with FileLock(self.folder / CLAIMS / "seal.lock"):
            if self.sealed:
                return
            missing = [i for i in range(n_shards) if not record_path(self.folder, i).is_file()]
            if missing:
                raise StoreError(f"{self.folder}: {len(missing)} of {n_shards} shards are missing; it stays unsealed.")
            self._seal([read_record(self.folder, i) for i in range(n_shards)])
        for left in self.folder.glob(".shard-*"):
            left.unlink(missing_ok=True)
        (self.folder / PLAN).unlink(missing_ok=True)
        shutil.rmtree(self.folder / CLAIMS, ignore_errors=True)

    def _seal(self, records: list[Record]) -> None:
        shapes = sorted({r.shape for r in records})
        if len(shapes) > 1:
            raise StoreError(f"{self.folder}: shards of different shapes {shapes}; delete it and extract again.")
        moments = merge(r.moments for r in records)
        deviation = (moments.m2 / moments.count).sqrt()
        n_patches, d_in = shapes[0]
        class_names, labels = whole_labels(self.about["class_names"], [x for r in records for x in r.labels])
        columns: dict[str, Any] = {"image_id": [x for r in records for x in r.image_ids], "label": labels}
        if all(r.captions is not None for r in records):
            columns["caption"] = [x for r in records for x in r.captions or []]
        try:
            save_file({"mean": moments.mean, "deviation": deviation}, self.folder / "statistics.safetensors")
            pq.write_table(pa.table(columns), self.folder / "images.parquet")
            files = {n: data_sha256(self.folder / n, 0) for n in ("statistics.safetensors", "images.parquet")}
            mean_length, spread = float(moments.mean.norm()), float(deviation.norm())
            about = self.about | {"class_names": class_names}
            Manifest(
                **about, fingerprint=self.fingerprint, n_images=len(labels), n_patches=n_patches, d_in=d_in,
                dtype=self.dtype, images_per_shard=self.images_per_shard,
                std=(moments.variance / (moments.count * d_in)) ** 0.5,
                mean_norm=moments.norms / moments.count, severity=mean_length / max(spread, 1e-12),
                rounding=moments.lost / max(moments.variance, 1e-12), shards=[r.shard for r in records], files=files,
                skipped_images=sum(len(r.skipped) for r in records), versions={n: version(n) for n in VERSIONS},
            ).write(self.folder)  # fmt: skip
            sync_folder(self.folder)
        except OSError as error:
            raise StoreError(
                f"Sealing {self.folder} failed ({error}). All shards are kept; free space and run the same command."
            ) from error


def whole_labels(class_names: list[str] | None, labels: list[Any]) -> tuple[list[str], np.ndarray]:
    """Class names and labels as indices of them, where a stream knew the names only at its end."""
    if class_names is not None:
        return class_names, np.asarray(labels, dtype=np.int64)
    found = sorted(set(labels))
    return [str(name) for name in found], np.searchsorted(np.asarray(found), np.asarray(labels)).astype(np.int64)
