"""MonoScore equals the pairwise definition on every kind of latent, merges over batches, refuses bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.kernels import native
from sae_lightning.metrics import MonoScore, MSScore
from sae_lightning.metrics.monoscore import monoscore
from sae_lightning.saes.codes import DenseCodes, SparseCodes


def pairwise(activations: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper as it stands: O(N²), one pair after another."""
    h = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    low, high = activations.min(0), activations.max(0)
    scaled = (activations - low) / np.where(high > low, high - low, 1)
    above, below = np.zeros(activations.shape[1]), np.zeros(activations.shape[1])
    for n in range(len(h)):
        for m in range(n + 1, len(h)):
            r = scaled[n] * scaled[m]
            above += r * (h[n] @ h[m])
            below += r
    return np.where(below > 0, above / np.where(below > 0, below, 1), 0)


def latents(n: int, seed: int = 0) -> torch.Tensor:
    """[n, 8]: sparse, dense, always active, constant, never active, active once, twice, and nearly constant."""
    g = torch.Generator().manual_seed(seed)
    a = torch.zeros(n, 8, dtype=torch.float64)
    a[:, 0] = torch.relu(torch.randn(n, generator=g) - 1)
    a[:, 1] = torch.relu(torch.randn(n, generator=g) + 1)
    a[:, 2] = 0.5 + torch.rand(n, generator=g)
    a[:, 3] = 0.7
    a[2, 5] = 3.0
    a[[1, n - 1], 6] = torch.tensor([2.0, 1e-6], dtype=torch.float64)
    a[:, 7], a[0, 7], a[4, 7] = 0.4, 0.9, 0.6
    return a


def codes_of(dense: torch.Tensor) -> SparseCodes:
    return SparseCodes.select(dense, dense > 0)


def embeddings(n: int, d: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


@pytest.mark.parametrize("form", ["codes", "dense codes", "matrix"])
def test_equals_the_pairwise_definition_on_every_kind_of_latent(form):
    a, h = latents(40), embeddings(40)
    given = {"codes": codes_of(a), "dense codes": DenseCodes(a), "matrix": a}[form]
    np.testing.assert_allclose(monoscore(given, h), pairwise(a.numpy(), h.numpy()), rtol=1e-9, atol=1e-12)


def test_activations_of_any_sign():
    a, h = torch.randn(30, 5, dtype=torch.float64) * 4 - 7, embeddings(30)
    a[:, 4] = torch.relu(a[:, 4] + 7) - 2  # most at the minimum
    np.testing.assert_allclose(monoscore(a, h), pairwise(a.numpy(), h.numpy()), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernels", ["native", "portable"])
def test_low_precision_inputs_are_summed_exactly(dtype, kernels, monkeypatch):
    """The features and codes as stored, not rounded again: equal to the definition on their own exact values."""
    if kernels == "portable":
        monkeypatch.setattr(native, "available", lambda *_: False)
    a, h = latents(50).float(), embeddings(50, 19).to(dtype)
    expected = pairwise(a.double().numpy(), h.double().numpy())
    np.testing.assert_allclose(monoscore(codes_of(a), h), expected, rtol=1e-9, atol=1e-12)


def test_few_images():
    h = embeddings(2)
    cosine = torch.cosine_similarity(h[0], h[1], dim=0)
    a = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    assert monoscore(codes_of(a), h).tolist() == [0, 0, 0]  # the minimum of two images scales to zero
    three = torch.cat([a, torch.zeros(1, 3, dtype=torch.float64)])
    score = monoscore(codes_of(three), torch.cat([h, h[:1]]))
    assert score[0] == pytest.approx(float(cosine))
    assert score[1:].tolist() == [0, 0]


def test_batches_in_any_order_and_reduced_states_give_the_same():
    a, h = latents(60), embeddings(60)
    whole = MonoScore(8, 6)
    whole.update(codes_of(a), h)
    parts = [MonoScore(8, 6) for _ in range(3)]
    for i in torch.randperm(60).split(7):
        parts[int(i[0]) % 3].update(codes_of(a[i]) if len(i) % 2 else a[i], h[i])
    merged = MonoScore(8, 6)
    for part in parts:
        merged.merge_state(part)
    torch.testing.assert_close(merged.scores(), whole.scores(), rtol=1e-12, atol=1e-14)
    assert merged.scored().tolist() == whole.scored().tolist() == [True, True, True, False, False, False, True, True]
    torch.testing.assert_close(merged.compute()["monoscore"], whole.compute()["monoscore"], rtol=1e-9, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 25), st.floats(0.0, 1.0), st.booleans(), st.sampled_from([1e-3, 1.0, 1e3]))
def test_any_sparsity_shift_and_scale(seed, n, share, shift, scale):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(n, 6, generator=g, dtype=torch.float64) * (torch.rand(n, 6, generator=g) < share) * scale
    a = a + (0.1 * scale if shift else 0)
    h = torch.randn(n, 4, generator=g, dtype=torch.float64)
    np.testing.assert_allclose(monoscore(codes_of(a), h), pairwise(a.numpy(), h.numpy()), rtol=1e-6, atol=1e-9)


def test_summary():
    a, h = latents(40), embeddings(40)
    metric = MonoScore(8, 6)
    metric.update(codes_of(a), h)
    scores, out = pairwise(a.numpy(), h.numpy()), metric.compute()
    scored = [0, 1, 2, 6, 7]
    assert float(out["monoscore"]) == pytest.approx(scores.mean())
    assert float(out["monoscore_scored"]) == pytest.approx(scores[scored].mean())
    assert float(out["scored_share"]) == 5 / 8
    unit = (h / h.norm(dim=1, keepdim=True)).numpy()
    pairs = [unit[i] @ unit[j] for i in range(40) for j in range(i)]
    assert float(out["similarity_baseline"]) == pytest.approx(np.mean(pairs))
    named = MSScore(8, 6)
    named.update(codes_of(a), h)
    assert float(named.compute()["ms_peak"]) == pytest.approx(scores[scored].max())
    assert float(named.compute()["ms_mean"]) == pytest.approx(scores[scored].mean())
    assert named.scores().isnan().nonzero().squeeze(1).tolist() == [3, 4, 5]


def test_a_latent_that_only_fires_on_alike_images_scores_one():
    h = torch.eye(3).repeat_interleave(5, 0)
    a = torch.zeros(15, 2)
    a[:5, 0] = torch.rand(5) + 0.1
    a[:, 1] = torch.rand(15) + 0.1
    assert float(monoscore(codes_of(a), h)[0]) == pytest.approx(1)
    assert float(monoscore(codes_of(a), h)[1]) < 0.5


def test_memory_does_not_grow_and_precision_survives_a_cast():
    metric = torch.nn.ModuleDict({"m": MonoScore(8, 6)}).half()["m"]
    for seed in range(3):
        metric.update(codes_of(latents(20, seed)), embeddings(20, seed=seed))
    assert metric.weighted.dtype == torch.float64
    assert sum(t.numel() for t in metric.metric_state.values()) == 8 * 6 + 6 + 6 * 8 + 1


def test_refuses_what_does_not_fit():
    metric = MonoScore(8, 6)
    with pytest.raises(ValueError, match=r"embeddings \[N, 6\]"):
        metric.update(codes_of(latents(10)), embeddings(9))
    with pytest.raises(ValueError, match="of 8 latents"):
        metric.update(codes_of(latents(10)[:, :5]), embeddings(10))
    broken = embeddings(10)
    broken[3] = 0
    with pytest.raises(ValueError, match="image 3"):
        metric.update(codes_of(latents(10)), broken)
    broken[3] = torch.nan
    with pytest.raises(ValueError, match="image 3"):
        metric.update(codes_of(latents(10)), broken)
    with pytest.raises(ValueError, match="seen no sample"):
        metric.compute()
