"""Similarity search: neighbours, what explains them, turned latents, scores, and the whole application."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from scipy import sparse
from scipy.spatial.distance import cdist

from sae_lightning.apps.app import results_of
from sae_lightning.apps.edits import edited, whole_images
from sae_lightning.apps.search.app import captions, turned_latents
from sae_lightning.apps.search.dose import (
    LATENT,
    OTHER,
    RANDOM,
    class_latents,
    dose_means,
    dose_table,
    spread,
)
from sae_lightning.apps.search.neighbours import (
    COSINE,
    FEATURES,
    SHUFFLED,
    agreement_of_shared,
    contributions,
    drawn,
    neighbours,
    precision,
    precisions,
    queries_of,
    shuffled,
    spaces,
    top_shared,
)
from sae_lightning.apps.statistics import fires_alike, mean_interval
from sae_lightning.runs.run import Run
from sae_lightning.saes import TopK
from sae_lightning.saes.sae import Normalizer
from sae_lightning.training.fit import train
from tests.configs import CONF, composed


def sparse_codes(n, d, seed, share=0.3):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix((rng.random((n, d)) * (rng.random((n, d)) < share)).astype(np.float32))


# --- neighbours -----------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["cosine", "manhattan"])
@pytest.mark.parametrize("compressed", [False, True])
def test_neighbours_are_those_of_the_whole_table_of_distances(by, compressed):
    codes = sparse_codes(40, 25, 0)
    queries, dense = codes[[3, 17, 30]], codes.toarray()
    table = cdist(dense[[3, 17, 30]].astype(np.float64), dense, "cityblock" if by == "manhattan" else "cosine")
    table[range(3), [3, 17, 30]] = np.inf  # themselves
    args = (queries, codes) if compressed else (queries.toarray(), dense)
    found = neighbours(*args, 6, by, np.array([3, 17, 30]))
    assert (found.images == table.argsort(1)[:, :6]).all()
    np.testing.assert_allclose(found.distances, np.sort(table, 1)[:, :6], rtol=1e-5, atol=1e-6)


def test_blocks_change_nothing(monkeypatch):
    codes = sparse_codes(50, 20, 1)
    whole = neighbours(codes, codes, 4, "manhattan")
    monkeypatch.setattr("sae_lightning.apps.search.neighbours.BLOCK", 120)
    parts = neighbours(codes, codes, 4, "manhattan")
    assert (whole.images == parts.images).all()
    assert np.allclose(whole.distances, parts.distances)
    assert (whole.images[:, 0] == np.arange(50)).all()  # nothing was left out: each finds itself


def test_a_small_gallery_and_rows_without_codes_leave_gaps():
    codes = sparse.csr_matrix(np.array([[1.0, 0], [0, 0], [2, 1]], dtype=np.float32))
    found = neighbours(codes, codes, 3, "cosine", np.arange(3))
    assert found.images.tolist() == [[2, -1, -1], [-1, -1, -1], [0, -1, -1]]
    assert np.isnan(found.distances[found.images < 0]).all()
    assert neighbours(codes, codes, 3, "manhattan", np.arange(3)).images.tolist() == [
        [1, 2, -1],
        [0, 2, -1],
        [0, 1, -1],
    ]
    with pytest.raises(ValueError, match="Unknown distance=dot; choose one of cosine, manhattan"):
        neighbours(codes, codes, 1, "dot")


# --- what explains a neighbour --------------------------------------------------------------------
def dense_contributions(x, y, gallery, by):
    """All latents' parts of how much nearer y is to x than the average image, by the definition."""
    if by == "manhattan":
        return np.abs(x - gallery).mean(0) - np.abs(x - y)

    def unit(v):
        return v / (np.linalg.norm(v, axis=-1, keepdims=True) + (np.linalg.norm(v, axis=-1, keepdims=True) == 0))

    return unit(x) * (unit(y) - unit(gallery).mean(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["cosine", "manhattan"]), st.floats(0.05, 0.9))
def test_contributions_are_the_parts_of_the_nearness_that_shared_latents_hold(seed, by, share):
    gallery = sparse_codes(12, 9, seed, share)
    a, b = np.random.default_rng(seed).integers(0, 12, (2, 5))
    ours = contributions(gallery[a], gallery[b], gallery, by).toarray()
    dense = gallery.toarray().astype(np.float64)
    for i in range(5):
        x, y = dense[a[i]], dense[b[i]]
        parts = dense_contributions(x, y, dense, by)
        np.testing.assert_allclose(ours[i], np.where((x > 0) & (y > 0), parts, 0), atol=1e-9)
        if by == "manhattan":  # over all latents they sum to the distance gained
            np.testing.assert_allclose(parts.sum(), np.abs(x - dense).sum(1).mean() - np.abs(x - y).sum(), atol=1e-9)


def test_a_latent_that_fires_alike_everywhere_explains_nothing():
    codes = np.zeros((10, 3))
    codes[:, 0] = 5.0  # everywhere
    codes[:2, 1] = 1.0  # on the pair alone
    codes[5:, 2] = 1.0
    matrix = sparse.csr_matrix(codes)
    for by in ("manhattan", "cosine"):
        (best,) = top_shared(contributions(matrix[:1], matrix[1:2], matrix, by), 3)
        assert best[0][0] == 1
        assert all(value > 0 for _, value in best)


# --- turning --------------------------------------------------------------------------------------
def test_a_spread_is_how_far_images_lie_from_their_mean():
    sae = TopK(6, 60, k=2, normalizer=Normalizer(6, torch.zeros(6), 2.0), seed=1)
    features = torch.randn(64, 4, 6)
    images, unit = whole_images(sae, [features[:3]]), spread(sae, features)
    moved = edited(sae, images, 7, [unit])[0] - edited(sae, images, 7, [0.0])[0]
    pooled = features.mean(1)
    expected = (pooled - pooled.mean(0)).norm(dim=1).square().mean().sqrt()
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), float(expected), rtol=1e-5)


# --- scores ---------------------------------------------------------------------------------------
def test_precision_counts_the_class_and_takes_a_gap_for_a_miss():
    labels = np.array([0, 0, 1, 1])
    found = np.array([[1, 2, -1], [3, 0, 1]])
    assert precision(found, np.array([0, 1]), labels, 1).tolist() == [1, 1]
    assert precision(found, np.array([0, 1]), labels, 3).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_the_bootstrap_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = mean_interval(values)
    normal = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert low == pytest.approx(values.mean() - normal, abs=0.05)
    assert high == pytest.approx(values.mean() + normal, abs=0.05)
    assert mean_interval(np.ones(5)) == (1, 1)


def test_shuffled_codes_keep_every_latents_values_and_lose_the_images():
    codes = sparse_codes(60, 8, 3)
    dealt = shuffled(codes, np.random.default_rng(0))
    a, b = codes.toarray(), dealt.toarray()
    assert (np.sort(a, 0) == np.sort(b, 0)).all()
    assert not (a == b).all()


def planted(n=90, noise=0.02, seed=0):
    """Codes of 3 classes with two latents each, one shared latent, and features that hide the class in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    codes = np.zeros((n, 7), dtype=np.float32)
    for i, c in enumerate(labels):
        codes[i, 2 * c : 2 * c + 2] = 1 + rng.random(2)
    codes[:, 6] = 3
    features = rng.standard_normal((n, 12)).astype(np.float32)
    return features, sparse.csr_matrix(codes), labels


def test_planted_codes_beat_noisy_features_and_shuffled_ones_do_not():
    features, codes, labels = planted()
    table, found = precisions(spaces(features, codes, features.mean(0), 0), labels, np.arange(90), (1, 5))
    at = table[table["k"] == 5].set_index("method")
    assert at.loc[COSINE, "precision"] == 1
    assert at.loc[COSINE, "gain_low"] > 0.5
    assert at.loc[FEATURES, "precision"] < 0.45
    assert at.loc[SHUFFLED, "precision"] < 0.45
    assert at.loc[FEATURES, "gain"] == 0
    assert found[COSINE].shape == (90, 5)
    assert not (found[COSINE] == np.arange(90)[:, None]).any()


def test_shared_latents_of_the_class_explain_more_than_random_ones():
    _, codes, labels = planted()
    found = neighbours(codes, codes, 5, "cosine", np.arange(90)).images
    label = np.array([0, 0, 1, 1, 2, 2, 0])
    top, random = agreement_of_shared(codes, found, np.arange(90), labels, label, "cosine", 1)
    assert len(top) == 90
    assert top.mean() > 0.95
    assert random.mean() < 0.8  # one of three shared latents fires on every class


# --- dose -----------------------------------------------------------------------------------------
def test_class_latents_are_the_strongest_of_those_that_the_class_dominates():
    labels = np.repeat([0, 1], 30)
    codes = np.zeros((60, 5))
    codes[:30, 0] = 1.0
    codes[:30, 1], codes[30:, 1] = 5.0, 1.0  # less pure, but what moves images of class 0
    codes[:10, 2] = 9.0  # on too few
    codes[30:, 3] = 2.0
    codes[:, 4] = 1.0
    matrix = sparse.csr_matrix(codes)
    assert class_latents(matrix, labels, 2, 1) == [(1, 0), (3, 1)]
    assert class_latents(matrix, labels, 2, 9) == [(1, 0), (0, 0), (3, 1)]


def test_a_random_latent_is_of_another_class_and_fires_as_often(monkeypatch):
    monkeypatch.setattr("sae_lightning.apps.statistics.ALIKE", 2)
    label, images = np.array([0, 0, 1, 1, 1, 2]), np.array([100, 101, 90, 5, 110, 0])
    assert {fires_alike(0, label != label[0], images, np.random.default_rng(i)) for i in range(20)} == {2, 4}
    assert fires_alike(0, np.zeros(6, dtype=bool), images, np.random.default_rng(0)) == -1


def dictionary(n=120):
    """An SAE whose latents 0, 1, 2 write the directions in which three classes of patch features lie."""
    sae = TopK(8, 16, k=2, seed=3)
    sae.W_dec.data[:8], sae.W_enc.data[:8] = torch.eye(8), torch.eye(8)
    sae.b_enc.data[8:] = -10.0
    labels = np.arange(n) % 3
    features = 0.05 * torch.randn(n, 4, 8, generator=torch.Generator().manual_seed(0))
    features[range(n), :, labels] += 1.0
    features[:, :, 3 + torch.arange(n)[:, None] % 5] += 0.5  # something else, unlike the class
    codes = sae.encode(features).pool(4)
    matrix = sparse.csr_matrix((codes.values.detach(), codes.latents, codes.offsets), (n, 16))
    images = SimpleNamespace(labels=labels, class_names=["a", "b", "c"])

    class Store:
        def __len__(self):
            return n

        def features(self, i):
            return features[i]

    return SimpleNamespace(
        sae=sae.eval(), images=lambda split: images, codes=lambda split: matrix, store=lambda split: Store(),
        features=lambda split: features.mean(1).numpy(),
    )  # fmt: skip


def test_turning_a_planted_latent_brings_and_removes_its_class_and_random_ones_do_not():
    table = dose_table(dictionary(), "test", 1, 10, [-1, 0, 1, 2], 5, 0)
    assert set(table["latent"]) == {0, 1, 2}
    assert set(table["class"]) == {"a", "b", "c"}
    means = dose_means(table).set_index(["of", "arm", "dose"])["share"]
    assert means["others", LATENT, 0] == 0
    assert means["others", LATENT, 2] == 1
    assert means["others", OTHER, 2] < 0.2
    assert means["others", RANDOM, 2] < 0.5
    assert means["own", LATENT, -1] < 0.2
    assert (table["before"] == np.where(table["of"] == "own", 1, 0)).all()


# --- the application ------------------------------------------------------------------------------
def test_draws_take_one_of_each_class_first():
    labels = np.array([0] * 50 + [1, 2])
    assert {int(labels[i]) for i in drawn(labels, 3, 7)} == {0, 1, 2}
    assert drawn(labels, 3, 7) == drawn(labels, 3, 7)
    assert len(set(drawn(labels, 9, 7))) == 9


def test_latents_are_turned_by_number_or_name():
    queries = [SimpleNamespace(label=0), SimpleNamespace(label=1)]
    names = ["", "ship", "dog"]
    assert turned_latents(queries, ["ship", 2], names, [], 0) == [[1, 2]] * 2
    assert turned_latents(queries, None, names, [(5, 0), (6, 1)], 0) == [[6], [5]]
    assert turned_latents(queries[:1], None, names, [(5, 0)], 0) == [[]]
    with pytest.raises(ValueError, match=r"'cow', which is neither a latent .0 to 2. nor a name.*Names are: dog, ship"):
        turned_latents(queries, "cow", names, [], 0)


def test_a_latent_without_a_name_is_called_by_its_class_in_brackets():
    called = captions(["ship", "", ""], np.array([0, 1, -1]), np.array([0.9, 0.312, 0]), ["a", "b"])
    assert called == ["ship", "(b 31%)", ""]


@pytest.fixture(scope="module", params=["patch", "pooled"])
def opened(request, tmp_path_factory, pictures):
    root = tmp_path_factory.mktemp("search")
    cfg = composed(
        "config", "data=folder", f"data.path={pictures}", "backbone=deit", "backbone.size=tiny", "sae=topk", "k=4",
        "expansion=2", "batch_size=16", "trainer.accelerator=cpu", "trainer.max_epochs=1",
        "trainer.enable_progress_bar=false", f"features={request.param}", "logger=none",
        f"paths.stores={tmp_path_factory.getbasetemp() / 'training-stores'}", f"paths.runs={root}",
    )  # fmt: skip
    train(cfg)
    (folder,) = (path.parent for path in root.rglob("result.json"))
    return Run(folder)


def asked(**app):
    defaults = OmegaConf.load(CONF / "app" / "search.yaml")
    small = {"shown": 2, "neighbours": 3, "dose": {"latents": 1, "images": 4, "to": [-1, 0, 1], "neighbours": 3}}
    cfg = {"app": OmegaConf.merge(defaults, small, app), "split": "test", "seed": 1, "device": "cpu"}
    return OmegaConf.create(cfg)


@pytest.mark.slow
def test_a_run_is_searched_and_leaves_page_record_and_tables(opened, pictures):
    own = pictures / "test" / "rows" / "0.png"
    (result,) = results_of([opened], asked(queries=[1, str(own)], turn={"latents": [2], "to": [0, 1]}))
    page = result.page.read_text()
    assert page.count("turned, then searched") == 2
    assert "0.png" in page
    assert 'src="http' not in page
    shown = pd.read_parquet(result.folder / "neighbours.parquet")
    assert len(shown) == 2 * 3 * 3
    assert set(shown["query"].unique()) >= {"0.png"}
    same = shown[(shown["query"] == "0.png") & (shown["method"] == FEATURES)].iloc[0]
    assert same["distance"] < 1e-3  # it is of the data set, and not left out as the query itself is not known to be
    table = pd.read_parquet(result.folder / "precision.parquet")
    assert set(table["k"]) == {1, 5, 10}
    assert table["precision"].between(0, 1).all()
    assert {line.what.split(",")[0] for line in result.headlines} >= {"precision@10"}


def test_queries_are_numbers_ids_or_files_and_anything_else_is_named(opened):
    images = opened.images("test")
    by_id, by_number = queries_of(opened, "test", [images.image_ids[3], 3])
    assert by_id.index == by_number.index == 3
    assert by_id.label == images.labels[3]
    assert torch.equal(by_id.features, by_number.features)
    assert (by_id.codes != opened.codes("test")[3]).nnz == 0
    with pytest.raises(ValueError, match=r"app\.queries=nowhere\.png is neither a number below 8 or an image id"):
        queries_of(opened, "test", "nowhere.png")


def test_wrong_options_are_told(opened):
    with pytest.raises(ValueError, match=r"Unknown app\.turn\.unit=volts; choose one of spread, code"):
        results_of([opened], asked(turn={"unit": "volts"}))
    opened.cfg["features"], kind = "text", opened.cfg["features"]
    try:
        with pytest.raises(ValueError, match="was trained on captions; search needs a run on features of images"):
            results_of([opened], asked())
    finally:
        opened.cfg["features"] = kind


def test_a_picture_of_any_size_and_mode_can_be_searched_for(opened, tmp_path):
    path = tmp_path / "wide.png"
    Image.new("LA", (90, 40), (200, 100)).save(path)
    (query,) = queries_of(opened, "test", str(path))
    assert (query.index, query.label, query.title) == (-1, -1, "wide.png")
    assert query.features.shape == opened.store("test").features([0]).shape
