"""What is kept of each finished shard beside it: enough to seal, merge or mend the store without reading features."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sae_lightning.features.manifest import Shard, StoreError, write_atomically
from sae_lightning.features.moments import Moments

RECORDS = "records"


@dataclass
class Record:
    """A finished shard: its checksums, its images in order, its moments, and what was left out of it.

    ``labels`` are class indices, or class names where those are only known at the end. ``state`` is where a stream of
    images stood after the shard's last one.
    """

    shard: Shard
    shape: tuple[int, int]  # patches, d_in
    moments: Moments
    image_ids: list[str]
    labels: list[int] | list[str]
    captions: list[str] | None = None
    skipped: list[str] = field(default_factory=list)
    state: dict | None = None


def record_path(folder: Path, index: int) -> Path:
    """``records/00007.json`` of a store."""
    return folder / RECORDS / f"{index:05d}.json"


def shard_name(index: int) -> str:
    """``shard-00007.safetensors``."""
    return f"shard-{index:05d}.safetensors"


def write_record(folder: Path, index: int, record: Record) -> None:
    """Write the record; only now does the shard count as finished."""
    write_atomically(record_path(folder, index), json.dumps(asdict(record) | {"moments": record.moments.to_json()}))


def read_record(folder: Path, index: int) -> Record:
    """The record of shard ``index``; StoreError when it is missing or unreadable."""
    path = record_path(folder, index)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["shard"] = Shard(**content["shard"])
        content["moments"] = Moments.from_json(content["moments"])
        content["shape"] = tuple(content["shape"])
        return Record(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read ({error}); delete it and run extract.py again.") from error
