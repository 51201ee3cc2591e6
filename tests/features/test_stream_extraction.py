"""Extraction from streams: equal to that with random access, resumed where it stood, shared out in parts."""

from __future__ import annotations

import random
import signal
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch

from sae_lightning.backbones.backbone import Tap
from sae_lightning.data import DataError
from sae_lightning.data.errors import DataWarning
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.source import Source
from sae_lightning.features.store import FeatureStore
from tests.data.making import png
from tests.features import jobs
from tests.features.jobs import (
    PATCH,
    Job,
    content,
    cut,
    encoded,
    extract_split,
    finished,
    litter,
    made,
    times,
)
from tests.processes import wait_for

FILES, ROWS = 3, 13

pytestmark = pytest.mark.usefixtures("one_thread")


def write_parquet(root: Path, names: bool = False, broken: tuple[int, ...] = ()) -> Path:
    """Three files of 13 pictures with labels (texts if ``names``, else numbers of known names) and captions."""
    kinds = ["ship", "cat", "dog"]
    label = datasets.Value("string") if names else datasets.ClassLabel(names=["cat", "dog", "ship"])
    features = datasets.Features({"image": datasets.Image(), "label": label, "caption": datasets.Value("string")})
    root.mkdir(parents=True, exist_ok=True)
    for file in range(FILES):
        rows = range(file * ROWS, (file + 1) * ROWS)
        columns = {
            "image": [{"bytes": b"no picture" if i in broken else png(i, 32), "path": None} for i in rows],
            "label": [kinds[i % 3] for i in rows], "caption": [f"a photo of a {kinds[i % 3]}" for i in rows],
        }  # fmt: skip
        data = datasets.Dataset.from_dict(columns, features)
        data.to_parquet(root / f"train-{file:05d}-of-{FILES:05d}.parquet")
    return root


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("parquet"))


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """Labels are texts, whose names only the end tells."""
    return write_parquet(tmp_path_factory.mktemp("named"), names=True)


def config(path: Path, root: Path, *overrides: str, streaming: bool = True):
    """A tiny clip on all pictures of ``path`` in their order."""
    return made(
        root, "data=hf", f"data.id={path}", "data.splits.val=train", "data.splits.test=train", "data.held_out=0.0",
        f"data.streaming={streaming}", "data.shuffle=false", "backbone=clip", "backbone.size=tiny",
        "extract.batch_size=3", "extract.images_per_shard=5", "data.caption_column=caption", "extract.device=cpu",
        *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(named, tmp_path_factory):
    """The content of the store of ``named``, never interrupted."""
    torch.set_num_threads(1)
    return content(extract_split(config(named, tmp_path_factory.mktemp("whole")))[PATCH])


def without_names(found: dict) -> dict:
    """What does not depend on how images are named, nor on how a store is cut."""
    return {key: found[key] for key in ("features", "labels")} | {
        key: found["manifest"][key] for key in ("class_names", "n_images", "n_patches", "d_in", "kind", "layer")
    }


@pytest.mark.slow
def test_a_stream_gives_what_random_access_gives(parquet, tmp_path):
    taps = [PATCH, Tap("cls", 2), Tap("embedding"), Tap("text")]
    streamed = extract_split(config(parquet, tmp_path), taps)
    random_access = extract_split(config(parquet, tmp_path, streaming=False), taps)
    for tap in taps:
        one, other = content(streamed[tap]), content(random_access[tap])
        assert without_names(one) == without_names(other), tap
        assert one["mean"] == other["mean"]
        assert one["ids"][13] == "train-00001-00000000"
        assert litter(streamed[tap]) == []
    assert FeatureStore.open(streamed[taps[3]])._column("caption")[2] == "a photo of a dog"
    assert [shard.images for shard in FeatureStore.open(streamed[PATCH]).manifest.shards] == [5] * 7 + [4]


@pytest.mark.slow
def test_several_taps_of_a_stream_equal_separate_passes(parquet, tmp_path):
    taps = [PATCH, Tap("pooled"), Tap("text")]
    once = extract_split(config(parquet, tmp_path / "once"), taps)
    for tap in taps:
        assert content(once[tap]) == content(extract_split(config(parquet, tmp_path / "each"), [tap])[tap])


def test_class_names_that_only_the_end_tells(whole, parquet, tmp_path):
    known = content(extract_split(config(parquet, tmp_path))[PATCH])
    assert whole["manifest"]["class_names"] == ["cat", "dog", "ship"]
    assert without_names(whole) == without_names(known)


def test_a_job_that_wants_the_store_of_a_stream_makes_it(whole, named, tmp_path):
    store = Source.of(config(named, tmp_path)).store("train")
    assert content(store.folder) == whole
    assert Source.of(config(named, tmp_path)).store("train").fingerprint == store.fingerprint


def test_a_class_has_one_number_in_the_stores_of_all_splits_of_a_stream(tmp_path):
    """Train's are texts, which only the end tells: whole numbers in numerical order; test's own order gives way."""
    declared = datasets.ClassLabel(names=["11", "10", "9"])
    labels = {"train": (datasets.Value("string"), ["10", "9", "2"]), "test": (declared, ["9", "11"])}
    splits = {}
    for split, (kind, texts) in labels.items():
        pictures = [{"bytes": png(i, 32), "path": None} for i in range(len(texts))]
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        splits[split] = datasets.Dataset.from_dict({"image": pictures, "label": texts}, features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    cfg = made(
        tmp_path, "data=hf", f"data.id={tmp_path / 'data'}", "data.streaming=true", "data.splits.val=train",
        "data.held_out=0.0", "backbone=clip", "backbone.size=tiny", "extract.device=cpu",
    )  # fmt: skip
    train = Source.of(cfg).store("train")
    with pytest.warns(DataWarning, match=r"the test split of 'data', train lacks 1: 11"):
        test = Source.of(cfg).store("test")
    assert (train.class_names, train.labels.tolist()) == (["2", "9", "10"], [2, 1, 0])
    assert (test.class_names, test.labels.tolist()) == (["2", "9", "10", "11"], [1, 3])


# --- interrupted ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_killed_at_random_moments_a_stream_ends_as_if_it_had_not_been(whole, named, tmp_path):
    cfg = config(named, tmp_path)
    rng, kept, attempts = random.Random(1), {}, 0
    while jobs.kill_at_random(tmp_path / "log", tmp_path / "encoded", rng, extract_split, cfg):
        attempts += 1
        (folder,) = {path.parent for path in tmp_path.rglob("records")}
        with pytest.raises(StoreError, match="did not finish"):
            FeatureStore.open(folder)
        assert kept.items() <= finished(folder).items()
        kept = finished(folder)
    assert attempts > 1
    (folder,) = {path.parent for path in tmp_path.rglob("records")}
    assert content(folder) == whole
    assert kept.items() <= times(folder).items()
    assert litter(folder) == []


@pytest.mark.slow
def test_killed_before_changes_of_files_a_stream_goes_on(whole, named, tmp_path):
    """At every fifth change, as each takes a while; which they are differs from shard to shard."""
    for n in range(2, 100, 5):
        cfg = config(named, tmp_path / str(n))
        log = tmp_path / f"log-{n}"
        job = Job(log, extract_split, cfg, before=partial(jobs.die_at, tmp_path / str(n) / "stores", n))
        status = job.end()
        assert status in (0, -signal.SIGKILL), job.said()
        folder = extract_split(cfg)[PATCH]
        assert content(folder) == whole
        assert litter(folder) == [], n
        if status == 0:
            break
    assert n > 40


@pytest.mark.slow
def test_a_second_process_waits_and_takes_over_when_the_first_is_killed(whole, named, tmp_path):
    cfg = config(named, tmp_path)
    first = Job(tmp_path / "log-1", extract_split, cfg,
                before=partial(jobs.count_encoded, tmp_path / "first.txt", stuck=5))  # fmt: skip
    wait_for((tmp_path / "first.stuck").exists)
    second = Job(tmp_path / "log-2", extract_split, cfg, before=partial(jobs.count_encoded, tmp_path / "second.txt"))
    wait_for(lambda: second.process.is_alive())
    second.process.join(1.5)
    assert second.process.is_alive()
    assert encoded(tmp_path / "second.txt") == 0
    assert first.kill()
    assert second.end() == 0, second.said()
    (folder,) = {path.parent for path in tmp_path.rglob("records")}
    assert content(folder) == whole
    assert encoded(tmp_path / "second.txt") == 39 - 10, "two shards were finished"
    assert litter(folder) == []


def test_extracting_again_redoes_a_damaged_shard_alone(whole, named, tmp_path, capsys):
    cfg = config(named, tmp_path)
    folder = extract_split(cfg)[PATCH]
    before = times(folder)
    for name in ("shard-00002.safetensors", "shard-00007.safetensors"):
        cut(folder / name)
    capsys.readouterr()
    extract_split(cfg)
    assert "9 images in" in capsys.readouterr().out
    assert content(folder) == whole
    assert sorted(name for name, t in times(folder).items() if t != before[name]) == [
        "shard-00002.safetensors", "shard-00007.safetensors"
    ]  # fmt: skip
    assert litter(folder) == []


def test_a_stream_that_breaks_goes_on_later(whole, named, tmp_path):
    path = tmp_path / "copy"
    path.mkdir()
    for file in named.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    cfg = config(path, tmp_path)
    images = Source.of(cfg).images("train")
    broken = path / "train-00002-of-00003.parquet"
    sound = broken.read_bytes()
    broken.write_bytes(sound[:400])
    from sae_lightning.features.source import extract_stores

    with pytest.raises(DataError, match=r"broke in shard 2 after row 0 .* run again to go on"):
        extract_stores(Source.of(cfg), images, [PATCH])
    (folder,) = {found.parent for found in tmp_path.rglob("records")}
    kept = finished(folder)
    assert kept
    broken.write_bytes(sound)
    extract_stores(Source.of(cfg), images, [PATCH])
    assert content(folder)["features"] == whole["features"]
    assert kept.items() <= times(folder).items()


# --- broken pictures --------------------------------------------------------------------------------------
def test_unreadable_pictures_of_a_stream_are_refused_or_left_out(tmp_path):
    path = write_parquet(tmp_path / "broken", broken=(3, 10, 11, 12, 13, 14, 38))
    with pytest.raises(DataError, match=r"Image 'train-00000-00000003' cannot be read .* extract\.unreadable=skip"):
        extract_split(config(path, tmp_path))
    folder = extract_split(config(path, tmp_path, "extract.unreadable=skip"))[PATCH]
    store = FeatureStore.open(folder, verify=True)
    assert [shard.images for shard in store.manifest.shards] == [4, 5, 0, 5, 5, 5, 5, 3]
    assert store.manifest.skipped_images == 7
    assert len(store) == len(set(store.image_ids)) == 32
    assert litter(folder) == []


@pytest.mark.slow
def test_text_stores_keep_the_captions_of_unreadable_pictures(tmp_path):
    """In one pass with the pictures as without them, and as with random access."""
    path = write_parquet(tmp_path / "broken", broken=(3, 38))
    options = ["extract.unreadable=skip"]
    taps = [PATCH, Tap("text")]
    together = extract_split(config(path, tmp_path / "1", *options), taps)
    alone = extract_split(config(path, tmp_path / "2", *options), taps[1:])
    other = extract_split(config(path, tmp_path / "3", *options, streaming=False), taps)
    assert content(together[taps[1]]) == content(alone[taps[1]])
    assert without_names(content(together[taps[1]])) == without_names(content(other[taps[1]]))
    assert [len(FeatureStore.open(together[tap])) for tap in taps] == [37, 39]


# --- parts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_parts_become_the_whole(order, whole, named, tmp_path):
    folders = []
    for part in order:
        assert not list(tmp_path.glob("stores/**/records/0000*.json")) or not (folders[-1] / "manifest.json").exists()
        folders.append(extract_split(config(named, tmp_path, f"extract.part={part}/2"))[PATCH])
    assert folders[0] == folders[1]
    merged = content(folders[0])
    assert without_names(merged) == without_names(whole)
    assert merged["ids"] == whole["ids"]
    assert merged["mean"] == pytest.approx(whole["mean"], rel=1e-12)
    assert merged["manifest"]["fingerprint"] == whole["manifest"]["fingerprint"]
    assert litter(folders[0]) == []
    assert Source.of(config(named, tmp_path)).store("train").folder == folders[0]
    assert extract_split(config(named, tmp_path, "extract.part=0/2"))[PATCH] == folders[0], "again: nothing to do"


@pytest.mark.slow
def test_two_parts_at_once_one_of_them_killed(whole, named, tmp_path):
    configs = [config(named, tmp_path, f"extract.part={part}/2") for part in (0, 1)]
    stuck = [partial(jobs.count_encoded, tmp_path / f"{i}.txt", stuck=stuck) for i, stuck in enumerate((4, 0))]
    running = [Job(tmp_path / f"log-{i}", extract_split, configs[i], before=stuck[i]) for i in range(2)]
    wait_for((tmp_path / "0.stuck").exists)
    assert running[0].kill()
    assert running[1].end() == 0, running[1].said()
    assert extract_split(configs[0])[PATCH]
    (folder,) = {p.parent for p in tmp_path.rglob("records") if "-part-" not in p.parent.name}
    assert content(folder)["ids"] == whole["ids"]
    assert content(folder)["features"] == whole["features"]


def test_a_damaged_whole_of_parts_is_made_anew_by_its_parts(whole, named, tmp_path):
    configs = [config(named, tmp_path, f"extract.part={part}/2") for part in (0, 1)]
    folder = [extract_split(cfg)[PATCH] for cfg in configs][-1]
    merged = content(folder)
    cut(folder / "shard-00001.safetensors")  # which is linked, so the part's is damaged too
    with pytest.raises(StoreError, match=r"merged from parts .* run the commands with extract\.part again"):
        extract_split(config(named, tmp_path))
    for cfg in configs:
        extract_split(cfg)
    assert content(folder) == merged
    assert litter(folder) == []


def test_parts_of_a_limited_stream_are_refused(named, tmp_path):
    """They would hold other images than the whole of the same name."""
    with pytest.raises(StoreError, match=r"data\.limit=10 .* extract\.part cannot share out"):
        extract_split(config(named, tmp_path, "data.limit=10", "extract.part=0/2"))


def test_several_devices_are_refused_with_the_way_out(named, tmp_path):
    with pytest.raises(StoreError, match=r"read by one process; start several with extract\.part=0/4"):
        extract_split(config(named, tmp_path, "extract.devices=2"))
