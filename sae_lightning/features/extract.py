"""One pass of a backbone over images into the stores of all wanted features, alone or beside other processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.backbones import Backbone, Tap
from sae_lightning.data import DataError, ImageData
from sae_lightning.data.loader import PictureLoader, pixel_bytes
from sae_lightning.data.remarks import begin_anew, say
from sae_lightning.features.claims import Claims
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.prepare import Captions, Pictures, collate
from sae_lightning.features.sink import Encoded, Sink
from sae_lightning.features.writer import StoreWriter
from sae_lightning.limits import cores

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
UNREADABLE = ("refuse", "skip")
POLL = 0.5  # seconds between looks at shards that other processes hold

Features = dict[Tap, Tensor]


@dataclass(frozen=True)
class Settings:
    """How to extract; ``conf/extract/default.yaml`` says what each means. Raises StoreError for what cannot be."""

    batch_size: int = 256
    num_workers: int | None = None
    device: str = "auto"
    precision: str = "32"
    unreadable: str = "refuse"
    part: str | None = None
    sharing: int = 1  # processes here that extract the same at once, and share the cores

    def __post_init__(self) -> None:
        if str(self.precision) not in PRECISIONS:
            raise StoreError(f"Unknown extract.precision={self.precision}; choose one of {', '.join(PRECISIONS)}.")
        if self.unreadable not in UNREADABLE:
            raise StoreError(f"Unknown extract.unreadable={self.unreadable}; choose one of {', '.join(UNREADABLE)}.")
        self.share()

    def share(self) -> tuple[int, int]:
        """(which, of how many) parts of the shards this process may take."""
        if self.part is None:
            return 0, 1
        try:
            index, count = map(int, str(self.part).split("/"))
            assert 0 <= index < count
        except (ValueError, AssertionError) as error:
            raise StoreError(f"extract.part={self.part} must look like 0/4, 1/4, 2/4 or 3/4.") from error
        return index, count

    def target(self) -> torch.device:
        """The device to encode on."""
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    def allow(self, errors: Mapping[int, DataError]) -> None:
        """Raise the first of the ``errors`` unless unreadable images are to be left out."""
        if errors and self.unreadable == "refuse":
            raise DataError(f"{next(iter(errors.values()))} Or leave such images out with extract.unreadable=skip.")

    def workers(self, image_size: int) -> int:
        """Processes that decode; none for small pictures, whose decoding costs less than starting one."""
        if self.num_workers is not None:
            return self.num_workers
        return 0 if image_size <= 64 else max(1, cores() // self.sharing - 1)


@dataclass
class Summary:
    """What a pass did: ``images`` encoded, in ``seconds``, of which ``waiting`` for pictures or for the disk."""

    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    @property
    def busy_share(self) -> float:
        """Share of the time in which the encoder worked."""
        return 1 - self.waiting / max(self.seconds, 1e-9)


def encoder(backbone: Backbone, taps: Sequence[Tap], settings: Settings) -> Callable[[Tensor | list[str]], Features]:
    """What turns pixels [n, 3, H, W], or captions, into the features of ``taps``, which are all of one of the two."""
    target, kind = settings.target(), PRECISIONS[str(settings.precision)]
    backbone.to(target)

    def encode(batch: Tensor | list[str]) -> Features:
        with torch.autocast(target.type, dtype=kind, enabled=kind != torch.float32):
            if isinstance(batch, Tensor):
                return backbone.forward_features(batch.to(target, non_blocking=True), taps)
            return dict.fromkeys(taps, backbone.encode_text(batch))

    return encode


def extract(
    images: ImageData, backbone: Backbone, writers: Mapping[Tap, StoreWriter], settings: Settings | None = None
) -> Summary:
    """Write and seal the stores of ``writers``, each with the features of its tap for all ``images``.

    Takes shards that nobody has finished or holds, so any number of processes may do the same at once; without
    ``settings.part`` it waits for the others' and takes over those that they leave. Text goes by captions. Raises
    DataError, BackboneError or StoreError; whatever was finished stays.
    """
    settings = settings or Settings()
    summary = Summary()
    begin_anew()
    for of_text in (False, True):
        chosen = {t: w for t, w in writers.items() if (t.kind == "text") == of_text and not w.sealed}
        if chosen:
            _pass(images, backbone, chosen, settings, of_text, summary)
    return summary


def _pass(
    images: ImageData, backbone: Backbone, writers: Mapping[Tap, StoreWriter], settings: Settings, of_text: bool,
    summary: Summary,
) -> None:  # fmt: skip
    for tap in writers:
        backbone.check(tap)
    check_captions(images.name, images.captions is not None or not of_text)
    samples = Captions(images) if of_text else Pictures(images, backbone)
    workers = 0 if of_text else settings.workers(backbone.image_size)
    encode = encoder(backbone, list(writers), settings)
    claims = Claims(len(images), list(writers.values()), settings.batch_size, *settings.share())
    with progress(backbone, writers, images.name, images.split, len(images)) as bar:
        while True:
            bar.update(claims.done() - bar.n)
            if claims.ready():
                loader = PictureLoader(
                    samples, pixel_bytes(backbone.image_size, settings.batch_size), workers, "extract.num_workers",
                    collate, batch_sampler=claims, pin_memory=settings.target().type == "cuda",
                )  # fmt: skip
                _encode(images, loader, encode, writers, claims, settings, bar, summary)
            if settings.part is not None or claims.all_finished():
                break
            time.sleep(POLL)
        bar.update(claims.done() - bar.n)
    if claims.all_finished():
        for writer in writers.values():
            writer.seal(claims.n_shards)


def _encode(
    images: ImageData, loader: Iterable, encode: Callable[[Any], Features], writers: Mapping[Tap, StoreWriter],
    claims: Claims, settings: Settings, bar: tqdm, summary: Summary,
) -> None:  # fmt: skip
    """Encode whatever can be claimed now."""
    start = mark = time.perf_counter()
    sink = Sink(writers, claims.release)
    try:
        for payload, errors, said in loader:
            batch = claims.issued.popleft()
            say(said)
            settings.allow(errors)
            summary.waiting += time.perf_counter() - mark
            features = encode(payload) if payload is not None else {}
            mark = time.perf_counter()
            claims.encoded(batch)
            kept = [image for i, image in enumerate(batch.images) if i not in errors]
            sink.put(Encoded(
                batch.shard, batch.last, [images.image_ids[i] for i in kept], [int(images.labels[i]) for i in kept],
                [images.captions[i] for i in kept] if images.captions else None, features,
                [images.image_ids[batch.images[i]] for i in errors],
            ))  # fmt: skip
            summary.images += len(batch.images)
            bar.update(claims.done() - bar.n if batch.last else len(batch.images))
        sink.close()
        summary.waiting += time.perf_counter() - mark
    finally:
        sink.stop()
        claims.release_all()
        summary.seconds += time.perf_counter() - start


def progress(backbone: Backbone, taps: Iterable[Tap], data: str, split: str, total: int | None) -> tqdm:
    """The bar of a pass: images, images a second, time left."""
    title = f"Extracting {backbone.title} {' '.join(map(str, taps))}, {data} {split}"
    return tqdm(total=total, desc=title, unit="image", mininterval=0.5)


def check_captions(data: str, there: bool) -> None:
    """DataError when text is wanted of images without captions."""
    if not there:
        raise DataError(f"'{data}' has no captions, so there is no text to embed; set data.caption_column.")
