"""Where b_pre and thresholds start, and what is said about a start that leaves latents dead."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from sae_lightning.saes import VARIANTS, BatchTopK, JumpReLU, Normalizer, ReLU, TopK
from sae_lightning.training.start import dead_at_start, geometric_median, prepare, sample, warnings_for
from tests.conftest import D_IN

D_SAE = 40


def normaliser(store) -> Normalizer:
    return Normalizer(D_IN, store.mean + 0.5, 1.7)


def skewed(n: int = 200, d: int = 5) -> torch.Tensor:
    """Points of which a tenth lies far away on one side."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    x[: n // 10] += 30
    return x


# --- the geometric median ---------------------------------------------------------------------------
@pytest.mark.parametrize("x", [skewed(), skewed(40, 2), skewed()[:, :1] + 100, skewed(60, 3) / 1000], ids=str)
def test_the_geometric_median_has_the_least_sum_of_distances(x):
    points = x.double().numpy()

    def distances(point):
        return np.linalg.norm(points - point, axis=1).sum()

    best = minimize(
        distances, points.mean(0), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9, "maxiter": 9999}
    )
    got = geometric_median(x).double().numpy()
    assert distances(got) <= best.fun * (1 + 1e-4)


def test_the_geometric_median_of_a_symmetric_cloud_is_its_centre():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(geometric_median(torch.cat([x, -x]) + 3), torch.full((4,), 3.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(geometric_median(torch.ones(5, 4)), torch.ones(4))


def test_the_geometric_median_is_found_from_a_mean_that_is_one_of_the_points():
    x = torch.tensor([[-3.0], [0.0], [1.0], [1.0], [1.0]])
    torch.testing.assert_close(geometric_median(x), torch.tensor([1.0]), atol=1e-2, rtol=0)


# --- b_pre and thresholds ---------------------------------------------------------------------------
def test_a_sample_is_of_evenly_spaced_images(stores):
    store = stores["train"]
    assert sample(store, 10**9).shape == (len(store) * store.n_patches, D_IN)
    few = sample(store, 160)
    assert len(few) == pytest.approx(160, abs=16)
    torch.testing.assert_close(few[:16], store.features(slice(0, 1)).reshape(-1, D_IN).float())


def test_b_pre_starts_at_the_mean_the_geometric_median_or_the_origin(stores):
    store = stores["train"]
    sae = ReLU(D_IN, D_SAE, normalizer=normaliser(store))
    prepare(sae, store, "mean", None)
    torch.testing.assert_close(sae.normalizer.denormalize(sae.b_pre.detach()), store.mean)
    prepare(sae, store, "zero", None)
    torch.testing.assert_close(sae.normalizer.denormalize(sae.b_pre.detach()), torch.zeros(D_IN), atol=1e-5, rtol=0)
    prepare(sae, store, "geometric_median", None)
    torch.testing.assert_close(sae.b_pre.detach(), geometric_median(sae.inputs(sample(store))[0]))
    assert sae.b_pre.requires_grad
    with pytest.raises(ValueError, match=r"Unknown init\.b_pre=median; choose one of mean, geometric_median, zero"):
        prepare(sae, store, "median", None)


@pytest.mark.parametrize("kind", ["none", "layer", "rms", "unit"])
@pytest.mark.parametrize("l0", [0.5, 4, 19.75])
def test_start_at_gives_the_asked_l0(l0, kind):
    x = 3 * torch.randn(400, D_IN, generator=torch.Generator().manual_seed(0)) + 1
    sae = JumpReLU(D_IN, 100, seed=0, input_norm=kind)
    x, _ = sae.inputs(x)
    sae.start(x, l0)
    assert len(set(sae.log_threshold.tolist())) == 1
    for mode in (True, False):
        assert sae.train(mode).forward_pass(x).codes.nnz / 400 == pytest.approx(l0, abs=1 / 100)


def test_start_at_an_l0_beyond_all_positive_entries_keeps_nearly_all_of_them():
    x = torch.randn(100, D_IN, generator=torch.Generator().manual_seed(0))
    sae = JumpReLU(D_IN, D_SAE, seed=0)
    sae.start(x, 1000)
    positive = int((sae.pre_acts(x) > 1e-3).sum())
    assert sae.eval().forward_pass(x).codes.nnz == pytest.approx(positive, abs=2)


def test_prepare_sets_a_jumprelus_thresholds_on_the_stores_features(stores):
    store = stores["train"]
    sae = JumpReLU(D_IN, D_SAE, seed=0, normalizer=normaliser(store))
    prepare(sae, store, "mean", None)
    assert float(sae.log_threshold.detach()[0].exp()) == pytest.approx(0.1)
    prepare(sae, store, "mean", 3.0)
    assert sae.eval().encode(sample(store)).counts().float().mean() == pytest.approx(3.0, abs=0.01)
    plain = TopK(D_IN, D_SAE, 5)
    prepare(plain, store, "mean", 3.0)  # others have no thresholds to set


# --- warnings ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["none", "layer", "rms", "unit"])
@pytest.mark.parametrize("variant", [name for name, cls in VARIANTS.items() if not cls.fitted])
def test_dead_at_start_counts_latents_that_never_fire_and_changes_nothing(variant, kind, stores):
    store = stores["val"]
    options = {} if variant in ("relu", "jumprelu", "gated") else {"k": 2}
    if variant == "jumprelu":
        options = {"threshold": 0.5}
    sae = VARIANTS[variant](D_IN, D_SAE, seed=0, normalizer=normaliser(store), input_norm=kind, **options)
    for name, p in sae.named_parameters():
        if name in ("b_enc", "b_gate"):
            p.data -= torch.linspace(0, 8, D_SAE)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    got = dead_at_start(sae, store)
    assert sae.training
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    x = sae.inputs(sample(store))[0]
    sae.train(sae.k is not None)
    fired = sae.forward_pass(x).codes.fired()
    assert 0.1 < got < 1
    assert got == pytest.approx(1 - float(fired.float().mean()))


def told(dead: float, severity: float, normalize: str = "standard", b_pre: str = "mean") -> list[str]:
    store = SimpleNamespace(manifest=SimpleNamespace(severity=severity))
    return warnings_for(store, dead, normalize, b_pre)


def test_a_good_start_is_not_warned_of():
    assert told(0.5, 30.0, "none") == told(0.5, 9.0, "none", "zero") == told(0.2, 30.0) == []


def test_a_start_with_most_latents_dead_is_told_with_what_to_set():
    (sentence,) = told(0.83, 2.0)
    assert sentence == (
        "83% of the latents fire on no token of a sample before training. Set resample.every=500, or loss.aux=0.03125."
    )
    for settings, advice in (({"normalize": "none"}, "normalize=standard"), ({"b_pre": "zero"}, "init.b_pre=mean")):
        (sentence,) = told(0.83, 2.0, **settings)
        assert f"Set {advice}" in sentence
        assert "; resample.every=500" in sentence
        assert "severity" not in sentence


def test_outlier_dimensions_are_named_as_the_cause():
    (sentence,) = told(0.99, 23.46, "none")
    assert "The store's severity γ = ‖μ‖/‖σ‖ is 23.5: single dimensions lie far off zero" in sentence


def test_severe_features_that_are_not_centred_are_told_before_latents_die():
    (sentence,) = told(0.3, 23.46, b_pre="zero")
    assert "severity γ = ‖μ‖/‖σ‖ is 23.5" in sentence
    assert sentence.endswith("Set init.b_pre=mean (or geometric_median), which centres [arXiv 2605.31518].")


def test_a_batchtopk_is_looked_at_as_in_training(stores):
    sae = BatchTopK(D_IN, D_SAE, 0.01, seed=0, normalizer=normaliser(stores["val"]))
    assert dead_at_start(sae, stores["val"]) > 0.5  # its threshold of 0 in evaluation would keep all alive
