"""The classifier of the application bias and its dose-response curves."""

import numpy as np
import pytest
from scipy import special

from sae_lightning.apps.bias.dose import dose, plateau, pushes, typical
from sae_lightning.apps.bias.study import direct_effects, f1_of, mean_of, train
from sae_lightning.apps.edits import whole_images
from tests.apps.world import a_classifier, an_sae, features


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
    images, effects = whole_images(sae, [x]), direct_effects(classifier, sae)
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
    images = whole_images(an_sae("batchtopk"), [features(1, 1)])
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
