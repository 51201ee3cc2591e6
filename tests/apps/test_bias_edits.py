"""Edits of latents in whole images, and the curves made of them, against encoding, setting and decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special

from sae_lightning.apps.bias.dose import dose, forced, neutralised, plateau, pushes, typical, wholes
from sae_lightning.apps.bias.study import Classifier, direct_effects, f1_of, mean_of, train
from sae_lightning.saes import MSAE, BatchTopK, SparseCodes
from sae_lightning.saes.sae import Normalizer

D_IN, D_SAE = 6, 16
MAKES = {
    "batchtopk": lambda **o: BatchTopK(D_IN, D_SAE, k=3, seed=0, **o),
    "dense": lambda **o: MSAE(D_IN, D_SAE, k=4, seed=0, **o),
    "layer": lambda **o: BatchTopK(D_IN, D_SAE, k=3, seed=0, input_norm="layer", **o),
}


def an_sae(kind: str):
    sae = MAKES[kind](normalizer=Normalizer(D_IN, torch.linspace(-1, 1, D_IN), 1.7)).eval()
    with torch.no_grad():
        sae.b_pre.normal_(generator=torch.Generator().manual_seed(1))
    return sae


def features(n: int, tokens: int) -> torch.Tensor:
    return 2 * torch.randn(n, tokens, D_IN, generator=torch.Generator().manual_seed(2))


def a_classifier() -> Classifier:
    return Classifier(np.random.default_rng(0).normal(size=D_IN), 0.3)


def set_and_decode(sae, x: torch.Tensor, latents: list[int], value) -> np.ndarray:
    """Encode [n, P, d], set ``latents`` on all tokens, decode, mean over tokens: [n, d]."""
    codes = sae.encode(x)
    dense = codes.to_dense().detach().clone()
    dense[:, latents] = value
    edited = SparseCodes.select(dense, dense > 0)
    edited.frame = codes.frame
    return sae.decode(edited).detach().reshape(x.shape).mean(1).numpy()


@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_forcing_a_latent_is_encoding_setting_decoding_and_pooling(kind, tokens):
    sae, x, classifier = an_sae(kind), features(7, tokens), a_classifier()
    images, effects = wholes(sae, [x[:4], x[4:]]), direct_effects(classifier, sae)
    decoded = classifier.logits(images.decoded)
    for latent in (0, 5, 11):
        curve = forced(decoded, images, effects[latent], latent, np.array([0.0, 0.7, 4.0]))
        for m, value in enumerate((0.0, 0.7, 4.0)):
            slow = classifier.logits(set_and_decode(sae, x, [latent], value))
            np.testing.assert_allclose(curve[:, m], slow, atol=1e-4)


def test_with_the_error_kept_the_edit_adds_to_the_features():
    sae, x, classifier = an_sae("batchtopk"), features(7, 5), a_classifier()
    images, effects = wholes(sae, [x]), direct_effects(classifier, sae)
    curve = forced(classifier.logits(images.features), images, effects[3], 3, np.array([2.0]))[:, 0]
    moved = x.mean(1).numpy() + set_and_decode(sae, x, [3], 2.0) - images.decoded
    np.testing.assert_allclose(curve, classifier.logits(moved), atol=1e-4)


def test_whole_images_hold_means_of_features_and_maxima_of_codes():
    sae, x = an_sae("batchtopk"), features(7, 5)
    images = wholes(sae, [x[:2], x[2:]])
    codes = sae.encode(x).to_dense().detach().reshape(7, 5, D_SAE)
    np.testing.assert_allclose(images.features, x.mean(1), atol=1e-6)
    np.testing.assert_allclose(images.magnitudes.toarray(), codes.amax(1), atol=1e-6)
    np.testing.assert_allclose(images.amounts.toarray(), codes.mean(1), atol=1e-6)
    assert (images.room == 1).all()
    with pytest.raises(ValueError, match="no images to encode"):
        wholes(sae, [])


def test_versions_of_images_are_chosen_one_by_one():
    sae = an_sae("layer")
    one, other = (wholes(sae, [features(4, 2) + shift]) for shift in (0, 1))
    mask = np.array([True, False, False, True])
    mixed = one.where(mask, other)
    for i, of_one in enumerate(mask):
        source = one if of_one else other
        assert (mixed.features[i] == source.features[i]).all()
        assert mixed.room[i] == source.room[i]
        assert (mixed.amounts[[i]] != source.amounts[[i]]).nnz == 0
    assert (one.take(np.array([2])).features == one.features[2]).all()


def test_neutralised_latents_are_set_to_their_usual_amount():
    sae, x, classifier = an_sae("batchtopk"), features(7, 1), a_classifier()
    images, effects = wholes(sae, [x]), direct_effects(classifier, sae)
    usual = np.asarray(images.amounts.mean(0)).ravel()
    chosen = np.array([2, 9, 4])
    slow = set_and_decode(sae, x, chosen.tolist(), torch.as_tensor(usual[chosen], dtype=torch.float32))
    ours = neutralised(classifier.logits(images.decoded), images, effects, chosen, usual)
    np.testing.assert_allclose(ours, classifier.logits(slow), atol=1e-4)


def test_the_classifier_is_logistic_regression_in_the_saes_scale():
    from sklearn.linear_model import LogisticRegression

    sae, x = an_sae("batchtopk"), features(200, 1)[:, 0]
    truth = (x[:, 0] + x[:, 1] > 0).numpy() ^ (np.random.default_rng(0).random(200) < 0.1)
    ours = train(x.double().numpy(), truth, sae, strength=0.5)
    scaled = sae.normalizer.normalize(x).double().numpy()
    theirs = LogisticRegression(C=0.5, max_iter=5000).fit(scaled, truth)
    np.testing.assert_allclose(ours.logits(x.double().numpy()), theirs.decision_function(scaled), atol=2e-3)
    assert 0.5 < ours.slope < 1.5
    with pytest.raises(ValueError, match="5 training images of each class"):
        train(x.double().numpy(), np.arange(200) < 3, sae)


def test_a_dose_response_curve_holds_means_by_class_examples_and_its_plateau():
    sae, x, classifier = an_sae("batchtopk"), features(40, 1), a_classifier()
    images, effects = wholes(sae, [x]), direct_effects(classifier, sae)
    logits = classifier.logits(images.features)
    truth = logits + np.random.default_rng(0).normal(size=40) > np.median(logits)
    latent = int(np.argmax(images.amounts.sum(0)))
    examples = typical(logits, truth)
    assert truth[examples[0]]
    assert not truth[examples[1]]
    found = dose(latent, effects[latent], logits, truth, images, examples, reach=2.0)
    own = images.magnitudes.toarray()[:, latent]
    p = special.expit(logits[:, None] + effects[latent] * (found.magnitudes - own[:, None]))
    assert found.magnitudes[0] == 0
    assert found.magnitudes[-1] == pytest.approx(2 * own.max())
    np.testing.assert_allclose(found.positive.mean, p[truth].mean(0))
    error = p[~truth].std(0, ddof=1) / np.sqrt((~truth).sum())
    np.testing.assert_allclose(found.negative.hi, np.minimum(1, p[~truth].mean(0) + 1.959964 * error), rtol=1e-5)
    np.testing.assert_allclose(found.examples, p[list(examples)])
    np.testing.assert_allclose(found.before, special.expit(logits[list(examples)]))
    usual = np.quantile(own[own > 0], 0.95)
    moved = np.abs(special.expit(logits + effects[latent] * (usual - own)) - special.expit(logits))
    np.testing.assert_allclose(pushes(np.array([latent]), effects, logits, images), moved, rtol=1e-5)


def test_a_silent_latent_has_no_curve():
    images = wholes(an_sae("batchtopk"), [features(1, 1)])
    silent = int(np.flatnonzero(np.asarray(images.amounts.sum(0)).ravel() == 0)[0])
    with pytest.raises(ValueError, match=f"Latent {silent} is silent"):
        dose(silent, 1.0, np.zeros(1), np.ones(1, dtype=bool), images, (0, 0))


def test_where_a_curve_levels_off():
    at = np.linspace(0, 10, 11)
    assert plateau(at, np.minimum(at / 4, 1)) == 4
    assert plateau(at, at / 10) is None
    assert plateau(at, np.full(11, 0.4)) == 0


def test_bootstrap_intervals_of_means_and_f1():
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.8
    mean = mean_of(right)
    assert mean.value == right.mean()
    assert mean.hi - mean.lo == pytest.approx(2 * 1.96 * right.std() / 20, rel=0.12)
    truth = rng.random(400) < 0.5
    predicted = truth ^ ~right
    from sklearn.metrics import f1_score

    found = f1_of(predicted, truth)
    assert found.value == pytest.approx(f1_score(truth, predicted))
    redrawn = [f1_score(truth[i], predicted[i]) for i in rng.integers(400, size=(300, 400))]
    np.testing.assert_allclose(found[1:], np.quantile(redrawn, (0.025, 0.975)), atol=0.015)
    assert f1_of(np.zeros(4, dtype=bool), np.zeros(4, dtype=bool)).value == 0
