"""Probes by gradient steps: Adam's formulas in NumPy, and what a probe predicts."""

import numpy as np
import pytest
from scipy import sparse, special

from sae_lightning.metrics import probes
from sae_lightning.metrics.descent import RECIPES, descend


def case(n: int = 90, d: int = 5, n_classes: int = 3):
    draw = np.random.default_rng(0)
    y = np.arange(n) % n_classes
    x = draw.normal(size=(n, d)) + 2 * np.eye(n_classes, d)[y]
    return np.where(draw.random((n, d)) < 0.3, 0, x), y


def by_hand(x, y, n_classes, lr, decay, epochs, decoupled):
    """Adam [Kingma & Ba 2015, Algorithm 1] over all samples, with an L2 term, or decoupled decay."""
    one, w = np.c_[x, np.ones(len(x))], np.zeros((n_classes, x.shape[1] + 1))
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, epochs + 1):
        p = special.softmax(one @ w.T, axis=1) - np.eye(n_classes)[y]
        g = p.T @ one / len(x) + (0 if decoupled else decay * w)
        w = w * (1 - lr * decay) if decoupled else w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w[:, :-1], w[:, -1]


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize(("solver", "settings"), [("adam", (1e-2, 1e-4, 50, False)), ("adamw", (1e-3, 1e-2, 50, True))])
def test_is_adam_of_the_papers_settings(solver, settings, form):
    x, y = case()
    for found, expected in zip(descend(form(x), y, 3, solver), by_hand(x, y, 3, *settings), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_batches_are_those_of_the_papers(monkeypatch):
    assert [(name, recipe.batch, recipe.plateau) for name, recipe in RECIPES.items()] == [
        ("adam", 2048, False), ("adamw", 256, True)
    ]  # fmt: skip
    monkeypatch.setitem(RECIPES, "adam", RECIPES["adam"]._replace(batch=16))
    x, y = case()
    assert not np.allclose(descend(x, y, 3, "adam")[0], by_hand(x, y, 3, 1e-2, 1e-4, 50, False)[0])
    with pytest.raises(ValueError, match="solver=sgd"):
        descend(x, y, 3, "sgd")


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_probe_by_it_predicts_and_is_read_like_any_other(n_classes):
    x, y = case(n_classes=n_classes)
    model = probes.fit(x, y + 4, solver="adam")
    weight, bias = descend(x, y, n_classes, "adam")
    assert (probes.predict(model, x) == (x @ weight.T + bias).argmax(1) + 4).all()
    p = np.exp(probes.log_probabilities(probes.logits(model, x)))
    np.testing.assert_allclose(p, special.softmax(x @ weight.T + bias, axis=1), rtol=1e-9)
    assert probes.accuracy(model, x, y + 4) > 0.6
