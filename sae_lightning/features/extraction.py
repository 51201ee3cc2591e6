"""One pass of a backbone over images into the stores of all wanted features, alone or beside other processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

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
from sae_lightning.features.prepare import Collated, Pictures, collate
from sae_lightning.features.shard import ShardFile
from sae_lightning.features.writer import StoreWriter
from sae_lightning.registry import one_of

DEPTH = 4  # batches in flight


@dataclass
class Batch:
    """Consecutive images of one shard: what an encoder takes of them, and what is kept beside their features.

    ``pixels`` [n, 3, H, W] are of the readable ones; ``errors`` says by position what is wrong with the others,
    ``said`` what is to be printed of them. ``last`` ends the shard; ``state`` is then where a stream of images stands.
    """

    shard: int
    last: bool
    image_ids: list[str]
    labels: list
    captions: list[str] | None
    pixels: Tensor | None = None
    errors: Mapping[int, DataError] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)
    state: dict | None = None

    def split(self, of_text: bool) -> tuple[list[int], list[int]]:
        """Positions of the images with features and of those without; every image has a text."""
        without = [] if of_text else list(self.errors)
        return [i for i in range(len(self.image_ids)) if i not in without], without


class Sink:
    """``put`` batches with their features in order: a thread writes them to the stores of ``writers``.

    After the last batch of a shard it is finished and ``release(shard)`` is called. An error in the thread is raised by
    the next ``put`` or by ``close``.
    """

    def __init__(self, writers: Mapping[Tap, StoreWriter], release: Callable[[int], None] = lambda shard: None) -> None:
        self.writers, self.release = writers, release
        self.of_text = all(tap.kind == "text" for tap in writers)
        self._open: dict[Tap, ShardFile] = {}
        self._parts: list[Batch] = []  # of the open shard, without their pixels
        self._error: BaseException | None = None
        self._room = threading.Semaphore(DEPTH)
        self._thread = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def put(self, batch: Batch, features: Mapping[Tap, Tensor]) -> None:
        """Hand over the next batch; waits while as many as ``DEPTH`` are not yet written."""
        ready = None
        if self._stream is not None and any(x.is_cuda for x in features.values()):
            ready = torch.cuda.Event()
            ready.record()
        self._room.acquire()
        if self._error is not None:
            raise self._error
        self._thread.submit(self._take, replace(batch, pixels=None), dict(features), ready)

    def close(self) -> None:
        """Wait until everything is written."""
        self._thread.shutdown()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread; a shard that is not finished is removed. Harmless after ``close``."""
        self._thread.shutdown(cancel_futures=True)
        for shard in self._open.values():
            shard.abort()
        self._open = {}

    def _take(self, batch: Batch, features: dict[Tap, Tensor], ready: torch.cuda.Event | None) -> None:
        try:
            if self._error is None:
                self._write(batch, features, ready)
        except BaseException as error:
            self._error = error
        finally:
            self._room.release()

    def _write(self, batch: Batch, features: dict[Tap, Tensor], ready: torch.cuda.Event | None) -> None:
        self._parts.append(batch)
        ids = [batch.image_ids[i] for i in batch.split(self.of_text)[0]]
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
                    self._open[tap].append(x if x.ndim == 3 else x[:, None], ids)
        if batch.last:
            self._finish(batch)

    def _finish(self, last: Batch) -> None:
        parts, self._parts = [(part, *part.split(self.of_text)) for part in self._parts], []
        ids = [part.image_ids[i] for part, kept, _ in parts for i in kept]
        labels = [part.labels[i] for part, kept, _ in parts for i in kept]
        captions = [part.captions[i] for part, kept, _ in parts for i in kept if part.captions]
        left_out = [part.image_ids[i] for part, _, without in parts for i in without]
        for tap, writer in self.writers.items():
            text = captions if tap.kind == "text" else None
            if tap in self._open or not writer.has(last.shard):  # nothing is open where no image could be read
                writer.finish(last.shard, self._open.pop(tap, None), ids, labels, text, left_out, last.state)
        self.release(last.shard)


PIXELS = 8 * 224 * 224  # that a CPU encodes at a time

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


def encoder(
    backbone: Backbone, taps: Sequence[Tap], settings: Extraction, said: Callable[[int], object] = lambda n: None
) -> Callable[[Tensor | list[str]], Features]:
    """What turns pixels [n, 3, H, W], or captions, into the features of ``taps``, which are all of one of the two.

    A CPU encodes as many pictures at a time as its caches hold, which is up to 2.5 times as fast as a whole batch;
    ``said`` is told how many after each time.
    """
    target, kind = settings.target(), PRECISIONS[str(settings.precision)]
    backbone.to(target)

    def encode(batch: Tensor | list[str]) -> Features:
        with torch.autocast(target.type, dtype=kind, enabled=kind != torch.float32):
            if not isinstance(batch, Tensor):
                return dict.fromkeys(taps, backbone.encode_text(batch))
            if target.type != "cpu":
                return backbone.forward_features(batch.to(target, non_blocking=True), taps)
            parts = []
            for piece in batch.split(max(1, PIXELS // (batch.shape[-2] * batch.shape[-1]))):
                parts.append(backbone.forward_features(piece.contiguous(memory_format=torch.channels_last), taps))
                said(len(piece))
            return {tap: torch.cat([part[tap] for part in parts]) for tap in taps}

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
    claims = Claims(len(images), list(writers.values()), settings.batch_size, *settings.share())
    with progress(backbone, writers, images.name, images.split, len(images)) as bar:
        while True:
            bar.update(claims.done() - bar.n)
            if claims.ready():
                try:
                    batches = claimed(images, backbone, claims, settings, of_text)
                    encode_all(batches, backbone, [Sink(writers, claims.release)], settings, summary, bar, claims.done)
                finally:
                    claims.release_all()
            if settings.part is not None or claims.all_finished():
                break
            time.sleep(POLL)
        bar.update(claims.done() - bar.n)
    if claims.all_finished():
        for writer in writers.values():
            writer.seal(claims.n_shards)


def claimed(
    images: ImageData, backbone: Backbone, claims: Claims, settings: Extraction, of_text: bool
) -> Iterator[Batch]:
    """Batches of all shards that can be claimed now, with their pictures decoded unless it is text that is encoded."""
    pixels: Iterable[Collated] = ((None, {}, {}) for _ in claims)
    if not of_text:
        size, pinned = backbone.image_size, settings.target().type == "cuda"
        pixels = PictureLoader(
            Pictures(images, backbone), pixel_bytes(size, settings.batch_size), settings.workers(size),
            "extract.num_workers", collate, batch_sampler=claims, pin_memory=pinned,
        )  # fmt: skip
    for payload, errors, said in pixels:
        part = claims.issued.popleft()
        claims.encoded(part)
        yield Batch(
            part.shard, part.last, [images.image_ids[i] for i in part.images],
            [int(images.labels[i]) for i in part.images],
            [images.captions[i] for i in part.images] if images.captions else None, payload, errors, said,
        )  # fmt: skip


def encode_all(
    batches: Iterable[Batch], backbone: Backbone, sinks: Sequence[Sink], settings: Extraction, summary: Summary,
    bar: tqdm, done: Callable[[], int] | None = None,
) -> None:  # fmt: skip
    """Encode all ``batches`` into the stores of the ``sinks``, which this closes, and count them in ``summary``.

    The ``bar`` moves with every picture; after a shard to ``done()``, where other processes help.
    """
    start = mark = time.perf_counter()
    encoders = [encoder(backbone, list(sink.writers), settings, bar.update) for sink in sinks]
    try:
        for batch in batches:
            say(batch.said)
            settings.allow(batch.errors)
            summary.waiting += time.perf_counter() - mark
            begun = bar.n
            inputs = [batch.captions if sink.of_text else batch.pixels for sink in sinks]
            features = [
                {} if x is None or not len(x) else encode(x) for encode, x in zip(encoders, inputs, strict=True)
            ]
            mark = time.perf_counter()
            for sink, found in zip(sinks, features, strict=True):
                sink.put(batch, found)
            summary.images += len(batch.image_ids)
            bar.update(done() - bar.n if done and batch.last else begun + len(batch.image_ids) - bar.n)
        for sink in sinks:
            sink.close()
        summary.waiting += time.perf_counter() - mark
    finally:
        for sink in sinks:
            sink.stop()
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
