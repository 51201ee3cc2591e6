"""From a config to opened stores: found where an earlier job left them, or extracted now."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from sae_lightning.backbones.backbone import LAYER_KINDS, Backbone, BackboneError, Tap
from sae_lightning.backbones.registry import default_layer, identity, load_backbone
from sae_lightning.data import DataError, ImageData, ImageStream, load_images
from sae_lightning.data.splits import tell_unseen
from sae_lightning.distributed.limits import cores
from sae_lightning.distributed.processes import run_together
from sae_lightning.features.codec import check_dtype
from sae_lightning.features.extraction import Settings, extract, images_a_shard, seconds_an_image
from sae_lightning.features.manifest import MANIFEST, Manifest, StoreError
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.stream_extraction import extract_stream
from sae_lightning.features.upkeep import mend, merge_stores
from sae_lightning.features.writer import StoreWriter, cannot_write
from sae_lightning.files import LockError, held, lend_cache
from sae_lightning.settings.resolvers import folder_name


def given_store(cfg: DictConfig, split: str, tap: Tap | None = None) -> FeatureStore:
    """The store ``cfg.data.<split>``; where val or test is null, a stratified share ``held_out`` of ``data.train``.

    Labels have the numbers that their classes have in train's store.
    StoreError when it holds another kind of feature, layer or backbone than the config names.
    """
    stream = cfg.get("stream") or {}
    options = (stream.get("damaged", "refuse"), stream.get("verify", False))
    missing = [s for s in ("val", "test") if cfg.data.get(s) is None]
    if cfg.data.get(split) is not None and not (split == "train" and missing):
        store = _fits(FeatureStore.open(Path(cfg.data[split]), *options), cfg, tap)
        train = Path(cfg.data.train)
        numbered = split != "train" and (train / MANIFEST).is_file()
        return store.numbered_as(Manifest.read(train).class_names) if numbered else store
    whole = _fits(FeatureStore.open(Path(cfg.data.train), *options), cfg, tap)
    shares = {"train": 1 - cfg.data.held_out * len(missing)} | dict.fromkeys(missing, cfg.data.held_out)
    return whole.parts(shares, cfg.data.seed)[split]


def _fits(store: FeatureStore, cfg: DictConfig, tap: Tap | None) -> FeatureStore:
    name = folder_name(store.backbone.split(" ")[0])
    if name != cfg.backbone.name:
        raise StoreError(
            f"{store.folder} holds features of {store.backbone}, but backbone={cfg.backbone.name}. Set "
            f"backbone={name}, or name another store."
        )
    if tap is not None and (store.kind, store.layer) != (tap.kind, tap.layer):
        found = f"{store.kind} features of layer {store.layer}" if store.layer is not None else store.kind
        raise StoreError(
            f"{store.folder} holds {found}; the config asks for {tap}. Set features={store.kind}"
            + (f" and backbone.layer={store.layer}." if store.layer is not None else ".")
        )
    return store


FORMAT = "2"  # of what a store holds, for the fingerprint

BUNDLED = ("demo", "digits", "mosaic")  # data sets that ship with a package, and cannot change

_bundled: dict[str, str] = {}  # their fingerprints

LOSSY, LOSSY_DIMENSION = 1e-3, 1e-2  # shares of variance, of all and of a dimension, that are lost with a warning

Images = ImageData | ImageStream


def tap_of(cfg: DictConfig, kind: str | None = None, layer: int | None = None) -> Tap:
    """The tap that ``cfg.features`` (or ``kind``) and ``cfg.backbone.layer`` (or ``layer``) name."""
    kind = kind or cfg.get("features", "patch")
    if kind not in LAYER_KINDS:
        return Tap(kind)
    return Tap(kind, default_layer(cfg.backbone if layer is None else plain(cfg.backbone) | {"layer": layer}))


def taps_of(cfg: DictConfig) -> list[Tap]:
    """All taps that ``cfg.features`` and ``cfg.layers``, each one or a list, name."""
    kinds = [cfg.features] if isinstance(cfg.features, str) else list(cfg.features)
    layers = [None] if cfg.get("layers") is None else [cfg.layers] if isinstance(cfg.layers, int) else list(cfg.layers)
    return list(dict.fromkeys(tap_of(cfg, kind, layer) for kind in kinds for layer in layers))


def fingerprint(cfg: DictConfig, images: Images, tap: Tap) -> str:
    """Hex digest of images, backbone, tap, precision and dtype: equal features have equal fingerprints."""
    e = cfg.extract
    parts = (images.fingerprint, identity(cfg.backbone), tap, e.precision, e.get("dtype", "float16"), FORMAT)
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def store_folder(cfg: DictConfig, images: Images, tap: Tap, digest: str) -> Path:
    """``<stores>/<data>/<backbone>-<size>/<tap>/<split>-<fingerprint>``."""
    backbone = f"{cfg.backbone.name}-{cfg.backbone.size}"
    return (
        Path(cfg.paths.stores) / images.name.replace("/", "--") / backbone / str(tap) / f"{images.split}-{digest[:8]}"
    )


def ensure_store(cfg: DictConfig, split: str, kind: str | None = None) -> FeatureStore:
    """The store of ``split`` for ``cfg.data``, ``cfg.backbone`` and ``cfg.features``; extracted now if it is missing.

    Jobs that want the same store at once wait for the one that extracts it. Raises DataError, BackboneError or
    StoreError with a sentence.
    """
    if cfg.data.source == "store":
        return given_store(cfg, split, tap_of(cfg, kind))
    images = load_images(plain(cfg.data), split)
    tap = tap_of(cfg, kind)
    folder = store_folder(cfg, images, tap, fingerprint(cfg, images, tap))
    if not (folder / MANIFEST).is_file():
        with waiting_lock(folder):
            extract_stores(cfg, images, [tap])
    stream = cfg.get("stream") or {}
    store = FeatureStore.open(folder, stream.get("damaged", "refuse"), stream.get("verify", False))
    return _numbered_as_train(cfg, images, tap, _checked(store, fingerprint(cfg, images, tap)))


def _numbered_as_train(cfg: DictConfig, images: Images, tap: Tap, store: FeatureStore) -> FeatureStore:
    """The store of a stream, its classes with the numbers that they have in train's, whose end may have told them."""
    if not isinstance(images, ImageStream) or images.split == "train":
        return store
    train = load_images(plain(cfg.data), "train")
    folder = store_folder(cfg, train, tap, fingerprint(cfg, train, tap))
    if not (folder / MANIFEST).is_file():
        return store
    of_train = Manifest.read(folder).class_names
    tell_unseen(images.name, images.split, store.class_names, of_train)
    return store.numbered_as(of_train)


_seen: dict[str, str] | None = None  # fingerprints by data and split, while one look is enough


@contextmanager
def looking_once() -> Iterator[None]:
    """Inside, and in all threads, the images of one data set are looked at once for ``images_fingerprint``."""
    global _seen
    if _seen is not None:
        yield
        return
    _seen = {}
    try:
        yield
    finally:
        _seen = None


def images_fingerprint(cfg: DictConfig, split: str) -> str:
    """The fingerprint of the images of ``split``, or of the store where the data set is one (``data=store``)."""
    data = plain(cfg.data)
    key = json.dumps([data, split, cfg.features, plain(cfg.backbone)] if data["source"] == "store" else [data, split])
    seen = _bundled if data["source"] in BUNDLED else _seen
    if seen is not None and key in seen:
        return seen[key]
    store = data["source"] == "store"
    found = given_store(cfg, split, tap_of(cfg)).fingerprint if store else load_images(data, split).fingerprint
    if seen is not None:
        seen[key] = found
    return found


def store_fingerprint(cfg: DictConfig, split: str) -> str:
    """The fingerprint of what ``ensure_store`` gives, without extracting it."""
    if cfg.data.source == "store":
        return given_store(cfg, split, tap_of(cfg)).fingerprint
    return fingerprint(cfg, load_images(plain(cfg.data), split), tap_of(cfg))


def extract_stores(cfg: DictConfig, images: Images, taps: Sequence[Tap]) -> dict[Tap, Path]:
    """Make or complete the stores of all ``taps`` in one pass, with other processes that do the same; their folders.

    A sealed store with damaged shards gets these anew. Raises DataError, BackboneError or StoreError.
    """
    lend_cache(Path(cfg.paths.stores))
    folders = {tap: store_folder(cfg, images, tap, fingerprint(cfg, images, tap)) for tap in taps}
    if isinstance(images, ImageStream) and cfg.extract.get("part") is not None:
        return _part_of_stream(cfg, images, folders)
    missing = [tap for tap, folder in folders.items() if not _whole(folder)]
    if not missing:
        return folders
    devices = int(cfg.extract.get("devices", 1))
    if devices > 1 and isinstance(images, ImageStream):
        raise StoreError("A streamed data set is read by one process; start several with extract.part=0/4, 1/4 …")
    if devices > 1:
        _spawn(cfg, images, missing, devices)
        return folders
    _extract(cfg, images, {tap: folders[tap] for tap in missing})
    return folders


def _part_of_stream(cfg: DictConfig, images: ImageStream, folders: dict[Tap, Path]) -> dict[Tap, Path]:
    """Extract one part of a stream into stores beside the whole ones, and merge when all parts are there."""
    index, count = Settings(part=cfg.extract.part).share()
    if cfg.data.get("limit") is not None:
        raise StoreError(
            f"data.limit={cfg.data.limit} takes the first images of a stream, which extract.part cannot share out; "
            "leave out one of the two."
        )
    parts = {tap: [f.with_name(f"{f.name}-part-{i}-of-{count}") for i in range(count)] for tap, f in folders.items()}
    missing = {tap: names[index] for tap, names in parts.items() if not _whole(names[index])}
    if missing:
        _extract(cfg, images.part(index, count), missing)
    for tap, folder in folders.items():
        with waiting_lock(folder):
            if not _whole(folder) and all((p / MANIFEST).is_file() for p in parts[tap]):
                merge_stores(parts[tap], folder, fingerprint=fingerprint(cfg, images, tap))
    return folders


def _extract(cfg: DictConfig, images: Images, folders: dict[Tap, Path]) -> None:
    backbone = load_backbone(plain(cfg.backbone))
    writers = {tap: writer(cfg, images, backbone, tap, folder) for tap, folder in folders.items()}
    settings = settings_of(cfg)
    if isinstance(images, ImageStream):
        summary = extract_stream(images, backbone, writers, settings)
    else:
        summary = extract(images, backbone, writers, settings)
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


def writer(cfg: DictConfig, images: Images, backbone: Backbone, tap: Tap, folder: Path) -> StoreWriter:
    """A writer of the store of one tap. StoreError where it was begun with another number of images a shard."""
    settings, asked = settings_of(cfg), cfg.extract.get("images_per_shard")
    one_process = isinstance(images, ImageStream)
    per_shard = (
        asked
        if asked is not None
        else images_a_shard(
            images.length if isinstance(images, ImageStream) else len(images),
            backbone.n_patches * backbone.d_in * 2,  # of the default layer, so that all taps cut shards alike
            seconds_an_image(backbone, settings.target().type),
            1 if one_process else int(cfg.extract.get("devices", 1)) * settings.share()[1],
            settings.batch_size,
        )
    )
    about = {
        "data": images.name, "split": images.split, "backbone": backbone.title, "kind": tap.kind, "layer": tap.layer,
        "grid": (1, 1) if tap.layer is None or tap.kind == "cls" else backbone.grid_at(tap.layer),
        "class_names": images.class_names,
    }  # fmt: skip
    dtype = check_dtype(cfg.extract.get("dtype", "float16"))
    made = StoreWriter(folder, fingerprint(cfg, images, tap), about, per_shard, dtype)
    if asked is not None and made.images_per_shard != asked:
        raise StoreError(
            f"{folder} was begun with {made.images_per_shard} images a shard, not extract.images_per_shard={asked}; "
            "leave that setting out to go on, or delete the folder to begin anew."
        )
    return made


def settings_of(cfg: DictConfig) -> Settings:
    """The settings of the section ``extract`` that a pass needs."""
    return Settings(**{k: v for k, v in plain(cfg.extract).items() if k in Settings.__dataclass_fields__})


def _whole(folder: Path) -> bool:
    """Whether ``folder`` is a sealed store without damage that a glance shows; what is damaged is cleared away."""
    if not (folder / MANIFEST).is_file():
        return False
    lost = mend(folder)
    if lost:
        print(f"{folder}: made anew, as damaged or missing: {', '.join(lost)}.", flush=True)
    return (folder / MANIFEST).is_file()


def _checked(store: FeatureStore, digest: str) -> FeatureStore:
    if store.manifest.fingerprint != digest:
        raise StoreError(
            f"{store.folder} has fingerprint {store.manifest.fingerprint[:12]}, expected {digest[:12]}: it was made "
            "from other images or another backbone. Delete it and extract again."
        )
    return store


def _spawn(cfg: DictConfig, images: Images, taps: Sequence[Tap], devices: int) -> None:
    """Extract in ``devices`` processes, one a GPU (or all on the CPU); StoreError when one of them fails."""
    gpus = torch.cuda.device_count()
    if gpus and devices > gpus:
        raise StoreError(f"extract.devices={devices} but {gpus} GPUs are visible; lower it.")
    variables = dict(os.environ)
    variables.setdefault("OMP_NUM_THREADS", str(max(1, cores() // devices)))
    given = OmegaConf.create(plain(cfg))
    arguments = [(given, images.split, f"cuda:{i}" if gpus else "cpu", tuple(taps)) for i in range(devices)]
    with run_together(_extract_share, arguments, [variables] * devices) as processes:
        while not processes.ended(1):
            pass
        if processes.failures():
            raise StoreError("A process of this extraction failed; its error is above. The same command goes on.")


def _extract_share(cfg: DictConfig, split: str, device: str, taps: Sequence[Tap]) -> None:
    """What one of several processes does."""
    cfg.extract.device, cfg.extract.sharing = device, cfg.extract.devices
    try:
        images = load_images(plain(cfg.data), split)
        _extract(cfg, images, {tap: store_folder(cfg, images, tap, fingerprint(cfg, images, tap)) for tap in taps})
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


def plain(node: Any) -> dict[str, Any]:
    """A config node as a plain dict."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)  # type: ignore[return-value]
