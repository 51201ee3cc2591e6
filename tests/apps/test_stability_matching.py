"""Matching by activation equals NumPy's correlations and SciPy's dense assignment, by blocks and by candidates too."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix

from sae_lightning.apps.stability import activations as stability_matching
from sae_lightning.apps.stability.activations import (
    activations,
    class_correlation,
    correlation,
    match,
    paired_correlation,
)


def random_codes(n: int, d: int, seed: int, share: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return ((rng.random((n, d)) + 0.1) * (rng.random((n, d)) < share)).astype(np.float32)


def pearson(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Correlations of all columns by NumPy, 0 for columns that do not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = np.corrcoef(one.astype(np.float64).T, two.astype(np.float64).T)
    return np.nan_to_num(whole[: one.shape[1], one.shape[1] :])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(3, 40), st.integers(1, 12), st.integers(1, 12), st.floats(0.05, 1))
def test_correlations_are_those_of_the_dense_codes(seed, n, d1, d2, share):
    one, two = random_codes(n, d1, seed, share), random_codes(n, d2, seed + 1, share)
    one[:, 0] = 0.1  # fires always alike
    a, b = activations(csr_matrix(one)), activations(csr_matrix(two))
    expected = pearson(one, two)
    np.testing.assert_allclose(correlation(a, b), expected, atol=1e-9)
    rows = np.arange(d1)[::2]
    np.testing.assert_allclose(correlation(a, b, rows), expected[::2], atol=1e-9)
    i, j = np.arange(d1), np.arange(d1) % d2
    np.testing.assert_allclose(paired_correlation(a, b, i, j), expected[i, j], atol=1e-9)


def test_a_large_offset_costs_no_digits():
    one, two = random_codes(50, 4, 0, 1.0), random_codes(50, 4, 1, 1.0)
    shifted = activations(csr_matrix((one + 1000).astype(np.float64)))
    np.testing.assert_allclose(
        correlation(shifted, activations(csr_matrix(two))), pearson(one + 1000.0, two), atol=1e-6
    )


def test_class_correlation_is_the_mean_over_all_shuffles_within_classes():
    labels = np.array([0, 1, 0, 1, 1])
    one, two = random_codes(5, 3, 2, 0.8), random_codes(5, 4, 3, 0.8)
    zeros, ones = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    total = []
    for p in permutations(zeros):
        for q in permutations(ones):
            order = np.empty(5, dtype=int)
            order[zeros], order[ones] = p, q
            total.append(pearson(one, two[order]))
    a, b = activations(csr_matrix(one), labels), activations(csr_matrix(two), labels)
    np.testing.assert_allclose(class_correlation(a, b), np.mean(total, 0), atol=1e-9)
    np.testing.assert_allclose(class_correlation(a, b, np.array([2])), np.mean(total, 0)[2:], atol=1e-9)


def test_shuffled_images_and_chosen_latents():
    one, two = random_codes(30, 5, 4), random_codes(30, 6, 5)
    order, some = np.random.default_rng(0).permutation(30), np.array([4, 1])
    a, b = activations(csr_matrix(one)), activations(csr_matrix(two)).shuffled(order)
    np.testing.assert_allclose(correlation(a, b), pearson(one, two[order]), atol=1e-9)
    np.testing.assert_allclose(correlation(a, b.take(some)), pearson(one, two[order][:, some]), atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 25), st.integers(1, 25), st.booleans())
def test_matching_equals_the_dense_assignment(seed, n, m, sparse):
    values = np.random.default_rng(seed).uniform(-1, 1, (n, m))
    found = match(lambda rows: values[rows], n, m, candidates=25, dense=0 if sparse else 10**9)
    best = values[linear_sum_assignment(values, maximize=True)].sum()
    assert found.similarity.sum() == pytest.approx(best)
    assert len(found.first) == len(set(found.second.tolist())) == min(n, m)
    assert found.first.tolist() == sorted(set(found.first.tolist()))
    np.testing.assert_array_equal(found.similarity, values[found.first, found.second])
    np.testing.assert_array_equal(found.nearest_first, values.max(1))
    np.testing.assert_array_equal(found.nearest_second, values.max(0))


@pytest.mark.parametrize(("n", "m"), [(120, 120), (80, 120), (120, 80)])
def test_a_few_candidates_in_blocks_come_near_the_optimum(n, m, monkeypatch):
    monkeypatch.setattr(stability_matching, "BLOCK", 7 * m)  # seven rows at once
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.2, (n, m)).clip(-1, 1)
    planted = min(n, m) // 2
    values[np.arange(planted), rng.permutation(m)[:planted]] = 0.9
    best = values[linear_sum_assignment(values, maximize=True)].mean()
    found = match(lambda rows: values[rows], n, m, candidates=8, dense=0)
    assert len(found.first) == len(set(found.second.tolist())) == min(n, m)
    assert best - 0.02 < found.similarity.mean() <= best + 1e-12
    np.testing.assert_array_equal(found.similarity, values[found.first, found.second])


def test_latents_that_all_want_one_partner_share_out_the_rest():
    values = np.tile(np.array([0.9, 0.5, -0.2, -0.1]), (4, 1)) + 0.01 * np.eye(4)
    found = match(lambda rows: values[rows], 4, 4, candidates=1, dense=0)
    assert sorted(found.second.tolist()) == [0, 1, 2, 3]


def test_a_shuffled_copy_of_the_codes_is_recovered():
    codes = random_codes(60, 15, 6)
    order = np.random.default_rng(1).permutation(15)
    a, b = activations(csr_matrix(codes)), activations(csr_matrix(3 * codes[:, order]))
    found = match(lambda rows: correlation(a, b, rows), 15, 15)
    assert order[found.second].tolist() == list(range(15))
    np.testing.assert_allclose(found.similarity, 1)


def test_refuses_an_empty_dictionary():
    with pytest.raises(ValueError, match="two dictionaries with latents; got 0 and 3"):
        match(lambda rows: np.empty((0, 3)), 0, 3)
