"""Looking after stores: mending and merging them, and the commands ``sae-lightning store …``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from sae_lightning.commands.main import main
from sae_lightning.features.manifest import MANIFEST, Manifest, StoreError
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.upkeep import find_stores, join_modalities, mend, merge_stores
from sae_lightning.features.writer import StoreWriter
from tests.conftest import fill_shard, fill_store, sparse_features, write_store
from tests.features import jobs
from tests.features.jobs import Job, content, cut, extract_pixels, flip, litter, noise_images, times

SHARD = "shard-00001.safetensors"
MIDDLE = 4096 + 50 * 16 * 12  # of a shard of 50 images: no glance sees it


# --- mending ----------------------------------------------------------------------------------------------
def test_mending_a_whole_store_changes_nothing(tmp_path):
    folder = write_store(tmp_path / "s", 120, 1).folder
    before = content(folder)
    assert mend(folder) == []
    assert mend(tmp_path / "nothing here") == []
    assert content(folder) == before
    assert litter(folder) == []


def test_mending_removes_damaged_shards_alone(tmp_path):
    folder = write_store(tmp_path / "s", 170, 1).folder
    before = times(folder)
    cut(folder / SHARD)
    (folder / "shard-00003.safetensors").unlink()
    assert mend(folder) == [SHARD, "shard-00003.safetensors"]
    kept = {name: t for name, t in before.items() if name[10] in "02"}
    assert times(folder) == kept
    with pytest.raises(StoreError, match="did not finish"):
        FeatureStore.open(folder)
    assert json.loads((folder / "plan.json").read_text())["images_per_shard"] == 50
    assert mend(folder) == [], "it is not sealed any more"
    assert (folder / "plan.json").is_file(), "so what belongs to its making stays"


def test_shards_that_only_verification_finds_are_mended_when_they_are_named(tmp_path):
    folder = write_store(tmp_path / "s", 120, 1).folder
    flip(folder / SHARD, MIDDLE)
    assert mend(folder) == []
    assert mend(folder, [1]) == [SHARD]


@pytest.mark.slow
def test_killed_while_it_mends_a_store_is_mended_the_next_time(tmp_path):
    extract_pixels(tmp_path / "whole")
    expected = content(tmp_path / "whole")
    for n in count(1):
        folder = tmp_path / str(n)
        extract_pixels(folder)
        cut(folder / SHARD)
        job = Job(tmp_path / "log", mend, folder, before=partial(jobs.die_at, folder, n))
        if job.end() == 0:
            break
        assert job.process.exitcode == -signal.SIGKILL, job.said()
        with pytest.raises(StoreError):
            FeatureStore.open(folder)
        mend(folder)
        encoder = jobs.PixelEncoder()
        extract_pixels(folder, encoder=encoder)
        assert encoder.seen == 4
        assert content(folder) == expected
        assert litter(folder) == []
    assert n > 5


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    folder = write_store(tmp_path / "s", 120, 1).folder
    (folder / "claims").mkdir()
    for name in ("claims/3.lock", ".shard-00001.safetensors.host-7", "records/.00001.json.host-7", "plan.json",
                 ".manifest.json.host-7", ".images.parquet.host-7", ".statistics.safetensors.host-7"):  # fmt: skip
        (folder / name).touch()
    assert mend(folder) == []
    assert litter(folder) == []
    assert len(FeatureStore.open(folder, verify=True)) == 120


# --- merging ----------------------------------------------------------------------------------------------
def part_of(folder: Path, features: torch.Tensor, first: int, **changes) -> Path:
    """A store of ``features`` whose images are named from ``first`` on."""
    about = {
        "data": "synthetic", "split": "train", "backbone": "none", "kind": "patch", "layer": 0, "grid": (4, 4),
        "class_names": ["a", "b"],
    } | changes  # fmt: skip
    writer = StoreWriter(folder, f"{first:064x}", about, 20)
    for index, start in enumerate(range(0, len(features), 20)):
        shard = writer.begin(index)
        some = features[start : start + 20]
        ids = [f"image-{first + start + i}" for i in range(len(some))]
        shard.append(some, ids)
        named = about["class_names"] is None
        labels = ["yx"[i % 2] for i in range(len(some))] if named else [i % 2 for i in range(len(some))]
        writer.finish(index, shard, ids, labels, skipped=["gone"] if index == 0 else None)
    writer.seal(index + 1)
    return folder


def test_a_merged_store_is_the_stores_one_after_the_other(tmp_path):
    x = sparse_features(75, 1)
    parts = [part_of(tmp_path / "a", x[:45], 0), part_of(tmp_path / "b", x[45:], 45)]
    store = merge_stores(parts, tmp_path / "both")
    assert torch.equal(store.features(slice(None)), x.half())
    assert store.image_ids == [f"image-{i}" for i in range(75)]
    assert store.labels.tolist() == [i % 20 % 2 for i in range(45)] + [i % 20 % 2 for i in range(30)]
    assert store.manifest.skipped_images == 2
    whole = x.half().double().reshape(-1, 12)
    torch.testing.assert_close(store._statistics["mean"], whole.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(store._statistics["deviation"], whole.std(0, correction=0), rtol=1e-9, atol=1e-12)
    store.verify()
    assert litter(tmp_path / "both") == []
    assert [len(FeatureStore.open(part, verify=True)) for part in parts] == [45, 30], "they stay"
    assert (parts[1] / "shard-00000.safetensors").samefile(tmp_path / "both" / "shard-00003.safetensors")
    assert store.fingerprint not in {FeatureStore.open(part).fingerprint for part in parts}


def test_class_names_of_parts_of_a_stream_are_joined(tmp_path):
    x = sparse_features(30, 1)
    parts = [
        part_of(tmp_path / "a", x[:29], 0, class_names=None),
        part_of(tmp_path / "b", x[29:], 29, class_names=None),
    ]
    assert FeatureStore.open(parts[1]).class_names == ["y"]
    store = merge_stores(parts, tmp_path / "both")
    assert store.class_names == ["x", "y"]
    assert store.labels[-1] == 1


def test_shards_without_images_are_merged_too(tmp_path):
    for name, unreadable in (("a", (0, 1, 2, 3)), ("b", (8, 9, 10))):
        images = noise_images(11, unreadable)
        images.image_ids = [f"{name}-{i}" for i in images.image_ids]
        extract_pixels(tmp_path / name, images, unreadable="skip")
    store = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert [shard.images for shard in store.manifest.shards] == [0, 4, 3, 4, 4, 0]
    assert store.manifest.skipped_images == 7
    assert store.class_names == ["a", "b", "c"]
    store.verify()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer": 3}, r"b has layer 3, .*a has 0; they cannot be merged"),
        ({"backbone": "another"}, r"b has backbone another"),
        ({"kind": "cls"}, r"b has kind cls"),
        ({"class_names": ["a", "c"]}, r"b has class_names \['a', 'c'\]"),
        ({"split": "val"}, r"b has split val"),
    ],
)
def test_stores_that_do_not_belong_together_are_not_merged(changes, sentence, tmp_path):
    x = sparse_features(30, 1)
    parts = [part_of(tmp_path / "a", x, 0), part_of(tmp_path / "b", x, 30, **changes)]
    with pytest.raises(StoreError, match=sentence):
        merge_stores(parts, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_what_else_cannot_be_merged(tmp_path):
    x = sparse_features(30, 1)
    a, b = part_of(tmp_path / "a", x, 0), part_of(tmp_path / "b", x, 25)
    with pytest.raises(StoreError, match="share 5 images"):
        merge_stores([a, b], tmp_path / "both")
    with pytest.raises(StoreError, match=r"b exists; name another folder"):
        merge_stores([a], b)
    with pytest.raises(StoreError, match="nothing to merge"):
        merge_stores([], tmp_path / "both")
    wide = part_of(tmp_path / "wide", sparse_features(30, 1, d_in=13), 100)
    with pytest.raises(StoreError, match=r"wide has d_in 13"):
        merge_stores([a, wide], tmp_path / "both")
    (b / SHARD).unlink()
    with pytest.raises(StoreError, match=rf"There is no file .*{SHARD}"):
        merge_stores([b], tmp_path / "both")


def test_a_merge_that_was_killed_is_done_by_the_next(tmp_path):
    x = sparse_features(75, 1)
    parts = [part_of(tmp_path / "a", x[:45], 0), part_of(tmp_path / "b", x[45:], 45)]
    expected = content(merge_stores(parts, tmp_path / "whole").folder)
    for n in (3, 9, 14, 20, 26):
        target = tmp_path / str(n)
        job = Job(tmp_path / "log", merge_stores, parts, target, before=partial(jobs.die_at, target, n))
        assert job.end() == -signal.SIGKILL, (n, job.said())
        if not (target / "manifest.json").exists():
            merge_stores(parts, target)
        mend(target)
        assert content(target) == expected
        assert litter(target) == []


# --- commands ---------------------------------------------------------------------------------------------
@pytest.fixture
def root(tmp_path) -> Path:
    """A whole store, a store with a shard that only verification finds broken, and one that is unfinished."""
    write_store(tmp_path / "demo" / "good", 120, 1, images_per_shard=50)
    write_store(tmp_path / "demo" / "bad", 120, 2)
    flip(tmp_path / "demo" / "bad" / SHARD, MIDDLE)
    about = {"data": "d", "split": "train", "backbone": "b", "kind": "patch", "layer": 0, "grid": (4, 4),
             "class_names": ["a", "b", "c"]}  # fmt: skip
    fill_shard(StoreWriter(tmp_path / "half", "f" * 64, about, 50), 0, sparse_features(120, 3), 0)
    return tmp_path


def said(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, " ".join(out.split()), " ".join(err.split())


def test_ls_names_all_stores_and_how_far_they_are(root, capsys):
    status, out, err = said(capsys, "store", "ls", root)
    assert (status, err) == (0, "")
    assert "demo/good │ 120 │ 16 × 12 │ float16 │ 58.4 kB │ none (synthetic)" in out
    assert "half │ 50 │ unfinished, 1 shards so far" in out
    assert find_stores(root) == [root / "demo" / "bad", root / "demo" / "good", root / "half"]


def test_ls_goes_on_after_a_broken_store(root, capsys):
    cut(root / "demo" / "bad" / "manifest.json", 100)
    cut(root / "half" / "records" / "00000.json", 100)
    status, out, _ = said(capsys, "store", "ls", root)
    assert status == 1
    assert "demo/good │ 120" in out
    assert "bad/manifest.json is not valid JSON" in out
    assert "half/records/00000.json cannot be read" in out
    status, _, err = said(capsys, "store", "ls", root / "nowhere")
    assert status == 1
    assert "There is no store in" in err


def test_verify_finds_what_opening_does_not_see(root, capsys):
    status, out, _ = said(capsys, "store", "verify", root)
    assert status == 1
    assert f"bad/{SHARD} does not match its checksum" in out
    assert "demo/good: whole." in out
    assert "half: unfinished" in out
    assert said(capsys, "store", "verify", root / "demo" / "good")[0] == 0
    assert (root / "demo" / "bad" / "manifest.json").exists(), "it only looks"


@pytest.mark.parametrize("name", ["images.parquet", "statistics.safetensors", "manifest.json"])
def test_verify_looks_at_every_file(name, root, capsys):
    cut(root / "demo" / "good" / name)
    status, out, _ = said(capsys, "store", "verify", root / "demo" / "good")
    assert status == 1
    assert name in out
    assert "whole" not in out


def test_verify_can_mend(root, capsys):
    status, out, _ = said(capsys, "store", "verify", "--mend", root / "demo")
    assert status == 1
    assert f"bad: removed {SHARD}; run extract.py again" in out
    assert not (root / "demo" / "bad" / "manifest.json").exists()
    assert (root / "demo" / "good" / "manifest.json").exists()


def test_verify_nothing_is_an_error(root, capsys):
    status, _, err = said(capsys, "store", "verify", root / "nowhere")
    assert status == 1
    assert err.startswith("There is no store in")


def test_stats_describe_a_store(root, capsys):
    status, out, _ = said(capsys, "store", "stats", root / "demo" / "good")
    store = FeatureStore.open(root / "demo" / "good")
    assert status == 0
    assert "patch, layer 0, of none (synthetic)" in out
    assert "[120, 16, 12] float16 in 3 shards" in out
    assert f"{store.manifest.severity:.3g}" in out
    assert "class 0 40, class 1 40, class 2 40" in out
    rms = store.features(slice(None)).double().square().mean((0, 1)).sqrt()
    assert int((rms > 6 * rms.median()).sum()) == 0
    assert "none with an rms above 6 medians" in out
    status, _, err = said(capsys, "store", "stats", root / "half")
    assert status == 1
    assert "did not finish" in err


def test_stats_name_outlier_dimensions_and_how_to_start(tmp_path, capsys):
    x = torch.randn(6, 16, 12, generator=torch.Generator().manual_seed(0))
    x[..., 7] += 300
    fill_store(tmp_path / "massive", x)
    _, out, _ = said(capsys, "store", "stats", tmp_path / "massive")
    rms = x.square().mean((0, 1)).sqrt()
    assert f"1 of 12, rms above 6 medians: 7 ({float(rms[7] / rms.median()):.3g} medians" in " ".join(out.split())
    assert "above 10: centre, with normalize=standard" in " ".join(out.split())


def test_lock_files_beside_stores_are_passed_over(root, capsys):
    (root / "demo" / "good.lock").touch()
    stores = [root / "demo" / "good", root / "demo" / "good.lock"]
    for verb in ("stats", "verify"):
        assert said(capsys, "store", verb, *stores)[0] == 0


@pytest.mark.parametrize(("name", "value"), [("n_images", "many"), ("d_in", "128"), ("std", None)])
def test_a_manifest_with_a_value_of_another_type_is_named(name, value, root):
    path = root / "demo" / "good" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(StoreError, match=rf"{path} is not a manifest \({name} is .*not of the type"):
        Manifest.read(path.parent)


def test_merge_by_command(tmp_path, capsys):
    x = sparse_features(75, 1)
    parts = [part_of(tmp_path / "a", x[:45], 0), part_of(tmp_path / "b", x[45:], 45)]
    status, out, _ = said(capsys, "store", "merge", *parts, "--into", tmp_path / "both")
    assert status == 0
    assert out.endswith("both: 75 images in 5 shards.")
    status, _, err = said(capsys, "store", "merge", *parts, "--into", tmp_path / "both")
    assert status == 1
    assert "exists; name another folder" in err


def test_merge_without_hard_links_copies(tmp_path, capsys):
    """On another disk, for example."""
    other = Path("/dev/shm") / f"sae-lightning-{os.getpid()}"
    if not other.parent.is_dir() or other.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    part = part_of(tmp_path / "a", sparse_features(30, 1), 0)
    try:
        assert said(capsys, "store", "merge", part, "--into", other)[0] == 0
        assert content(other)["features"] == content(part)["features"]
    finally:
        shutil.rmtree(other, ignore_errors=True)
        other.with_name(f".{other.name}.lock").unlink(missing_ok=True)


@pytest.mark.slow
def test_the_command_is_installed_and_exits_with_its_status(tmp_path):
    command = [sys.executable, "-m", "sae_lightning.commands.main", "store", "ls", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("There is no store in")
    assert "Traceback" not in done.stderr


def test_int8_stores_merge(tmp_path):
    x = sparse_features(40, 1)
    store = fill_store(tmp_path / "a", x, 20, dtype="int8")
    merged = merge_stores([store.folder], tmp_path / "b")
    assert torch.equal(merged.features(slice(None)), store.features(slice(None)))


def test_both_modalities_are_joined_each_by_its_own_statistics(tmp_path):
    about = {"kind": "embedding", "layer": None, "grid": (1, 1)}
    images, texts = sparse_features(45, 1)[:, :1], 3 * sparse_features(30, 2)[:, :1] - 7
    fill_store(tmp_path / "images", images, 20, "1" * 64, **about)
    fill_store(tmp_path / "texts", texts, 20, "2" * 64, **about | {"kind": "text"})
    both = join_modalities(tmp_path / "images", tmp_path / "texts", tmp_path / "both")
    scale, offset = StandardScaler(with_std=False).fit(texts.flatten(1)), images.flatten(1).mean(0)
    spread = [np.sqrt(np.mean((x - x.mean(0)) ** 2)) for x in (images.flatten(1).numpy(), texts.flatten(1).numpy())]
    moved = scale.transform(texts.flatten(1)) * spread[0] / spread[1] + offset.numpy()
    np.testing.assert_allclose(both.features(slice(45, 75))[:, 0].float(), moved, atol=0.02)
    assert torch.equal(both.features(slice(0, 45)), images.half())
    assert both.image_ids[44:46] == ["image-44", "text/image-0"]
    assert both.labels.tolist() == [i % 3 for i in range(45)] + [i % 3 for i in range(30)]
    assert (both.manifest.kind, both.std) == ("embedding", pytest.approx(spread[0], rel=1e-3))
    with pytest.raises(StoreError, match="in this order; these hold text and embedding"):
        join_modalities(tmp_path / "texts", tmp_path / "images", tmp_path / "other")
    fill_store(tmp_path / "elsewhere", texts, 20, "3" * 64, **about | {"kind": "text", "backbone": "clip"})
    with pytest.raises(StoreError, match=r"has backbone clip, .* cannot be joined"):
        join_modalities(tmp_path / "images", tmp_path / "elsewhere", tmp_path / "other")
