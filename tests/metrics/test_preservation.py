"""What a raw probe, and probes of their own, know of reconstructions and codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from sae_lightning.metrics import probes
from sae_lightning.metrics.preservation import RawProbe, fit_raw, preservation
from tests.metrics.test_probes import clusters


def values(scores) -> dict[str, float]:
    assert all(score.setting == "" for score in scores)
    found = {score.metric: score.value for score in scores}
    assert len(found) == len(scores)
    return found


def blurred(x: np.ndarray, amount: float = 1.5, seed: int = 3) -> np.ndarray:
    return (0.7 * x + amount * np.random.default_rng(seed).normal(size=x.shape)).astype(np.float32)


@pytest.mark.parametrize("classes", [2, 5])
def test_equals_the_definitions(classes):
    x, y = clusters(400, classes=classes)
    x, y = blurred(x, 0.8, seed=1), y + 3
    reconstruction = blurred(x)
    codes = np.maximum(np.concatenate([x, -x], axis=1) - 0.3, 0)
    found = values(preservation(fit_raw(x, y), reconstruction, y, sparse.csr_array(codes), retrain=True))

    train, test = train_test_split(np.arange(400), test_size=0.2, random_state=42, stratify=y)

    def own(features):
        model = LogisticRegression(max_iter=1000).fit(features[train].astype(np.float64), y[train])
        return model, np.mean([model.predict(features[[i]])[0] == y[i] for i in test])

    phi, raw = own(x)
    p, q = phi.predict_proba(x[test]), phi.predict_proba(reconstruction[test])
    kl = np.mean([sum(a * np.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)])
    right = np.mean(phi.classes_[q.argmax(1)] == y[test])
    assert 0.5 < right < raw < 1
    _, of_codes = own(codes)
    _, retrained = own(reconstruction)
    assert found == pytest.approx(
        {
            "preservation": right / raw, "accuracy_raw": raw, "accuracy_reconstruction": right, "lp_kl": kl,
            "lp_accuracy": np.mean(p.argmax(1) == q.argmax(1)),
            "lp_accuracy_std": np.std(p.argmax(1) == q.argmax(1)),
            "lp_kl_std": np.std((p * np.log(p / q)).sum(1)), "accuracy_codes": of_codes,
            "codes_lift": of_codes / raw, "accuracy_reconstruction_retrained": retrained,
            "preservation_retrained": retrained / raw, "probes_converged": 1,
        },
        rel=1e-3,
    )  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_the_features_themselves_are_preserved_exactly(seed, classes):
    x, y = clusters(120, classes=classes, seed=seed)
    found = values(preservation(fit_raw(x, y), torch.from_numpy(x), y, retrain=True))
    assert found["preservation"] == found["preservation_retrained"] == found["lp_accuracy"] == 1
    assert found["lp_kl"] == 0
    assert "accuracy_codes" not in found


def test_a_reconstruction_by_one_constant_is_a_guess():
    x, y = clusters(classes=4)
    probe = fit_raw(x, y)
    found = values(preservation(probe, np.zeros_like(x), y))
    assert found["accuracy_reconstruction"] == (y[probe.test] == probe.model.intercept_.argmax()).mean()
    assert found["lp_kl"] > 0.1


def test_the_raw_probe_may_be_kept_and_its_split_given():
    x, y = clusters()
    split = probes.split(y, seed=7)
    probe = fit_raw(x, y, split)
    assert isinstance(probe, RawProbe)
    assert probe.test.tolist() == split.test.tolist()
    assert probe.right.mean() == probes.accuracy(probe.model, x[split.test], y[split.test])
    assert preservation(probe, blurred(x), y) == preservation(probe, blurred(x), y)


def test_a_probe_that_is_never_right_has_no_ratio():
    x, y = clusters(200, classes=2)
    probe = fit_raw(x, y)
    found = values(preservation(probe._replace(right=np.zeros_like(probe.right)), x, y, sparse.csr_array(np.abs(x))))
    assert np.isnan(found["preservation"])
    assert np.isnan(found["codes_lift"])


def test_probes_that_stopped_early_are_counted():
    x, y = clusters()
    assert values(preservation(fit_raw(x, y, max_iter=1), x, y))["probes_converged"] == 0
    assert values(preservation(fit_raw(x, y), x, y, retrain=True, max_iter=1))["probes_converged"] == 0.5


def test_refuses_what_does_not_fit():
    x, y = clusters()
    probe = fit_raw(x, y)
    with pytest.raises(ValueError, match="299 rows of raw, but 300 labels"):
        fit_raw(x[1:], y)
    with pytest.raises(ValueError, match="299 rows of reconstruction, but 300 labels"):
        preservation(probe, x[1:], y)
    with pytest.raises(ValueError, match="299 rows of codes, but 300 labels"):
        preservation(probe, x, y, x[1:])
    with pytest.raises(ValueError, match="fitted on 12 dimensions, but the reconstruction has 11"):
        preservation(probe, x[:, 1:], y)
