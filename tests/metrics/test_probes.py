"""Probes equal scikit-learn's, on both engines and from dense and sparse features."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from sae_lightning.metrics import logistic, probes


def clusters(n: int = 300, d: int = 12, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))
    return x.astype(np.float32), y


@pytest.fixture(autouse=True)
def one_thread():
    """Products as small as these only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on(monkeypatch, engine: str) -> None:
    """Fit by PyTorch on the CPU, as it is done on an accelerator."""
    if engine == "torch":
        monkeypatch.setattr(probes, "SMALL", 0)


def test_the_split_is_scikit_learns_and_each_class_is_divided():
    labels = np.repeat([3, 0, 7], [50, 30, 20])
    train, test = probes.split(labels)
    expected = train_test_split(np.arange(100), test_size=0.2, random_state=42, stratify=labels)
    assert train.tolist() == sorted(expected[0])
    assert test.tolist() == sorted(expected[1])
    assert np.unique(labels[test], return_counts=True)[1].tolist() == [6, 10, 4]
    assert probes.split(torch.from_numpy(labels)).test.tolist() == test.tolist()
    assert probes.split(labels, seed=1).test.tolist() != test.tolist()


def test_a_split_that_cannot_be_stratified_says_why():
    with pytest.raises(ValueError, match=r"2 of 4 classes have a single image \(the first is class 5\)"):
        probes.split(np.array([0, 0, 5, 1, 1, 6]))
    with pytest.raises(ValueError, match="20 images is 4 held out, but a stratified split of 5 classes needs 5"):
        probes.split(np.repeat(np.arange(5), 4))
    with pytest.raises(ValueError, match="needs 10 images or more in each part"):
        probes.split(np.repeat(np.arange(10), 2), test_share=0.9)


@pytest.mark.parametrize(
    ("rare", "out"),
    [
        ([7], [7]),  # one picture
        ([7, 8, 9, 9], [7, 8]),
        (np.repeat(np.arange(10, 40), 2), range(10, 40)),  # more classes than a fifth of the images
        ([7, *np.repeat(np.arange(10, 40), 2), *[50] * 5], [7, *range(10, 40)]),
    ],
)
def test_classes_with_too_few_images_are_left_out_and_the_rest_is_split(rare, out):
    common = np.repeat([0, 1, 2, 3], 20)
    labels = np.random.default_rng(0).permutation(np.concatenate([common, rare]))
    found = probes.split(labels)
    assert probes.left_out(labels, found).tolist() == list(out)
    kept = np.flatnonzero(~np.isin(labels, list(out)))
    expected = train_test_split(kept, test_size=0.2, random_state=42, stratify=labels[kept])
    assert [part.tolist() for part in found] == [sorted(part) for part in expected]


@pytest.mark.parametrize("engine", ["scikit-learn", "torch"])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("form", ["float32", "float16", "tensor", "csr_array", "csr_matrix"])
def test_a_probe_is_scikit_learns(form, classes, engine, monkeypatch):
    on(monkeypatch, engine)
    x, y = clusters(classes=classes)
    if form.startswith("csr"):
        x = np.where(x > 0.5, x, 0)
        x[:, 4] = 0  # silent
    if form == "float16":
        x = x.astype(np.float16).astype(np.float32)
    reference = LogisticRegression(C=0.3, tol=1e-4 if engine == "scikit-learn" else 1e-7).fit(x.astype(float), y * 10)
    forms = {
        "float32": lambda: x, "float16": lambda: x.astype(np.float16), "tensor": lambda: torch.from_numpy(x),
        "csr_array": lambda: sparse.csr_array(x), "csr_matrix": lambda: sparse.csr_matrix(x),
    }  # fmt: skip
    given = forms[form]()
    model = probes.fit(given, torch.from_numpy(y * 10), C=0.3, max_iter=200)
    assert model.converged_
    assert 2 < model.n_iter_[0] <= 40
    np.testing.assert_allclose(model.coef_, reference.coef_, atol=1e-2)
    np.testing.assert_allclose(model.intercept_, reference.intercept_, atol=2e-2)
    z = probes.logits(model, given)
    np.testing.assert_allclose(z, reference.decision_function(x), atol=3e-2)
    np.testing.assert_allclose(np.exp(probes.log_probabilities(z)), reference.predict_proba(x), atol=2e-3)
    assert (probes.predict(model, given) != reference.predict(x)).sum() <= (engine == "torch")
    assert probes.accuracy(model, given, y * 10) == pytest.approx(reference.score(x, y * 10), abs=1.1 / len(y))
    assert isinstance(model, LogisticRegression)
    assert (model.predict(x) == probes.predict(model, given)).all()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("as_sparse", [False, True])
def test_the_objective_is_its_formula_and_the_gradient_its_slope(classes, as_sparse, monkeypatch):
    for name, few in (("BLOCK", 40), ("CACHE", 15), ("TILE", 2)):  # some blocks of images, and of classes
        monkeypatch.setattr(logistic, name, few)
    x, y = clusters(30, 4, classes)
    x = np.where(x > 0, x, 0).astype(np.float64)
    given = sparse.csr_array(x) if as_sparse else x
    function = (
        logistic.Multinomial(given, y, classes, 0.1, "cpu")
        if classes > 2
        else logistic.Binary([given], y[None] == 1, 0.1, "cpu")
    )
    rng = np.random.default_rng(1)
    coef, intercept = (
        rng.normal(size=(classes if classes > 2 else 1, 4)),
        rng.normal(size=classes if classes > 2 else 1),
    )
    w = function.flat(coef, intercept)
    assert [part.tolist() for part in function.found(w)] == [coef.tolist(), intercept.tolist()]
    loss = 0.0
    for row, label in zip(x, y, strict=True):
        z = coef @ row + intercept
        z = z if classes > 2 else np.array([0, z[0]])
        loss -= z[label] - np.log(np.exp(z).sum())
    value, gradient = function(w)
    assert value.item() == pytest.approx(loss / 30 + 0.05 * (coef**2).sum(), rel=1e-12)
    for i in range(w.numel()):
        step = torch.zeros_like(w)
        step[0, i] = 1e-6
        slope = (function(w + step)[0] - function(w - step)[0]).item() / 2e-6
        assert gradient[0, i].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_warm_start_ends_at_the_same_optimum_in_fewer_steps(classes, form, monkeypatch):
    monkeypatch.setattr(probes, "SMALL", 0)
    monkeypatch.setattr(probes, "tolerance", lambda share: 1e-6)
    x, y = clusters(classes=classes)
    x = np.where(x > 0, x, 0) * np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0.1, 0.1], np.float32)  # one is silent
    start = probes.fit(form(x[:, :10]), y)
    cold, warm = (probes.fit(form(x), y, start=first) for first in (None, start))
    assert cold.converged_
    assert warm.converged_
    assert warm.n_iter_ < cold.n_iter_
    exact = LogisticRegression(tol=1e-8).fit(x.astype(float), y)
    for model in (cold, warm):
        np.testing.assert_allclose(model.coef_, exact.coef_, atol=1e-3)
        np.testing.assert_allclose(model.predict_proba(x), exact.predict_proba(x), atol=1e-4)


def test_probes_that_are_fitted_at_once_are_those_fitted_one_by_one(monkeypatch):
    x, y = clusters()
    x, rng = np.where(x > 0.5, x, 0), np.random.default_rng(1)
    columns, positive = [rng.permutation(12)[:6] for _ in range(5)], [y == c for c in range(5)]
    monkeypatch.setattr(probes, "ENTRIES", 500)  # two at a time
    none = probes.fit_each((sparse.csc_array(x[:, c]) for c in columns), positive, 1.0, 500, "cpu", [None] * 5)
    for model, c, truth in zip(none, columns, positive, strict=True):
        exact = LogisticRegression(tol=1e-8).fit(x[:, c].astype(float), truth)
        assert model.converged_
        np.testing.assert_allclose(model.coef_, exact.coef_, atol=1e-2)
        assert (probes.predict(model, x[:, c]) == exact.predict(x[:, c])).all()
    few = probes.fit_each((sparse.csc_array(x[:, c]) for c in columns), positive, 1.0, 2, "cpu", [None] * 5)
    assert [(model.converged_, *model.n_iter_) for model in few] == [(False, 2)] * 5


@pytest.mark.slow
@pytest.mark.parametrize("as_sparse", [False, True])
def test_both_engines_agree_on_real_pictures(as_sparse, monkeypatch):
    x, y = load_digits(return_X_y=True)
    x = (x / 4).astype(np.float32)
    x = sparse.csr_array(x) if as_sparse else x
    train, test = probes.split(y)
    objective = logistic.Multinomial(x[train].astype(np.float64), y[train], 10, 1 / len(train), "cpu")
    exact = LogisticRegression(tol=1e-8, max_iter=10_000).fit(x[train].astype(np.float64), y[train])

    def loss(model) -> float:
        return objective(objective.flat(model.coef_.astype(np.float64), model.intercept_))[0].item()

    for engine in ("scikit-learn", "torch"):
        on(monkeypatch, engine)
        model = probes.fit(x[train], y[train])
        assert model.converged_
        assert loss(model) == pytest.approx(loss(exact), rel=5e-3)
        assert probes.accuracy(model, x[test], y[test]) == pytest.approx(exact.score(x[test], y[test]), abs=1.01 / 360)
        assert (probes.predict(model, x[test]) == exact.predict(x[test])).mean() > 0.99


@pytest.mark.parametrize("engine", ["scikit-learn", "torch"])
def test_stopping_early_is_told_without_a_warning(engine, monkeypatch):
    on(monkeypatch, engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model = probes.fit(*clusters(), max_iter=2)
    assert not model.converged_
    assert model.n_iter_.tolist() == [2]


def test_logits_in_blocks_and_by_torch_are_the_same(monkeypatch):
    for classes in (2, 5):
        x, y = clusters(classes=classes)
        for form in (x, sparse.csr_array(np.where(x > 0, x, 0))):
            model = probes.fit(form, y)
            z, found = probes.logits(model, form), probes.predict(model, form)
            with monkeypatch.context() as patch:
                patch.setattr(probes, "BLOCK", 35)
                assert (probes.predict(model, form) == found).all()
                # a device that is not "cpu" by name but has its memory: the path of accelerators
                patch.setattr(torch, "device", lambda _: type("Device", (), {"type": "other"}))
                np.testing.assert_allclose(probes.logits(model, form, "cpu"), z, atol=1e-5)


def test_codes_that_are_all_silent_leave_the_intercept():
    model = probes.fit(sparse.csr_array((6, 9), dtype=np.float32), np.array([1, 1, 1, 1, 2, 2]))
    assert model.coef_.tolist() == np.zeros((1, 9)).tolist()
    assert probes.predict(model, sparse.csr_array((2, 9), dtype=np.float32)).tolist() == [1, 1]


def test_images_of_unknown_classes_count_as_wrong():
    x, y = clusters(classes=3)
    model = probes.fit(x[y < 2], y[y < 2])
    known = probes.accuracy(model, x[y < 2], y[y < 2])
    assert probes.accuracy(model, x, y) == pytest.approx(known * (y < 2).mean())


def test_refuses_what_does_not_fit():
    x, y = clusters()
    with pytest.raises(ValueError, match="300 rows of features, but 299 labels"):
        probes.fit(x, y[1:])
    with pytest.raises(ValueError, match="two classes or more; got 300 images of 1"):
        probes.fit(x, np.zeros(300))
    with pytest.raises(ValueError, match="one row an image; got the shape"):
        probes.fit(x[:, :, None], y)
    for bad in (np.nan, np.inf):
        x[7, 3] = bad
        for form in (x, sparse.csr_array(x)):
            with pytest.raises(ValueError, match="not finite"):
                probes.fit(form, y)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_ordered_pairs(pairs):
    scores, positive = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    won = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    if won:
        assert probes.auc(scores, positive) == pytest.approx(np.mean(won))
        assert probes.auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    else:
        assert np.isnan(probes.auc(scores, positive))


def test_the_mean_auc_is_scikit_learns_and_leaves_absent_classes_out():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 60)
    y = rng.integers(0, 4, 60)
    names = np.array([2, 4, 6, 8])
    expected = roc_auc_score(y, p, multi_class="ovr", average="macro")
    assert probes.aucs(p, names[y], names).mean() == pytest.approx(expected)
    each = [roc_auc_score(y[y > 0] == c, p[y > 0, c]) for c in (1, 2, 3)]
    assert probes.aucs(p[y > 0], names[y[y > 0]], names).mean() == pytest.approx(np.mean(each))
    assert not len(probes.aucs(p, np.full(60, 2), names))


def test_a_ratio_of_nothing_is_nan():
    assert probes.ratio(0.3, 0.6) == 0.5
    assert np.isnan(probes.ratio(0.3, 0.0))
