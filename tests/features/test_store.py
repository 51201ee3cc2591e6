"""The store's round trip, its statistics, its parts, and its refusal of everything broken."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sae_lightning.features.manifest import Moments, StoreError, merge
from sae_lightning.features.source import warn_of_loss
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.upkeep import merge_stores
from tests.conftest import fill_store, write_store


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 40), d=st.integers(1, 9), per_shard=st.integers(4, 45), batch=st.integers(1, 20),
    dtype=st.sampled_from(["float16", "bfloat16"]), data=st.data(),
)  # fmt: skip
def test_round_trip_for_any_shard_size(n, d, per_shard, batch, dtype, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("s") / "store"
    x = torch.randn(n, 4, d, generator=torch.Generator().manual_seed(n))
    store = fill_store(folder, x, per_shard, dtype=dtype, batch=batch)
    kept = x.to(getattr(torch, dtype))
    assert len(store) == n
    assert store.n_tokens == 4 * n
    assert torch.equal(store.features(slice(None)), kept)
    start, stop = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    assert torch.equal(store.features(slice(start, stop)), kept[start:stop])
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    assert torch.equal(store.features(torch.tensor(rows)), kept[rows])
    store.verify()


def test_shards_are_plain_safetensors(tmp_path):
    x = torch.randn(7, 4, 6)
    fill_store(tmp_path / "s", x, 5)
    parts = [load_file(path)["features"] for path in sorted((tmp_path / "s").glob("*-0*.safetensors"))]
    assert torch.equal(torch.cat(parts), x.half())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_statistics_equal_one_shot_float64(dtype, tmp_path):
    store = fill_store(tmp_path / "s", 5 + 3 * torch.randn(70, 4, 6) * torch.arange(1, 7), 16, dtype=dtype)
    x = store.features(slice(None)).double().reshape(-1, 6).numpy()
    np.testing.assert_allclose(store.mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(store.deviation, x.std(0), rtol=1e-6)
    assert store.std == pytest.approx(np.sqrt(((x - x.mean(0)) ** 2).mean()), rel=1e-9)
    assert store.manifest.mean_norm == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-9)
    assert store.manifest.severity == pytest.approx(np.linalg.norm(x.mean(0)) / np.linalg.norm(x.std(0)), rel=1e-9)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), offset=st.floats(-1e4, 1e4))
@settings(max_examples=30, deadline=None)
def test_moments_of_parts_are_those_of_the_whole(sizes, offset):
    x = offset + torch.randn(sum(sizes), 3, dtype=torch.float64)
    whole = merge(Moments.of(part) for part in x.split(sizes))
    torch.testing.assert_close(whole.mean, x.mean(0), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(whole.m2, (x - x.mean(0)).square().sum(0), rtol=1e-6, atol=1e-9)
    again = Moments.from_json(json.loads(json.dumps(whole.to_json())))
    assert torch.equal(again.mean, whole.mean)
    assert torch.equal(again.m2, whole.m2)


def test_int8_loses_little_even_beside_massive_dimensions(tmp_path):
    """Without a shift and spread a dimension, one entry of 500 among ones would cost a thousandth of the variance."""
    x = torch.randn(200, 4, 64)
    x[..., 7] = 500 + 5 * x[..., 7]
    x[..., 9] *= 40
    store = fill_store(tmp_path / "s", x, 64, dtype="int8")
    got = store.features(slice(None)).float()
    lost = (x - got).double().square().sum() / (x - x.reshape(-1, 64).mean(0)).double().square().sum()
    assert store.manifest.rounding == pytest.approx(float(lost), rel=1e-3)
    assert lost < 1e-3
    every = (x - got).square().mean((0, 1)) / x.reshape(-1, 64).var(0)
    assert float(every.max()) < 1e-3, "of each dimension too"
    plain = x.abs().amax(-1, keepdim=True) / 127
    naive = (x - (x / plain).round() * plain).square().mean((0, 1)) / x.reshape(-1, 64).var(0)
    assert float(naive.max()) > 0.1
    assert (store.folder / "shard-00000.safetensors").stat().st_size < 4096 + 0.6 * 64 * 4 * 64 * 2
    store.verify()


@pytest.mark.parametrize("when", ["in the first batch", "later", "in a few tokens"])
def test_int8_scales_by_the_whole_shard_and_measures_every_dimension(when, tmp_path):
    """A massive dimension that first appears after the first batch (of 33) cost the others four fifths."""
    x = torch.randn(400, 4, 64, generator=torch.Generator().manual_seed(0))
    massive = {"in the first batch": slice(0, 30), "later": slice(50, None), "in a few tokens": slice(390, 394)}[when]
    x[massive, :, 7] += 3000
    store = fill_store(tmp_path / "s", x, 400, dtype="int8")
    lost = (x.double() - store.features(slice(None)).double()).square().sum((0, 1))
    varies = (x.double() - x.double().mean((0, 1))).square().sum((0, 1))
    share = lost / varies
    assert float(share.max()) < (0.02 if when == "in a few tokens" else 2e-3)
    assert store.manifest.rounding_worst == pytest.approx(float(share.max()), rel=3e-3)
    assert store.manifest.rounding == pytest.approx(float(lost.sum() / varies.sum()), rel=3e-3)
    store.verify()


def test_a_loss_of_one_dimension_that_the_sum_hides_is_said(tmp_path, capsys):
    x = torch.randn(100, 4, 64)
    x[..., 7] = 40000 * torch.rand(100, 4)
    x[..., 9] += 3000
    store = fill_store(tmp_path / "s", x, dtype="bfloat16")
    assert store.manifest.rounding < 1e-4
    assert store.manifest.rounding_worst > 0.5
    warn_of_loss(store.folder, store.manifest)
    assert re.search(r"lost 0\.00% of .* one dimension's \d\d\.\d\d%.*extract\.dtype=float16", capsys.readouterr().out)


def test_a_store_from_before_losses_were_kept_by_dimension_opens_and_merges(tmp_path):
    store = write_store(tmp_path / "s", 10, 1)
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["rounding_worst"]
    path.write_text(json.dumps(manifest))
    for record in (store.folder / "records").glob("*.json"):
        content = json.loads(record.read_text())
        content["moments"]["lost"] = sum(content["moments"]["lost"])
        record.write_text(json.dumps(content))
    merged = merge_stores([store.folder], tmp_path / "merged")
    assert merged.manifest.rounding == pytest.approx(manifest["rounding"])


def test_labels_ids_and_description_come_back(stores):
    store = stores["train"]
    assert store.labels[:4].tolist() == [0, 1, 2, 0]
    assert store.image_ids[7] == "image-7"
    assert (store.backbone, store.kind, store.layer, store.grid) == ("none (synthetic)", "patch", 0, (4, 4))


# --- parts ----------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_part_reads_like_the_selected_images(stores, data):
    store = stores["train"]
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(store) - 1), min_size=1, max_size=80))))
    part = store.select(chosen)
    whole = store.features(slice(None))
    assert torch.equal(part.features(slice(None)), whole[chosen])
    rows = data.draw(st.lists(st.integers(0, len(chosen) - 1), min_size=1, max_size=9))
    assert torch.equal(part.features(rows), whole[chosen[rows]])
    inner = np.array(sorted(set(rows)))
    assert torch.equal(part.select(inner).features(slice(None)), whole[chosen[inner]])
    assert part.image_ids == [store.image_ids[i] for i in chosen]
    assert torch.equal(part.labels, store.labels[chosen])
    assert part.fingerprint != store.fingerprint or len(part) == len(store)


def test_subsets_by_count_class_and_both(stores):
    store = stores["train"]
    assert len(store.subset(images=30)) == 30
    assert store.subset(images=30, seed=1).image_ids != store.subset(images=30, seed=2).image_ids
    two = store.subset(classes=["class 0", "class 2"])
    assert set(two.labels.tolist()) == {0, 2}
    assert torch.bincount(store.subset(per_class=5).labels).tolist() == [5, 5, 5]
    assert torch.bincount(store.subset(per_class=5, classes=["class 1"]).labels).tolist() == [0, 5]
    assert store.subset() is store
    with pytest.raises(StoreError, match=r"no class \['cat'\]"):
        store.subset(classes=["cat"])


@pytest.mark.parametrize("classes", [[0, 10], ["0", "10"], [0.0, 10]])
def test_classes_whose_names_are_numbers_or_truths_are_chosen_as_they_are_written(tmp_path, classes):
    store = write_store(tmp_path / "store", 9, 1, class_names=["0", "5", "10"])
    assert set(store.subset(classes=classes).labels.tolist()) == {0, 2}
    truths = write_store(tmp_path / "truths", 9, 1, class_names=["false", "True", "caf\u00e9"])
    assert set(truths.subset(classes=[False, True]).labels.tolist()) == {0, 1}
    assert set(truths.subset(classes=["cafe\u0301"]).labels.tolist()) == {2}
    with pytest.raises(StoreError, match=r"no class \['7'\]; it has \['0', '5', '10'\]"):
        store.subset(classes=[0, 7])


def test_labels_can_be_numbered_as_in_another_store(tmp_path):
    store = write_store(tmp_path / "store", 9, 1, class_names=["ant", "cat", "dog"])
    other = store.numbered_as(["dog", "fox", "cat"])
    assert other.class_names == ["dog", "fox", "cat", "ant"]
    names = [other.class_names[label] for label in other.labels]
    assert names == [store.class_names[label] for label in store.labels] == ["ant", "cat", "dog"] * 3
    assert other.select([1, 2]).labels.tolist() == [2, 0]
    assert other.subset(classes=["dog"]).labels.tolist() == [0] * 3
    assert other.fingerprint == store.fingerprint
    assert store.numbered_as(["ant", "cat"]) is store


def test_splits_without_a_copy_are_disjoint_and_stratified(stores):
    parts = stores["train"].parts({"train": 0.75, "val": 0.25}, seed=3)
    ids = {name: set(part.image_ids) for name, part in parts.items()}
    assert not ids["train"] & ids["val"]
    assert len(ids["train"] | ids["val"]) == 400
    assert torch.bincount(parts["val"].labels).tolist() == pytest.approx([100 / 3] * 3, abs=1)
    assert parts["val"].mean is not None
    assert parts["val"].std == stores["train"].std


# --- broken ---------------------------------------------------------------------------------------------
def broken(name, damage, sentence):
    return pytest.param(damage, sentence, id=name)


def cut(path, n=10):
    path.write_bytes(path.read_bytes()[:-n])


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SHARD = "shard-00001.safetensors"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        broken("missing folder", lambda f: shutil.rmtree(f), "There is no feature store"),
        broken("unsealed", lambda f: (f / "manifest.json").unlink(), "did not finish"),
        broken("cut manifest", lambda f: cut(f / "manifest.json", 300), "not valid JSON"),
        broken("truncated shard", lambda f: cut(f / SHARD), f"{SHARD} has .* bytes instead of"),
        broken("missing shard", lambda f: (f / SHARD).unlink(), f"no file .*{SHARD}"),
        broken("changed header", lambda f: flip(f / SHARD, 20), f"header of .*{SHARD}"),
        broken("flipped first byte", lambda f: flip(f / SHARD, 4096), f"{SHARD} was changed"),
        broken("flipped last byte", lambda f: flip(f / SHARD, -1), f"{SHARD} was changed"),
        broken("missing table", lambda f: (f / "images.parquet").unlink(), "lacks images.parquet"),
        broken("changed statistics", lambda f: flip(f / "statistics.safetensors", -1), "statistics.* was changed"),
        broken("old schema", lambda f: edit(f, schema=1), "schema 1.*delete the folder and extract again"),
        broken("new schema", lambda f: edit(f, schema=7), "schema 7.*update"),
        broken("shape", lambda f: edit(f, d_in=5), "not what its manifest says"),
    ],
)
def test_broken_stores_are_refused_with_a_sentence(damage, sentence, tmp_path):
    folder = write_store(tmp_path / "store", 120, 1).folder
    damage(folder)
    with pytest.raises(StoreError, match=sentence):
        FeatureStore.open(folder)


def test_verifying_finds_a_flipped_byte_that_opening_cannot_see(tmp_path):
    store = write_store(tmp_path / "store", 120, 1)
    flip(store.folder / SHARD, 4096 + 50 * 16 * 12)
    with pytest.raises(StoreError, match=rf"{SHARD} does not match its checksum"):
        FeatureStore.open(store.folder).verify()
    with pytest.raises(StoreError, match=SHARD):
        FeatureStore.open(store.folder, verify=True)


@pytest.mark.parametrize("damage", [lambda p: cut(p), lambda p: p.unlink(), lambda p: flip(p, 4096 + 9600)])
def test_damaged_shards_are_skipped_and_counted_on_request(damage, tmp_path):
    store = write_store(tmp_path / "store", 120, 1)
    before = store.features(slice(None))
    damage(store.folder / SHARD)
    with pytest.warns(UserWarning, match=rf"1 damaged of 3 shards are skipped, 50 images: {SHARD}"):
        rest = FeatureStore.open(store.folder, damaged="skip", verify=True)
    left = torch.cat([before[:50], before[100:]])
    assert torch.equal(rest.features(slice(None)), left)
    assert rest.skipped == [SHARD]
    assert rest.image_ids == [f"image-{i}" for i in (*range(50), *range(100, 120))]
    x = left.double().reshape(-1, left.shape[-1])
    torch.testing.assert_close(rest.mean.double(), x.mean(0), rtol=1e-6, atol=1e-7)
    assert rest.std == pytest.approx(float((x - x.mean(0)).square().mean().sqrt()), rel=1e-9)
    with pytest.raises(StoreError, match="choose one of refuse, skip"):
        FeatureStore.open(store.folder, damaged="ignore")


def test_a_shard_cut_while_it_is_read_is_an_error_that_names_it(tmp_path):
    store = write_store(tmp_path / "store", 120, 1)
    cut(store.folder / SHARD, 5000)
    with pytest.raises(StoreError, match=rf"{SHARD} ends .* rows before"):
        store.features(slice(None))
