"""Sparse probing equals its definition in scikit-learn, and so do the F statistics that rank the latents."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from sae_lightning.metrics import probes
from sae_lightning.metrics.sparse_probing import (
    class_sums,
    f_statistics,
    f_statistics_of,
    ranked,
    read_out,
    sparse_probing,
)


def pooled_codes(n: int = 300, d_sae: int = 40, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Dense non-negative codes, a tenth to a half of them active, some latents telling classes; and labels."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes).repeat(10), rng.integers(0, classes, n - 10 * classes)])
    chance = rng.uniform(0.05, 0.4, (classes, d_sae))
    chance[np.arange(d_sae) % classes, np.arange(d_sae)] += rng.uniform(0, 0.5, d_sae)
    codes = rng.gamma(2.0, size=(n, d_sae)) * (rng.random((n, d_sae)) < chance[labels])
    codes[:, 5] = 0
    return codes.astype(np.float32), labels


def exact_f(codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return f_classif(codes.astype(np.float64), labels)[0]


def best(f: np.ndarray) -> list[int]:
    return sorted(range(len(f)), key=lambda latent: (-f[latent] if not np.isnan(f[latent]) else np.inf, latent))


def values(scores) -> dict[tuple[str, str], float]:
    found = {(score.metric, score.setting): score.value for score in scores}
    assert len(found) == len(scores)
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(70, 120))
def test_f_statistics_are_scikit_learns(seed, classes, n):
    codes, labels = pooled_codes(n, 15, classes, seed)
    sums = class_sums(sparse.csr_array(codes), labels + 2)
    np.testing.assert_allclose(f_statistics(sums), exact_f(codes, labels), rtol=1e-8, atol=1e-10)
    for c in range(classes):
        np.testing.assert_allclose(f_statistics_of(sums, c), exact_f(codes, labels == c), rtol=1e-8, atol=1e-10)
    assert ranked(f_statistics(sums)).tolist() == best(exact_f(codes, labels))


def test_constant_latents_come_last_and_perfect_ones_first():
    labels = np.repeat([0, 1, 2], 7)
    noise = np.random.default_rng(0).random(21)
    codes = np.stack([np.zeros(21), noise, np.full(21, 0.1), (labels == 1) * 0.3, noise, (labels == 2) * 0.7], axis=1)
    f = f_statistics(class_sums(codes, labels))
    assert np.isnan(f).tolist() == [True, False, True, False, False, False]
    assert np.isinf(f).tolist() == [False, False, False, True, False, True]
    assert ranked(f).tolist() == [3, 5, 1, 4, 0, 2]
    one = f_statistics_of(class_sums(codes, labels), 1)
    assert ranked(one).tolist()[:1] == [3]
    assert np.isfinite(one[5])
    # one image a class: nothing varies within
    assert np.isinf(f_statistics(class_sums(np.array([[1.0], [2.0]]), np.array([0, 1])))).all()


@pytest.mark.parametrize("classes", [2, 4])
def test_joint_probing_equals_the_definition(classes):
    codes, labels = pooled_codes(classes=classes)
    labels = labels * 3 + 1
    found = values(sparse_probing(sparse.csr_matrix(codes), labels, budgets=(1, 2, 8, 32, 64)))
    assert {setting for _, setting in found} == {"", "k=1", "k=2", "k=8", "k=32"}  # 40 latents have no 64
    train, test = train_test_split(np.arange(300), test_size=0.2, random_state=42, stratify=labels)
    order = best(exact_f(codes[train], labels[train]))
    for k in (1, 2, 8, 32):
        x = codes[:, order[:k]].astype(np.float64)
        model = LogisticRegression(max_iter=500).fit(x[train], labels[train])
        p = model.predict_proba(x[test])
        areas = [roc_auc_score(labels[test] == name, p[:, c]) for c, name in enumerate(model.classes_)]
        assert found["sparse_probing_auc", f"k={k}"] == pytest.approx(np.mean(areas), abs=2e-3)
        assert found["sparse_probing_accuracy", f"k={k}"] == pytest.approx(model.score(x[test], labels[test]), abs=1e-9)
        assert found["sparse_probing_converged", f"k={k}"] == 1
    assert found["sparse_probing_auc", "k=32"] > found["sparse_probing_auc", "k=1"] + 0.1
    accuracy = {k: found["sparse_probing_accuracy", f"k={k}"] for k in (1, 2, 8, 32)}
    assert found["sparse_probing_area", "k=1"] == accuracy[1]
    area = (accuracy[1] + accuracy[2]) / 2 + 6 * (accuracy[2] + accuracy[8]) / 2
    assert found["sparse_probing_area", "k=8"] == pytest.approx(area / 7)
    area += 24 * (accuracy[8] + accuracy[32]) / 2
    assert found["sparse_probing_area", "k=32"] == found["sparse_probing_area", ""] == pytest.approx(area / 31)


def test_per_class_probing_equals_the_definition():
    codes, labels = pooled_codes()
    split = probes.split(labels, seed=1)
    split = probes.Split(split.train, split.test[labels[split.test] != 2])  # a class without held-out images
    found = values(sparse_probing(codes, labels, split, (1, 4), ranking="per_class"))
    for k in (1, 4):
        areas = []
        for c in (0, 1, 3):
            columns = best(exact_f(codes[split.train], labels[split.train] == c))[:k]
            x = codes[:, columns].astype(np.float64)
            model = LogisticRegression(max_iter=500).fit(x[split.train], labels[split.train] == c)
            areas.append(roc_auc_score(labels[split.test] == c, model.decision_function(x[split.test])))
        assert found["sparse_probing_auc", f"k={k},ranking=per_class"] == pytest.approx(np.mean(areas), abs=2e-3)
        assert found["sparse_probing_converged", f"k={k},ranking=per_class"] == 1
    assert len(found) == 4


def test_ranking_looks_at_the_train_part_only():
    codes, labels = pooled_codes(classes=2)
    train, test = probes.split(labels)
    codes[test, 7] = labels[test] * 100.0  # gives the held-out classes away
    codes[train, 7] = 0
    [found] = read_out(codes[train], labels[train], codes[test], labels[test], [1])
    assert np.mean(found.aucs) < 0.95


def test_a_perfect_latent_is_enough_and_silent_ones_do_not_matter():
    labels = np.arange(60) % 2
    codes = np.zeros((60, 9))
    codes[:, 4] = labels * (1 + np.arange(60) % 5)
    codes[:, 6] = (np.arange(60) % 7) * 0.1
    scores = values(sparse_probing(codes, labels, budgets=(1, 8)))
    assert scores["sparse_probing_auc", "k=1"] == scores["sparse_probing_accuracy", "k=1"] == 1
    silent = np.concatenate([codes[:, :7], np.zeros((60, 30))], axis=1)
    wide = values(sparse_probing(silent, labels, budgets=(2, 32)))
    assert wide["sparse_probing_auc", "k=32"] == pytest.approx(wide["sparse_probing_auc", "k=2"])


@pytest.mark.parametrize("ranking", ["joint", "per_class"])
def test_large_probes_have_the_scores_of_small_ones(ranking, monkeypatch):
    codes, labels = pooled_codes()
    found = []
    for small in (1 << 30, 0):
        monkeypatch.setattr(probes, "SMALL", small)
        found.append(values(sparse_probing(codes, labels, budgets=(1, 4, 16), ranking=ranking)))
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        assert found[1][key] == pytest.approx(found[0][key], abs=3e-3), key


@pytest.mark.parametrize("ranking", ["joint", "per_class"])
def test_an_interrupted_call_goes_on_with_the_next_budget(ranking, tmp_path, monkeypatch):
    codes, labels = pooled_codes()
    expected = sparse_probing(codes, labels, budgets=(1, 4, 16), ranking=ranking)
    kept, fit, seen = tmp_path / "kept.json", probes.fit, []

    def watched(x, *args, **kwargs):
        seen.append(x.shape[1])
        if x.shape[1] == 16 and kept.is_file() and len(seen) < 12:
            raise KeyboardInterrupt
        return fit(x, *args, **kwargs)

    monkeypatch.setattr(probes, "fit", watched)
    with pytest.raises(KeyboardInterrupt):
        sparse_probing(codes, labels, budgets=(1, 4, 16), ranking=ranking, kept=kept)
    assert set(seen) == {1, 4, 16}
    seen[:] = [0] * 12
    assert sparse_probing(codes, labels, budgets=(1, 4, 16), ranking=ranking, kept=kept) == expected
    assert set(seen[12:]) == {16}


def test_probes_that_stopped_early_are_counted():
    codes, labels = pooled_codes()
    found = values(sparse_probing(codes, labels, budgets=(32,), max_iter=1))
    assert found["sparse_probing_converged", "k=32"] == 0
    found = values(sparse_probing(codes, labels, budgets=(32,), max_iter=1, ranking="per_class"))
    assert found["sparse_probing_converged", "k=32,ranking=per_class"] == 0


def test_refuses_what_does_not_fit():
    codes, labels = pooled_codes()
    with pytest.raises(ValueError, match="Unknown ranking=anova; choose one of joint, per_class"):
        sparse_probing(codes, labels, ranking="anova")
    with pytest.raises(ValueError, match="smallest budget is 64 latents, but the SAE has 40"):
        sparse_probing(codes, labels, budgets=(64, 128))
    with pytest.raises(ValueError, match=r"1 or more; got \[0, 2\]"):
        sparse_probing(codes, labels, budgets=(0, 2))
    with pytest.raises(ValueError, match="300 rows of codes, but 299 labels"):
        sparse_probing(codes, labels[1:])
