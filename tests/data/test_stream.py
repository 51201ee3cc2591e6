"""Streams: order, resuming anywhere, parts, and splits cut item by item."""

import json
import pickle
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from sae_lightning.data import DataError, decode, load_images
from sae_lightning.data.stream import StreamCut
from tests.data.making import class_folders, hf_cfg, pixels, write_shards
from tests.data.test_hf import IMAGE, LABEL, TEXT, made

SIZES = (50, 1, 37, 8, 64)  # rows of the shards


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Five parquet files with row groups of 10; the picture's seed is its row in the whole."""
    root = tmp_path_factory.mktemp("stream")
    start = 0
    for shard, size in enumerate(SIZES):
        rows = range(start, start + size)
        labels, texts = (LABEL, [i % 2 for i in rows]), (TEXT, [f"number {i}" for i in rows])
        data = made(start + size, label=(LABEL, [0] * (start + size))).select(rows).remove_columns("label")
        data = data.add_column("label", labels[1], feature=LABEL).add_column("caption", texts[1], feature=TEXT)
        data.to_parquet(root / f"train-{shard:05d}-of-00005.parquet", batch_size=10)
        start += size
    return root


def streamed(path, split="train", **changes):
    return load_images(hf_cfg(path, streaming=True, **changes), split)


def whole(path, **changes):
    """The stream of all images: nothing is cut."""
    return streamed(path, splits={"train": "train", "val": "train", "test": "train"}, held_out=0.0, **changes)


def ids(items):
    return [item.image_id for item in items]


def test_items_come_in_order_with_all_that_belongs_to_them(parquet):
    parts = [streamed(parquet, split) for split in ("train", "val", "test")]
    items = sorted((item for part in parts for item in part.items()), key=lambda item: item.image_id)
    assert len(items) == sum(SIZES)
    for i, item in enumerate(items):
        assert item.label == i % 2
        assert item.caption == f"number {i}"
        assert isinstance(item.image, bytes)
        assert (np.asarray(decode(item)) == pixels(i)).all()
    assert items[50].image_id == "train-00001-00000000"
    for part in parts:
        assert ids(part.items()) == sorted(ids(part.items()))
        assert part.class_names == ["cat", "dog"]
        assert part.length is None
    assert len({part.fingerprint for part in parts}) == 3


def test_a_stream_goes_on_exactly_where_it_stood(parquet):
    stream = streamed(parquet)
    full = list(stream.items())
    for position in [*range(0, len(full), 5), len(full)]:
        items = stream.items()
        assert list(islice(items, position)) == full[:position]
        state = json.loads(json.dumps(stream.state_dict()))
        assert list(islice(streamed(parquet).items(state), 9)) == full[position : position + 9]


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), max_size=5), st.sampled_from(["train", "val", "test"]), st.sampled_from([None, 7]))
def test_any_number_of_stops_changes_nothing(parquet, steps, split, limit):
    full = ids(streamed(parquet, split, limit=limit).items())
    got, state = [], None
    for step in [*steps, 1000]:
        stream = streamed(parquet, split, limit=limit)
        got += ids(islice(stream.items(state), step))
        state = json.loads(json.dumps(stream.state_dict()))
    assert got == full
    assert limit is None or len(full) == limit


def test_splits_are_an_exact_partition_whatever_the_parts(parquet):
    expected = [f"train-{shard:05d}-{row:08d}" for shard, size in enumerate(SIZES) for row in range(size)]
    for count in (1, 2, 5):
        found = []
        for split in ("train", "val", "test"):
            stream = streamed(parquet, split)
            parts = ids(item for i in range(count) for item in stream.part(i, count).items())
            assert parts == ids(stream.items())
            assert len({stream.part(i, count).fingerprint for i in range(count)} | {stream.fingerprint}) == 1
            found += parts
        assert sorted(found) == expected


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from("abc"), max_size=300), st.integers(3, 12), st.integers(0, 5),
    st.sampled_from([("val",), ("val", "test")]),
)  # fmt: skip
def test_each_block_of_a_class_gives_one_image_to_each_held_out_split(labels, block, seed, held_out):
    shares = dict.fromkeys(held_out, 1 / block)
    cuts = {split: StreamCut.of(shares, split, seed) for split in ("train", *held_out)}
    seen, taken = Counter(), Counter()
    for label in labels:
        owners = [split for split, cut in cuts.items() if cut.keeps(label, 0, seen[label])]
        assert len(owners) == 1
        seen[label] += 1
        taken[owners[0], label] += 1
    for label, count in seen.items():
        for split in held_out:
            assert count // block <= taken[split, label] <= -(-count // block)


def test_places_are_drawn_evenly_and_by_seed_and_shard():
    cut, other = (StreamCut.of({"val": 0.2, "test": 0.2}, "val", seed) for seed in (0, 1))
    kept = [i for i in range(20_000) if cut.keeps("a", 0, i)]
    places = np.bincount(np.array(kept) % 5)
    assert np.abs(places - 800).max() < 100
    assert kept != [i for i in range(20_000) if other.keeps("a", 0, i)]
    assert kept != [i for i in range(20_000) if cut.keeps("a", 1, i)]


def test_limits_are_the_first_images_and_are_shared_by_parts(parquet):
    full = ids(streamed(parquet).items())
    limited = streamed(parquet, limit=9)
    assert ids(limited.items()) == full[:9]
    assert [len(ids(limited.part(i, 2).items())) for i in range(2)] == [4, 5]
    assert limited.fingerprint != streamed(parquet).fingerprint


def test_a_saved_data_set_and_tars_and_folders_stream_too(tmp_path):
    made(10, label=(LABEL, [i % 2 for i in range(10)])).save_to_disk(tmp_path / "saved", num_shards=2)
    write_shards(tmp_path / "tars")
    class_folders(tmp_path / "pictures")
    for name, count, classes in (("saved", 10, ["cat", "dog"]), ("tars", 24, None), ("pictures", 20, ["cat", "dog"])):
        stream = whole(tmp_path / name)
        items = list(stream.items())
        assert len(items) == count
        assert stream.class_names == classes
        assert all(isinstance(item.label, str if classes is None else int) for item in items)
        assert len({decode(item).tobytes() for item in items}) == count


def test_unlabelled_streams_have_one_class(tmp_path):
    made(4).to_parquet(tmp_path / "train.parquet")
    stream = whole(tmp_path)
    assert stream.class_names == ["unlabelled"]
    assert [item.label for item in stream.items()] == [0] * 4


def test_the_data_sets_own_split_has_its_length(tmp_path):
    data = datasets.DatasetDict(train=made(6), test=made(4))
    data.save_to_disk(tmp_path / "x")
    assert [item.image_id for item in streamed(tmp_path / "x", "test").items()] == [
        f"test-00000-{i:08d}" for i in range(4)
    ]


def test_what_a_stream_refuses(parquet, tmp_path):
    stream = streamed(parquet)
    with pytest.raises(DataError, match=r"has 5 shards .*cannot be divided into 6 parts"):
        stream.part(0, 6)
    with pytest.raises(DataError, match="no part 2 of 2"):
        stream.part(2, 2)
    state = stream.state_dict()
    for other in (streamed(parquet, "val"), stream.part(0, 2), streamed(parquet, seed=5)):
        with pytest.raises(DataError, match="state is not of this part"):
            other.items(state)
    made(4, label=(LABEL, [0, 1, -1, 0])).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"'train-00000-00000002' .* has no label"):
        list(whole(tmp_path).items())
    with pytest.raises(DataError, match=r"held_out=0\.5 cannot be cut from a stream"):
        StreamCut.of({"val": 0.5, "test": 0.5}, "train", 0)


def test_a_stream_that_breaks_says_where_and_goes_on_later(parquet, tmp_path):
    for file in parquet.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stream = whole(tmp_path)
    expected = ids(stream.items())
    broken = tmp_path / "train-00002-of-00005.parquet"
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    items = stream.items()
    got = ids(islice(items, SIZES[0] + SIZES[1]))
    with pytest.raises(
        DataError, match=r"broke in shard 2 after row 0 of .*train-00002-of-00005\.parquet \(.*copy that file again"
    ):
        next(items)
    broken.write_bytes(good)
    assert got + ids(stream.items(stream.state_dict())) == expected


def test_empty_pictures_are_left_to_decode(tmp_path):
    data = made(3)
    data = data.map(
        lambda row, i: {"image": row["image"] if i != 1 else None}, with_indices=True, features=data.features
    )
    data.to_parquet(tmp_path / "train.parquet")
    items = list(whole(tmp_path).items())
    assert decode(items[2]).size == (8, 8)
    with pytest.raises(DataError, match="Image 'train-00000-00000001' is empty"):
        decode(items[1])


def test_streams_can_be_pickled_with_their_place(parquet):
    stream = streamed(parquet).part(1, 2)
    items = stream.items()
    first = ids(islice(items, 3))
    copied = pickle.loads(pickle.dumps(stream))
    assert first + ids(copied.items(copied.state_dict())) == ids(stream.items())


class Parts(IterableDataset):
    """Worker i reads part i."""

    def __init__(self, stream, count):
        self.stream, self.count = stream, count

    def __iter__(self):
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        yield from ids(self.stream.part(info.id, self.count).items())


def test_dataloader_workers_read_their_parts_whole(parquet):
    stream = streamed(parquet)
    loader = DataLoader(Parts(stream, 2), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(loader) == ids(stream.items())


def test_no_feature_of_pictures_is_decoded_by_the_library(parquet):
    assert streamed(parquet)._data.features["image"] == datasets.Image(decode=False) != IMAGE
