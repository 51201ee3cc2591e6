"""The streaming pass against one dense pass over the whole store."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from sklearn.metrics import r2_score

from sae_lightning.evaluation.by_latent import choose_latents, ranked, spread_ranks, strongest, top_purity
from sae_lightning.evaluation.core import activation_maps, stored_scores
from sae_lightning.evaluation.scoring_pass import ScoringPass, stream
from sae_lightning.evaluation.similarity import ImageEmbeddings, SimilarityEncoder
from sae_lightning.features.manifest import StoreError
from sae_lightning.kernels import native
from sae_lightning.metrics import Moran
from sae_lightning.runs.run import BAND_IMAGES, FILES, LATENTS, SCORES, TOP_IMAGES, find_runs
from sae_lightning.saes import Normalizer, SparseCodes, TopK
from sae_lightning.saes.artefact import read_tensors
from tests.conftest import fill_store, write_store
from tests.scoring import score


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
    assert metrics["r2"] == pytest.approx(r2_score(x, rebuilt), rel=1e-5)
    assert metrics["l0"] == pytest.approx((z > 0).sum(1).mean())
    assert metrics["dead_share"] == pytest.approx(1 - (z > 0).any(0).mean())


def slow_scores(peaks: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """MonoScore of each latent over all pairs of images, by the paper's Algorithm 1."""
    h = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = np.zeros(peaks.shape[1])
    upper = np.triu_indices(len(h), 1)
    for k, a in enumerate(peaks.T):
        weights = np.outer(a - a.min(), a - a.min())[upper]
        scores[k] = (weights * (h @ h.T)[upper]).sum() / weights.sum() if weights.sum() > 0 else 0
    return scores


@pytest.mark.parametrize("judged_by", ["itself", "another store"])
@pytest.mark.parametrize("batch_tokens", [100, 10_000])
def test_monosemanticity_and_purity_equal_a_dense_pass(run, stores, tmp_path, judged_by, batch_tokens):
    store = stores["test"]
    x, _, z = dense_pass(run, store)
    peaks = z.reshape(90, 16, 40).max(1)
    embeddings, judge = x.reshape(90, 16, 12).mean(1), None
    if judged_by == "another store":
        embeddings = np.random.default_rng(0).normal(size=(90, 1, 5)).astype(np.float16)
        other = store_of_ids(tmp_path / "judge", torch.from_numpy(embeddings))
        embeddings = embeddings[:, 0].astype(np.float64)
        judge = ImageEmbeddings(store, other, "another")
    scores = score(run, store, batch_tokens, judge=judge, above=[0.1, 0.9])
    latents, _ = read_tensors(run / LATENTS)
    expected = slow_scores(peaks, embeddings)
    np.testing.assert_allclose(latents["monoscore"], expected, rtol=1e-5, atol=1e-7)
    metrics = scores["metrics"]
    assert metrics["monoscore"] == pytest.approx(expected.mean(), rel=1e-5)
    assert metrics["monoscore_scored"] == pytest.approx(expected[latents["scored"].numpy()].mean(), rel=1e-5)
    assert metrics["monoscore_above_0.1"] == (expected > 0.1).mean()
    assert metrics["monoscore_above_0.9"] == (expected > 0.9).mean()
    h = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert scores["similarity"]["baseline"] == pytest.approx((h @ h.T)[np.triu_indices(90, 1)].mean(), abs=1e-6)
    assert scores["similarity"]["key"] == ("own" if judge is None else "another")
    labels, fired = store.labels.numpy(), peaks.sum(0) > 0
    per_class = np.stack([(peaks[labels == c] > 0).sum(0) for c in range(3)])
    mass = np.stack([peaks[labels == c].sum(0) for c in range(3)])
    dominant = per_class.argmax(0)
    np.testing.assert_array_equal(latents["dominant_class"], np.where(fired, dominant, -1))
    binary = per_class.max(0)[fired] / per_class.sum(0)[fired]
    weighted = (mass[dominant, np.arange(40)] / mass.sum(0).clip(1e-9))[fired]
    assert metrics["purity"] == pytest.approx(binary.mean(), rel=1e-9)
    assert metrics["weighted_purity"] == pytest.approx(weighted.mean(), rel=1e-5)
    np.testing.assert_array_equal(latents["images_fired"], (peaks > 0).sum(0))
    np.testing.assert_array_equal(latents["counts"], (z > 0).sum(0))


def store_of_ids(folder, embeddings, order=None):
    """A store of ``embeddings`` [n, 1, d] of the images "image-0" …, written in another ``order`` of ids."""
    store = fill_store(folder, embeddings, kind="pooled", layer=None, grid=(1, 1), backbone="judge", split="test")
    if order is not None:
        store.image_ids = order
    return store


def test_another_store_is_aligned_by_image_id(run, stores, tmp_path):
    store = stores["test"]
    generator = torch.Generator().manual_seed(0)
    embeddings, shuffle = torch.randn(90, 1, 5, generator=generator), torch.randperm(90, generator=generator)
    straight = ImageEmbeddings(store, store_of_ids(tmp_path / "straight", embeddings))
    ids = [f"image-{i}" for i in shuffle.tolist()]
    other = ImageEmbeddings(store, store_of_ids(tmp_path / "shuffled", embeddings[shuffle], ids))
    span = slice(10, 50)
    torch.testing.assert_close(other.embeddings(span, None), straight.embeddings(span, None))
    lacking = store_of_ids(tmp_path / "lacking", embeddings[:80])
    with pytest.raises(StoreError, match=r"lacks 10 of the 90 images .*first: 'image-80'.*same data set"):
        ImageEmbeddings(store, lacking)


def test_bands_show_the_latents_of_the_spread_ranks(run, stores):
    store = stores["test"]
    score(run, store, band_ranks=6, band_images=4)
    t, metadata = read_tensors(run / BAND_IMAGES)
    latents = read_tensors(run / LATENTS)[0]
    assert t["ranks"].tolist() == spread_ranks(40, 6).tolist()
    assert t["latents"].tolist() == ranked(latents["monoscore"])[t["ranks"]].tolist()
    peaks = dense_pass(run, store)[2].reshape(90, 16, 40).max(1)
    for i, latent in enumerate(t["latents"].tolist()):
        shown = t["images"][i].flatten()
        shown = shown[shown >= 0]
        assert len(shown) == len(set(shown.tolist())) == min(12, (peaks[:, latent] > 0).sum())
        np.testing.assert_allclose(t["values"][i].flatten()[: len(shown)], peaks[shown, latent], rtol=1e-5)
    ids = json.loads(metadata["image_ids"])
    assert all(ids[str(n)] == store.image_ids[n] for n in t["images"][t["images"] >= 0].tolist())


def test_images_without_labels_have_no_purity(run, tmp_path, stores):
    bare = write_store(tmp_path / "bare", 20, seed=9, class_names=["unlabelled", "b", "c"])
    bare.class_names = ["unlabelled"]
    bare.labels = torch.zeros(20, dtype=torch.long)
    metrics = score(run, bare)["metrics"]
    assert "monoscore" in metrics
    assert "purity" not in metrics
    assert "purity" not in read_tensors(run / LATENTS)[0]


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


def test_of_all_tokens_spatial_scores_and_maps_take_the_patches_alone(run, stores, tmp_path):
    patches = stores["test"]
    more = torch.randn(90, 3, patches.d_in, generator=torch.Generator().manual_seed(0))
    x = torch.cat([more, patches.features(slice(None)).float()], 1)
    whole = fill_store(tmp_path / "tokens", x, kind="tokens", prefix=3, split="test")
    assert (whole.n_patches, whole.grid, whole.spatial, whole.n_tokens) == (19, (4, 4), True, 90 * 19)
    sae, found = TopK.load(run), {}
    of_tokens = tmp_path / "topk-tokens"
    sae.save(of_tokens, name="topk-tokens", backbone=whole.backbone, features="tokens", layer=0, k=3, config={})
    for folder, store in ((run, patches), (of_tokens, whole)):
        moran = Moran(sae.d_sae, store.grid, min_images=5)
        with TemporaryDirectory(dir=tmp_path) as kept:
            scored = ScoringPass(folder, store, ImageEmbeddings(store), Path(kept), {"moran": moran})
            stream([scored], 300, title="")
            scored.close()
        found[store.kind] = moran.compute() | {"all": moran.scores().nan_to_num()}
        images = torch.tensor([[0, 5, -1], [7, 80, 2]])
        found[store.kind]["maps"] = activation_maps(sae, store, torch.tensor([4, 9]), images)
    for name, value in found["patch"].items():
        torch.testing.assert_close(found["tokens"][name], value)
    with torch.no_grad():
        codes = sae.encode(x.flatten(0, 1))
    left = codes.without_first(3, 19).to_dense()
    assert torch.equal(left, codes.to_dense().unflatten(0, (90, 19))[:, 3:].flatten(0, 1))


def test_a_store_of_another_backbone_or_layer_is_refused(run, tmp_path):
    for change in ({"backbone": "another"}, {"layer": 3}, {"site": "mlp_out"}):
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
    assert set(chosen["random"].tolist()) == {1, 3, 4}
    assert set(choose_latents(counts, fired // 10, purity, n=9)["random"].tolist()) == {
        1,
        2,
        3,
        4,
        5,
    }  # rather than none
    assert chosen["random"].tolist() == choose_latents(counts, fired, purity, n=3)["random"].tolist()


def test_images_are_ranked_by_their_strongest_patch():
    dense = torch.zeros(3 * 2, 2)  # three images of two patches
    dense[0, 0], dense[1, 0], dense[5, 0] = 1.0, 1.5, 1.6
    top = strongest((SparseCodes.select(rows, rows > 0).pool(2, "max") for rows in dense.split(2)), d_sae=2, n=2)
    assert top.images.tolist() == [[2, 0], [-1, -1]]
    assert top.values[:, 0].tolist() == pytest.approx([1.6, 0])
    assert top.fired.tolist() == [2, 0]


@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 50), max_size=6), n_top=st.integers(1, 9))
def test_top_images_equal_a_sort_of_all_images(compiled, seed, cuts, n_top):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(0, 6, (50, 12), generator=generator) / 2  # with many ties
    dense[torch.rand(50, 12, generator=generator) < 0.6] = 0
    batches = [dense[start:stop] for start, stop in pairwise([0, *sorted(cuts), 50])]
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "available", lambda *tensors: False)
        top = strongest((SparseCodes.select(rows, rows > 0) for rows in batches), 12, n_top)
    for latent, a in enumerate(dense.T.numpy()):
        order = [n for n in np.argsort(-a, kind="stable") if a[n] > 0][:n_top]
        assert top.images[latent].tolist() == order + [-1] * (n_top - len(order))
        assert float(top.values[latent, 0]) == a.max()
    np.testing.assert_array_equal(top.fired, (dense > 0).sum(0))


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
    assert stored_scores(run, "test", ["fvu"], SimilarityEncoder()) == scores
    assert stored_scores(run, "test", ["fvu"], SimilarityEncoder(store=str(stores["val"].folder))) is None
    for name in FILES:
        content = (run / name).read_bytes()
        (run / name).unlink()
        assert stored_scores(run, "test", ["fvu"]) is None
        (run / name).write_bytes(content)
    (run / SCORES).write_text(json.dumps(scores | {"schema": 1}))
    assert stored_scores(run, "test", ["fvu"]) is None


def test_no_matching_run_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="No finished run in"):
        find_runs(["batchtopk-*"], tmp_path)
