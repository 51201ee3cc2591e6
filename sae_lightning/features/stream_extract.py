"""Extraction from images that come only in order: one process, which goes on where its last finished shard ends."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from filelock import FileLock
from torch import Tensor

from sae_lightning.backbones import Backbone, Tap
from sae_lightning.data import DataError, ImageStream, Item, decode
from sae_lightning.features.extract import POLL, Settings, Summary, check_captions, collate, encoder, progress
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.record import read_record
from sae_lightning.features.sink import Encoded, Sink
from sae_lightning.features.writer import StoreWriter

AHEAD = 4  # batches that are being decoded while one is encoded


@dataclass
class Part:
    """Consecutive items of a shard; ``state`` is where the stream stands after the shard's last."""

    shard: int
    items: list[Item]
    last: bool
    state: dict | None = None


def extract_stream(
    images: ImageStream, backbone: Backbone, writers: Mapping[Tap, StoreWriter], settings: Settings | None = None
) -> Summary:
    """As ``extract``, but in order; a second process waits for the first, and takes over if that dies."""
    settings = settings or Settings()
    writers = {tap: writer for tap, writer in writers.items() if not writer.sealed}
    for tap in writers:
        backbone.check(tap)
    summary = Summary()
    locks: list[FileLock] = []
    try:
        for writer in writers.values():
            lock = writer.claim("stream")
            while lock is None:
                time.sleep(POLL)
                lock = writer.claim("stream")
            locks.append(lock)
        writers = {tap: writer for tap, writer in writers.items() if not writer.sealed}
        if writers:
            _run(images, backbone, writers, settings, summary)
    finally:
        for lock in locks:
            lock.release()
    return summary


def _run(
    images: ImageStream, backbone: Backbone, writers: Mapping[Tap, StoreWriter], settings: Settings, summary: Summary
) -> None:
    sizes = {writer.images_per_shard for writer in writers.values()}
    if len(sizes) > 1:
        raise StoreError(f"These stores were begun with {sorted(sizes)} images a shard; finish each by itself.")
    first = min(writers.values(), key=StoreWriter.count)
    done = first.count()
    records = [read_record(first.folder, i) for i in range(done)]
    read = sum(len(r.image_ids) + len(r.skipped) for r in records)
    state = records[-1].state if records else None
    seen = [tap for tap in writers if tap.kind != "text"]
    text = [tap for tap in writers if tap.kind == "text"]
    look = encoder(backbone, seen, settings)
    tell = encoder(backbone, text, settings)
    start = mark = time.perf_counter()
    sink = Sink(writers, lambda shard: None)
    shards = done
    try:
        with progress(backbone, writers, images.name, images.split, images.length) as bar:
            bar.update(read)
            parts = cut(images, state, sizes.pop(), settings.batch_size, done)
            for part, samples in decoded(parts, backbone, bool(seen), settings):
                payload, errors = collate(samples) if seen else (None, {})
                settings.allow(errors)
                summary.waiting += time.perf_counter() - mark
                kept = [item for i, item in enumerate(part.items) if i not in errors]
                features = look(payload) if payload is not None else {}
                if text and kept:
                    check_captions(images.name, all(item.caption is not None for item in kept))
                    features |= tell([item.caption or "" for item in kept])
                mark = time.perf_counter()
                sink.put(Encoded(
                    part.shard, part.last, [item.image_id for item in kept], [item.label for item in kept],
                    [item.caption or "" for item in kept], features, [part.items[i].image_id for i in errors],
                    part.state,
                ))  # fmt: skip
                shards = part.shard + 1
                summary.images += len(part.items)
                bar.update(len(part.items))
            sink.close()
            summary.waiting += time.perf_counter() - mark
    finally:
        sink.stop()
        summary.seconds += time.perf_counter() - start
    if shards == 0:
        raise DataError(f"The {images.split} split of '{images.name}' has no images.")
    for writer in writers.values():
        writer.seal(shards)


def cut(images: ImageStream, state: dict | None, per_shard: int, batch_size: int, first: int) -> Iterator[Part]:
    """The stream's items from ``state`` on as parts of shards, the first of which is ``first``."""
    items = images.items(state)
    shard, filled = first, 0
    while True:
        wanted = min(batch_size, per_shard - filled)
        some = list(islice(items, wanted))
        filled += len(some)
        ended = len(some) < wanted
        if filled:
            last = ended or filled == per_shard
            yield Part(shard, some, last, images.state_dict() if last else None)
        if ended:
            return
        if filled == per_shard:
            shard, filled = shard + 1, 0


def decoded(
    parts: Iterator[Part], backbone: Backbone, pictures: bool, settings: Settings
) -> Iterator[tuple[Part, list[Tensor | DataError]]]:
    """Each part with its pictures as the backbone's input, decoded by threads ahead of time."""

    def prepare(item: Item) -> Tensor | DataError:
        try:
            return backbone.transform(decode(item))
        except DataError as error:
            return error

    with ThreadPoolExecutor(max(1, settings.num_workers or os.cpu_count() or 1)) as pool:
        waiting: deque = deque()
        for part in parts:
            waiting.append((part, [pool.submit(prepare, item) for item in part.items] if pictures else []))
            if len(waiting) > AHEAD:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        for ready, futures in waiting:
            yield ready, [future.result() for future in futures]
