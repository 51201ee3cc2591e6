"""Kills, full disks, broken shards, several processes, wrong stores: nothing is lost or taken for whole."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import subprocess
import time
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sae_lightning.backbones.backbone import Backbone, Tap
from sae_lightning.features.extraction import Extraction, extract
from sae_lightning.features.manifest import Manifest, StoreError
from sae_lightning.features.source import Source
from sae_lightning.features.store import FeatureStore
from sae_lightning.runs.identity import run_name
from sae_lightning.saes import SAE, Normalizer, TopK
from sae_lightning.training.fit import train
from tests.conftest import write_store
from tests.features import jobs
from tests.features.jobs import (
    PATCH,
    PIXELS,
    Job,
    PixelEncoder,
    content,
    cut,
    encoded,
    extract_pixels,
    extract_split,
    finished,
    flip,
    litter,
    made,
    make_pictures,
    noise_images,
    picture_config,
    pixel_writer,
    times,
)
from tests.processes import wait_for
from tests.scoring import score

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The content of a store of ``noise_images()`` that was never interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    extract_pixels(folder)
    assert litter(folder) == []
    return content(folder)


@pytest.fixture(scope="module")
def sixty(tmp_path_factory) -> Path:
    """Sixty pictures to train on."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), 60)


@pytest.fixture(scope="module")
def sixty_whole(sixty, tmp_path_factory):
    """The content of their store, never interrupted."""
    torch.set_num_threads(1)
    return content(extract_split(picture_config(sixty, tmp_path_factory.mktemp("whole")))[PATCH])


def folder_of(root: Path) -> Path:
    """The only store that is being made below ``root``."""
    (folder,) = {path.parent for path in root.rglob("records")}
    return folder


def unopenable(folder: Path) -> None:
    with pytest.raises(StoreError, match=r"did not finish|There is no feature store"):
        FeatureStore.open(folder)


# --- kill -9 of an extraction -----------------------------------------------------------------------------
@pytest.mark.slow
def test_killed_before_any_change_of_any_file_an_extraction_goes_on(undisturbed, tmp_path):
    """Between a shard and its record, in the middle of sealing, while tidying up: everywhere."""
    sealed = 0
    for n in count(1):
        folder = tmp_path / str(n) / "store"
        job = Job(tmp_path / "log", extract_pixels, folder, before=partial(jobs.die_at, tmp_path / str(n), n))
        if job.end() == 0:
            break
        assert job.process.exitcode == -signal.SIGKILL, job.said()
        if (folder / "manifest.json").exists():
            sealed += 1
            assert content(folder) == undisturbed
        else:
            unopenable(folder)
        kept = finished(folder)
        encoder = jobs.PixelEncoder()
        extract_pixels(folder, encoder=encoder)
        assert content(folder) == undisturbed
        assert encoder.seen == sum([4, 4, 3][int(name[6:11])] for name in set(times(folder)) - set(kept))
        assert kept.items() <= times(folder).items()
        assert litter(folder) == [], n
    assert n > 30
    assert sealed > 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_random_moments_an_extraction_ends_as_if_it_had_not_been(workers, sixty, sixty_whole, tmp_path):
    cfg = picture_config(sixty, tmp_path, f"extract.num_workers={workers}")
    rng, kept, attempts = random.Random(workers), {}, 0
    while jobs.kill_at_random(tmp_path / "log", tmp_path / "encoded", rng, extract_split, cfg):
        attempts += 1
        if (folder_of(tmp_path) / "manifest.json").is_file():  # killed after sealing, on its way out
            assert content(folder_of(tmp_path)) == sixty_whole
        else:
            unopenable(folder_of(tmp_path))
        now = finished(folder_of(tmp_path))
        assert kept.items() <= now.items()
        kept = now
    folder = folder_of(tmp_path)
    assert attempts > 1
    assert content(folder) == sixty_whole
    assert kept.items() <= times(folder).items()
    assert litter(folder) == []


# --- several at once --------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_several_extractions_share_the_work_and_encode_each_image_once(n, sixty, sixty_whole, tmp_path):
    cfg = picture_config(sixty, tmp_path)
    logs, gate = [tmp_path / f"encoded-{i}" for i in range(n)], tmp_path / "gate"
    running = [
        Job(tmp_path / f"log-{i}", extract_split, cfg, before=partial(jobs.count_encoded, log, 0.01, gate=gate))
        for i, log in enumerate(logs)
    ]
    wait_for(lambda: all(log.with_suffix(".ready").exists() for log in logs))
    gate.touch()
    assert [job.end() for job in running] == [0] * n, [job.said() for job in running]
    assert content(folder_of(tmp_path)) == sixty_whole
    assert sum(map(encoded, logs)) == 60
    assert all(map(encoded, logs)), "each took part"
    assert litter(folder_of(tmp_path)) == []


@pytest.mark.slow
def test_others_take_over_the_shard_of_one_that_was_killed(sixty, sixty_whole, tmp_path):
    cfg = picture_config(sixty, tmp_path, "extract.images_per_shard=12")
    victim = Job(
        tmp_path / "log", extract_split, cfg, before=partial(jobs.count_encoded, tmp_path / "victim.txt", stuck=2)
    )
    wait_for((tmp_path / "victim.stuck").exists)
    other = Job(tmp_path / "log-2", extract_split, cfg, before=partial(jobs.count_encoded, tmp_path / "other.txt"))
    wait_for(lambda: len(finished(folder_of(tmp_path))) == 4)
    time.sleep(1)
    assert other.process.is_alive(), "it waits for the shard that the victim holds"
    unopenable(folder_of(tmp_path))
    assert victim.kill()
    assert other.end() == 0, other.said()
    folder = folder_of(tmp_path)
    assert encoded(tmp_path / "other.txt") == 60
    assert content(folder)["features"] == sixty_whole["features"]
    assert litter(folder) == []


@pytest.mark.slow
def test_two_jobs_with_the_same_taps_in_another_order_do_not_wait_for_each_other(sixty, tmp_path):
    cfg = picture_config(sixty, tmp_path)
    taps = [Tap("cls", 1), Tap("patch", 1), Tap("cls", 2)]
    slow = partial(jobs.count_encoded, tmp_path / "encoded", seconds=0.02)
    running = [
        Job(tmp_path / f"log-{i}", extract_split, cfg, order, before=slow) for i, order in enumerate([taps, taps[::-1]])
    ]
    assert [job.end() for job in running] == [0, 0], [job.said() for job in running]
    folders = extract_split(cfg, taps)
    assert all(litter(folder) == [] for folder in folders.values())
    assert {len(FeatureStore.open(folder)) for folder in folders.values()} == {60}


@pytest.mark.slow
def test_stores_that_four_processes_finish_at_the_same_time_are_sealed_once(undisturbed, tmp_path):
    """Of one image a shard, so that they meet at every claim and at the end."""
    for attempt in range(4):
        folder = tmp_path / str(attempt) / "store"
        running = [
            Job(tmp_path / f"log-{attempt}-{i}", extract_pixels, folder, noise_images(), None, 1) for i in range(4)
        ]
        assert [job.end() for job in running] == [0] * 4, [job.said() for job in running]
        assert len(times(folder)) == 11
        assert content(folder)["features"] == undisturbed["features"]
        assert litter(folder) == []


@pytest.mark.slow
def test_processes_that_find_the_same_damage_mend_it_together(sixty, sixty_whole, tmp_path):
    cfg = picture_config(sixty, tmp_path)
    folder = extract_split(cfg)[PATCH]
    for attempt in range(3):
        for i in range(1, 15, 2):
            cut(folder / f"shard-{i:05d}.safetensors")
        before = times(folder)
        running = [Job(tmp_path / f"log-{attempt}-{i}", extract_split, cfg) for i in range(3)]
        assert [job.end() for job in running] == [0] * 3, [job.said() for job in running]
        assert content(folder) == sixty_whole
        assert litter(folder) == []
        assert {name: t for name, t in before.items() if int(name[6:11]) % 2 == 0}.items() <= times(folder).items()


@pytest.mark.slow
def test_of_two_jobs_that_want_a_store_the_second_waits(sixty, tmp_path):
    cfg = picture_config(sixty, tmp_path)
    counted = partial(jobs.count_encoded, tmp_path / "encoded", gate=tmp_path / "gate")
    first = Job(tmp_path / "log-1", Source.of(cfg).store, "train", before=counted)
    wait_for((tmp_path / "encoded.ready").exists)
    second = Job(tmp_path / "log-2", Source.of(cfg).store, "train", before=counted)
    wait_for(lambda: "Another job is extracting" in second.said())
    (tmp_path / "gate").touch()
    assert [first.end(), second.end()] == [0, 0], second.said()
    assert encoded(tmp_path / "encoded") == 60


# --- full disks -------------------------------------------------------------------------------------------
def fill_up_everywhere(root: Path, expected: dict) -> None:
    """In a job: from the n-th change of a file on nothing can be written, for every n; then there is space again."""
    changes = jobs.Changes()
    sentences = set()
    for n in count(1):
        folder = root / str(n) / "store"
        changes.at(root / str(n), n, partial(jobs.limit_files, 0))
        said = None
        try:
            extract_pixels(folder)
        except StoreError as error:
            said = str(error)
        jobs.limit_files()
        if changes.left:
            break
        if said is not None:
            sentences.add(said.split(str(folder))[0])
            assert "the disk is full" in said, said
            assert "ree space" in said, said
            assert not (folder / "manifest.json").exists()
        kept = finished(folder)
        assert not list(folder.glob(".*")), "half files are removed at once, as they take space"
        extract_pixels(folder)
        assert content(folder) == expected
        assert kept.items() <= times(folder).items()
        assert litter(folder) == [], n
    assert n > 25
    assert sentences == {"", "Writing ", "Sealing "}


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_moment_is_a_sentence_and_loses_nothing(undisturbed, tmp_path):
    """For plan, shards, records, statistics, table and manifest."""
    job = Job(tmp_path / "log", fill_up_everywhere, tmp_path, undisturbed, before=jobs.silence)
    assert job.end() == 0, job.said()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 500 KB, which ``grow()`` makes one of 5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=5m", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_disk_is_filled_then_freed_and_the_same_command_ends(small_disk, sixty, sixty_whole):
    disk, grow = small_disk
    cfg = picture_config(sixty, disk)
    with pytest.raises(StoreError, match=r"Writing .*shard-0000\d\.safetensors failed: the disk is full\. Free space"):
        extract_split(cfg)
    folder = folder_of(disk)
    kept = finished(folder)
    assert len(kept) > 3
    unopenable(folder)
    assert not list(folder.glob(".*"))
    grow()
    extract_split(cfg)
    assert content(folder) == sixty_whole
    assert kept.items() <= times(folder).items()


def test_a_folder_that_cannot_be_written_is_a_sentence(sixty, tmp_path):
    """Also what lies there whole stays usable."""
    cfg = picture_config(sixty, tmp_path)
    folder = extract_split(cfg, split="val")[PATCH]
    (folder / "plan.json").touch()  # a leftover that cannot be removed harms nobody
    places = [path for path in tmp_path.rglob("*") if path.is_dir()]
    for path in places:
        path.chmod(0o555)
    try:
        assert Job(tmp_path / "a", Source.of(cfg).store, "val", before=jobs.obey_permissions).end() == 0
        assert Job(tmp_path / "b", extract_split, cfg, [PATCH], "val", before=jobs.obey_permissions).end() == 0
        for work in (partial(Source.of(cfg).store, "train"), partial(extract_split, cfg)):
            job = Job(tmp_path / work.func.__name__, work, before=jobs.obey_permissions)
            assert "cannot be written" in job.sentence()
            assert "set paths.stores to another disk" in job.sentence()
    finally:
        for path in places:
            path.chmod(0o755)
    assert len(FeatureStore.open(folder)) == 2
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        Source.of(made(tmp_path, "data=folder", f"data.path={sixty}", "backbone=mae", "backbone.size=tiny",
                          f"paths.stores={tmp_path / 'file'}")).store("train")  # fmt: skip


# --- features that cannot be stored -----------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 70_000.0])
def test_features_that_cannot_be_stored_are_refused_naming_the_image(value, tmp_path, monkeypatch):
    """And when the cause is gone the same command goes on from the shards before."""
    pictures = make_pictures(tmp_path / "p", 12)
    Image.new("RGB", (32, 32), "white").save(pictures / "train" / "even" / "6.png")
    cfg = picture_config(pictures, tmp_path, "data.shuffle=false")
    sound = Backbone.forward_features

    def broken(self, images, taps):
        features = sound(self, images, taps)
        white = (images == images[0, :, :1, :1]).flatten(1).all(1) | (images.flatten(1).std(1) < 0.3)
        return {tap: torch.where(white[:, None, None], value, x) for tap, x in features.items()}

    monkeypatch.setattr(Backbone, "forward_features", broken)
    why = r"NaN or infinite, in dimension 0 of 128; .*extract\.precision=32"
    if value == 70_000:
        why = r"70,000 at most, too large for float16, in dimension 0 of 128; set extract\.dtype=bfloat16"
    with pytest.raises(StoreError, match=rf"features of image 'train/even/6\.png' are {why}"):
        extract_split(cfg)
    folder = folder_of(tmp_path)
    unopenable(folder)
    kept = finished(folder)
    assert not list(folder.glob(".*"))
    assert list(times(folder)) == list(kept)
    monkeypatch.undo()
    extract_split(cfg)
    assert kept.items() <= times(folder).items()
    whole = extract_split(picture_config(pictures, tmp_path / "whole", "data.shuffle=false"))[PATCH]
    assert content(folder) == content(whole)


def massive(value):
    """PixelEncoder with one massive dimension, number 1."""

    class Massive(PixelEncoder):
        def forward_features(self, images, taps):
            features = super().forward_features(images, taps)
            return {tap: x.index_fill(2, torch.tensor([1]), value) for tap, x in features.items()}

    return Massive()


def test_massive_features_are_stored_as_bfloat16_and_said_where_they_near_float16s_end(tmp_path, capsys):
    for dtype, value, said in (("float16", 40_000.0, True), ("bfloat16", 3e6, False), ("float16", 9_000.0, False)):
        folder = tmp_path / f"{dtype}-{value}"
        extract(noise_images(6), massive(value), {PIXELS: pixel_writer(folder, 2, dtype)}, Extraction(4, device="cpu"))
        kept = FeatureStore.open(folder).features(slice(None))
        assert kept[..., 1].float().mean() == pytest.approx(value, rel=5e-3)
        out = capsys.readouterr().out
        assert out.count("warning: features reach 40,000 in dimension 1, and float16 ends at 65,504") == said
        assert said or "warning: features" not in out


def test_large_features_fit_bfloat16(tmp_path):
    class Loud(jobs.PixelEncoder):
        def forward_features(self, images, taps):
            return {tap: 1000 * x for tap, x in super().forward_features(images, taps).items()}

    writer = jobs.pixel_writer(tmp_path / "s", dtype="bfloat16")
    jobs.extract(noise_images(), Loud(), {jobs.PIXELS: writer}, jobs.Extraction(batch_size=3, device="cpu"))
    assert FeatureStore.open(tmp_path / "s").features([0]).max() > 70_000


# --- broken shards ----------------------------------------------------------------------------------------
SHARD = "shard-00001.safetensors"
DAMAGE = {
    "cut": lambda f: cut(f / SHARD),
    "gone": lambda f: (f / SHARD).unlink(),
    "changed at an end": lambda f: flip(f / SHARD, -1),
    "header changed": lambda f: flip(f / SHARD, 20),
    "record gone": lambda f: (f / "records" / "00001.json").unlink(),
    "record cut": lambda f: cut(f / "records" / "00001.json", 50),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_extracting_again_redoes_a_damaged_shard_alone(damage, tmp_path, capsys):
    cfg = picture_config(make_pictures(tmp_path / "p", 10), tmp_path)
    folder = extract_split(cfg)[PATCH]
    expected, before = content(folder), times(folder)
    damage(folder)
    capsys.readouterr()
    assert extract_split(cfg)[PATCH] == folder
    said = capsys.readouterr().out
    assert SHARD in said
    assert "4 images in" in said
    assert content(folder) == expected
    assert {name for name, t in times(folder).items() if t != before[name]} == {SHARD}
    assert litter(folder) == []


@pytest.mark.parametrize("name", ["images.parquet", "statistics.safetensors"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_extracting_again_makes_table_and_statistics_anew_without_encoding(name, damage, tmp_path, capsys):
    cfg = picture_config(make_pictures(tmp_path / "p", 10), tmp_path)
    folder = extract_split(cfg)[PATCH]
    expected, before = content(folder), times(folder)
    damage(folder / name)
    with pytest.raises(StoreError, match=rf"{name}.*Run extract\.py again"):
        Source.of(cfg).store("train")
    capsys.readouterr()
    extract_split(picture_config(tmp_path / "p", tmp_path, "extract.images_per_shard=null"))
    assert "images in" not in capsys.readouterr().out
    assert content(folder) == expected
    assert times(folder) == before


def test_damaged_shards_are_refused_by_name_or_skipped_and_counted_when_a_job_asks_for_the_store(tmp_path):
    pictures = make_pictures(tmp_path / "p", 10)
    whole = Source.of(picture_config(pictures, tmp_path)).store("train")
    flip(whole.folder / SHARD, 4096 + 4 * 64 * 128)
    assert len(Source.of(picture_config(pictures, tmp_path)).store("train")) == 10, "a glance does not see it"
    for verify, damage in ((True, lambda: None), (False, lambda: cut(whole.folder / SHARD))):
        damage()
        options = [f"stream.verify={verify}"]
        with pytest.raises(StoreError, match=SHARD):
            Source.of(picture_config(pictures, tmp_path, *options)).store("train")
        with pytest.warns(UserWarning, match=rf"1 damaged of 3 shards are skipped, 4 images: {SHARD}"):
            rest = Source.of(picture_config(pictures, tmp_path, *options, "stream.damaged=skip")).store("train")
        assert len(rest) == 6
        assert rest.skipped == [SHARD]


# --- kill -9 of a training --------------------------------------------------------------------------------
def training(pictures: Path, root: Path, *overrides: str):
    """20 steps an epoch, three epochs, a checkpoint every third step."""
    return picture_config(
        pictures, root, "k=8", "expansion=2", "batch_size=192", "trainer.accelerator=cpu", "trainer.max_epochs=3",
        "dead_after=1000", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=2",
        "checkpoint.every_steps=3",
        *overrides,
    )  # fmt: skip


def diary(path: Path, *die: int, rank: int = 0) -> str:
    return f"+callbacks.diary={{_target_: tests.features.jobs.Diary, path: {path}, die: {list(die)}, rank: {rank}}}"


@pytest.fixture(scope="module")
def whole_training(sixty, tmp_path_factory):
    """A run that was never interrupted: its weights, and its diary."""
    root = tmp_path_factory.mktemp("training")
    job = Job(root / "log", train, training(sixty, root, diary(root / "diary")))
    assert job.end() == 0, job.said()
    (run,) = (root / "runs").iterdir()
    order, steps = jobs.read_diary(root / "diary")
    assert order == [(step, 1) for step in range(1, 61)]
    assert len(set(steps.values())) == 60
    return SAE.load(run).state_dict(), steps, root / "stores"


def same_weights(folder: Path, expected: dict) -> None:
    for name, tensor in SAE.load(folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_training_that_was_killed_ends_with_the_same_weights(whole_training, sixty, tmp_path):
    """Killed in the middle of the first epoch, right before a checkpoint, at an epoch's ends, and from outside."""
    weights, steps, stores = whole_training
    cfg = training(sixty, tmp_path, f"paths.stores={stores}", diary(tmp_path / "diary", 7, 11, 20, 39, 58))
    for attempt in count():
        job = Job(tmp_path / f"log-{attempt}", train, cfg)
        if attempt == 2:  # from outside, wherever it is then
            lines = len((tmp_path / "diary").read_text().splitlines())
            wait_for(lambda lines=lines: len((tmp_path / "diary").read_text().splitlines()) > lines + 3)
            job.process.kill()
        if job.end() == 0:
            break
        assert job.process.exitcode == -signal.SIGKILL, job.said()
    assert attempt >= 5
    (run,) = (tmp_path / "runs").iterdir()
    same_weights(run, weights)
    order, final = jobs.read_diary(tmp_path / "diary")
    assert final == steps, "every batch once, in its place"
    begun = [step for before, (step, _) in zip([(0, 1), *order], order, strict=False) if step != before[0] + 1]
    assert begun[0] == 7, "after the checkpoint of step 6"
    assert len(order) <= 60 + 3 * attempt, "no more than three steps are done again"


@pytest.mark.slow
def test_a_training_that_was_killed_while_it_wrote_a_checkpoint_goes_on(whole_training, sixty, tmp_path):
    weights, _, stores = whole_training
    for n in (1, 2, 3, 8):
        cfg = training(sixty, tmp_path / str(n), f"paths.stores={stores}")
        checkpoints = Path(cfg.paths.runs) / run_name(cfg) / "checkpoints"
        job = Job(tmp_path / f"log-{n}", train, cfg, before=partial(jobs.die_at, checkpoints, n))
        assert job.end() == -signal.SIGKILL, job.said()
        assert Job(tmp_path / f"log-{n}", train, cfg).end() == 0
        same_weights(checkpoints.parent, weights)


def test_the_history_of_a_training_that_was_killed_is_whole(whole_training, sixty, tmp_path):
    _, _, stores = whole_training
    cfg = training(sixty, tmp_path, f"paths.stores={stores}", "trainer.max_epochs=1", diary(tmp_path / "diary", 8))
    assert [Job(tmp_path / "log", train, cfg).end() for _ in range(2)] == [-signal.SIGKILL, 0]
    with next((tmp_path / "runs").glob("*/history.csv")).open() as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["loss/reconstruction"]]
    assert logged == list(range(2, 21, 2))


@pytest.mark.slow
def test_two_ranks_go_on_where_one_stopped_and_one_where_two_did(whole_training, sixty, tmp_path):
    _, steps, stores = whole_training
    options = [f"paths.stores={stores}", diary(tmp_path / "diary", 8, rank=0)]
    first = Job(tmp_path / "log-1", train, training(sixty, tmp_path, *options))
    assert first.end() == -signal.SIGKILL
    options[1] = diary(tmp_path / "diary", 29, rank=1)
    second = Job(tmp_path / "log-2", train, training(sixty, tmp_path, "trainer.devices=2", *options))
    assert second.end() == 1
    assert "one of its 2 ranks failed" in second.said()
    third = Job(tmp_path / "log-3", train, training(sixty, tmp_path, *options))
    assert third.end() == 0, third.said()
    order, final = jobs.read_diary(tmp_path / "diary")
    assert final == steps
    ranks = dict(order)
    assert [ranks[step] for step in range(1, 61)] == [1] * 6 + [2] * 21 + [1] * 33
    result = json.loads(next((tmp_path / "runs").glob("*/result.json")).read_text())
    assert (result["steps"], result["devices"]) == (60, 1)


@pytest.mark.slow
def test_a_checkpoint_of_another_batch_size_is_refused(whole_training, sixty, tmp_path):
    _, _, stores = whole_training
    cfg = training(sixty, tmp_path, f"paths.stores={stores}", diary(tmp_path / "diary", 8))
    assert Job(tmp_path / "log", train, cfg).end() == -signal.SIGKILL
    other = training(sixty, tmp_path, f"paths.stores={stores}", "batch_size=128")
    shutil.copytree(Path(cfg.paths.runs) / run_name(cfg), Path(other.paths.runs) / run_name(other))
    with pytest.raises(ValueError, match=r"another order of the features \(batch_size 192 there, 128 now"):
        train(other)


@pytest.mark.slow
def test_a_training_on_a_store_with_a_damaged_shard_refuses_or_skips_it(sixty, tmp_path):
    cfg = training(sixty, tmp_path, "trainer.max_epochs=1")
    cut(Source.of(cfg).store("train").folder / SHARD)
    with pytest.raises(StoreError, match=SHARD):
        train(cfg)
    cfg.stream.damaged = "skip"
    with pytest.warns(UserWarning, match=rf"1 damaged of 15 shards are skipped, 4 images: {SHARD}"):
        run = train(cfg)
    assert json.loads((run / "result.json").read_text())["steps"] == 56 * 64 // 192
    trained_on = json.loads((run / "cfg.json").read_text())["store"]["train"]
    extract_split(cfg)
    assert Source.of(cfg).store("train").fingerprint != trained_on, "it says that it saw a part only"


# --- wrong stores -----------------------------------------------------------------------------------------
def given(folder: Path, *overrides: str):
    return made(folder.parent, "data=store", f"data.train={folder}", "backbone=deit", *overrides)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["backbone=mae", "backbone.layer=4"],
            r"holds features of deit \(tiny\), but backbone=mae\. Set backbone=deit",
        ),
        ([], r"holds patch features of layer 4; .* asks for patch-L11\. Set features=patch and backbone\.layer=4"),
        (["features=cls", "backbone.layer=4"], r"asks for cls-L4\. Set features=patch and backbone\.layer=4"),
        (["features=pooled"], r"asks for pooled\. Set features=patch and backbone\.layer=4"),
    ],
)
def test_a_given_store_of_something_else_is_refused(overrides, sentence, tmp_path):
    folder = write_store(tmp_path / "s", 120, 1, backbone="deit (tiny)", layer=4).folder
    with pytest.raises(StoreError, match=sentence):
        Source.of(given(folder, *overrides)).store("train")


def test_a_given_store_is_used_and_cut(tmp_path):
    folder = write_store(tmp_path / "s", 120, 1, backbone="deit (tiny)", layer=4).folder
    parts = {s: Source.of(given(folder, "backbone.layer=4")).store(s) for s in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [108, 6, 6]
    assert len({image for part in parts.values() for image in part.image_ids}) == 120
    about = {"backbone": "deit (tiny)", "layer": 4, "class_names": ["class 2", "class 0", "class 1"]}
    other = write_store(tmp_path / "t", 6, 2, **about).folder
    test = Source.of(given(folder, "backbone.layer=4", f"data.test={other}")).store("test")
    assert (test.class_names, test.labels.tolist()) == (["class 0", "class 1", "class 2"], [2, 0, 1] * 2)
    with pytest.raises(StoreError, match="There is no feature store"):
        Source.of(given(tmp_path / "nowhere", "backbone.layer=4")).store("train")


def test_a_store_of_an_old_schema_says_what_to_do(tmp_path):
    cfg = picture_config(make_pictures(tmp_path / "p", 6), tmp_path)
    folder = extract_split(cfg)[PATCH]
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    for work in (partial(extract_split, cfg), partial(Source.of(cfg).store, "train")):
        with pytest.raises(StoreError, match=r"schema 1; .* delete the folder and extract again"):
            work()
    with pytest.raises(StoreError, match="schema 1"):
        Source.of(given(folder, "backbone.layer=4")).store("train")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": None}, "schema None; .* extract again"),
        ({"schema": 3}, "schema 3; .* update sae-lightning"),
        ({"surprise": 1}, "not a manifest .*surprise.* extract again"),
        ({"shards": [{"file": "x"}]}, "not a manifest .* extract again"),
    ],
)
def test_manifests_of_something_else_are_refused(change, sentence, tmp_path):
    folder = write_store(tmp_path / "s", 10, 1).folder
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StoreError, match=sentence):
        Manifest.read(folder)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ('{"schema": 2, "fingerprint": "e", "dtype": "float16", "images_per_shard": 4}', "beginnings of another"),
        ('{"schema": 1, "fingerprint": "f", "dtype": "float16", "images_per_shard": 4}', "beginnings of another"),
        ('{"schema": 2, "fing', "plan.json cannot be read .* delete .* and extract again"),
        ('["something", "else"]', "plan.json cannot be read .* delete .* and extract again"),
    ],
)
def test_a_plan_of_something_else_is_refused(plan, sentence, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "plan.json").write_text(plan)
    with pytest.raises(StoreError, match=sentence):
        extract_pixels(folder)


def test_an_sae_is_not_scored_on_a_store_of_another_width(tmp_path, stores):
    other = write_store(tmp_path / "wide", 10, 1)
    sae = TopK(other.d_in + 4, 40, 3, normalizer=Normalizer(other.d_in + 4), seed=1)
    sae.save(tmp_path / "run", name="run", backbone=other.backbone, layer=other.layer, features=other.kind, k=3,
             config={})  # fmt: skip
    with pytest.raises(StoreError, match=r"run was trained on .* 16, 'block'\).* holds .* 12, 'block'\)"):
        score(tmp_path / "run", other)
    assert not (tmp_path / "run" / "scores.json").exists()


def test_stores_that_were_begun_differently_are_finished_one_by_one(tmp_path):
    cfg = picture_config(make_pictures(tmp_path / "p", 10), tmp_path, "extract.part=0/2")
    extract_split(cfg, [PATCH])
    other = picture_config(tmp_path / "p", tmp_path, "extract.images_per_shard=null", "extract.batch_size=5")
    with pytest.raises(StoreError, match=r"begun with \[4, 5\] images a shard; finish each by itself"):
        extract_split(other, [PATCH, Tap("cls", 4)])
    for tap in (PATCH, Tap("cls", 4)):
        assert np.sum([s.images for s in FeatureStore.open(extract_split(other, [tap])[tap]).manifest.shards]) == 10
