"""What a feature store says about itself: ``manifest.json``, written last."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeVar

SCHEMA = 2
MANIFEST = "manifest.json"
TYPES: dict[str, tuple[type, ...]] = {  # of the fields below, as they are annotated
    "int": (int,), "float": (int, float), "str": (str,), "list[str]": (list,), "dict[str, str]": (dict,),
}  # fmt: skip
T = TypeVar("T")


class StoreError(ValueError):
    """A feature store that is missing, unfinished, broken, or of another making."""


@dataclass
class Shard:
    """One safetensors file with the features of ``images`` consecutive images.

    ``sha256`` is that of the bytes after the file's header, ``edges`` the CRC-32 of their first and last 4096.
    """

    file: str
    images: int
    bytes: int
    sha256: str
    edges: int


@dataclass
class Manifest:
    """A sealed store: counts, shapes, what made it, and the checksums of its files.

    A store holds one kind of feature (``patch``, ``cls``, ``pooled``, ``embedding`` or ``text``) of one split as
    [n_images, n_patches, d_in]; all but patch tokens have n_patches = 1. ``std`` is the scalar deviation, sqrt(mean
    over tokens and dimensions of (x - mean)²); ``severity`` is γ = ‖mean‖ / ‖per-dimension deviation‖, large where
    single dimensions lie far off zero; ``mean_norm`` the mean length of a token; ``rounding`` the share of the
    features' variance that was lost by storing them as ``dtype``, ``rounding_worst`` the largest such share of one
    dimension, which massive ones hide in the sum. The vectors lie in ``statistics.safetensors``.
    """

    fingerprint: str
    data: str
    split: str
    backbone: str
    kind: str
    layer: int | None
    n_images: int
    n_patches: int
    d_in: int
    grid: tuple[int, int]
    dtype: str
    images_per_shard: int  # fewer where pictures were left out, or at the end
    std: float
    mean_norm: float
    severity: float
    rounding: float
    class_names: list[str]
    shards: list[Shard]
    files: dict[str, str]  # other files and their SHA-256
    skipped_images: int = 0  # unreadable pictures left out at extraction
    versions: dict[str, str] = field(default_factory=dict)
    rounding_worst: float = 0.0
    schema: int = SCHEMA

    def write(self, folder: Path) -> None:
        """Put ``manifest.json`` into ``folder`` in one move."""
        write_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in ``folder``; StoreError when it is missing, unreadable or of another schema."""
        path = folder / MANIFEST
        if not folder.is_dir():
            raise StoreError(f"There is no feature store {folder}; run extract.py with the same data and backbone.")
        if not path.is_file():
            raise StoreError(f"{folder} has no {MANIFEST}: its extraction did not finish. Run extract.py again.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StoreError(f"{path} is not valid JSON ({error}); delete {folder} and extract again.") from error
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            what = "update sae-lightning" if newer else "delete the folder and extract again"
            raise StoreError(f"{path} has schema {schema}; this version reads schema {SCHEMA}: {what}.")
        missing = {f.name for f in fields(cls)} - {"rounding_worst"} - set(content)  # which older stores lack
        if missing:
            raise StoreError(f"{path} lacks {sorted(missing)}; delete {folder} and extract again.")
        try:
            shards = [_typed(Shard(**shard)) for shard in content.pop("shards")]
            return _typed(cls(**content | {"shards": shards, "grid": tuple(content["grid"])}))
        except TypeError as error:
            raise StoreError(f"{path} is not a manifest ({error}); delete {folder} and extract again.") from error


def _typed(made: T) -> T:
    """``made`` itself; TypeError for a field whose value is of another type than it says."""
    for f in fields(made):  # type: ignore[arg-type]
        value, kinds = getattr(made, f.name), TYPES.get(str(f.type))
        if kinds is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise TypeError(f"{f.name} is {value!r}, not of the type {f.type}")
    return made


def partial_name(path: Path) -> Path:
    """Where this process writes what will be ``path``: hidden beside it."""
    return path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Give ``path`` the content so that a reader, or a kill, never sees half of it; OSError leaves nothing behind."""
    partial = partial_name(path)
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def cause(error: OSError) -> str:
    """Why a file could not be written, for a sentence."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error)
