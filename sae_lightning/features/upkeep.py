"""Looking after stores: finding, mending and merging them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sae_lightning.features.manifest import MANIFEST, SCHEMA, Manifest, StoreError, write_atomically
from sae_lightning.features.record import RECORDS, read_record, record_path, shard_name, write_record
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.writer import PLAN, StoreWriter


def find_stores(root: Path) -> list[Path]:
    """Folders below ``root`` that are stores or the beginnings of one, sorted."""
    found = {path.parent for name in (MANIFEST, PLAN) for path in root.rglob(name)}
    return sorted(found)


def unfinished(folder: Path) -> tuple[int, int]:
    """Shards and images that an extraction has finished so far."""
    records = [json.loads(path.read_text()) for path in (folder / RECORDS).glob("[0-9]*.json")]
    return len(records), sum(record["shard"]["images"] for record in records)


def mend(folder: Path, damage: Iterable[int] | None = None) -> list[str]:
    """Make a sealed store with damaged shards one that the next extraction completes; returns the shards' names.

    Removes those shards with their records, and the manifest; everything whole stays. ``damage`` are the shards known
    to be bad, by default those that a glance shows.
    """
    manifest = Manifest.read(folder)
    bad = sorted(FeatureStore(folder, manifest).damage() if damage is None else damage)
    for i in range(len(manifest.shards)):
        try:
            read_record(folder, i)
        except StoreError:
            bad = sorted({*bad, i})
    if not bad:
        return []
    plan = {"schema": SCHEMA, "fingerprint": manifest.fingerprint, "dtype": manifest.dtype,
            "images_per_shard": manifest.images_per_shard}  # fmt: skip
    write_atomically(folder / PLAN, json.dumps(plan))
    (folder / MANIFEST).unlink()
    for i in bad:
        record_path(folder, i).unlink(missing_ok=True)
        (folder / manifest.shards[i].file).unlink(missing_ok=True)
    return [manifest.shards[i].file for i in bad]


def merge_stores(
    sources: Sequence[Path], target: Path, progress: Callable[[], object] = lambda: None, fingerprint: str | None = None
) -> FeatureStore:
    """One sealed store with all shards of ``sources``, which stay as they are; hard links where the disk allows.

    They must agree in data, split, backbone, layer, kind, shape, dtype and classes, and share no image. Its
    fingerprint is that of theirs unless one is given. Raises StoreError.
    """
    if (target / MANIFEST).exists():
        raise StoreError(f"{target} exists; name another folder to merge into.")
    stores = [FeatureStore.open(folder) for folder in sources]
    if not stores:
        raise StoreError("There is nothing to merge; name at least one store.")
    first = stores[0].manifest
    same = ["data", "split", "backbone", "kind", "layer", "n_patches", "d_in", "dtype"]
    by_name = all(isinstance(label, str) for s in stores for label in read_record(s.folder, 0).labels)
    same += [] if by_name else ["class_names"]
    for store in stores[1:]:
        for name in same:
            ours, theirs = getattr(first, name), getattr(store.manifest, name)
            if ours != theirs:
                raise StoreError(
                    f"{store.folder} has {name} {theirs}, {stores[0].folder} has {ours}; they cannot be merged."
                )
    ids = [image for store in stores for image in store.image_ids]
    if len(set(ids)) != len(ids):
        raise StoreError(f"The stores share {len(ids) - len(set(ids))} images; merge stores of different ones.")
    digest = fingerprint or hashlib.sha256("|".join(s.fingerprint for s in stores).encode()).hexdigest()
    about = {name: getattr(first, name) for name in ("data", "split", "backbone", "kind", "layer", "grid")}
    about["class_names"] = None if by_name else first.class_names
    writer = StoreWriter(target, digest, about, first.images_per_shard, first.dtype)
    count = 0
    for store in stores:
        for i, shard in enumerate(store.manifest.shards):
            record = read_record(store.folder, i)
            record.shard.file = shard_name(count)
            _link(store.folder / shard.file, target / shard_name(count))
            write_record(target, count, record)
            count += 1
            progress()
    writer.seal(count)
    return FeatureStore.open(target)


def _link(source: Path, target: Path) -> None:
    try:
        target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
