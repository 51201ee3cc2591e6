"""One pass of a backbone over images into the stores of all wanted features, alone or beside other processes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.backbones.backbone import Backbone, Tap
from sae_lightning.data import DataError, ImageData
from sae_lightning.data.errors import begin_anew, say
from sae_lightning.data.loader import PictureLoader, pixel_bytes
from sae_lightning.distributed.limits import cores
from sae_lightning.features.claims import Claims
from sae_lightning.features.codec import check_dtype
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.prepare import Captions, Pictures, collate
from sae_lightning.features.shard import ShardFile
from sae_lightning.features.writer import StoreWriter
from sae_lightning.registry import one_of

DEPTH = 4  # batches in flight


@dataclass
class Encoded:
    """The features of consecutive images of one shard, and what is known of the images.

    ``left_out`` has the ids of images that could not be read. ``last`` ends the shard; ``state`` is then where a stream
    of images stands.
    """

    shard: int
    last: bool
    image_ids: list[str]
    labels: list
    captions: list[str] | None
    features: dict[Tap, Tensor]
    left_out: list[str] = field(default_factory=list)
    state: dict | None = None


class Sink:
    """``put`` batches in order; after the last of a shard it is finished and ``release(shard)`` is called.

    An error in the thread is raised by the next ``put`` or by ``close``.
    """

    def __init__(self, writers: Mapping[Tap, StoreWriter], release: Callable[[int], None]) -> None:
        self.writers, self.release = writers, release
        self._open: dict[Tap, ShardFile] = {}
        self._parts: list[Encoded] = []  # of the open shard, without their features
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._queue: queue.Queue = queue.Queue(DEPTH)
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, batch: Encoded) -> None:
        """Hand over the next batch."""
        ready = None
        if self._stream is not None and any(x.is_cuda for x in batch.features.values()):
            ready = torch.cuda.Event()
            ready.record()
        self._hand((batch, ready))

    def close(self) -> None:
        """Wait until everything is written."""
        self._hand(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread; a shard that is not finished is removed. Harmless after ``close``."""
        self._stopped.set()
        self._thread.join()
        for shard in self._open.values():
            shard.abort()
        self._open = {}

    def _hand(self, item: object) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    item = self._queue.get(timeout=0.1)
                except queue.Empty:
                    continue
                if item is None:
                    return
                self._take(*item)
        except BaseException as error:
            self._error = error

    def _take(self, batch: Encoded, ready: torch.cuda.Event | None) -> None:
        features, batch.features = batch.features, {}
        self._parts.append(batch)
        with torch.cuda.stream(self._stream) if ready is not None else nullcontext():
            if ready is not None:
                assert self._stream is not None
                self._stream.wait_event(ready)
            for tap, x in features.items():
                if ready is not None:
                    x.record_stream(self._stream)  # type: ignore[arg-type]
                if not self.writers[tap].has(batch.shard):
                    if tap not in self._open:
                        self._open[tap] = self.writers[tap].begin(batch.shard)
                    self._open[tap].append(x if x.ndim == 3 else x[:, None], batch.image_ids)
        if batch.last:
            self._finish(batch)

    def _finish(self, last: Encoded) -> None:
        parts, self._parts = self._parts, []
        ids = [x for part in parts for x in part.image_ids]
        labels = [x for part in parts for x in part.labels]
        captions = [x for part in parts for x in part.captions or []]
        left_out = [x for part in parts for x in part.left_out]
        for tap, writer in self.writers.items():
            text = captions if tap.kind == "text" else None
            if tap in self._open or not writer.has(last.shard):  # nothing is open where no image could be read
                writer.finish(last.shard, self._open.pop(tap, None), ids, labels, text, left_out, last.state)
        self.release(last.shard)


PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}

UNREADABLE = ("refuse", "skip")

POLL = 0.5  # seconds between looks at shards that other processes hold

Features = dict[Tap, Tensor]


@dataclass(frozen=True)
class Extraction:
    """How to extract; ``conf/extract/default.yaml`` says what each means. Raises StoreError for what cannot be."""

    batch_size: int = 256
    num_workers: int | None = None
    images_per_shard: int | None = None
    device: str = "auto"
    devices: int = 1
    part: str | None = None
    precision: str = "32"
    dtype: str = "float16"
    unreadable: str = "refuse"
    sharing: int = 1  # processes here that extract the same at once, and share the cores

    def __post_init__(self) -> None:
        one_of(str(self.precision), PRECISIONS, "extract.precision", StoreError)
        one_of(self.unreadable, UNREADABLE, "extract.unreadable", StoreError)
        check_dtype(self.dtype)
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


def encoder(backbone: Backbone, taps: Sequence[Tap], settings: Extraction) -> Callable[[Tensor | list[str]], Features]:
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
    images: ImageData, backbone: Backbone, writers: Mapping[Tap, StoreWriter], settings: Extraction | None = None
) -> Summary:
    """Write and seal the stores of ``writers``, each with the features of its tap for all ``images``.

    Takes shards that nobody has finished or holds, so any number of processes may do the same at once; without
    ``settings.part`` it waits for the others' and takes over those that they leave. Text goes by captions. Raises
    DataError, BackboneError or StoreError; whatever was finished stays.
    """
    settings = settings or Extraction()
    summary = Summary()
    begin_anew()
    for of_text in (False, True):
        chosen = {t: w for t, w in writers.items() if (t.kind == "text") == of_text and not w.sealed}
        if chosen:
            _pass(images, backbone, chosen, settings, of_text, summary)
    return summary


def _pass(
    images: ImageData, backbone: Backbone, writers: Mapping[Tap, StoreWriter], settings: Extraction, of_text: bool,
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
    claims: Claims, settings: Extraction, bar: tqdm, summary: Summary,
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


BYTES, IMAGES = 256 << 20, 4096  # at most

MINUTE = 60.0  # seconds

PER_PROCESS = 8  # shards that each process is to have, where that leaves whole batches

OPERATIONS = {"cpu": 3e10, "cuda": 3e12}  # a second, of a slow device


def images_a_shard(n_images: int | None, image_bytes: int, seconds: float, processes: int, batch_size: int) -> int:
    """Images a shard of a store of ``n_images`` (None: not known) that ``processes`` write, each of ``image_bytes``.

    At most 256 MB, 4096 images and a minute's work at ``seconds`` an image; of small data sets less, so that every
    process has some. A whole number of batches where it is more than one.
    """
    most = min(IMAGES, BYTES // image_bytes, int(MINUTE / seconds))
    if n_images is not None:
        share = -(-n_images // processes)
        most = min(most, share, -(-share // (PER_PROCESS * batch_size)) * batch_size)
    return max(1, most - most % batch_size if most > batch_size else most)


def seconds_an_image(backbone: Backbone, device: str) -> float:
    """What an image takes a slow ``device``, by its parameters and patches: never measured, so that shards are the same
    on every machine of a kind.
    """
    operations = 2 * sum(p.numel() for p in backbone.model.parameters()) * backbone.n_patches
    return operations / OPERATIONS.get(device, OPERATIONS["cuda"])
