"""The loader gives what the order says, whatever reads it, and keeps to its memory."""

import threading
import time

import numpy as np
import pytest
import torch

from sae_lightning.features import shard
from sae_lightning.features.loader import FeatureLoader
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.order import Order
from sae_lightning.features.store import FeatureStore
from tests.conftest import fill_store, write_store


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> FeatureStore:
    """200 images of 12 tokens in 7 shards; a token's features spell its number."""
    numbers = torch.arange(200 * 12)
    features = torch.stack([numbers % 64, numbers // 64, *[torch.zeros(2400)] * 6], 1).reshape(200, 12, 8)
    return fill_store(tmp_path_factory.mktemp("numbered") / "s", features.float(), 30)


def numbers(batch):
    tokens = batch.reshape(-1, batch.shape[-1]).int()
    return (tokens[:, 0] + 64 * tokens[:, 1]).tolist()


def loader(store, batch_size=64, **options):
    return FeatureLoader(store, batch_size, **({"buffer_mb": 0.02, "block_mb": 0.001, "pinned": False} | options))


def expected(order: Order, epoch=0):
    """The batches by the order's own description, one lane after the other."""
    out = np.empty((order.steps, order.lanes, order.per_lane), dtype=int)
    for window in range(order.windows):
        first, steps = order.first_step(window), order.steps_of(window)
        for lane in range(order.lanes):
            drawn = np.concatenate([np.arange(a, a + n) for a, n in order.segments(epoch, lane, window)])
            place = order.places(epoch, lane, window, 1, 0)
            part = np.empty(len(drawn), dtype=int)
            part[place] = drawn
            out[first : first + steps, lane] = part.reshape(steps, -1)
    return out.reshape(-1, order.batch_size).tolist()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("readers", [1, 4])
def test_batches_are_those_of_the_order(native, readers, numbered, monkeypatch):
    if not native:
        monkeypatch.setattr(shard, "_native_scatter", lambda: None)
    stream = loader(numbered, readers=readers)
    assert stream.order.windows > 3
    assert [numbers(batch) for batch in stream] == expected(stream.order)
    assert [numbers(batch) for batch in stream] == expected(stream.order, epoch=1)


def test_images_come_whole(numbered):
    stream = loader(numbered, 16, unit="images")
    got = list(stream)
    assert {tuple(batch.shape) for batch in got} == {(16, 12, 8)}
    first = [numbers(image)[0] for batch in got for image in batch]
    assert all(
        numbers(image) == list(range(n, n + 12)) for batch in got for image in batch for n in [numbers(image)[0]]
    )
    assert len(set(first)) == 192


def test_parts_and_int8_stream_too(numbered, tmp_path):
    part = numbered.select(np.arange(5, 200, 3))
    got = [n for batch in loader(part, 32) for n in numbers(batch)]
    wanted = {12 * i + t for i in range(5, 200, 3) for t in range(12)}
    assert len(got) == len(set(got)) == len(wanted) // 32 * 32
    assert set(got) <= wanted
    small = fill_store(tmp_path / "s", numbered.features(slice(None)).float(), 30, dtype="int8")
    values = torch.cat(list(loader(small))).float()
    true = torch.cat(list(loader(numbered))).float()
    assert (values - true).abs().max() < 0.6


def test_ranks_share_the_global_batches(numbered):
    alone = [sorted(numbers(batch)) for batch in loader(numbered)]
    shared = zip(*(loader(numbered, rank=r, world=4) for r in range(4)), strict=True)
    assert [sorted(n for part in parts for n in numbers(part)) for parts in shared] == alone


@pytest.mark.parametrize("step", [0, 1, 7, 30, 36, 37, 50])
def test_seeking_goes_on_in_the_middle_of_an_epoch(step, numbered):
    stream = loader(numbered)
    assert len(stream) == 37
    two = [numbers(batch) for _ in range(2) for batch in stream]
    again = loader(numbered)
    again.seek(0, step)
    rest = [numbers(batch) for batch in again]
    rest += [numbers(batch) for batch in again] if step < 37 else []
    assert rest == two[step:]


def test_batches_stay_as_they_are_when_they_are_kept(numbered):
    """Memory is used again only when nobody holds a batch of it."""
    stream = loader(numbered)
    kept = list(stream)
    for _ in range(2):
        for _ in stream:
            pass
    assert [numbers(batch) for batch in kept] == expected(stream.order)


def test_two_buffers_serve_a_consumer_that_keeps_nothing(numbered):
    stream = loader(numbered)
    places = {batch.untyped_storage().data_ptr() for _ in range(5) for batch in stream}
    assert len(places) <= 2 * stream.order.window


def test_leaving_an_epoch_early_stops_its_threads(numbered):
    before = threading.active_count()
    stream = loader(numbered)
    for _ in range(5):
        iterator = iter(stream)
        next(iterator)
        iterator.close()
    assert threading.active_count() == before


def test_errors_of_the_reading_threads_reach_the_consumer(tmp_path):
    store = write_store(tmp_path / "s", 120, 1)
    path = store.folder / "shard-00001.safetensors"
    stream = loader(store)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(StoreError, match=r"shard-00001.* ends .* rows before"):
        list(stream)


def test_waiting_is_measured(numbered, monkeypatch):
    stream = loader(numbered)
    read = FeatureStore.read

    def slow(*arguments):
        time.sleep(0.002)
        read(*arguments)

    monkeypatch.setattr(FeatureStore, "read", slow)
    start = time.perf_counter()
    for _ in stream:
        pass
    assert 0.5 * (time.perf_counter() - start) < stream.wait_seconds < time.perf_counter() - start


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"unit": "words"}, "choose one of tokens, images"),
        ({"buffer_mb": 0.001}, "does not hold two batches"),
        ({"readers": 0}, "at least 1"),
        ({"world": 3}, "cannot share"),
    ],
)
def test_impossible_settings_fail_with_a_sentence(options, sentence, numbered):
    with pytest.raises(ValueError, match=sentence):
        loader(numbered, **options)
