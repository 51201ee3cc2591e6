"""Class purity against loops over latents and images."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.metrics.purity import Purity
from sae_lightning.saes import SparseCodes

D_SAE, CLASSES = 20, 4


def make(seed: int, n: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, D_SAE, generator=generator)
    dense[torch.rand(n, D_SAE, generator=generator) < 0.9] = 0
    return dense, torch.randint(CLASSES, (n,), generator=generator)


def codes_of(dense: torch.Tensor) -> SparseCodes:
    return SparseCodes.select(dense, dense > 0)


def slow(dense: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, int]]:
    """Binary purity, weighted purity and dominant class of each latent, by the paper's definition."""
    found = []
    for k in range(dense.shape[1]):
        fires = [n for n in range(len(labels)) if dense[n, k] > 0]
        if not fires:
            found.append((0.0, 0.0, -1))
            continue
        dominant = max(range(CLASSES), key=lambda c: (sum(labels[n] == c for n in fires), -c))
        own = [n for n in fires if labels[n] == dominant]
        weighted = sum(float(dense[n, k]) for n in own) / sum(float(dense[n, k]) for n in fires)
        found.append((len(own) / len(fires), weighted, dominant))
    return found


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 50), max_size=5), ranks=st.integers(1, 3))
def test_batches_and_ranks_do_not_matter(seed, cuts, ranks):
    dense, labels = make(seed)
    metrics = [Purity(D_SAE, CLASSES) for _ in range(ranks)]
    for i, (start, stop) in enumerate(pairwise([0, *sorted(cuts), 50])):
        metrics[i % ranks].update(codes_of(dense[start:stop]), labels[start:stop])
    for other in metrics[1:]:
        metrics[0].merge_state(other)
    expected = slow(dense.numpy(), labels.numpy())
    found = metrics[0].per_latent()
    np.testing.assert_allclose(found.purity, [binary for binary, _, _ in expected], rtol=1e-14)
    np.testing.assert_allclose(found.weighted_purity, [weighted for _, weighted, _ in expected], rtol=1e-12)
    assert found.dominant.tolist() == [dominant for _, _, dominant in expected]
    np.testing.assert_array_equal(found.images, (dense > 0).sum(0))
    alive = [e for e in expected if e[2] >= 0]
    means = metrics[0].compute()
    assert float(means["purity"]) == pytest.approx(np.mean([e[0] for e in alive]), rel=1e-12)
    assert float(means["weighted_purity"]) == pytest.approx(np.mean([e[1] for e in alive]), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.25, 3.0, 1e4]))
def test_bounds_and_invariances(seed, scale):
    dense, labels = make(seed)
    metric, scaled = Purity(D_SAE, CLASSES), Purity(D_SAE, CLASSES)
    metric.update(codes_of(dense), labels)
    scaled.update(codes_of(dense * scale), labels)
    found = metric.per_latent()
    fired = found.images > 0
    assert bool((found.purity[fired] >= 1 / CLASSES).all())
    assert bool((found.purity <= 1).all())
    assert bool(((found.weighted_purity >= 0) & (found.weighted_purity <= 1)).all())
    torch.testing.assert_close(scaled.per_latent().purity, found.purity, rtol=0, atol=0)
    torch.testing.assert_close(scaled.per_latent().weighted_purity, found.weighted_purity, rtol=1e-6, atol=0)
    flat = Purity(D_SAE, CLASSES)
    flat.update(codes_of((dense > 0).float()), labels)  # equal activations: both purities agree
    torch.testing.assert_close(flat.per_latent().weighted_purity, found.purity)


def test_ties_go_to_the_lower_class():
    dense = torch.tensor([[1.0, 0.0], [4.0, 2.0], [2.0, 1.0], [1.0, 5.0]])
    metric = Purity(2, CLASSES)
    metric.update(codes_of(dense), torch.tensor([3, 1, 3, 1]))
    found = metric.per_latent()
    assert found.dominant.tolist() == [1, 1]
    assert found.purity.tolist() == pytest.approx([1 / 2, 2 / 3])
    assert found.weighted_purity.tolist() == pytest.approx([5 / 8, 7 / 8])


def test_nothing_active_has_no_purity():
    metric = Purity(3, 2)
    metric.update(codes_of(torch.zeros(4, 3)), torch.zeros(4, dtype=torch.long))
    assert metric.compute().keys() == {"purity", "weighted_purity"}
    assert all(bool(value.isnan()) for value in metric.compute().values())
    assert metric.per_latent().dominant.tolist() == [-1, -1, -1]


def test_errors_say_what_is_wrong():
    dense, labels = make(0)
    with pytest.raises(ValueError, match="codes of 30 latents; got 20"):
        Purity(30, CLASSES).update(codes_of(dense), labels)
    with pytest.raises(ValueError, match=r"each of 50 images; got labels \[10\].*Pool"):
        Purity(D_SAE, CLASSES).update(codes_of(dense), labels[:10])
    with pytest.raises(ValueError, match="span 0 to 3, but there are 2 classes"):
        Purity(D_SAE, 2).update(codes_of(dense), labels)
