"""The statistics of bias against SciPy, statsmodels and slow counting."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import special, stats
from scipy.sparse import csr_matrix

from sae_lightning.apps.statistics import Z95, auc, excess, false_discovery, of_latents


def magnitudes(n: int = 120, d: int = 5, seed: int = 0) -> np.ndarray:
    """Sparse magnitudes with many ties, [n, d] float32."""
    rng = np.random.default_rng(seed)
    return (np.maximum(rng.normal(size=(n, d)), 0).round(1)).astype(np.float32)


def wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which of all pairs x wins, ties half, [len(x), len(y)]."""
    return (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])


def test_auc_and_p_are_those_of_the_mann_whitney_test():
    z, group = magnitudes(), np.random.default_rng(1).random(120) < 0.4
    found = auc(csr_matrix(z), group)
    theirs = stats.mannwhitneyu(z[group], z[~group], axis=0, method="asymptotic", use_continuity=False)
    np.testing.assert_allclose(found.value, theirs.statistic / (group.sum() * (~group).sum()))
    np.testing.assert_allclose(found.p, theirs.pvalue)


def test_the_interval_of_auc_is_delongs():
    z, group = magnitudes(), np.random.default_rng(1).random(120) < 0.4
    found = auc(csr_matrix(z), group)
    for i in range(z.shape[1]):
        won = wins(z[group, i], z[~group, i])
        variance = won.mean(1).var(ddof=1) / group.sum() + won.mean(0).var(ddof=1) / (~group).sum()
        half = Z95 * np.sqrt(variance)
        assert found.hi[i] - found.value[i] == pytest.approx(half)
        assert found.value[i] - found.lo[i] == pytest.approx(half)


def test_within_strata_only_pairs_of_one_stratum_count():
    rng = np.random.default_rng(2)
    z, group, strata = magnitudes(), rng.random(120) < 0.5, rng.random(120) < 0.3
    found = auc(csr_matrix(z), group, strata)
    for i in range(z.shape[1]):
        parts = [wins(z[group & (strata == s), i], z[~group & (strata == s), i]) for s in (False, True)]
        assert found.value[i] == pytest.approx(sum(p.sum() for p in parts) / sum(p.size for p in parts))


def test_a_latent_that_only_follows_the_stratum_is_not_associated_within_it():
    rng = np.random.default_rng(3)
    strata = rng.random(2000) < 0.5
    group = rng.random(2000) < np.where(strata, 0.8, 0.2)
    z = csr_matrix((strata + rng.random(2000))[:, None])
    plain, within = auc(z, group), auc(z, group, strata)
    assert plain.lo[0] > 0.7
    assert within.lo[0] < 0.5 < within.hi[0]
    assert within.p[0] > 0.01


def test_auc_of_constant_latents_and_of_one_group():
    z = csr_matrix(np.zeros((6, 2)))
    found = auc(z, np.array([True] * 3 + [False] * 3))
    assert found.value.tolist() == [0.5, 0.5]
    assert found.p.tolist() == [1, 1]
    assert np.isnan(auc(z, np.ones(6, dtype=bool)).value).all()
    with pytest.raises(ValueError, match="one group and one stratum for each of 6 images"):
        auc(z, np.ones(5, dtype=bool))


def slow_scores(z: np.ndarray, logits: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """p of statsmodels' score test of one latent, and p with the sandwich variance, counted image by image."""
    null = sm.GLM(truth.astype(float), np.ones((len(z), 1)), family=sm.families.Binomial(), offset=logits).fit(
        tol=1e-12
    )
    _, p, _ = null.model.score_test(null.params, exog_extra=z[:, None].astype(float))
    fitted = special.expit(logits + null.params[0])
    weight = fitted * (1 - fitted)
    moved = z - (weight * z).sum() / weight.sum()
    each = moved * (truth - fitted)
    return float(np.squeeze(p)), float(2 * stats.norm.sf(abs(each.sum()) / np.sqrt((each**2).sum())))


@pytest.mark.parametrize("wrong", [0.7, 3.0])
def test_excess_is_a_score_test_with_the_larger_of_two_variances(wrong):
    rng = np.random.default_rng(4)
    z, logits = magnitudes(300), wrong * rng.normal(size=300)
    truth = rng.random(300) < special.expit(rng.normal(size=300) - 0.7 * z[:, 0])
    found = excess(csr_matrix(z), logits, truth)
    for i in range(z.shape[1]):
        assert found.p[i] == pytest.approx(max(slow_scores(z[:, i], logits, truth)), rel=1e-5)
        half = Z95 * abs(found.value[i]) / stats.norm.isf(found.p[i] / 2)
        assert found.hi[i] - found.value[i] == pytest.approx(half, rel=1e-4)


def test_a_rare_latent_on_a_few_sure_mistakes_is_no_certainty():
    logits = np.concatenate([np.full(50, -6.0), np.full(50, 6.0)])
    truth = logits > 0
    truth[[0, 60]] = ~truth[[0, 60]]
    z = np.zeros((100, 1))
    z[[0, 1, 2, 70]] = 1
    assert excess(csr_matrix(z), logits, truth).p[0] > 0.05


def test_excess_estimates_what_was_given_too_much_and_covers_it():
    covered, estimates = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        z, logits = magnitudes(800, 1, seed), rng.normal(size=800)
        per_deviation = 0.3 / z.std()
        truth = rng.random(800) < special.expit(logits - per_deviation * z[:, 0])
        found = excess(csr_matrix(z), logits, truth)
        covered += bool(found.lo[0] <= 0.3 <= found.hi[0])
        estimates.append(found.value[0])
    assert covered >= 34
    assert np.mean(estimates) == pytest.approx(0.3, abs=0.04)


def test_excess_is_zero_on_average_for_a_latent_that_deserves_its_weight():
    p = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        z = magnitudes(200, 1, seed)
        logits = 1.5 * z[:, 0] + rng.normal(size=200) - 0.6
        p.append(excess(csr_matrix(z), logits, rng.random(200) < special.expit(logits)).p[0])
    assert 0.02 <= np.mean(np.array(p) < 0.1) <= 0.18


def test_excess_ignores_another_share_of_the_classes_and_constant_latents():
    rng = np.random.default_rng(5)
    z, logits = np.concatenate([magnitudes(400, 1), np.ones((400, 1)), np.zeros((400, 1))], 1), rng.normal(size=400)
    truth = rng.random(400) < special.expit(logits)
    ours, shifted = (excess(csr_matrix(z), logits + c, truth) for c in (0.0, 3.0))
    assert ours.value[0] == pytest.approx(shifted.value[0])
    assert np.isnan(ours.value[1:]).all()
    with pytest.raises(ValueError, match="images of both classes"):
        excess(csr_matrix(z), logits, np.ones(400, dtype=bool))


def test_false_discovery_leaves_out_what_is_unknown():
    p = np.array([0.01, np.nan, 0.04, 0.03])
    q = false_discovery(p)
    assert np.isnan(q[1])
    np.testing.assert_allclose(q[[0, 2, 3]], stats.false_discovery_control(p[[0, 2, 3]]))
    assert np.isnan(false_discovery(np.array([np.nan]))).all()


def test_latents_that_are_not_tested_have_no_figures():
    found = of_latents(auc(csr_matrix(magnitudes()), np.arange(120) < 60), np.array([True, False, True, True, True]))
    assert all(np.isnan(each[1]) and not np.isnan(each[0]) for each in found)
