"""Histograms of activations equal numpy's on the dense codes, over any batches."""

import numpy as np
import pytest
import torch

from sae_lightning.metrics import ActivationHistogram
from sae_lightning.metrics.sparsity import Histogram, log_edges
from sae_lightning.saes.codes import DenseCodes, SparseCodes


def activations(n: int = 60, d_sae: int = 25, seed: int = 0) -> torch.Tensor:
    """Over ten powers of ten, a tenth active; some samples are silent and latent 3 never fires."""
    g = torch.Generator().manual_seed(seed)
    dense = 10 ** (torch.randn(n, d_sae, generator=g) * 2)
    dense[torch.rand(n, d_sae, generator=g) > 0.1] = 0
    dense[:, 3], dense[::9] = 0, 0
    return dense


def codes_of(dense: torch.Tensor) -> SparseCodes:
    return SparseCodes.select(dense, dense > 0)


def counts_of(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values, np.concatenate([[-np.inf], edges, [np.inf]]))[0]


@pytest.mark.parametrize("form", [codes_of, DenseCodes])
def test_equals_numpy_in_any_batches_and_ranks(form):
    dense = activations()
    ranks = [ActivationHistogram(25, low=-2, high=3, per_decade=4) for _ in range(2)]
    for i, part in enumerate(dense.split(7)):
        ranks[i % 2].update(form(part))
    ranks[0].merge_state(ranks[1])
    found, x = ranks[0].histograms(), dense.double().numpy()
    edges = 10 ** np.linspace(-2, 3, 21)
    np.testing.assert_allclose(found["values"].edges, edges)
    np.testing.assert_array_equal(found["values"].counts, counts_of(x[x > 0], edges))
    np.testing.assert_array_equal(found["maxima"].counts, counts_of(x.max(1), edges))
    shares = found["frequencies"].edges.numpy()
    assert shares[0] == pytest.approx(1e-9)
    assert shares[-1] == 1
    np.testing.assert_array_equal(found["frequencies"].counts, counts_of((x > 0).mean(0), shares))
    assert int(found["frequencies"].counts[0]) == (x == 0).all(0).sum() >= 1
    assert int(found["maxima"].counts[0]) >= 7  # of silent samples
    assert {name: counts.tolist() for name, counts in ranks[0].compute().items()} == {
        name: each.counts.tolist() for name, each in found.items()
    }


def test_an_edge_belongs_to_the_bin_above_it():
    metric = ActivationHistogram(1, low=-1, high=1, per_decade=1)
    metric.update(codes_of(torch.tensor([[0.1], [0.5], [1.0], [9.0], [10.0], [99.0], [0.01]], dtype=torch.float64)))
    assert metric.compute()["values"].tolist() == [1, 2, 2, 2]
    assert metric.compute()["frequencies"].tolist()[-1] == 1  # the one latent is always active


def test_quantiles_are_right_to_a_bin():
    g = torch.Generator().manual_seed(0)
    values = 10 ** torch.randn(20_000, generator=g)
    metric = ActivationHistogram(1, per_decade=20)
    metric.update(codes_of(values[:, None]))
    found = metric.histograms()["values"]
    for q in (0.01, 0.25, 0.5, 0.9, 0.999):
        assert np.log10(found.quantile(q)) == pytest.approx(float(values.quantile(q).log10()), abs=0.05)
    tiny = Histogram(torch.tensor([1.0, 10.0, 100.0]), torch.tensor([2, 4, 0, 2]))
    assert [tiny.quantile(q) for q in (0.1, 0.5, 0.9)] == pytest.approx([1, 10**0.5, 100])
    assert np.isnan(Histogram(tiny.edges, torch.zeros(4, dtype=torch.long)).quantile(0.5))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="Expected codes of 24 latents; got 25"):
        ActivationHistogram(24).update(codes_of(activations()))
    with pytest.raises(ValueError, match="low < high"):
        ActivationHistogram(24, low=2, high=2)
    with pytest.raises(ValueError, match="per decade"):
        log_edges(0, 1, 0)
    with pytest.raises(ValueError, match="seen no sample"):
        ActivationHistogram(24).compute()
