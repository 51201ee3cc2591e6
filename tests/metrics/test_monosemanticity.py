"""M5 equals its definition pair by pair, splits into classes exactly, and is zero for random images."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.metrics.monosemanticity import baseline, choose_live, monosemanticity, summarize


def slowly(images, strength, least, most, embeddings, labels):
    """(score, plain, within, between, within mass) of one latent by the formulas of App. K, w with its scale."""
    e = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    sums = {name: [0.0, 0.0] for name in ("score", "plain", "within", "between")}
    for u, v in itertools.combinations([i for i in range(len(images)) if images[i] >= 0], 2):
        w = (strength[u] - least) / (most - least) * (strength[v] - least) / (most - least) if most > least else 0
        c = e[images[u]] @ e[images[v]]
        kind = "within" if labels[images[u]] == labels[images[v]] else "between"
        for name, weight in (("score", w), ("plain", 1), (kind, w)):
            sums[name][0] += weight * c
            sums[name][1] += weight
    found = [a / b if b > 0 else np.nan for a, b in sums.values()]
    return [*found, sums["within"][1] / sums["score"][1] if sums["score"][1] > 0 else np.nan]


def case(seed: int, m: int = 9, top: int = 5, n: int = 30, d: int = 4):
    """Latents of which some fire on fewer than ``top`` images and one on all, alike; images, strength, least, …"""
    g = torch.Generator().manual_seed(seed)
    images = torch.stack([torch.randperm(n, generator=g)[:top] for _ in range(m)])
    strength = torch.rand(m, top, generator=g).sort(1, descending=True).values + 0.1
    least = torch.zeros(m)
    least[0] = strength[0, -1] * 0.5
    for latent, fires in ((1, 0), (2, 1), (3, 2), (4, 3)):
        images[latent, fires:], strength[latent, fires:] = -1, 0
    strength[5], least[5] = 0.3, 0.3
    embeddings = torch.randn(n, d, generator=g, dtype=torch.float64) + 0.4
    return images, strength, least, embeddings, torch.randint(0, 3, (n,), generator=g)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_equals_the_definition_and_splits_exactly_into_classes(seed):
    images, strength, least, embeddings, labels = case(seed)
    found = monosemanticity(images, strength, least, embeddings, labels)
    a = strength.double().numpy()
    each = zip(images.numpy(), a, least.double().numpy(), a[:, 0], strict=True)
    expected = [slowly(*of_latent, embeddings.numpy(), labels.numpy()) for of_latent in each]
    np.testing.assert_allclose(torch.stack(found, 1).numpy(), expected, rtol=1e-9, atol=1e-12)
    assert found.score[:6].isnan().tolist() == [False, True, True, False, False, True]
    assert found.plain[5].isfinite()
    mass = found.within_mass
    parts = (mass * found.within).nan_to_num() + ((1 - mass) * found.between).nan_to_num()
    np.testing.assert_allclose(parts[~mass.isnan()], found.score[~mass.isnan()], rtol=1e-12)


def test_three_images_by_hand():
    """Images along x, along the diagonal and along y, with activations 3, 2 and 1 above a least one of 0."""
    embeddings = torch.tensor([[5.0, 0.0], [1.0, 1.0], [0.0, 0.1]])
    images, strength = torch.tensor([[0, 1, 2]]), torch.tensor([[3.0, 2.0, 1.0]])
    half = 0.5**0.5
    found = monosemanticity(images, strength, torch.zeros(1), embeddings, torch.tensor([7, 7, 2]))
    assert float(found.score[0]) == pytest.approx((6 * half + 3 * 0 + 2 * half) / 11)
    assert float(found.plain[0]) == pytest.approx(2 * half / 3)
    assert float(found.within[0]) == pytest.approx(half)
    assert float(found.between[0]) == pytest.approx(2 * half / 5)
    assert float(found.within_mass[0]) == pytest.approx(6 / 11)
    above_one = monosemanticity(images, strength, torch.ones(1), embeddings)
    assert float(above_one.score[0]) == pytest.approx(half)  # weights 2, 1, 0
    assert above_one.within.isnan().all()
    assert above_one.within_mass.isnan().all()


def test_the_scale_of_activations_and_embeddings_does_not_matter_nor_do_parts(monkeypatch):
    images, strength, least, embeddings, labels = case(3)
    found = monosemanticity(images, strength, least, embeddings, labels)
    scaled = monosemanticity(images, strength * 1e-30, least * 1e-30, embeddings * 7, labels)
    monkeypatch.setattr("sae_lightning.metrics.monosemanticity.PART", 2 * 5 * 4)
    parts = monosemanticity(images, strength, least, embeddings, labels)
    for a, b, c in zip(found, scaled, parts, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7, equal_nan=True)
        torch.testing.assert_close(c, a, rtol=1e-12, atol=0, equal_nan=True)


def test_half_precision_embeddings_are_taken_exactly():
    images, strength, least, embeddings, _ = case(4)
    half = embeddings.half()
    found = monosemanticity(images, strength, least, half).score
    exact = monosemanticity(images, strength, least, half.double()).score
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0, equal_nan=True)


def test_random_images_score_zero_within_their_sampling_error():
    """Embeddings that all lean one way, as an encoder's do: the raw score is far from 0, the normalised one is not."""
    g = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3000, 24, generator=g) + 0.8
    images = torch.stack([torch.randperm(3000, generator=g)[:16] for _ in range(2000)])
    strength = torch.rand(2000, 16, generator=g) + 0.2
    found = monosemanticity(images, strength, torch.zeros(2000), embeddings)
    out = summarize(found, baseline(embeddings))
    floor = monosemanticity(images, torch.ones(2000, 16), torch.zeros(2000), embeddings).plain.std() / 1000**0.5
    error = (found.score.std() / 2000**0.5 + floor) / (1 - out["monosemanticity_baseline"])
    assert out["monosemanticity_raw"] > 0.3
    assert error < 0.005
    assert abs(out["monosemanticity"]) < 4 * error
    assert abs(out["monosemanticity_plain"]) < 4 * error
    assert out["monosemanticity_scored"] == 2000


def test_latents_of_one_class_score_one_against_classes_at_right_angles():
    labels = torch.arange(4).repeat_interleave(20)
    embeddings = torch.eye(4)[labels]
    images = torch.arange(80).view(4, 20)[:, 3:8]  # of one class each
    images = torch.cat([images, torch.tensor([[0, 20, 40, 60, 61]])])
    found = monosemanticity(images, torch.ones(5, 5), torch.zeros(5), embeddings, labels)
    np.testing.assert_allclose(found.score, [1, 1, 1, 1, 0.1], rtol=1e-12, atol=1e-12)
    assert found.within_mass.tolist() == pytest.approx([1, 1, 1, 1, 0.1])
    out = summarize(found, 0.2)
    assert out["monosemanticity_raw"] == pytest.approx(0.82)
    assert out["monosemanticity"] == pytest.approx(0.62 / 0.8)
    assert out["monosemanticity_within"] == pytest.approx(1)
    assert out["monosemanticity_between"] == pytest.approx(0)


def test_the_summary_is_of_scored_latents_alone():
    images, strength, least, embeddings, labels = case(5)
    found = monosemanticity(images, strength, least, embeddings, labels)
    out = summarize(found, 0.25)
    scored = [0, 3, 4, 6, 7, 8]
    assert out["monosemanticity_scored"] == 6
    assert out["monosemanticity_raw"] == pytest.approx(float(found.score[scored].mean()))
    assert out["monosemanticity_plain_raw"] == pytest.approx(float(found.plain[scored].mean()))
    assert out["monosemanticity_plain"] == pytest.approx((out["monosemanticity_plain_raw"] - 0.25) / 0.75)
    nothing = summarize(monosemanticity(images[1:3], strength[1:3], least[1:3], embeddings), 0.2)
    assert np.isnan(nothing["monosemanticity"])
    assert nothing["monosemanticity_scored"] == 0


def test_the_baseline_is_the_mean_cosine_of_pairs_and_repeats_by_seed():
    embeddings = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1).numpy()
    pairs = np.array([unit[i] @ unit[j] for i in range(40) for j in range(i)])
    found = baseline(embeddings, groups=3000, size=5)
    assert found == pytest.approx(pairs.mean(), abs=4 * pairs.std() / 3000**0.5)
    assert found == baseline(embeddings, groups=3000, size=5) != baseline(embeddings, groups=3000, size=5, seed=1)
    assert baseline(embeddings[:6], groups=2, size=16) == pytest.approx(
        np.mean([unit[i] @ unit[j] for i in range(6) for j in range(i)])
    )  # fewer images than a group: all of them, each once


def test_live_latents_are_drawn_uniformly_without_replacement():
    peaks = torch.zeros(500)
    peaks[100:400] = 0.5
    assert choose_live(peaks, 300).tolist() == list(range(100, 400))
    chosen = choose_live(peaks, 50)
    assert len(chosen.unique()) == 50
    assert chosen.tolist() == sorted(chosen.tolist()) == choose_live(peaks, 50).tolist()
    assert chosen.tolist() != choose_live(peaks, 50, seed=1).tolist()
    often = torch.zeros(500)
    for seed in range(300):
        often[choose_live(peaks, 50, seed)] += 1
    assert float(often[100:400].sum()) == 300 * 50
    assert 25 < float(often[100:400].min()) < float(often[100:400].max()) < 80  # 50 each, deviation 6.5


def test_refuses_what_does_not_fit():
    images, strength, least, embeddings, labels = case(6)
    with pytest.raises(ValueError, match=r"Expected strength \[9, 5\]"):
        monosemanticity(images, strength[:, :4], least, embeddings)
    with pytest.raises(ValueError, match="30 embeddings and 29 labels"):
        monosemanticity(images, strength, least, embeddings, labels[1:])
    embeddings[17] = 0
    with pytest.raises(ValueError, match=r"image 17 is zero or not finite.*1 of 30"):
        monosemanticity(images, strength, least, embeddings)
    with pytest.raises(ValueError, match="image 17"):
        baseline(embeddings)
    with pytest.raises(ValueError, match="Pairs need two images"):
        baseline(embeddings[:1])
