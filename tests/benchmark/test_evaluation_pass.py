"""The streaming pass against one dense pass over the whole store."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sae_lightning.benchmark.evaluate import SCORES, TOP_IMAGES, finished_runs, score, stored_scores
from sae_lightning.benchmark.top_images import TopImages, choose_latents, top_purity
from sae_lightning.features.store import StoreError
from sae_lightning.saes import Normalizer, SparseCodes, TopK
from tests.conftest import write_store


@pytest.fixture
def run(tmp_path, stores):
    store = stores["test"]
    sae = TopK(store.d_in, 40, 3, normalizer=Normalizer(store.d_in, store.mean, store.std), seed=1)
    folder = tmp_path / "topk-run"
    sae.save(folder, name="topk-run", backbone=store.backbone, features=store.kind, layer=store.layer, k=3, config={})
    return folder


def dense_pass(run, store):
    sae = TopK.load(run)
    x = store.features(slice(None)).reshape(-1, store.d_in).float()
    with torch.no_grad():
        codes = sae.encode(x)
        rebuilt = sae.decode(codes)
    return x.double().numpy(), rebuilt.double().numpy(), codes.to_dense().numpy()


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_scores_equal_a_dense_pass(run, stores, batch_tokens):
    store = stores["test"]
    x, rebuilt, z = dense_pass(run, store)
    scores = score(run, store, batch_tokens=batch_tokens)
    assert scores == json.loads((run / SCORES).read_text())
    assert (scores["split"], scores["store"]) == ("test", store.fingerprint)
    assert (scores["n_images"], scores["n_tokens"]) == (90, 90 * 16)
    fvu = ((x - rebuilt) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    metrics = scores["metrics"]
    assert metrics["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert metrics["explained_variance"] == pytest.approx(1 - fvu, abs=1e-5)
    assert metrics["l0"] == pytest.approx((z > 0).sum(1).mean())
    assert metrics["dead_share"] == pytest.approx(1 - (z > 0).any(0).mean())


def test_top_images_and_their_maps_equal_a_dense_pass(run, stores):
    store = stores["test"]
    score(run, store, batch_tokens=200, latents_shown=5)
    maps = dense_pass(run, store)[2].reshape(90, 16, 40)
    peaks = maps.max(1)
    with safe_open(run / TOP_IMAGES, "pt") as file:
        t = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        groups = file.metadata()["groups"].split("|")
    assert groups == ["most used", "random", "purest"]
    assert len(t["latents"]) == len(t["group"]) >= 10
    for i, latent in enumerate(t["latents"].tolist()):
        shown = [image for image in t["images"][i].tolist() if image >= 0]
        firing = (peaks[:, latent] > 0).sum()
        assert int(t["images_fired"][i]) == firing
        assert len(shown) == len(set(shown)) == min(9, firing)
        strongest = np.sort(peaks[:, latent])[::-1][: len(shown)]
        np.testing.assert_allclose(peaks[shown, latent], strongest, rtol=1e-5)
        np.testing.assert_allclose(t["maps"][i, : len(shown)].float(), maps[shown, :, latent], rtol=2e-3)
        assert float(t["firing_share"][i]) == pytest.approx((maps[:, :, latent] > 0).mean())


def test_a_store_of_another_backbone_or_layer_is_refused(run, tmp_path):
    for change in ({"backbone": "another"}, {"layer": 3}):
        other = write_store(tmp_path / next(iter(change)), 4, seed=9, **change)
        with pytest.raises(StoreError, match=r"topk-run was trained on .*none \(synthetic\).*own backbone"):
            score(run, other)
    assert not (run / SCORES).exists()


def test_purity_counts_only_images_that_fire():
    labels = torch.tensor([0, 0, 1, 2, 1])
    images = torch.tensor([[0, 1, 2], [2, 4, -1], [-1, -1, -1]])
    label, share = top_purity(images, labels)
    assert label.tolist() == [0, 1, -1]
    assert share.tolist() == pytest.approx([2 / 3, 1, 0])


def test_chosen_latents():
    counts = torch.tensor([0, 50, 7, 90, 20, 3])
    fired = torch.tensor([0, 30, 7, 60, 12, 3])
    purity = torch.tensor([0.0, 0.5, 1.0, 0.9, 0.9, 1.0])
    chosen = choose_latents(counts, fired, purity, n=3)
    assert chosen["most used"].tolist() == [3, 1, 4]
    assert chosen["purest"].tolist() == [4, 3, 1]  # 2 and 5 fire on fewer than 10 images; of equals the rarer first
    assert set(chosen["random"].tolist()) <= {1, 2, 3, 4, 5}
    assert chosen["random"].tolist() == choose_latents(counts, fired, purity, n=3)["random"].tolist()


def test_images_are_ranked_by_their_strongest_patch():
    dense = torch.zeros(3 * 2, 2)  # three images of two patches
    dense[0, 0], dense[1, 0], dense[5, 0] = 1.0, 1.5, 1.6
    top = TopImages(d_sae=2, n_patches=2, n_top=2)
    for start in (0, 2, 4):
        top.update(SparseCodes.select(dense[start : start + 2], dense[start : start + 2] > 0))
    assert top.images().tolist() == [[2, 0], [-1, -1]]
    assert top.peaks().tolist() == pytest.approx([1.6, 0])
    assert top.images_fired.tolist() == [2, 0]


def test_stored_scores_are_used_only_when_whole_and_fresh(run, stores):
    assert stored_scores(run, "test", []) is None
    scores = score(run, stores["test"])
    assert stored_scores(run, "test", ["fvu", "l0"]) == scores
    assert stored_scores(run, "val", ["fvu"]) is None
    assert stored_scores(run, "test", ["a_new_metric"]) is None
    written = (run / SCORES).stat().st_mtime
    os.utime(run / "sae.safetensors", (written + 10, written + 10))
    assert stored_scores(run, "test", ["fvu"]) is None
    os.utime(run / "sae.safetensors", (written - 10, written - 10))
    (run / TOP_IMAGES).unlink()
    assert stored_scores(run, "test", ["fvu"]) is None


def test_no_matching_run_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="No finished run in"):
        finished_runs(["batchtopk-*"], tmp_path)
