"""Retrieval by cosine against a loop over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sae_lightning.metrics import retrieval
from sae_lightning.metrics.retrieval import Recall, image_recall, nearest, recalls, text_recall


def rates(found: Recall) -> dict[int, float]:
    return {k: float(hits.mean()) if len(hits) else np.nan for k, hits in found.items()}


def by_loops(queries: np.ndarray, gallery: np.ndarray, k: int, alone: bool) -> list[list[int]]:
    found = []
    for i, q in enumerate(queries.astype(np.float64)):
        cosines = []
        for j, g in enumerate(gallery.astype(np.float64)):
            if np.any(q) and np.any(g) and not (alone and i == j):
                cosines.append((-(q @ g) / np.sqrt((q @ q) * (g @ g)), j))
        best = [j for _, j in sorted((round(c, 5), j) for c, j in cosines)][:k]
        found.append(best + [-1] * (k - len(best)))
    return found


def sparse_rows(n: int, d: int, seed: int) -> np.ndarray:
    """Small whole numbers, mostly zeros, so that cosines are often equal and some rows are zero."""
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 3, (n, d)) * (rng.random((n, d)) < 0.25)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000), n=st.integers(1, 25), m=st.integers(1, 25), k=st.integers(1, 7),
    alone=st.booleans(), block=st.integers(1, 200), forms=st.sampled_from(["dd", "ss", "sd", "ds"]),
)  # fmt: skip
def test_nearest_are_those_of_all_pairs(seed, n, m, k, alone, block, forms):
    q = sparse_rows(n, 6, seed)
    g = q if alone else sparse_rows(m, 6, seed + 1)
    given_q, given_g = (sparse.csr_array(x) if form == "s" else x for x, form in zip((q, g), forms, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK", block)
        # equal cosines may differ in their last bits; rounding makes the tie explicit on both sides
        largest = retrieval._largest
        patch.setattr(retrieval, "_largest", lambda cosines, k: largest(cosines.double().round(decimals=5), k))
        found = nearest(given_q, None if alone else given_g, k)
    assert found.tolist() == by_loops(q, g, k, alone)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_largest_of_ties_are_the_first(k):
    values = torch.tensor([[1.0, 2, 2, 0, 2, 1], [0, 0, 0, 0, 0, 0], [5, -torch.inf, 4, 5, -torch.inf, -torch.inf]])
    expected = [
        sorted(range(6), key=lambda i, row=row: (-row[i], i))[:k] for row in values.tolist()
    ]  # fmt: skip
    expected = [[i if values[r, i] > -torch.inf else -1 for i in row] for r, row in enumerate(expected)]
    assert retrieval._largest(values, k).tolist() == expected


def test_sparse_rows_on_another_device_are_multiplied_as_dense_ones(monkeypatch):
    x = sparse.csr_array(sparse_rows(30, 8, 0) + sparse.random_array((30, 8), density=0.3, rng=0).toarray())
    expected = nearest(x)
    monkeypatch.setattr(torch, "device", lambda _: type("Device", (), {"type": "other"}))
    assert nearest(x).tolist() == expected.tolist()


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array, torch.from_numpy, sparse.csr_matrix])
def test_image_recall_by_hand(form):
    # the nearest of image 0 is 1, a hit; of 1 it is 2 (cosine 0.976; 0.970 for 0), of another class; of 2 it is 1;
    # 3 is zero; 4 is alone in its class and no query
    x = np.array([[4, 0, 0, 0], [4, 1, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], dtype=np.float32)
    labels = np.array([0, 0, 1, 1, 2])
    assert nearest(form(x), k=3).tolist() == [[1, 2, 4], [2, 0, 4], [1, 0, 4], [-1, -1, -1], [0, 1, 2]]
    assert rates(image_recall(form(x), labels, ks=(1, 3))) == {1: 1 / 4, 3: 2 / 4}
    gallery, of_gallery = form(np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 5, 0]], dtype=np.float32)), [1, 0, 2]
    found = image_recall(form(x), labels, gallery, np.array(of_gallery), ks=(1, 2))
    assert rates(found) == {1: 3 / 5, 2: 4 / 5}


def test_scales_do_not_matter_and_a_copy_is_the_nearest():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)).astype(np.float32)
    twice = np.concatenate([x, 100 * x])
    assert nearest(twice, k=1)[:, 0].tolist() == [*range(40, 80), *range(40)]
    assert rates(image_recall(twice, np.tile(np.arange(40), 2), ks=(1,))) == {1: 1.0}
    assert rates(image_recall(x, np.arange(40), x, np.arange(40), ks=(1,))) == {1: 1.0}
    assert not len(image_recall(x, np.arange(40))[1])


def test_recall_grows_with_k_and_is_chance_for_noise():
    rng = np.random.default_rng(0)
    found = rates(image_recall(rng.normal(size=(1000, 20)), rng.integers(0, 10, 1000), ks=(1, 5, 10)))
    assert found[1] == pytest.approx(0.1, abs=0.03)
    assert found[5] == pytest.approx(1 - 0.9**5, abs=0.05)
    assert found[1] < found[5] < found[10]


def test_images_find_texts_and_texts_images():
    images = np.array([[1.0, 0, 0], [0, 1, 0.9], [0, 0, 1]], dtype=np.float32)
    texts = np.array([[1.0, 0.1, 0], [0, 0.9, 1], [0.3, 0.2, 1]], dtype=np.float32)
    found = text_recall(images, texts, ks=(1, 2))
    # image 2 is nearer to text 2 (cos 0.94) than to text 1 (0.74); text 1 is nearer to image 1, text 2 to image 2
    assert rates(found.image_to_text) == {1: 1, 2: 1}
    assert rates(found.text_to_image) == {1: 1, 2: 1}
    swapped = text_recall(images, texts[[0, 2, 1]], ks=(1, 2))
    assert rates(swapped.image_to_text) == {1: pytest.approx(1 / 3), 2: 1}


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_equal_texts_count_once(form):
    images = form(np.array([[1, 0], [1, 0.2], [0.3, 1], [0, 1.0]], dtype=np.float32))
    texts = form(np.array([[1, 0.1], [1, 0.1], [0, 1], [0.4, 1]], dtype=np.float32))
    found = text_recall(images, texts, same=np.array([5, 5, 2, 9]), ks=(1, 2))
    # the texts in question are those of images 0, 2 and 3; image 2 is nearest to text 3, and image 3 to text 2
    assert rates(found.image_to_text) == {1: 0.5, 2: 1}
    assert rates(found.text_to_image) == {1: pytest.approx(1 / 3), 2: 1}
    apart = text_recall(images, texts, ks=(1,))
    assert rates(apart.image_to_text) == {1: 0.25}


def test_lifts():
    def first(n: int) -> np.ndarray:
        return np.arange(10) < n

    raw, codes = {1: first(5), 5: first(0)}, {1: first(6), 5: first(2)}
    scores = recalls("retrieval", "pictures", raw, raw, codes)
    found = {(s.metric, s.setting): s for s in scores}
    assert len(found) == len(scores) == 8
    values = [found["retrieval_" + name, f"k={k}"].value for k in (1, 5) for name in ("raw", "codes", "lift")]
    assert values[:5] == pytest.approx([0.5, 0.6, 1.2, 0.0, 0.2])
    assert np.isnan(values[5])
    lift = found["retrieval_lift", "k=1"]
    assert lift.low < 1.2 < lift.high
    assert lift.n == 10


def test_refuses_what_does_not_fit():
    x = np.ones((4, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="Queries have 3 dimensions, the gallery 2"):
        nearest(x, x[:, :2])
    with pytest.raises(ValueError, match="4 rows of features, but 3 labels"):
        image_recall(x, np.zeros(3))
    with pytest.raises(ValueError, match="give both or neither"):
        image_recall(x, np.zeros(4), x)
    with pytest.raises(ValueError, match="4 rows of texts, but 3 labels"):
        text_recall(x[:3], x)
    x[2, 1] = np.nan
    for form in (x, sparse.csr_array(x)):
        with pytest.raises(ValueError, match="Row 2 holds values that are not finite"):
            nearest(form)
