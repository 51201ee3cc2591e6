"""Whole images with forced latents, against encoding, setting, decoding and taking means."""

import numpy as np
import pytest
import torch

from sae_lightning.apps.bias.study import direct_effects
from sae_lightning.apps.edits import edited, forced, neutralised, whole_images
from sae_lightning.saes import SparseCodes
from tests.apps.world import D_SAE, MAKES, a_classifier, an_sae, features


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
    images, effects = whole_images(sae, [x[:4], x[4:]]), direct_effects(classifier, sae)
    decoded, to = classifier.logits(images.decoded), (0.0, 0.7, 4.0)
    for latent in (0, 5, 11):
        curve, whole = forced(decoded, images, effects[latent], latent, np.array(to)), edited(sae, images, latent, to)
        for m, value in enumerate(to):
            slow = set_and_decode(sae, x, [latent], value)
            np.testing.assert_allclose(whole[m], slow, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(curve[:, m], classifier.logits(slow), atol=1e-4)
    with pytest.raises(ValueError, match=r"There is no latent 16; this SAE has 0 to 15\."):
        edited(sae, images, D_SAE, [1.0])


def test_with_the_error_kept_the_edit_adds_to_the_features():
    sae, x, classifier = an_sae("batchtopk"), features(7, 5), a_classifier()
    images, effects = whole_images(sae, [x]), direct_effects(classifier, sae)
    curve = forced(classifier.logits(images.features), images, effects[3], 3, np.array([2.0]))[:, 0]
    moved = x.mean(1).numpy() + set_and_decode(sae, x, [3], 2.0) - images.decoded
    np.testing.assert_allclose(curve, classifier.logits(moved), atol=1e-4)
    np.testing.assert_allclose(edited(sae, images, 3, [2.0], keep_error=True)[0], moved, atol=1e-4)
    row = sae.W_dec[3].detach().double().numpy()
    there, back = (edited(sae, images, 3, [2.0], along=along)[0] for along in (row, -row))
    np.testing.assert_allclose(there + back, 2 * images.decoded, atol=1e-5)


def test_whole_images_hold_means_of_features_and_maxima_of_codes():
    sae, x = an_sae("batchtopk"), features(7, 5)
    images = whole_images(sae, [x[:2], x[2:]])
    codes = sae.encode(x).to_dense().detach().reshape(7, 5, D_SAE)
    np.testing.assert_allclose(images.features, x.mean(1), atol=1e-6)
    np.testing.assert_allclose(images.magnitudes.toarray(), codes.amax(1), atol=1e-6)
    np.testing.assert_allclose(images.amounts.toarray(), codes.mean(1), atol=1e-6)
    assert (images.room == 1).all()
    with pytest.raises(ValueError, match="no images to encode"):
        whole_images(sae, [])


def test_versions_of_images_are_chosen_one_by_one():
    sae = an_sae("layer")
    one, other = (whole_images(sae, [features(4, 2) + shift]) for shift in (0, 1))
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
    images, effects = whole_images(sae, [x]), direct_effects(classifier, sae)
    usual = np.asarray(images.amounts.mean(0)).ravel()
    chosen = np.array([2, 9, 4])
    slow = set_and_decode(sae, x, chosen.tolist(), torch.as_tensor(usual[chosen], dtype=torch.float32))
    ours = neutralised(classifier.logits(images.decoded), images, effects, chosen, usual)
    np.testing.assert_allclose(ours, classifier.logits(slow), atol=1e-4)
