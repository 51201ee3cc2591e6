"""What a feature store says about itself: ``manifest.json``, written last."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sae_lightning.files import write_text

SCHEMA = 2

MANIFEST = "manifest.json"

SEVERE = 10.0  # severity from which outlier dimensions keep most latents from ever firing

NEWER = {"rounding_worst", "site", "prefix"}  # fields that older manifests of this schema lack

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

    A store holds one kind of feature (a tap's: ``patch``, ``cls`` …, at a ``site``) of one split as [n_images,
    n_patches, d_in], where n_patches counts all tokens of an image: 1 of a class token; of ``tokens`` the first
    ``prefix`` are none of the patches, which lie in the ``grid``. ``std`` is the scalar deviation, sqrt(mean over
    tokens and dimensions of (x - mean)²); ``severity`` is γ = ‖mean‖ / ‖per-dimension deviation‖, large where single
    dimensions lie far off zero; ``mean_norm`` the mean length of a token; ``rounding`` the share of the features'
    variance that was lost by storing them as ``dtype``, ``rounding_worst`` the largest such share of one dimension,
    which massive ones hide in the sum. The vectors lie in ``statistics.safetensors``.
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
    site: str = "block"
    prefix: int = 0
    schema: int = SCHEMA

    def write(self, folder: Path) -> None:
        """Put ``manifest.json`` into ``folder`` in one move."""
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")

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
        missing = (
            {f.name for f in fields(cls)} - {"rounding_worst", "site", "prefix"} - set(content)
        )  # which older ones lack
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


CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}  # elements turned into float64 at a time: 1 MB stays in a core's cache


@dataclass(frozen=True)
class Moments:
    """Of ``count`` tokens: ``mean`` [d], ``m2`` [d] summed squared deviations, ``norms`` summed lengths; float64.

    ``lost`` [d] is the summed squared difference between the features and what was stored of them.
    """

    count: int
    mean: Tensor
    m2: Tensor
    norms: float
    lost: Tensor

    @classmethod
    def of(cls, x: Tensor, lost: Tensor | None = None) -> Moments:
        """Of tokens ``x`` [..., d] of any float type, on their device; two passes over pieces of them."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.device.type not in CHUNK:  # without float64
            rows = rows.cpu()
        parts = [_piece(piece) for piece in rows.split(max(1, CHUNK[rows.device.type] // rows.shape[1]))]
        whole = merge(parts)
        return whole if lost is None else cls(whole.count, whole.mean, whole.m2, whole.norms, lost.cpu().double())

    @classmethod
    def none(cls) -> Moments:
        """Of no token; ``merge`` takes only others."""
        nothing = torch.empty(0, dtype=torch.float64)
        return cls(0, nothing, nothing, 0.0, nothing)

    @property
    def variance(self) -> float:
        """Summed squared deviation from the mean, over tokens and dimensions."""
        return float(self.m2.sum())

    @property
    def rounding(self) -> tuple[float, float]:
        """The share of the variance that was lost, and the largest such share of one dimension.

        Dimensions that hardly vary beside the median one are passed over.
        """
        varies = self.m2 > 1e-6 * self.m2.median()
        share = (self.lost / self.m2.clamp_min(1e-300))[varies]
        return float(self.lost.sum()) / max(self.variance, 1e-12), float(share.max()) if len(share) else 0.0

    def to_json(self) -> dict[str, Any]:
        """Numbers and lists that give the same float64 values back."""
        return {
            "count": self.count, "mean": self.mean.tolist(), "m2": self.m2.tolist(), "norms": self.norms,
            "lost": self.lost.tolist(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        """The inverse of ``to_json``."""
        vectors = {key: torch.tensor(content[key], dtype=torch.float64) for key in ("mean", "m2", "lost")}
        if vectors["lost"].ndim == 0:  # of an older store: known in sum only
            vectors["lost"] = (vectors["lost"] / max(len(vectors["mean"]), 1)).expand_as(vectors["mean"])
        return cls(content["count"], norms=content["norms"], **vectors)


def _piece(rows: Tensor) -> Moments:
    x = rows.double()
    mean = x.mean(0)
    norms = float(x.square().sum(1).sqrt().sum())
    m2 = (x - mean).square().sum(0).cpu()
    return Moments(len(x), mean.cpu(), m2, norms, torch.zeros_like(m2))


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of the union of parts, each given by its own [Chan et al. 1979]; at least one part."""
    return reduce(_two, parts)


def _two(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    delta = b.mean - a.mean
    m2 = a.m2 + b.m2 + delta.square() * (a.count * b.count / count)
    return Moments(count, a.mean + delta * (b.count / count), m2, a.norms + b.norms, a.lost + b.lost)


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
    content = vars(record) | {"shard": vars(record.shard), "moments": record.moments.to_json()}
    write_text(record_path(folder, index), json.dumps(content))


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
