"""Stability equals scipy's dense assignment, finds a shuffled copy, and leaves dead latents out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sae_lightning.metrics.dictionary import match_latents, nearest_cosine, stability


def dictionaries(n: int, m: int, d: int = 8, noise: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, d] of any norms, and [m, d]: a shuffled, noisy copy of it as far as it goes, otherwise random."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(n, d, generator=g)
    second = torch.randn(m, d, generator=g) * noise
    second[: min(n, m)] += first[torch.randperm(n, generator=g)[: min(n, m)]]
    return first * (torch.rand(n, 1, generator=g) + 0.5), second


def cosines(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    a, b = first.double().numpy(), second.double().numpy()
    return a / np.linalg.norm(a, axis=1, keepdims=True) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 60), st.floats(0.01, 3), st.booleans())
def test_equals_the_dense_assignment(seed, n, m, noise, absolute):
    first, second = dictionaries(n, m, noise=noise, seed=seed)
    full = cosines(first, second)
    full = np.abs(full) if absolute else full
    found = match_latents(first, second, absolute)
    assert float(found.cosine.sum()) == pytest.approx(full[linear_sum_assignment(full, maximize=True)].sum(), abs=1e-4)
    assert found.first.tolist() == sorted(found.first.tolist())
    assert len(found.first.unique()) == len(found.second.unique()) == len(found.cosine) == min(n, m)
    np.testing.assert_allclose(found.cosine, full[found.first, found.second], atol=1e-6)
    np.testing.assert_allclose(nearest_cosine(first, second, absolute, rows=7), full.max(1), atol=1e-6)


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_a_few_candidates_find_the_optimum(noise):
    """400 latents in 32 dimensions, alike and nearly unrelated."""
    first, second = dictionaries(400, 430, d=32, noise=noise)
    full = cosines(first, second)
    best = full[linear_sum_assignment(full, maximize=True)].mean()
    assert float(match_latents(first, second).cosine.mean()) == pytest.approx(best, abs=1e-6)
    assert best - 0.01 < float(match_latents(first, second, candidates=8).cosine.mean()) <= best + 1e-6


def test_latents_that_all_want_the_same_partners_get_what_is_left():
    """Ten latents along one axis, of whose candidates there are two."""
    first = torch.tensor([[1.0, 0.01 * i] for i in range(10)])
    second = torch.cat([torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.tensor([[0.1 * i, 1.0] for i in range(8)])])
    full = cosines(first, second)
    found = match_latents(first, second, candidates=2)
    assert sorted(found.second.tolist()) == list(range(10))
    assert float(found.cosine.sum()) <= full[linear_sum_assignment(full, maximize=True)].sum() + 1e-5
    np.testing.assert_allclose(found.cosine, full[found.first, found.second], atol=1e-6)


def test_a_shuffled_copy_is_found_and_its_opposite_only_by_magnitude():
    first = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    found = match_latents(first, 3 * first[order])
    assert order[found.second].tolist() == list(range(50))
    copy = stability(first, 3 * first[order])
    assert copy == pytest.approx(dict.fromkeys(copy, 1), abs=1e-6)
    assert stability(first, -first[order])["stability"] < 0.9
    assert stability(first, -first[order], absolute=True)["stability"] == pytest.approx(1)


def test_summary_by_hand():
    """Cosines 1, 0.8 and 0 of partners; the latent without one is alike to a latent that is taken."""
    first = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0.99, 0.1]])
    second = torch.tensor([[5.0, 0, 0], [0, 0.8, 0.6], [-1, 0, 0]])
    alone = float(first[2, 1:] @ second[1, 1:] / first[2].norm())
    found = stability(first, second)
    assert match_latents(first, second).second.tolist() == [0, 2, 1]
    assert found["stability"] == pytest.approx((1 + 0 + alone) / 3, abs=1e-6)
    assert found["stability_median"] == pytest.approx(alone, abs=1e-6)
    assert found["stability_above_0.7"] == pytest.approx(2 / 3)
    assert found["stability_above_0.9"] == pytest.approx(1 / 3)
    assert found["stability_nearest"] == pytest.approx((1 + 0.8 + alone) / 3, abs=1e-6)
    assert found["stability_nearest_above_0.7"] == 1


def test_dead_latents_are_left_out():
    first, second = dictionaries(30, 30)
    alive_first, alive_second = torch.arange(30) % 3 > 0, torch.arange(30) > 4
    found = stability(first, second, alive_first, alive_second)
    assert found == stability(first[alive_first], second[alive_second])
    assert found != stability(first, second)
    assert all(np.isnan(v) for v in stability(first, second, torch.zeros(30, dtype=torch.bool)).values())


def test_refuses_what_does_not_fit():
    first, second = dictionaries(5, 6)
    with pytest.raises(ValueError, match=r"of the same d; got \[5, 8\] and \[6, 7\]"):
        match_latents(first, second[:, 1:])
    with pytest.raises(ValueError, match="a bool mask of 6 latents"):
        stability(first, second, None, torch.ones(5, dtype=torch.bool))
