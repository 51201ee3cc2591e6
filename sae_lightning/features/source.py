"""The source of features, built once from the config: its images, and its stores, found where they lie or extracted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from sae_lightning.backbones.backbone import Backbone
from sae_lightning.backbones.registry import default_layer, identity, load_backbone
from sae_lightning.backbones.taps import IN_LAYERS, LAYER_KINDS, BackboneError, Tap
from sae_lightning.data import DataError, ImageData, ImageStream, load_images
from sae_lightning.data.splits import tell_unseen
from sae_lightning.distributed.limits import cores
from sae_lightning.distributed.processes import run_together
from sae_lightning.features.extraction import Extraction, extract, images_a_shard, seconds_an_image
from sae_lightning.features.manifest import MANIFEST, Manifest, StoreError
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.stream_extraction import extract_stream
from sae_lightning.features.synthetic import fingerprint_of, write_synthetic
from sae_lightning.features.upkeep import mend, merge_stores
from sae_lightning.features.writer import StoreWriter, cannot_write
from sae_lightning.files import LockError, held, lend_cache
from sae_lightning.settings.resolvers import folder_name

FORMAT = "2"  # of what a store holds, for the fingerprint

BUNDLED = ("demo", "digits", "mosaic")  # data sets that ship with a package, and cannot change

LOSSY, LOSSY_DIMENSION = 1e-3, 1e-2  # shares of variance, of all and of a dimension, that are lost with a warning

USUAL = 224  # pixels; larger pictures are said, as they take several times as long

Images = ImageData | ImageStream


def plain(node: Any) -> dict[str, Any]:
    """A config node as a plain dict."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)  # type: ignore[return-value]


def tap_at(backbone: Mapping[str, Any], features: str, site: str = "block") -> Tap:
    """Where ``features`` of a kind are read: at a ``site``, of the layer that the config section ``backbone`` means."""
    layered = features in LAYER_KINDS and site in IN_LAYERS
    return Tap(features, default_layer(backbone) if layered else None, site)


def taps_of(cfg: DictConfig) -> list[Tap]:
    """All taps that ``cfg.features``, ``cfg.layers`` and ``cfg.site``, each one or a list, name."""
    kinds, sites = ([x] if isinstance(x, str) else list(x) for x in (cfg.features, cfg.site))
    layers = [cfg.layers] if cfg.layers is None or isinstance(cfg.layers, int) else list(cfg.layers)
    backbone = plain(cfg.backbone)
    nodes = [backbone if layer is None else backbone | {"layer": layer} for layer in layers]
    return list(dict.fromkeys(tap_at(node, kind, site) for site in sites for kind in kinds for node in nodes))


@dataclass(frozen=True)
class Reading:
    """How stores are opened: whether shards that are ``damaged`` are refused or skipped, and every byte verified."""

    damaged: str = "refuse"
    verify: bool = False


@dataclass(frozen=True)
class Source:
    """Features of one kind, ``features``, that an encoder (the section ``backbone``) gives at a ``site`` on a data set.

    Its methods raise DataError, BackboneError or StoreError with a sentence where there are none.
    """

    data: Mapping[str, Any]
    backbone: Mapping[str, Any]
    features: str = "patch"
    extraction: Extraction = field(default_factory=Extraction)
    reading: Reading = field(default_factory=Reading)
    stores: Path = Path("stores")
    site: str = "block"

    @classmethod
    def of(cls, cfg: Mapping[str, Any] | DictConfig, encoder: str = "backbone") -> Source:
        """From a config, or from that in a run's ``cfg.json``; ``encoder`` is the section that names the backbone.

        Of several ``features`` or sites, as ``extract.py`` takes them, the first.
        """
        node: Any = cfg if OmegaConf.is_config(cfg) else OmegaConf.create(dict(cfg))
        sections = {name: plain(node.get(name) or {}) for name in ("data", encoder, "extract", "stream", "paths")}
        features, site = node.get("features") or cls.features, node.get("site") or cls.site
        return cls(
            sections["data"], sections[encoder], features if isinstance(features, str) else features[0],
            Extraction(**_fields(Extraction, sections["extract"])), Reading(**_fields(Reading, sections["stream"])),
            Path(sections["paths"].get("stores", cls.stores)), site if isinstance(site, str) else site[0],
        )  # fmt: skip

    def replace(self, **other: Any) -> Source:
        """The same with other fields; interpolations of a new ``data`` or ``backbone`` name each other's settings.

        Another encoder's features, or another kind of them, are those after the block again.
        """
        if "backbone" in other or other.get("features", self.features) != self.features:
            other = {"site": "block"} | other
        new = [name for name in ("data", "backbone") if name in other]
        if new:
            node = {
                "data": self.data,
                "backbone": self.backbone,
                "extract": dataclasses.asdict(self.extraction),
                **other,
            }
            resolved = OmegaConf.create({name: dict(node[name]) for name in ("data", "backbone", "extract")})
            other |= {name: plain(resolved[name]) for name in new}
        return dataclasses.replace(self, **other)

    @cached_property
    def tap(self) -> Tap:
        """The place in the encoder that is read; of features of an encoder that is not here, what their store says."""
        if self.data["source"] == "store" and "size" not in self.backbone:
            made = Manifest.read(Path(self.data["train"]))
            layered = self.features in LAYER_KINDS and made.site in IN_LAYERS
            return Tap(self.features, (made.layer or 0) if layered else None, made.site)
        return tap_at(self.backbone, self.features, self.site)

    @property
    def given(self) -> bool:
        """Whether there are features alone: those of a store that the config names, or made up ones."""
        return self.data["source"] in ("store", "synthetic")

    def images(self, split: str) -> Images:
        """The images of ``split``, which must be known."""
        return load_images(self.data, split)

    def images_fingerprint(self, split: str) -> str:
        """The fingerprint of the images of ``split``, or of the store where they are ``given``."""
        what = [self.data, split, *((self.features, self.backbone) if self.given else ())]
        key, seen = json.dumps(what), _bundled if self.data["source"] in BUNDLED else _seen
        if seen is not None and key in seen:
            return seen[key]
        found = self.fingerprint(split) if self.given else self.images(split).fingerprint
        if seen is not None:
            seen[key] = found
        return found

    def fingerprint(self, of: str | Images, tap: Tap | None = None) -> str:
        """The fingerprint of the store of a split, or of its images, without extracting it; of ``tap`` or our own."""
        if isinstance(of, str):
            if self.data["source"] == "synthetic":
                return fingerprint_of(self.data, of, self.extraction.dtype)
            if self.given:
                return self.store(of).fingerprint
            of = self.images(of)
        e = self.extraction
        parts = (of.fingerprint, identity(self.backbone), tap or self.tap, e.precision, e.dtype, FORMAT)
        return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()

    def folder(self, images: Images, tap: Tap | None = None) -> Path:
        """``<stores>/<data>/<backbone>-<size>/<tap>/<split>-<fingerprint>``, of ``tap`` or our own."""
        tap, backbone = tap or self.tap, f"{self.backbone['name']}-{self.backbone['size']}"
        name = f"{images.split}-{self.fingerprint(images, tap)[:8]}"
        return self.stores / images.name.replace("/", "--") / backbone / str(tap) / name

    def store(self, split: str) -> FeatureStore:
        """The store of ``split``; extracted now if it is missing. Jobs that want it at once wait for one that does."""
        if self.given:
            return _given_store(self, split)
        images = self.images(split)
        folder = self.folder(images)
        if not (folder / MANIFEST).is_file():
            with waiting_lock(folder):
                extract_stores(self, images, [self.tap])
        store = self.open(folder)
        wanted = self.fingerprint(images)
        if store.manifest.fingerprint != wanted:
            raise StoreError(
                f"{store.folder} has fingerprint {store.manifest.fingerprint[:12]}, expected {wanted[:12]}: it was "
                "made from other images or another backbone. Delete it and extract again."
            )
        return _numbered_as_train(self, images, store)

    def open(self, folder: str | Path) -> FeatureStore:
        """The store in ``folder``, read as ``reading`` says."""
        return FeatureStore.open(Path(folder), self.reading.damaged, self.reading.verify)


def _fields(kind: Any, section: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of a config section that are fields of the dataclass ``kind``."""
    return {f.name: section[f.name] for f in dataclasses.fields(kind) if f.name in section}


_bundled: dict[str, str] = {}  # fingerprints of bundled data sets

_seen: dict[str, str] | None = None  # fingerprints by data and split, while one look is enough


@contextmanager
def looking_once() -> Iterator[None]:
    """Inside, and in all threads, the images of one data set are looked at once for ``Source.images_fingerprint``."""
    global _seen
    if _seen is not None:
        yield
        return
    _seen = {}
    try:
        yield
    finally:
        _seen = None


# --- stores that are there ------------------------------------------------------------------------------
def _given_store(source: Source, split: str) -> FeatureStore:
    """The store ``data.<split>``; where val or test is null, a stratified share ``held_out`` of ``data.train``.

    Labels have the numbers that their classes have in train's store. StoreError when it holds another kind of feature,
    layer or backbone than the source.
    """
    data = source.data
    if data["source"] == "synthetic":
        return _synthetic_store(source, split)
    missing = [s for s in ("val", "test") if data.get(s) is None]
    if data.get(split) is not None and not (split == "train" and missing):
        store = _fits(source.open(data[split]), source)
        train = Path(data["train"])
        numbered = split != "train" and (train / MANIFEST).is_file()
        return store.numbered_as(Manifest.read(train).class_names) if numbered else store
    whole = _fits(source.open(data["train"]), source)
    shares = {"train": 1 - data["held_out"] * len(missing)} | dict.fromkeys(missing, data["held_out"])
    return whole.parts(shares, data["seed"])[split]


def _synthetic_store(source: Source, split: str) -> FeatureStore:
    """The store of made-up features, written now if it is missing."""
    lend_cache(source.stores)
    folder = source.stores / source.data["name"] / f"{split}-{source.fingerprint(split)[:8]}"
    if not _whole(folder):
        with waiting_lock(folder):
            if not _whole(folder):
                write_synthetic(folder, source.data, split, source.extraction.dtype)
    return source.open(folder)


def _fits(store: FeatureStore, source: Source) -> FeatureStore:
    name, wanted, tap = folder_name(store.backbone.split(" ")[0]), source.backbone["name"], source.tap
    if "size" in source.backbone and name != wanted:
        raise StoreError(
            f"{store.folder} holds features of {store.backbone}, but backbone={wanted}. Set backbone={name}, or name "
            "another store."
        )
    layer = store.layer if "size" in source.backbone else tap.layer
    if (store.kind, layer, store.site) != (tap.kind, tap.layer, tap.site):
        found = f"{store.kind} features of layer {store.layer}" if store.layer is not None else store.kind
        set_ = [f"features={store.kind}", f"site={store.site}"][: 1 if store.site == tap.site else 2]
        set_ += [] if store.layer is None else [f"backbone.layer={store.layer}"]
        at = "" if store.site == "block" else f" at {store.site}"
        raise StoreError(f"{store.folder} holds {found}{at}; the config asks for {tap}. Set {' and '.join(set_)}.")
    return store


def _numbered_as_train(source: Source, images: Images, store: FeatureStore) -> FeatureStore:
    """The store of a stream, its classes with the numbers that they have in train's, whose end may have told them."""
    if not isinstance(images, ImageStream) or images.split == "train":
        return store
    folder = source.folder(source.images("train"))
    if not (folder / MANIFEST).is_file():
        return store
    of_train = Manifest.read(folder).class_names
    tell_unseen(images.name, images.split, store.class_names, of_train)
    return store.numbered_as(of_train)


# --- extracting -----------------------------------------------------------------------------------------
def extract_stores(source: Source, images: Images, taps: Sequence[Tap]) -> dict[Tap, Path]:
    """Make or complete the stores of all ``taps`` in one pass, with other processes that do the same; their folders.

    A sealed store with damaged shards gets these anew. Raises DataError, BackboneError or StoreError.
    """
    lend_cache(source.stores)
    folders = {tap: source.folder(images, tap) for tap in taps}
    if isinstance(images, ImageStream) and source.extraction.part is not None:
        return _part_of_stream(source, images, folders)
    missing = [tap for tap, folder in folders.items() if not _whole(folder)]
    if not missing:
        return folders
    if source.extraction.devices <= 1:
        _extract(source, images, {tap: folders[tap] for tap in missing})
        return folders
    if isinstance(images, ImageStream):
        raise StoreError("A streamed data set is read by one process; start several with extract.part=0/4, 1/4 …")
    _spawn(source, images.split, missing)
    return folders


def _part_of_stream(source: Source, images: ImageStream, folders: dict[Tap, Path]) -> dict[Tap, Path]:
    """Extract one part of a stream into stores beside the whole ones, and merge when all parts are there."""
    index, count = source.extraction.share()
    if source.data.get("limit") is not None:
        raise StoreError(
            f"data.limit={source.data['limit']} takes the first images of a stream, which extract.part cannot share "
            "out; leave out one of the two."
        )
    parts = {tap: [f.with_name(f"{f.name}-part-{i}-of-{count}") for i in range(count)] for tap, f in folders.items()}
    missing = {tap: names[index] for tap, names in parts.items() if not _whole(names[index])}
    if missing:
        _extract(source, images.part(index, count), missing)
    for tap, folder in folders.items():
        with waiting_lock(folder):
            if not _whole(folder) and all((p / MANIFEST).is_file() for p in parts[tap]):
                merge_stores(parts[tap], folder, fingerprint=source.fingerprint(images, tap))
    return folders


def _extract(source: Source, images: Images, folders: Mapping[Tap, Path]) -> None:
    backbone = load_backbone(source.backbone)
    if backbone.image_size > USUAL:
        print(
            f"{backbone.title} reads pictures of {backbone.image_size} x {backbone.image_size} pixels, "
            f"{backbone.n_patches} patches each; backbone.published.image_size={USUAL} gives fewer, sooner.",
            flush=True,
        )
    writers = {tap: writer(source, images, backbone, tap, folder) for tap, folder in folders.items()}
    if isinstance(images, ImageStream):
        summary = extract_stream(images, backbone, writers, source.extraction)
    else:
        summary = extract(images, backbone, writers, source.extraction)
    if summary.images:
        busy = f"the encoder busy {summary.busy_share:.0%} of the time"
        print(f"{summary.images} images in {summary.seconds:.0f} s, {busy}.", flush=True)
    for folder in folders.values():
        if (folder / MANIFEST).is_file():
            manifest = Manifest.read(folder)
            if manifest.skipped_images:
                print(f"{folder}: {manifest.skipped_images} unreadable pictures were left out.", flush=True)
            warn_of_loss(folder, manifest)


def warn_of_loss(folder: Path, manifest: Manifest) -> None:
    """Say so where a store's type has lost much of the features' variance, in all or in one dimension."""
    lost, worst = manifest.rounding, manifest.rounding_worst
    if lost > LOSSY or worst > LOSSY_DIMENSION:
        advice = "" if manifest.dtype == "float16" else " Use extract.dtype=float16."
        print(
            f"{folder}: warning: {manifest.dtype} lost {lost:.2%} of the features' variance, of one dimension's "
            f"{worst:.2%}; an SAE cannot explain more than the rest.{advice}",
            flush=True,
        )


def writer(source: Source, images: Images, backbone: Backbone, tap: Tap, folder: Path) -> StoreWriter:
    """A writer of the store of one tap. StoreError where it was begun with another number of images a shard."""
    how, stream = source.extraction, isinstance(images, ImageStream)
    asked = how.images_per_shard
    per_shard = (
        asked
        if asked is not None
        else images_a_shard(
            images.length if isinstance(images, ImageStream) else len(images),
            backbone.n_patches * backbone.d_in * 2,  # of the default layer, so that all taps cut shards alike
            seconds_an_image(backbone, how.target().type),
            1 if stream else how.devices * how.share()[1],
            how.batch_size,
        )
    )
    about = {
        "data": images.name, "split": images.split, "backbone": backbone.title, "kind": tap.kind, "layer": tap.layer,
        "site": tap.site, "grid": backbone.shape_at(tap).grid if tap.kind in ("patch", "tokens") else (1, 1),
        "prefix": backbone.shape_at(tap).prefix if tap.kind == "tokens" else 0, "class_names": images.class_names,
    }  # fmt: skip
    made = StoreWriter(folder, source.fingerprint(images, tap), about, per_shard, how.dtype)
    if asked is not None and made.images_per_shard != asked:
        raise StoreError(
            f"{folder} was begun with {made.images_per_shard} images a shard, not extract.images_per_shard={asked}; "
            "leave that setting out to go on, or delete the folder to begin anew."
        )
    return made


def _whole(folder: Path) -> bool:
    """Whether ``folder`` is a sealed store without damage that a glance shows; what is damaged is cleared away."""
    if not (folder / MANIFEST).is_file():
        return False
    lost = mend(folder)
    if lost:
        print(f"{folder}: made anew, as damaged or missing: {', '.join(lost)}.", flush=True)
    return (folder / MANIFEST).is_file()


def _spawn(source: Source, split: str, taps: Sequence[Tap]) -> None:
    """Extract in ``extract.devices`` processes, one a GPU (or all on the CPU); StoreError when one of them fails."""
    gpus, devices = torch.cuda.device_count(), source.extraction.devices
    if gpus and devices > gpus:
        raise StoreError(f"extract.devices={devices} but {gpus} GPUs are visible; lower it.")
    variables = {"OMP_NUM_THREADS": str(max(1, cores() // devices))} | dict(os.environ)
    places = [f"cuda:{i}" if gpus else "cpu" for i in range(devices)]
    shares = [dataclasses.replace(source.extraction, device=place, sharing=devices) for place in places]
    arguments = [(source.replace(extraction=share), split, tuple(taps)) for share in shares]
    with run_together(_extract_share, arguments, [variables] * devices) as processes:
        while not processes.ended(1):
            pass
        if processes.failures():
            raise StoreError("A process of this extraction failed; its error is above. The same command goes on.")


def _extract_share(source: Source, split: str, taps: Sequence[Tap]) -> None:
    """What one of several processes does."""
    try:
        images = source.images(split)
        _extract(source, images, {tap: source.folder(images, tap) for tap in taps})
    except (BackboneError, DataError, StoreError) as error:
        sys.exit(str(error))


@contextmanager
def waiting_lock(folder: Path) -> Iterator[None]:
    """A lock file beside ``folder``; says once that it waits for another job."""
    with ExitStack() as locks:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(held(folder.with_name(folder.name + ".lock"), f"extracting {folder}"))
        except (OSError, LockError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            if not isinstance(cause, OSError):
                raise
            raise cannot_write(folder, cause) from error
        yield
