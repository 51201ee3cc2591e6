"""Activations of every variant against slow references, and what the base class promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.saes import VARIANTS, BatchTopK, Normalizer, ReLU, TopK
from sae_lightning.saes.batchtopk import largest

D_IN, D_SAE, K = 12, 40, 5


def build(variant: str, **kwargs):
    settings = {} if variant == "relu" else {"k": K}
    return VARIANTS[variant](D_IN, D_SAE, seed=0, **settings, **kwargs)


def features(n: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


def dense_pre_acts(sae, x):
    return (x - sae.b_pre) @ sae.W_enc + sae.b_enc


def test_relu_keeps_every_positive_pre_activation():
    sae, x = build("relu"), features()
    expected = torch.relu(dense_pre_acts(sae, x))
    torch.testing.assert_close(sae.run(x).codes.to_dense(), expected)


def test_topk_keeps_the_k_largest_positive_of_each_row():
    sae, x = build("topk"), features()
    pre = dense_pre_acts(sae, x)
    expected = torch.zeros_like(pre)
    for i, row in enumerate(pre):
        for j in row.argsort(descending=True)[:K]:
            expected[i, j] = max(row[j], 0.0)
    torch.testing.assert_close(sae.run(x).codes.to_dense(), expected)


def test_topk_drops_negative_entries_among_the_k_largest():
    sae = build("topk")
    codes = sae.activate(torch.full((3, D_SAE), -1.0).index_fill(1, torch.tensor([7]), 2.0))
    assert codes.counts().tolist() == [1, 1, 1]
    assert codes.latents.tolist() == [7, 7, 7]


def test_batchtopk_keeps_the_largest_of_the_whole_batch_in_training():
    sae, x = build("batchtopk").train(), features()
    pre = dense_pre_acts(sae, x)
    cut = pre.flatten().sort(descending=True).values[K * len(x) - 1]
    expected = torch.where(pre >= cut, pre, torch.zeros_like(pre))
    codes = sae.run(x).codes
    torch.testing.assert_close(codes.to_dense(), expected)
    assert codes.counts().sum() == K * len(x)
    assert codes.counts().float().std() > 0  # samples share the budget unevenly


@pytest.mark.parametrize("k", [0.5, 2.25, 3])
def test_batchtopk_takes_fractions_of_a_latent_a_sample(k):
    sae = BatchTopK(D_IN, D_SAE, k, seed=0).train()
    assert len(sae.run(features(40)).codes.latents) == round(40 * k)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.floats(-2, 6))
def test_largest_is_exact_for_any_guess(seed, count, guess):
    values = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    expected = values[values > 0].sort(descending=True).values[:count]
    got = largest(values, count, torch.tensor(guess)).sort(descending=True).values
    assert torch.equal(got, expected)


def test_calibrated_threshold_gives_k_active_latents_and_is_independent_of_batches():
    x = features(300)
    sae = build("batchtopk")
    threshold = sae.calibrate(x.split(37), len(x))
    assert build("batchtopk").calibrate([x], len(x)) == pytest.approx(threshold)
    sae.eval()
    together = sae.encode(x)
    assert together.counts().float().mean() == pytest.approx(K, abs=0.01)
    alone = torch.cat([sae.encode(row).to_dense() for row in x])
    torch.testing.assert_close(alone, together.to_dense())


def test_calibrate_refuses_a_wrong_number_of_samples():
    with pytest.raises(ValueError, match="promised 10"):
        build("batchtopk").calibrate([features(9)], 10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_flattens_leading_dimensions_and_forward_restores_them(variant):
    sae = build(variant).eval()
    images = features(6 * 4).reshape(6, 4, D_IN)
    assert sae.encode(images).n_samples == 24
    assert sae(images).shape == images.shape
    torch.testing.assert_close(sae(images).reshape(24, D_IN), sae(images.reshape(24, D_IN)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_raw_features_are_normalised_inside(variant):
    raw = features() * 7 + 3
    normalizer = Normalizer(D_IN, raw.mean(0), raw.std())
    inside, outside = build(variant, normalizer=normalizer).eval(), build(variant).eval()
    x = (raw - raw.mean(0)) / raw.std()
    torch.testing.assert_close(inside(raw), outside(x) * raw.std() + raw.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialisation_ties_encoder_to_unit_norm_decoder(variant):
    sae = build(variant)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert torch.equal(sae.W_dec, build(variant).W_dec)  # the seed decides


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_dense_codes(variant):
    sae, x = build(variant).train(), features()
    (sae.run(x).reconstruction - x).square().mean().backward()
    got = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    pre = dense_pre_acts(sae, x)
    active = sae.run(x).codes.to_dense().detach() > 0
    ((torch.where(active, pre, 0.0) @ sae.W_dec + sae.b_pre - x).square().mean()).backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(got[name], p.grad, msg=name)


def test_projected_decoder_gradient_is_orthogonal_to_its_row():
    sae, x = build("topk"), features()
    (sae.run(x).reconstruction - x).square().mean().backward()
    sae.project_decoder_gradient()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(D_SAE), atol=1e-7, rtol=0)


def test_dead_latent_counters_follow_firing():
    sae = build("topk")
    fired = sae.run(features(8)).codes.to_dense().sum(0) > 0
    sae.count_firing(fired, 8)
    assert (sae.tokens_since_fired[fired] == 0).all()
    assert (sae.tokens_since_fired[~fired] == 8).all()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TopK(D_IN, D_SAE, 0), "k must lie"),
        (lambda: TopK(D_IN, D_SAE, D_SAE + 1), "raise expansion"),
        (lambda: BatchTopK(D_IN, D_SAE, -1), "k must lie"),
        (lambda: ReLU(0, 4), "at least 1"),
        (lambda: Normalizer(D_IN, torch.zeros(D_IN), 0.0), "positive deviation"),
        (lambda: Normalizer(D_IN, torch.full((D_IN,), torch.nan)), "finite mean"),
        (lambda: build("topk").encode(torch.zeros(2, D_IN + 1)), "another backbone or layer"),
    ],
)
def test_impossible_settings_fail_with_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
