"""BatchTopK's budget in training, and the thresholds that replace it in evaluation."""

import pytest
import torch

from sae_lightning.saes import BatchTopK, Matryoshka, Normalizer
from tests.saes import dense

D_IN, D_SAE, K = 12, 40, 5


def features(n: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))


def build(k: float = K, cls=BatchTopK, **options) -> BatchTopK:
    return cls(D_IN, D_SAE, k, seed=0, **options)


def sorted_pre_acts(sae: BatchTopK, x: torch.Tensor) -> torch.Tensor:
    return dense.pre_acts(sae, x).detach().flatten().sort(descending=True).values


@pytest.mark.parametrize("k", [0.5, 2.25, 3])
def test_k_may_be_a_fraction_of_a_latent_a_sample(k):
    assert build(k).train().run(features(40)).codes.nnz == round(40 * k)


def test_samples_share_the_budget_unevenly():
    counts = build().train().run(features()).codes.counts()
    assert counts.sum() == K * 64
    assert counts.float().std() > 0


def test_k_a_batch_does_not_grow_with_the_batch():
    sae = build(90, k_per="batch").train()
    assert [sae.run(features(n)).codes.nnz for n in (30, 64)] == [90, 90]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1000, 25])
def test_a_budget_beyond_all_positive_entries_keeps_all_of_them(dtype, k):
    sae = build(k, k_per="batch").to(dtype).train()
    x = features(2).to(dtype)
    pre = dense.pre_acts(sae, x).detach()
    positive = int((pre > 0).sum())
    assert sae.run(x).codes.nnz == min(k, positive)
    expected = pre[pre > 0].min() if k > positive else sorted_pre_acts(sae, x)[k - 1]
    torch.testing.assert_close(sae.threshold, expected)


def test_training_uses_the_annealed_k_and_evaluation_does_not():
    sae = build().train()
    sae.k_now = 9.5
    assert sae.run(features()).codes.nnz == round(9.5 * 64)
    sae.calibrate([features()], 64)
    assert sae.eval().run(features()).codes.nnz == K * 64


def test_a_batch_without_positive_entries_changes_no_threshold():
    sae = build().train()
    sae.b_enc.data -= 100
    run = sae.run(features())
    assert run.codes.nnz == 0
    assert float(sae.threshold) == 0
    assert float(sae.lowest) == float("inf")
    assert torch.equal(run.reconstruction, torch.zeros(64, D_IN))
    run.reconstruction.sum().backward()
    assert (sae.W_dec.grad == 0).all()


def test_training_follows_the_cut_as_running_average_and_minimum():
    sae = build().train()
    average, cuts = 0.0, []
    for seed in range(6):
        x = features(seed=seed) * (1 + seed % 3)
        cuts.append(float(sorted_pre_acts(sae, x)[K * 64 - 1]))
        average = cuts[-1] if seed == 0 else 0.99 * average + 0.01 * cuts[-1]
        sae.run(x)
        assert float(sae.threshold) == pytest.approx(average, rel=1e-5)
        assert float(sae.lowest) == pytest.approx(min(cuts), rel=1e-5)
    assert sae.use_lowest() == pytest.approx(min(cuts), rel=1e-5)
    assert float(sae.threshold) == float(sae.lowest)


def test_the_running_minimum_is_not_taken_before_any_training():
    sae = build()
    sae.threshold.fill_(0.7)
    assert sae.use_lowest() == pytest.approx(0.7)


@pytest.mark.parametrize("start", [0.0, 0.3, 50.0])
@pytest.mark.parametrize("k", [K, 0.25, 2.6])
def test_calibration_is_the_exact_quantile_for_any_split_into_batches(k, start):
    x = features(300)
    budget = round(k * len(x))
    for cls, parts in (
        (BatchTopK, x.split(37)),
        (Matryoshka, [x]),
        (BatchTopK, [x[:1], x[1:]]),
        (BatchTopK, x.split(9)),
    ):
        sae = build(k, cls)
        sae.threshold.fill_(start)
        threshold = sae.calibrate(list(parts), len(x))
        assert threshold == pytest.approx(float(sorted_pre_acts(sae, x)[budget]), rel=1e-5)
        assert threshold == float(sae.threshold)
        # the entry at the threshold may round to above it in a batch of another size
        assert sae.eval().encode(x).nnz == pytest.approx(budget, abs=1)


def test_calibration_takes_raw_features_and_the_input_norm():
    raw = features(200) * 7 + 3
    sae = build(normalizer=Normalizer(D_IN, raw.mean(0), raw.std()), input_norm="unit")
    threshold = sae.calibrate([raw.view(10, 20, D_IN)], 200)
    x = dense.normed("unit", (raw - raw.mean(0)) / raw.std())
    assert threshold == pytest.approx(float(sorted_pre_acts(sae, x)[K * 200]), rel=1e-4)
    assert sae.eval().encode(raw).nnz == K * 200


def test_calibration_with_too_few_positive_entries_keeps_all_of_them():
    sae = build()
    sae.b_enc.data -= 2.0
    sae.threshold.fill_(0.4)
    assert sae.calibrate([features()], 64) == 0
    pre = dense.pre_acts(sae, features())
    assert sae.eval().encode(features()).nnz == int((pre > 0).sum()) < K * 64


def test_calibration_refuses_a_wrong_number_of_samples_and_k_a_batch():
    with pytest.raises(ValueError, match="promised 10 held-out samples"):
        build().calibrate([features(9)], 10)
    with pytest.raises(ValueError, match="got 0"):
        build().calibrate([], 0)
    with pytest.raises(ValueError, match="k a sample"):
        build(k_per="batch").calibrate([features(9)], 9)
