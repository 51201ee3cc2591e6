"""FVU, R² and cosine in one metric, against the three and against naive formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.kernels import native
from sae_lightning.metrics import FVU, R2, Cosine
from sae_lightning.metrics.reconstruction import Reconstruction


def made(seed: int, n: int = 50, d: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * torch.linspace(0.1, 3, d) + torch.linspace(-9, 9, d)
    return x, x + 0.3 * torch.randn(n, d, generator=generator), x.mean(0) + 0.1


@pytest.mark.parametrize("with_native", [True, False])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 49), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_it_equals_the_three(with_native, seed, cut, dtype):
    x, y, center = (t.to(dtype) for t in made(seed))
    with pytest.MonkeyPatch.context() as patch:
        if not with_native:
            patch.setattr(native, "available", lambda *tensors: False)
        together = Reconstruction(7, center)
        for part in (slice(0, cut), slice(cut, None)):
            together.update(x[part], y[part])
    expected = {}
    for metric in (FVU(7, center), R2(7, center), Cosine(center)):
        metric.update(x, y)
        expected |= metric.compute()
    found = together.compute()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-9), name


def test_it_equals_the_formulas():
    x, y, _ = made(3)
    metric = Reconstruction(7)
    metric.update(x, y)
    a, b = x.double().numpy(), y.double().numpy()
    residual, spread = ((a - b) ** 2).sum(0), ((a - a.mean(0)) ** 2).sum(0)
    found = metric.compute()
    assert float(found["fvu"]) == pytest.approx(residual.sum() / spread.sum(), rel=1e-9)
    assert float(found["r2"]) == pytest.approx((1 - residual / spread).mean(), rel=1e-9)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert float(found["cosine"]) == pytest.approx(cosines.mean(), rel=1e-12)


def test_many_rows_are_shared_among_threads():
    x = torch.randn(5000, 600, generator=torch.Generator().manual_seed(0))
    one, many = Reconstruction(600), Reconstruction(600)
    one.update(x, 0.9 * x)
    for rows in x.split(100):
        many.update(rows, 0.9 * rows)
    assert float(one.compute()["fvu"]) == pytest.approx(float(many.compute()["fvu"]), rel=1e-12)
    assert float(one.compute()["cosine"]) == pytest.approx(1)


def test_samples_without_length_and_constant_features():
    metric = Reconstruction(2)
    metric.update(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    found = metric.compute()
    assert found["fvu"].isnan()
    assert float(found["cosine"]) == 0.5
    with pytest.raises(ValueError, match="no sample"):
        Reconstruction(2).compute()
    with pytest.raises(ValueError, match=r"shape \[N, 2\]"):
        metric.update(torch.zeros(3, 3), torch.zeros(3, 3))
