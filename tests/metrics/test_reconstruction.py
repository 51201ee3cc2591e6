"""FVU, R² and cosine against scikit-learn and numpy in float64, however the samples are split."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import explained_variance_score, r2_score
from sklearn.metrics.pairwise import paired_cosine_distances

from sae_lightning.kernels import native
from sae_lightning.metrics import Reconstruction


def make(seed: int, n: int = 60, d_in: int = 7, offset: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator) * torch.linspace(0.1, 2, d_in) + offset
    return x, x + 0.3 * torch.randn(n, d_in, generator=generator)


def reference(x: torch.Tensor, rebuilt: torch.Tensor, center: float = 0.0) -> dict[str, float]:
    a, b = x.double().numpy(), rebuilt.double().numpy()
    explained = r2_score(a, b, multioutput="variance_weighted")
    cosine = np.mean(1 - paired_cosine_distances(a - center, b - center))
    return {"fvu": 1 - explained, "explained_variance": explained, "r2": r2_score(a, b), "cosine": cosine}


def found(*batches: tuple[torch.Tensor, torch.Tensor], center: torch.Tensor | None = None) -> dict[str, float]:
    metric = Reconstruction(batches[0][0].shape[1], center)
    for x, rebuilt in batches:
        metric.update(x, rebuilt)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 60), max_size=6), ranks=st.integers(1, 3),
    center=st.sampled_from([None, 2.9, -4.0]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_batches_and_ranks_do_not_matter(compiled, seed, cuts, ranks, center, dtype):
    x, rebuilt = (t.to(dtype) for t in make(seed))
    fixed = None if center is None else torch.full((7,), center, dtype=torch.float64)
    metrics = [Reconstruction(7, fixed) for _ in range(ranks)]
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "available", lambda *tensors: False)
        for i, (start, stop) in enumerate(pairwise([0, *sorted(cuts), 60])):
            metrics[i % ranks].update(x[start:stop], rebuilt[start:stop])
    for other in metrics[1:]:
        metrics[0].merge_state(other)
    scores = metrics[0].compute()
    for name, value in reference(x, rebuilt, center or 0.0).items():  # the center costs (7 / 0.1)² · 1e-16 of R²
        assert float(scores[name]) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("compiled", [True, False])
def test_deviations_over_samples(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda *_: False)
    (x, rebuilt), metric = make(3), Reconstruction(7, torch.full((7,), 2.5))
    for some in (slice(0, 17), slice(17, 60)):
        metric.update(x[some], rebuilt[some])
    a, b, out = x.double().numpy() - 2.5, rebuilt.double().numpy() - 2.5, metric.deviations()
    relative = [np.sum((p - q) ** 2) / np.sum(p**2) for p, q in zip(a, b, strict=True)]
    assert float(out["fvu_std"]) == pytest.approx(np.std(relative), rel=1e-5)
    assert float(out["cosine_std"]) == pytest.approx(np.std(1 - paired_cosine_distances(a, b)), rel=1e-5)


def test_explained_variance_is_scikit_learns_where_the_error_has_no_mean():
    x, rebuilt = make(5)
    rebuilt = rebuilt + (x - rebuilt).mean(0)
    expected = explained_variance_score(x.double(), rebuilt.double(), multioutput="variance_weighted")
    assert found((x, rebuilt))["explained_variance"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_large_mean_and_half_precision_cost_no_accuracy(kind):
    x, rebuilt = make(0, n=4000, offset=1e5 if kind == torch.float32 else 3.0)
    x = x.to(kind)
    expected = reference(x, rebuilt, x.double().mean(0).numpy())
    for name, value in found((x, rebuilt), center=x.double().mean(0)).items():
        assert value == pytest.approx(expected[name], rel=1e-9), name


def test_many_rows_are_shared_among_threads():
    x = torch.randn(5000, 600, generator=torch.Generator().manual_seed(0))
    one, many = found((x, 0.9 * x)), found(*((rows, 0.9 * rows) for rows in x.split(100)))
    assert one == pytest.approx(many, rel=1e-12)
    assert one["cosine"] == pytest.approx(1)


def test_anchors():
    x, _ = make(2)
    perfect, mean = found((x, x)), found((x, x.double().mean(0).expand_as(x)))
    assert (perfect["fvu"], perfect["r2"]) == (0, 1)
    assert (mean["fvu"], mean["r2"]) == pytest.approx((1, 0), abs=1e-9)
    assert found((x, -2 * x))["cosine"] == pytest.approx(-1)


def test_every_dimension_weighs_the_same_in_r2():
    x, _ = make(2, n=500)
    rebuilt = x.clone()
    rebuilt[:, 0] = x[:, 0].mean()  # the smallest dimension lost: nothing to FVU, a seventh to R²
    scores = found((x, rebuilt))
    assert scores["r2"] == pytest.approx(6 / 7, abs=1e-6)
    assert scores["explained_variance"] > 0.99


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3e4])
@pytest.mark.parametrize("center", [None, 0.1])
def test_constant_dimensions_are_left_out_of_r2(value, center):
    x, rebuilt = make(3, n=333, d_in=3)
    x[:, 1] = value
    fixed = None if center is None else torch.full((3,), center)
    scores = found(*((x[part], rebuilt[part]) for part in (slice(0, 100), slice(100, 333))), center=fixed)
    a, b = x[:, [0, 2]].double().numpy(), rebuilt[:, [0, 2]].double().numpy()
    assert scores["r2"] == pytest.approx(r2_score(a, b), rel=1e-9)


def test_samples_without_length_and_constant_features():
    scores = found((torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])))
    assert np.isnan([scores["fvu"], scores["r2"]]).all()
    assert scores["cosine"] == 0.5


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"shape \[N, 7\]; got \[4, 6\]"):
        Reconstruction(7).update(torch.zeros(4, 6), torch.zeros(4, 6))
    with pytest.raises(ValueError, match="Flatten"):
        Reconstruction(6).update(torch.zeros(2, 4, 6), torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match="center of shape"):
        Reconstruction(7, center=torch.zeros(6))
    with pytest.raises(ValueError, match="no sample"):
        Reconstruction(7).compute()


def test_casting_the_parent_module_keeps_the_sums_precise():
    x, rebuilt = make(3, n=3000)
    parent = torch.nn.ModuleList([Reconstruction(7, center=x.mean(0))])
    parent.to(torch.bfloat16)
    parent.half()
    parent[0].update(x, rebuilt)
    expected = reference(x, rebuilt, x.mean(0).double().numpy())
    assert {name: float(v) for name, v in parent[0].compute().items()} == pytest.approx(expected, rel=1e-10)
