"""Extraction from images that come only in order: one process, which passes over what finished shards hold."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

from sae_lightning.backbones.backbone import Backbone, Tap
from sae_lightning.data import DataError, ImageStream, Item, decode
from sae_lightning.data.errors import begin_anew, say
from sae_lightning.distributed.limits import cores
from sae_lightning.features.extraction import (
    POLL,
    Encoded,
    Extraction,
    Features,
    Sink,
    Summary,
    check_captions,
    encoder,
    progress,
)
from sae_lightning.features.manifest import RECORDS, StoreError, read_record
from sae_lightning.features.prepare import Sample, collate, prepare
from sae_lightning.features.writer import StoreWriter
from sae_lightning.files import Lock

AHEAD = 4  # batches that are being decoded while one is encoded


@dataclass
class Part:
    """Consecutive items of a shard; ``state`` is where the stream stands after the shard's last."""

    shard: int
    items: list[Item]
    last: bool
    state: dict | None = None

    def encoded(self, features: Features, errors: Collection[int]) -> Encoded:
        """For the sink: all items but those at the positions ``errors``, whose ``features`` these are."""
        kept = [item for i, item in enumerate(self.items) if i not in errors]
        return Encoded(
            self.shard, self.last, [item.image_id for item in kept], [item.label for item in kept],
            [item.caption or "" for item in kept], features, [self.items[i].image_id for i in errors], self.state,
        )  # fmt: skip


def extract_stream(
    images: ImageStream, backbone: Backbone, writers: Mapping[Tap, StoreWriter], settings: Extraction | None = None
) -> Summary:
    """As ``extract``, but in order; a second process waits for the first, and takes over if that dies."""
    settings = settings or Extraction()
    begin_anew()
    wanted = {tap: writer for tap, writer in writers.items() if not writer.sealed}
    for tap in wanted:
        backbone.check(tap)
    summary = Summary()
    locks: list[Lock] = []
    try:
        for writer in sorted(wanted.values(), key=lambda writer: writer.folder):  # so that no two wait for each other
            while (lock := writer.claim("stream")) is None:
                time.sleep(POLL)
            locks.append(lock)
        missing = {tap: writer for tap, writer in wanted.items() if not writer.sealed}
        if missing:
            _run(images, backbone, missing, settings, summary)
    finally:
        for lock in locks:
            lock.release()
    for writer in wanted.values():
        writer.seal(writer.count())
    return summary


def _run(
    images: ImageStream, backbone: Backbone, writers: Mapping[Tap, StoreWriter], settings: Extraction, summary: Summary
) -> None:
    sizes = {writer.images_per_shard for writer in writers.values()}
    if len(sizes) > 1:
        raise StoreError(f"These stores were begun with {sorted(sizes)} images a shard; finish each by itself.")
    done = finished_shards(list(writers.values()))
    seen = [tap for tap in writers if tap.kind != "text"]
    text = [tap for tap in writers if tap.kind == "text"]
    look = encoder(backbone, seen, settings)
    tell = encoder(backbone, text, settings)
    start = mark = time.perf_counter()
    sinks = [Sink({tap: writers[tap] for tap in group}, lambda shard: None) for group in (seen, text)]
    try:
        with progress(backbone, writers, images.name, images.split, images.length) as bar:
            bar.update(sum(shard.images for shard in done.values()))
            parts = cut(images, done, sizes.pop(), settings.batch_size)
            for part, samples in decoded(parts, backbone, bool(seen), settings):
                payload, errors, said = collate(samples)
                say(said)
                settings.allow(errors)
                summary.waiting += time.perf_counter() - mark
                features = look(payload) if payload is not None else {}
                told: Features = {}
                if text and part.items:
                    check_captions(images.name, all(item.caption is not None for item in part.items))
                    told = tell([item.caption or "" for item in part.items])
                mark = time.perf_counter()
                if seen:
                    sinks[0].put(part.encoded(features, errors))
                if text:  # also of pictures that cannot be read
                    sinks[1].put(part.encoded(told, ()))
                summary.images += len(part.items)
                bar.update(len(part.items))
            for sink in sinks:
                sink.close()
            summary.waiting += time.perf_counter() - mark
    finally:
        for sink in sinks:
            sink.stop()
        summary.seconds += time.perf_counter() - start
    if not any(writer.count() for writer in writers.values()):
        raise DataError(f"The {images.split} split of '{images.name}' has no images.")


@dataclass
class Finished:
    """A shard that all stores have: its images, also unreadable ones, and where the stream stands after them."""

    images: int
    state: dict | None


def finished_shards(writers: list[StoreWriter]) -> dict[int, Finished]:
    """By shard; StoreError where stores that were merged from parts of a stream lack some."""
    folder = writers[0].folder
    found = {}
    for index in (int(path.stem) for path in (folder / RECORDS).glob("[0-9]*.json")):
        if all(writer.has(index) for writer in writers):
            record = read_record(folder, index)
            if record.state is None:
                raise StoreError(
                    f"{folder} was merged from parts of a stream and some of its files were damaged; run the commands "
                    "with extract.part again, which make these alone anew, or delete it."
                )
            found[index] = Finished(len(record.image_ids) + len(record.skipped), record.state)
    return found


def cut(images: ImageStream, done: Mapping[int, Finished], per_shard: int, batch_size: int) -> Iterator[Part]:
    """The stream's items as parts of shards, without those of shards that are ``done``."""
    items: Iterator[Item] | None = None
    shard, filled = 0, 0
    state: dict | None = None
    while True:
        while not filled and shard in done:
            state, items = done[shard].state, None
            shard += 1
        if items is None:
            items = images.items(state)
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
    parts: Iterator[Part], backbone: Backbone, pictures: bool, settings: Extraction
) -> Iterator[tuple[Part, list[Sample]]]:
    """Each part with its pictures as the backbone's input, decoded by threads ahead of time."""
    with ThreadPoolExecutor(max(1, settings.num_workers or cores())) as pool:
        waiting: deque = deque()
        for part in parts:
            items = part.items if pictures else []
            futures = [pool.submit(prepare, partial(decode, item), item.image_id, backbone) for item in items]
            waiting.append((part, futures))
            if len(waiting) > AHEAD:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        for ready, futures in waiting:
            yield ready, [future.result() for future in futures]
