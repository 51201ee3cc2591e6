"""What a feature store says about itself: ``manifest.json``, written last."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

SCHEMA = 1
MANIFEST = "manifest.json"


class StoreError(ValueError):
    """A feature store that is missing, unfinished, broken, or of another making."""


@dataclass
class Shard:
    """One safetensors file with the features of ``images`` consecutive images."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """A sealed store: counts, shapes, what made it, and the checksums of its files.

    ``std`` is the scalar deviation, sqrt(mean over tokens and dimensions of (x - mean)²); ``severity`` is
    γ = ‖mean‖ / ‖per-dimension deviation‖, large where single dimensions lie far off zero; ``mean_norm``
    the mean length of a token. The vectors lie in ``statistics.safetensors``.
    """

    fingerprint: str
    data: str
    split: str
    backbone: str
    layer: int
    n_images: int
    n_patches: int
    d_in: int
    d_pooled: int
    grid: tuple[int, int]
    dtype: str
    std: float
    mean_norm: float
    severity: float
    class_names: list[str]
    shards: list[Shard]
    files: dict[str, str]  # other files and their SHA-256
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in ``folder``; StoreError when it is missing, unreadable or of another schema."""
        path = folder / MANIFEST
        if not folder.is_dir():
            raise StoreError(f"There is no feature store {folder}; run extract.py with the same data and backbone.")
        if not path.is_file():
            raise StoreError(f"{folder} has no {MANIFEST}: its extraction did not finish. Run extract.py again.")
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise StoreError(f"{path} is not valid JSON ({error}); delete {folder} and extract again.") from error
        if content.get("schema") != SCHEMA:
            raise StoreError(f"{path} has schema {content.get('schema')}; this version reads schema {SCHEMA}.")
        missing = {f.name for f in fields(cls)} - set(content)
        if missing:
            raise StoreError(f"{path} lacks {sorted(missing)}; delete {folder} and extract again.")
        shards = [Shard(**shard) for shard in content.pop("shards")]
        return cls(**content | {"shards": shards, "grid": tuple(content["grid"])})
