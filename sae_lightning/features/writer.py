"""Writing a feature store shard by shard, by one process or by many at once.

A folder without a manifest is unfinished. ``plan.json`` says what is being made; each shard is claimed with a lock that
the system drops when its holder dies, written under another name, moved to its own, and counts as finished when its
record is there. Whoever finds all records seals: statistics, table of images, and last the manifest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import Timeout

from sae_lightning.data.splits import sorted_names
from sae_lightning.features.codec import check_dtype
from sae_lightning.features.manifest import (
    MANIFEST,
    RECORDS,
    SCHEMA,
    Manifest,
    Moments,
    Record,
    Shard,
    StoreError,
    merge,
    read_record,
    record_path,
    shard_name,
    write_record,
)
from sae_lightning.features.shard import ShardFile
from sae_lightning.files import (
    Lock,
    cause,
    file_sha256,
    half_files,
    kind,
    sync_folder,
    write_table,
    write_tensors,
    write_text,
)

VERSIONS = ("torch", "timm", "transformers", "safetensors")
PLAN, CLAIMS = "plan.json", "claims"
STATISTICS, TABLE = "statistics.safetensors", "images.parquet"


class StoreWriter:
    """One store being made.

    ``about`` holds the manifest's descriptive fields (data, split, backbone, kind, layer, grid, class_names). Images
    i · ``images_per_shard`` … make shard i. An extraction that was begun with another ``images_per_shard`` keeps it.
    ``beside`` are files of the folder that are sealed with it, and there before. Raises StoreError when the folder
    holds something else's beginnings.
    """

    def __init__(self, folder: Path, fingerprint: str, about: dict[str, Any], images_per_shard: int,
                 dtype: str = "float16", beside: Sequence[str] = ()) -> None:  # fmt: skip
        if images_per_shard < 1:
            raise StoreError(f"extract.images_per_shard={images_per_shard} must be at least 1.")
        self.folder, self.fingerprint, self.about, self.dtype = folder, fingerprint, about, check_dtype(dtype)
        self.images_per_shard, self.beside = images_per_shard, beside
        if not self.sealed or leftovers(folder):
            self._plan()

    @property
    def sealed(self) -> bool:
        """Whether the store is finished."""
        return (self.folder / MANIFEST).is_file()

    def _plan(self) -> None:
        path = self.folder / PLAN
        try:
            (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
            with state_lock(self.folder):
                if self.sealed:
                    tidy(self.folder)
                    return
                for name in (PLAN, STATISTICS, TABLE, MANIFEST):  # written by who holds this lock
                    remove_half_files(self.folder, name)
                if not path.is_file():
                    write_plan(self.folder, self.fingerprint, self.dtype, self.images_per_shard)
                text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        try:
            plan = json.loads(text)
            ours = (plan["schema"], plan["fingerprint"], plan["dtype"]) == (SCHEMA, self.fingerprint, self.dtype)
            self.images_per_shard = int(plan["images_per_shard"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} cannot be read ({error!r}); delete {self.folder} and extract again.") from error
        if not ours:
            raise StoreError(f"{self.folder} holds the beginnings of another extraction; delete it and extract again.")

    # --- shards -------------------------------------------------------------------------------------
    def has(self, index: int) -> bool:
        """Whether shard ``index`` is finished."""
        return record_path(self.folder, index).is_file() or self.sealed

    def claim(self, index: int | str) -> Lock | None:
        """A held lock on shard ``index``, or None while another process holds it. Release it when done."""
        lock = Lock(self.folder / CLAIMS / f"{index}.lock", thread_local=False)
        try:
            (self.folder / CLAIMS).mkdir(exist_ok=True)
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):  # the latter when another process seals the store just now
            return None
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return lock

    def begin(self, index: int) -> ShardFile:
        """A new shard ``index`` to append to; hold its claim. What killed processes left of it is removed."""
        remove_half_files(self.folder, shard_name(index))
        remove_half_files(self.folder / RECORDS, record_path(self.folder, index).name)
        return ShardFile(self.folder / shard_name(index), self.dtype)

    def finish(
        self, index: int, shard: ShardFile | None, image_ids: list[str], labels: list[int] | list[str],
        captions: list[str] | None = None, skipped: list[str] | None = None, state: dict | None = None,
    ) -> None:  # fmt: skip
        """Close the shard and write its record; only now does it count. None for a shard without a readable image."""
        if shard is None:
            about, moments, shape = Shard(shard_name(index), 0, 0, "", 0), Moments.none(), (0, 0)
        else:
            if shard.images != len(image_ids):
                shard.abort()
                raise StoreError(
                    f"{shard.path} would hold {shard.images} images for {len(image_ids)} ids; the backbone must give "
                    "one row for each image. Nothing of this shard was kept."
                )
            (about, moments), shape = shard.finish(), shard.shape
        record = Record(about, shape, moments, image_ids, labels, captions, skipped or [], state)
        try:
            write_record(self.folder, index, record)
        except OSError as error:
            raise StoreError(
                f"Writing {record_path(self.folder, index)} failed: {cause(error)}. Free space or set paths.stores to "
                "another disk; finished shards are kept and the same command goes on from them."
            ) from error

    def finished(self) -> set[int] | None:
        """All finished shards, in one look at the folder; None once the store is sealed."""
        if self.sealed:
            return None
        return {int(path.stem) for path in (self.folder / RECORDS).glob("[0-9]*.json")}

    def count(self) -> int:
        """Finished shards before the first missing one."""
        index = 0
        while record_path(self.folder, index).is_file():
            index += 1
        return index

    # --- the end ------------------------------------------------------------------------------------
    def seal(self, n_shards: int) -> None:
        """Write statistics, table and manifest; StoreError when a shard is missing. A sealed store is left as it is."""
        with state_lock(self.folder):
            if not self.sealed:
                missing = [i for i in range(n_shards) if not record_path(self.folder, i).is_file()]
                if missing:
                    raise StoreError(
                        f"{self.folder}: {len(missing)} of {n_shards} shards are missing; it stays unsealed. Run the "
                        "same command again."
                    )
                self._seal([read_record(self.folder, i) for i in range(n_shards)])
            tidy(self.folder)

    def _seal(self, records: list[Record]) -> None:
        held = [r for r in records if r.shard.images]
        if not held:
            raise StoreError(f"No image of {self.folder} could be read; check the images.")
        wrong = [r.shard for r in records if not r.shard.images == len(r.image_ids) == len(r.labels)]
        if wrong:
            raise StoreError(
                f"{self.folder / wrong[0].file} holds {wrong[0].images} images, its record names others; delete "
                f"{self.folder} and extract again."
            )
        shapes = sorted({r.shape for r in held})
        if len(shapes) > 1:
            raise StoreError(f"{self.folder}: shards of different shapes {shapes}; delete it and extract again.")
        moments = merge(r.moments for r in held)
        deviation = (moments.m2 / moments.count).sqrt()
        n_patches, d_in = shapes[0]
        class_names, labels = whole_labels(self.about["class_names"], [x for r in records for x in r.labels])
        columns: dict[str, Any] = {"image_id": [x for r in records for x in r.image_ids], "label": labels}
        if all(r.captions is not None for r in records):
            columns["caption"] = [x for r in records for x in r.captions or []]
        try:
            write_tensors(self.folder / STATISTICS, {"mean": moments.mean, "deviation": deviation})
            write_table(self.folder / TABLE, pa.table(columns))
            files = {n: file_sha256(self.folder / n) for n in (STATISTICS, TABLE, *self.beside)}
            mean_length, spread = float(moments.mean.norm()), float(deviation.norm())
            rounding, rounding_worst = moments.rounding
            about = self.about | {"class_names": class_names}
            Manifest(
                **about, fingerprint=self.fingerprint, n_images=len(labels), n_patches=n_patches, d_in=d_in,
                dtype=self.dtype, images_per_shard=self.images_per_shard,
                std=(moments.variance / (moments.count * d_in)) ** 0.5,
                mean_norm=moments.norms / moments.count, severity=mean_length / max(spread, 1e-12),
                rounding=rounding, rounding_worst=rounding_worst, shards=[r.shard for r in records], files=files,
                skipped_images=sum(len(r.skipped) for r in records), versions={n: version(n) for n in VERSIONS},
            ).write(self.folder)  # fmt: skip
            sync_folder(self.folder)
        except OSError as error:
            raise StoreError(
                f"Sealing {self.folder} failed: {cause(error)}. Free space; all shards are kept and the same command "
                "goes on from them."
            ) from error


def whole_labels(class_names: list[str] | None, labels: list[Any]) -> tuple[list[str], np.ndarray]:
    """Class names and labels as indices of them, where a stream knew the names only at its end."""
    if class_names is not None:
        return class_names, np.asarray(labels, dtype=np.int64)
    found = sorted_names(labels)
    place = {name: i for i, name in enumerate(found)}
    return found, np.array([place[str(label)] for label in labels], dtype=np.int64)


# --- the folder's state ---------------------------------------------------------------------------------
def state_lock(folder: Path) -> Lock:
    """To be held while a store is begun, sealed, tidied or mended; it lies beside the folder, hidden."""
    return Lock(folder.with_name(f".{folder.name}.lock"))


def write_plan(folder: Path, fingerprint: str, dtype: str, images_per_shard: int) -> None:
    """Say what is being made in ``folder``."""
    plan = {"schema": SCHEMA, "fingerprint": fingerprint, "dtype": dtype, "images_per_shard": images_per_shard}
    write_text(folder / PLAN, json.dumps(plan))


def leftovers(folder: Path) -> list[Path]:
    """What the making of a store has left in its folder: plan, claims, and half files of killed processes."""
    half = [*half_files(folder), *half_files(folder / RECORDS)]
    return half + [path for path in (folder / PLAN, folder / CLAIMS) if path.exists()]


def remove_half_files(folder: Path, name: str) -> None:
    """Remove what killed processes have left where they wrote ``folder / name``; nothing where there are no locks."""
    if kind() != "none":
        for half in half_files(folder, name):
            half.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove the leftovers from a sealed store."""
    for path in leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def cannot_write(folder: Path, error: OSError) -> StoreError:
    """The sentence for a folder that cannot be made or written."""
    return StoreError(f"{folder} cannot be written: {cause(error)}. Free space or set paths.stores to another disk.")
