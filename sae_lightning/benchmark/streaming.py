"""One read of a store for all SAEs that want it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.benchmark.scoring_pass import ScoringPass
from sae_lightning.features.store import FeatureStore


def stream(
    passes: Sequence[ScoringPass], batch_tokens: int = 4096, checkpoint_minutes: float = 5, title: str = "Scoring"
) -> None:
    """Let all ``passes``, of one store and span, see their images; those that an earlier process saw are not read.

    Every ``checkpoint_minutes`` and at the end everything is brought to the disk.
    """
    store, stop = passes[0].store, passes[0].span.stop
    start = min(each.next for each in passes)
    images = max(1, batch_tokens // store.n_patches)
    saved, fresh = time.monotonic(), False
    with tqdm(total=len(passes[0].span), initial=start - passes[0].span.start, desc=title, unit=" images",
              leave=False) as bar:  # fmt: skip
        for first, read in batches(store, start, stop, images):
            for each in passes:
                each.add(first, read)
            bar.update(len(read))
            fresh = True
            if time.monotonic() - saved > 60 * checkpoint_minutes:
                save(passes)
                saved, fresh = time.monotonic(), False
    if fresh:
        save(passes)


def save(passes: Sequence[ScoringPass]) -> None:
    """Bring all ``passes`` to the disk."""
    for each in passes:
        each.save()


def batches(
    store: FeatureStore, start: int, stop: int, images: int, title: str | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The images ``start`` to ``stop`` of a store, ``images`` at a time, the next batch read while one is used.

    With a ``title`` a progress bar is shown.
    """
    spans = [slice(first, min(stop, first + images)) for first in range(start, stop, images)]
    bar = tqdm(spans, title, unit="batch", leave=False, disable=title is None)
    with ThreadPoolExecutor(1, "reader") as pool:
        ahead = pool.submit(store.features, spans[0]) if spans else None
        for i, span in enumerate(bar):
            assert ahead is not None
            read = ahead.result()
            ahead = pool.submit(store.features, spans[i + 1]) if i + 1 < len(spans) else None
            yield span.start, read
