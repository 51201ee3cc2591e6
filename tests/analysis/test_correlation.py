"""Spearman's ρ and its two p agree with scipy, and the exact one with counting."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from sae_lightning.analysis.correlation import spearman

few = st.integers(3, 6).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 5), min_size=n, max_size=n)] * 2))


def counted(x, y) -> float:
    """The share of orderings of y with a ρ at least as far from 0, by scipy's ρ of each."""
    rho = abs(stats.spearmanr(x, y).statistic)
    return np.mean([abs(stats.spearmanr(x, p).statistic) >= rho - 1e-9 for p in permutations(y)])


@settings(deadline=None, max_examples=15)
@given(few)
def test_equals_scipy_and_the_count_of_orderings_with_ties(both):
    x, y = both
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    found, scipys = spearman(x, y), stats.spearmanr(x, y)
    assert found.rho == pytest.approx(scipys.statistic, abs=1e-9)
    assert found.p_t == pytest.approx(scipys.pvalue, abs=1e-7)
    assert found.exact
    if len(x) < 6:
        assert found.p == pytest.approx(counted(x, y))


@pytest.mark.slow
def test_exact_p_equals_scipys_permutation_test():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 7))
    exact = stats.permutation_test(
        (y,), lambda y: stats.spearmanr(x, y).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert spearman(x, y).p == pytest.approx(exact.pvalue)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-100, 100).map(lambda v: round(v, 3)), min_size=3, max_size=8, unique=True), st.randoms())
def test_monotone_changes_and_orders_of_pairs_change_nothing(x, random):
    y = random.sample(x, len(x))
    found = spearman(x, y)
    assert spearman(np.arctan(x), y) == found
    assert spearman(y, x) == found
    turned = spearman(x, -np.array(y))
    assert (turned.rho, turned.p) == pytest.approx((-found.rho, found.p))
    order = random.sample(range(len(x)), len(x))
    assert spearman(np.array(x)[order], np.array(y)[order]) == found
    assert 0 < found.p <= 1


@pytest.mark.parametrize(
    ("y", "rho", "p", "p_t"),
    [
        ([1, 2, 3, 4, 5], 1.0, 2 / 120, 0.0),
        ([5, 4, 3, 2, 1], -1.0, 2 / 120, 0.0),
        ([2, 1, 3, 4, 5], 0.9, 10 / 120, 0.0374),
        ([1, 1, 1, 1, 2], 0.7071, 48 / 120, 0.1817),  # ties: the outlier is at either end in 2 of 5 orderings
    ],
)
def test_five_pairs_by_hand(y, rho, p, p_t):
    found = spearman([1, 2, 3, 4, 5], y)
    assert found.n == 5
    assert (found.rho, found.p, found.p_t) == pytest.approx((rho, p, p_t), abs=1e-4)


def test_more_than_eight_pairs_take_students_t():
    x = np.arange(9.0)
    found = spearman(x, np.roll(x, 1))
    assert not found.exact
    assert found.p == found.p_t == pytest.approx(stats.spearmanr(x, np.roll(x, 1)).pvalue)


def test_rounding_makes_no_order():
    assert spearman([0.1 + 0.2, 0.3, 1], [1, 1, 2]).rho == 1


def test_pairs_without_a_value_are_left_out():
    assert spearman([1, 2, np.nan, 4, 5], [1, 2, 9, 3, np.nan]) == spearman([1, 2, 4], [1, 2, 3])


@pytest.mark.parametrize("x", [[], [1.0], [np.nan] * 3, [2.0, 2.0, 2.0]])
def test_nothing_to_correlate_is_nan(x):
    found = spearman(x, np.arange(len(x)))
    assert np.isnan([found.rho, found.p, found.p_t]).all()


def test_two_pairs_say_nothing_and_unequal_lengths_are_an_error():
    found = spearman([1, 2], [3, 4])
    assert (found.rho, found.p, found.n) == (1, 1, 2)
    assert np.isnan(found.p_t)
    with pytest.raises(ValueError, match="equal length"):
        spearman([1, 2], [1, 2, 3])
