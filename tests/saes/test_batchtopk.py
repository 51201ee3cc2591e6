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
    assert build(k).train().forward_pass(features(40)).codes.nnz == round(40 * k)


def test_samples_share_the_budget_unevenly():
    counts = build().train().forward_pass(features()).codes.counts()
    assert counts.sum() == K * 64
    assert counts.float().std() > 0


def test_k_a_batch_does_not_grow_with_the_batch():
    sae = build(90, k_per="batch").train()
    assert [sae.forward_pass(features(n)).codes.nnz for n in (30, 64)] == [90, 90]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1000, 25])
def test_a_budget_beyond_all_positive_entries_keeps_all_of_them(dtype, k):
    sae = build(k, k_per="batch").to(dtype).train()
    x = features(2).to(dtype)
    pre = dense.pre_acts(sae, x).detach()
    positive = int((pre > 0).sum())
    assert sae.forward_pass(x).codes.nnz == min(k, positive)
    expected = pre[pre > 0].min() if k > positive else sorted_pre_acts(sae, x)[k - 1]
    torch.testing.assert_close(sae.threshold, expected)


def test_training_uses_the_annealed_k_and_evaluation_does_not():
    sae = build().train()
    sae.k_now = 9.5
    assert sae.forward_pass(features()).codes.nnz == round(9.5 * 64)
    sae.calibrate([features()], 64)
    assert sae.eval().forward_pass(features()).codes.nnz == K * 64


def test_a_batch_without_positive_entries_changes_no_threshold():
    sae = build().train()
    sae.b_enc.data -= 100
    run = sae.forward_pass(features())
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
        sae.forward_pass(x)
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


# --- without a threshold ----------------------------------------------------------------------------
def trained_by_hand(steps: int, k: float = 8, n: int = 128, k_per: str = "sample") -> tuple[BatchTopK, torch.Tensor]:
    """A BatchTopK after ``steps`` of Adam, and held-out features."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(128, D_IN, generator=generator), dim=1)

    def batch(n: int) -> torch.Tensor:
        latents = torch.randint(0, 128, (n, 4), generator=generator)
        return torch.zeros(n, 128).scatter_(1, latents, 0.5 + torch.rand(n, 4, generator=generator)) @ directions

    sae = BatchTopK(D_IN, 96, k, seed=0, k_per=k_per).train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(steps):
        x = batch(n)
        optimizer.zero_grad()
        (sae.forward_pass(x).reconstruction - x).square().mean().backward()
        optimizer.step()
        sae.normalize_decoder()
    return sae, batch(2000)


@pytest.mark.parametrize("steps", [1, 8, 40])
def test_an_sae_saved_by_hand_has_about_k_active_latents(steps, tmp_path, recwarn):
    sae, x = trained_by_hand(steps)
    sae.save(tmp_path)
    loaded = BatchTopK.load(tmp_path)
    assert loaded.encode(x).nnz / len(x) == pytest.approx(8, rel=0.25)
    assert torch.equal(loaded.encode(x[:7]).to_dense(), loaded.encode(x).to_dense()[:7])  # whatever the batch
    assert not recwarn.list


def test_with_k_a_batch_the_latest_cut_stands_in_too():
    sae, x = trained_by_hand(20, k=512, k_per="batch")
    assert sae.eval().encode(x).nnz / len(x) == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize(("k", "k_per", "active"), [(K, "sample", 40 * K), (2.5, "sample", 40 * 3), (90, "batch", 90)])
def test_an_sae_that_was_never_trained_keeps_k_and_warns(k, k_per, active):
    sae = build(k, k_per=k_per).eval()
    with pytest.warns(UserWarning, match=f"neither been trained nor given a threshold, and keeps .* of each {k_per}"):
        codes = sae.encode(features(40))
    assert codes.nnz == active
    if k_per == "sample":
        assert torch.equal(sae.encode(features(40)[:3]).to_dense(), codes.to_dense()[:3])
    else:
        assert torch.equal(codes.to_dense(), sae.train().forward_pass(features(40)).codes.to_dense())


@pytest.mark.parametrize("how", ["calibrate", "use_lowest", "use_average", "by hand"])
def test_a_threshold_that_was_set_is_used_as_it_is_until_training_goes_on(how, tmp_path):
    sae, x = trained_by_hand(10)
    if how == "calibrate":
        sae.calibrate([x], len(x))
    elif how == "by hand":
        sae.threshold.fill_(0.9)
    else:
        getattr(sae, how)()
    sae.save(tmp_path)
    for each in (sae.eval(), BatchTopK.load(tmp_path)):
        assert float(each.inference_threshold()) == float(sae.threshold)
        assert each.encode(x).nnz == pytest.approx(int((dense.pre_acts(sae, x) > sae.threshold).sum()), abs=1)
    sae.train().forward_pass(x)
    assert float(sae.inference_threshold()) == float(sae.latest)


def test_a_threshold_of_zero_that_was_calibrated_keeps_all_positive_entries(recwarn):
    sae = build()
    sae.b_enc.data -= 2.0
    assert sae.calibrate([features()], 64) == 0
    assert sae.eval().encode(features()).nnz == int((dense.pre_acts(sae, features()) > 0).sum())
    assert not recwarn.list
