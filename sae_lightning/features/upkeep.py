"""Looking after stores: finding, mending and merging them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sae_lightning.features.manifest import (
    MANIFEST,
    RECORDS,
    Manifest,
    StoreError,
    read_record,
    record_path,
    shard_name,
    write_record,
)
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.writer import PLAN, StoreWriter, cannot_write, leftovers, state_lock, tidy, write_plan


def find_stores(root: Path) -> list[Path]:
    """Folders below ``root`` that are stores or the beginnings of one, sorted."""
    found = {path.parent for name in (MANIFEST, PLAN) for path in root.rglob(name)}
    return sorted(found)


def unfinished(folder: Path) -> tuple[int, int]:
    """Shards and images that an extraction has finished so far; StoreError for a broken record."""
    records = [read_record(folder, int(path.stem)) for path in sorted((folder / RECORDS).glob("[0-9]*.json"))]
    return len(records), sum(record.shard.images for record in records)


def mend(folder: Path, damage: Iterable[int] | None = None) -> list[str]:
    """Make a sealed store with damaged files one that the next extraction completes; returns the files' names.

    Removes damaged shards with their records, and the manifest; everything whole stays. ``damage`` are the shards known
    to be bad, by default those that a glance shows. Leaves a store alone that is not sealed (any more).
    """
    lost = _lost(folder, damage)
    if not (lost or leftovers(folder)):
        return []
    try:
        with state_lock(folder):
            if not (folder / MANIFEST).is_file():
                return []
            bad, files = _lost(folder, damage) or ([], [])
            if not (bad or files):
                tidy(folder)
                return []
            manifest = Manifest.read(folder)
            for i in bad:  # the manifest goes last: a kill in between leaves what the next glance finds
                record_path(folder, i).unlink(missing_ok=True)
                (folder / manifest.shards[i].file).unlink(missing_ok=True)
            write_plan(folder, manifest.fingerprint, manifest.dtype, manifest.images_per_shard)
            (folder / MANIFEST).unlink()
            return [manifest.shards[i].file for i in bad] + files
    except OSError as error:
        if lost is None:
            return []  # whole stores may lie where nobody can write
        raise cannot_write(folder, error) from error


def _lost(folder: Path, damage: Iterable[int] | None) -> tuple[list[int], list[str]] | None:
    """Damaged shards of a sealed store, and damaged files beside them; None where it is whole or not sealed."""
    try:
        manifest = Manifest.read(folder)
    except StoreError:
        if (folder / MANIFEST).is_file():
            raise
        return None
    store = FeatureStore(folder, manifest)
    bad = set(store.damage() if damage is None else damage)
    for i in range(len(manifest.shards)):
        try:
            read_record(folder, i)
        except StoreError:
            bad.add(i)
    files = list(store.damaged_files())
    return (sorted(bad), files) if bad or files else None


DESCRIPTIVE = ("data", "split", "backbone", "kind", "layer", "site", "prefix", "grid")


def join_modalities(
    images: Path, texts: Path, target: Path, progress: Callable[[], object] = lambda: None
) -> FeatureStore:
    """One sealed store of image embeddings and of the ``texts``' embeddings beside them, to train on both.

    Texts are moved and scaled so that they have the images' mean and scalar deviation: each modality is then centred
    and scaled by its own statistics [MSAE §3.3] when the joint store is by its. Image i's caption is called
    ``text/<its name>`` and has its label. Raises StoreError for stores of other kinds, encoders, widths or splits.
    """
    if (target / MANIFEST).exists():
        raise StoreError(f"{target} exists; name another folder to join into.")
    stores = [FeatureStore.open(folder) for folder in (images, texts)]
    first, second = (store.manifest for store in stores)
    if (first.kind, second.kind) != ("embedding", "text"):
        raise StoreError(
            f"Both modalities are joined from a store of embedding and one of text features, in this order; these hold "
            f"{first.kind} and {second.kind}."
        )
    _check_alike(stores, ("data", "split", "backbone", "d_in", "class_names"), "joined")
    digest = hashlib.sha256("|".join(("both", *(store.fingerprint for store in stores))).encode()).hexdigest()
    about = {name: getattr(first, name) for name in DESCRIPTIVE} | {"class_names": first.class_names}
    writer = StoreWriter(target, digest, about, first.images_per_shard, first.dtype)
    count = 0
    for store, before in zip(stores, ("", "text/"), strict=True):
        for at in range(0, len(store), writer.images_per_shard):
            if not writer.has(count):
                some = slice(at, min(len(store), at + writer.images_per_shard))
                x = store.features(some).float()
                x = x if store is stores[0] else (x - store.mean) / store.std * stores[0].std + stores[0].mean
                names = [before + name for name in store.image_ids[some]]
                shard = writer.begin(count)
                shard.append(x, names)
                writer.finish(count, shard, names, store.labels[some].tolist())
            count += 1
            progress()
    writer.seal(count)
    return FeatureStore.open(target)


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
    same = ["data", "split", "backbone", "kind", "layer", "site", "n_patches", "grid", "d_in", "dtype"]
    by_name = all(isinstance(label, str) for s in stores for label in _some_labels(s))
    same += [] if by_name else ["class_names"]
    _check_alike(stores, same, "merged")
    ids = [image for store in stores for image in store.image_ids]
    if len(set(ids)) != len(ids):
        raise StoreError(f"The stores share {len(ids) - len(set(ids))} images; merge stores of different ones.")
    digest = fingerprint or hashlib.sha256("|".join(s.fingerprint for s in stores).encode()).hexdigest()
    about = {name: getattr(first, name) for name in DESCRIPTIVE}
    about["class_names"] = None if by_name else first.class_names
    writer = StoreWriter(target, digest, about, first.images_per_shard, first.dtype)
    count = 0
    for store in stores:
        for i, shard in enumerate(store.manifest.shards):
            record = read_record(store.folder, i)
            record.shard.file = shard_name(count)
            record.state = None  # a place in a part is none in the whole
            try:
                if shard.images:
                    _link(store.folder / shard.file, target / shard_name(count))
                write_record(target, count, record)
            except OSError as error:
                raise cannot_write(target, error) from error
            count += 1
            progress()
    writer.seal(count)
    return FeatureStore.open(target)


def _check_alike(stores: Sequence[FeatureStore], names: Iterable[str], done: str) -> None:
    """StoreError where the manifests of ``stores`` differ in one of ``names``, so that they cannot be ``done``."""
    for store in stores[1:]:
        for name in names:
            ours, theirs = getattr(stores[0].manifest, name), getattr(store.manifest, name)
            if ours != theirs:
                raise StoreError(
                    f"{store.folder} has {name} {theirs}, {stores[0].folder} has {ours}; they cannot be {done}."
                )


def _some_labels(store: FeatureStore) -> list:
    """The labels of the first shard that has some, as they were recorded."""
    first = next(i for i, shard in enumerate(store.manifest.shards) if shard.images)
    return read_record(store.folder, first).labels


def _link(source: Path, target: Path) -> None:
    try:
        target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
