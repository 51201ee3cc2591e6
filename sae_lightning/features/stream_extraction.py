"""Extraction from images that come only in order: one process, which passes over what finished shards hold."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

from sae_lightning.backbones.backbone import Backbone, Tap
from sae_lightning.data import DataError, ImageStream, Item, decode
from sae_lightning.data.errors import begin_anew
from sae_lightning.distributed.limits import cores
from sae_lightning.features.extraction import (
    POLL,
    Batch,
    Extraction,
    Sink,
    Summary,
    check_captions,
    encode_all,
    progress,
)
from sae_lightning.features.manifest import RECORDS, StoreError, read_record
from sae_lightning.features.prepare import Sample, collate, prepare
from sae_lightning.features.writer import StoreWriter
from sae_lightning.files import Lock

AHEAD = 4  # batches that are being decoded while one is encoded


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
    groups = [{tap: w for tap, w in writers.items() if (tap.kind == "text") == of_text} for of_text in (False, True)]
    sinks = [Sink(group) for group in groups if group]
    with progress(backbone, writers, images.name, images.split, images.length) as bar:
        bar.update(sum(shard.images for shard in done.values()))
        batches = cut(images, done, sizes.pop(), settings.batch_size)
        ready = decoded(batches, images.name, backbone, [bool(group) for group in groups], settings)
        encode_all(ready, backbone, sinks, settings, summary, bar)
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


def cut(
    images: ImageStream, done: Mapping[int, Finished], per_shard: int, batch_size: int
) -> Iterator[tuple[Batch, list[Item]]]:
    """The stream's items as batches of shards, without those of shards that are ``done``."""
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
            yield Batch(
                shard, last, [item.image_id for item in some], [item.label for item in some],
                [item.caption or "" for item in some], state=images.state_dict() if last else None,
            ), some  # fmt: skip
        if ended:
            return
        if filled == per_shard:
            shard, filled = shard + 1, 0


def decoded(
    batches: Iterator[tuple[Batch, list[Item]]], name: str, backbone: Backbone, wanted: Sequence[bool],
    settings: Extraction,
) -> Iterator[Batch]:  # fmt: skip
    """Each batch with its pictures as the backbone's input, decoded by threads ahead of time.

    ``wanted`` says whether pictures are, and texts, which then all must have.
    """
    pictures, texts = wanted
    waiting: deque[tuple[Batch, list[Future[Sample]]]] = deque()

    def whole() -> Batch:
        batch, futures = waiting.popleft()
        batch.pixels, batch.errors, batch.said = collate([future.result() for future in futures])
        return batch

    with ThreadPoolExecutor(max(1, settings.num_workers or cores())) as pool:
        for batch, items in batches:
            check_captions(name, not texts or all(item.caption is not None for item in items))
            some = items if pictures else []
            waiting.append(
                (batch, [pool.submit(prepare, partial(decode, item), item.image_id, backbone) for item in some])
            )
            if len(waiting) > AHEAD:
                yield whole()
        while waiting:
            yield whole()
