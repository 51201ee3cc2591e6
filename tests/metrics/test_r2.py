"""R2 against sklearn's r2_score, however the samples are split."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score

from sae_lightning.metrics import FVU
from sae_lightning.metrics.r2 import R2


def make(seed: int, n: int = 60, d_in: int = 7, offset: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator) * torch.linspace(0.1, 2, d_in) + offset
    return x, x + 0.3 * torch.randn(n, d_in, generator=generator)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    ranks=st.integers(1, 3),
    center=st.sampled_from([None, 2.9, -4.0]),
)
def test_batches_and_ranks_do_not_matter(seed, cuts, ranks, center):
    x, rebuilt = make(seed)
    fixed = None if center is None else torch.full((7,), center)
    metrics = [R2(7, fixed) for _ in range(ranks)]
    for i, (start, stop) in enumerate(pairwise([0, *sorted(cuts), 60])):
        metrics[i % ranks].update(x[start:stop], rebuilt[start:stop])
    for other in metrics[1:]:
        metrics[0].merge_state(other)
    a, b = x.double().numpy(), rebuilt.double().numpy()
    exact = 1e-10  # a center 70 deviations off costs (7 / 0.1)² · 1e-16 of the smallest dimension's variance
    assert float(metrics[0].compute()["r2"]) == pytest.approx(r2_score(a, b), rel=exact)
    np.testing.assert_allclose(metrics[0].per_dimension(), r2_score(a, b, multioutput="raw_values"), rtol=exact)


def test_a_large_mean_costs_no_accuracy_with_a_center():
    x, rebuilt = make(0, n=4000, offset=1e5)
    metric = R2(7, center=x.mean(0))
    metric.update(x, rebuilt)
    assert float(metric.compute()["r2"]) == pytest.approx(r2_score(x.double().numpy(), rebuilt.double().numpy()))


def test_half_precision_features_are_summed_exactly():
    x, rebuilt = make(1, n=5000)
    metric = R2(7)
    metric.update(x.half(), rebuilt)
    expected = r2_score(x.half().double().numpy(), rebuilt.double().numpy())
    assert float(metric.compute()["r2"]) == pytest.approx(expected, rel=1e-12)


def test_every_dimension_weighs_the_same():
    x, _ = make(2, n=500)
    rebuilt = x.clone()
    rebuilt[:, 0] = x[:, 0].mean()  # the smallest dimension lost: nothing to FVU, a seventh to R²
    r2, fvu = R2(7), FVU(7)
    r2.update(x, rebuilt)
    fvu.update(x, rebuilt)
    assert float(r2.compute()["r2"]) == pytest.approx(6 / 7, abs=1e-6)
    assert float(fvu.compute()["explained_variance"]) > 0.99


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3e4])
@pytest.mark.parametrize("center", [None, 0.1])
def test_constant_dimensions_are_left_out(value, center):
    x, rebuilt = make(3, n=333, d_in=3)
    x[:, 1] = value
    metric = R2(3, None if center is None else torch.full((3,), center))
    for part in (slice(0, 100), slice(100, 333)):
        metric.update(x[part], rebuilt[part])
    a, b = x[:, [0, 2]].double().numpy(), rebuilt[:, [0, 2]].double().numpy()
    assert float(metric.compute()["r2"]) == pytest.approx(r2_score(a, b), rel=1e-12)
    assert metric.per_dimension().isnan().tolist() == [False, True, False]


def test_all_constant_is_nan():
    metric = R2(3)
    metric.update(torch.ones(4, 3), torch.zeros(4, 3))
    assert metric.compute()["r2"].isnan()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"shape \[N, 7\]; got \[4, 6\]"):
        R2(7).update(torch.zeros(4, 6), torch.zeros(4, 6))
    with pytest.raises(ValueError, match="center of shape"):
        R2(7, center=torch.zeros(6))
    with pytest.raises(ValueError, match="no sample"):
        R2(7).compute()


def test_casting_the_parent_module_keeps_the_sums_precise():
    x, rebuilt = make(3, n=3000)
    parent = torch.nn.ModuleList([R2(7, center=x.mean(0))]).half()
    parent[0].update(x, rebuilt)
    expected = r2_score(x.double().numpy(), rebuilt.double().numpy())
    assert float(parent[0].compute()["r2"]) == pytest.approx(expected, rel=1e-12)
