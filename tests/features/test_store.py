"""The store's round trip, its statistics, and its refusal of everything broken."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.features.store import FeatureStore, StoreError
from sae_lightning.features.writer import StoreWriter
from tests.conftest import write_store

ABOUT = {"data": "d", "split": "train", "backbone": "b", "layer": 1, "grid": (2, 2), "class_names": ["x"]}


def write(folder, patch, per_shard, part):
    writer = StoreWriter(folder, "f" * 64, ABOUT, [str(i) for i in range(len(patch))], np.zeros(len(patch)), per_shard)
    for piece in patch.split(part):
        writer.append(piece, piece.sum(1))
    writer.seal()
    return FeatureStore.open(folder)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 9), per_shard=st.integers(1, 45), part=st.integers(1, 20), data=st.data())
def test_round_trip_for_any_shard_size(n, d, per_shard, part, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("s") / "store"
    patch = torch.randn(n, 4, d, generator=torch.Generator().manual_seed(n))
    store = write(folder, patch, per_shard, part)
    assert len(store) == n
    assert store.n_tokens == 4 * n
    assert torch.equal(store.patches(slice(None)), patch.half())
    assert torch.equal(store.pooled(slice(None)), patch.sum(1).half())
    start, stop = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    assert torch.equal(store.patches(slice(start, stop)), patch.half()[start:stop])
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    assert torch.equal(store.patches(torch.tensor(rows)), patch.half()[rows])
    store.verify()


def test_statistics_equal_one_shot_float64(tmp_path):
    patch = 5 + 3 * torch.randn(70, 4, 6) * torch.arange(1, 7)
    store = write(tmp_path / "s", patch, 16, 9)
    x = patch.half().double().reshape(-1, 6).numpy()
    np.testing.assert_allclose(store.mean, x.mean(0), rtol=1e-6)
    assert store.std == pytest.approx(np.sqrt(((x - x.mean(0)) ** 2).mean()), rel=1e-9)
    assert store.manifest.mean_norm == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-9)
    assert store.manifest.severity == pytest.approx(np.linalg.norm(x.mean(0)) / np.linalg.norm(x.std(0)), rel=1e-9)


def test_labels_ids_and_description_come_back(stores):
    store = stores["train"]
    assert store.labels[:4].tolist() == [0, 1, 2, 0]
    assert store.image_ids[7] == "image-7"
    assert (store.backbone, store.layer, store.grid, store.split) == ("none (synthetic)", 0, (4, 4), "train")


def broken(name, damage, sentence):
    return pytest.param(damage, sentence, id=name)


def cut(path, n=10):
    path.write_bytes(path.read_bytes()[:-n])


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        broken("missing folder", lambda f: shutil.rmtree(f), "There is no feature store"),
        broken("unsealed", lambda f: (f / "manifest.json").unlink(), "did not finish"),
        broken("cut manifest", lambda f: cut(f / "manifest.json", 300), "not valid JSON"),
        broken("truncated shard", lambda f: cut(f / "shard-00001.safetensors"), "truncated"),
        broken("missing shard", lambda f: (f / "shard-00001.safetensors").unlink(), "lacks shard-00001"),
        broken("missing table", lambda f: (f / "images.parquet").unlink(), "lacks images.parquet"),
        broken("schema", lambda f: edit(f, schema=7), "schema 7"),
        broken("shape", lambda f: edit(f, d_in=5), "manifest says"),
    ],
)
def test_broken_stores_are_refused_with_a_sentence(damage, sentence, tmp_path):
    folder = write_store(tmp_path / "store", 120, 1).folder
    damage(folder)
    with pytest.raises(StoreError, match=sentence):
        FeatureStore.open(folder)


def test_verify_finds_a_flipped_byte_that_opening_cannot_see(tmp_path):
    store = write_store(tmp_path / "store", 120, 1)
    path = store.folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors does not match"):
        FeatureStore.open(store.folder).verify()


@pytest.mark.parametrize(("value", "why"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (1e6, "too large")])
def test_bad_features_are_refused_and_name_the_image(value, why, tmp_path):
    patch = torch.zeros(5, 4, 3)
    patch[3, 1, 2] = value
    writer = StoreWriter(tmp_path / "s", "f", ABOUT, list("abcde"), np.zeros(5), 2)
    with pytest.raises(StoreError, match=f"image 'd' are .*{why}"):
        writer.append(patch, patch[:, 0])
    assert not (tmp_path / "s").exists()


def test_a_store_with_images_missing_is_never_sealed(tmp_path):
    writer = StoreWriter(tmp_path / "s", "f", ABOUT, list("abc"), np.zeros(3), 2)
    writer.append(torch.zeros(2, 4, 3), torch.zeros(2, 3))
    with pytest.raises(StoreError, match="2 of 3"):
        writer.seal()
    assert not (tmp_path / "s").exists()


def test_finished_shards_are_kept_after_an_interruption(tmp_path):
    ids, patch = [str(i) for i in range(10)], torch.randn(10, 4, 3)
    first = StoreWriter(tmp_path / "s", "f", ABOUT, ids, np.zeros(10), 4)
    first.append(patch[:9], patch[:9, 0])  # two shards of four; one image is lost with the process
    again = StoreWriter(tmp_path / "s", "f", ABOUT, ids, np.zeros(10), 4)
    assert again.done == 8
    again.append(patch[8:], patch[8:, 0])
    again.seal()
    assert torch.equal(FeatureStore.open(tmp_path / "s").patches(slice(None)), patch.half())
    other = StoreWriter(tmp_path / "t", "f", ABOUT, ids, np.zeros(10), 4)
    other.append(patch, patch[:, 0])
    changed = StoreWriter(tmp_path / "t", "another fingerprint", ABOUT, ids, np.zeros(10), 4)
    assert changed.done == 0


def test_a_full_disk_is_one_sentence_and_seals_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sae_lightning.features.writer.save_file", full)
    writer = StoreWriter(tmp_path / "s", "f", ABOUT, list("abc"), np.zeros(3), 2)
    with pytest.raises(StoreError, match=r"No space left.*Free space"):
        writer.append(torch.zeros(3, 4, 3), torch.zeros(3, 3))
    assert not (tmp_path / "s").exists()
