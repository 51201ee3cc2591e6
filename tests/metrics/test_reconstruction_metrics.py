"""FVU and Cosine against one-shot float64 numpy, however the samples are split."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.metrics import FVU, Cosine


def make(seed: int, n: int = 60, d_in: int = 7, offset: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator) * torch.linspace(0.1, 2, d_in) + offset
    return x, x + 0.3 * torch.randn(n, d_in, generator=generator)


def reference(x: torch.Tensor, rebuilt: torch.Tensor) -> tuple[float, float]:
    a, b = x.double().numpy(), rebuilt.double().numpy()
    fvu = np.mean(((a - b) ** 2).sum(1)) / np.mean(((a - a.mean(0)) ** 2).sum(1))
    cosine = np.mean([a_i @ b_i / np.linalg.norm(a_i) / np.linalg.norm(b_i) for a_i, b_i in zip(a, b, strict=True)])
    return fvu, cosine


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
    fvus, cosines = [FVU(7, fixed) for _ in range(ranks)], [Cosine() for _ in range(ranks)]
    edges = [0, *sorted(cuts), 60]
    for i, (start, stop) in enumerate(pairwise(edges)):
        fvus[i % ranks].update(x[start:stop], rebuilt[start:stop])
        cosines[i % ranks].update(x[start:stop], rebuilt[start:stop])
    for other_fvu, other_cosine in zip(fvus[1:], cosines[1:], strict=True):
        fvus[0].merge_state(other_fvu)
        cosines[0].merge_state(other_cosine)
    fvu, cosine = reference(x, rebuilt)
    scores = fvus[0].compute()
    assert float(scores["fvu"]) == pytest.approx(fvu, rel=1e-12)
    assert float(scores["explained_variance"]) == pytest.approx(1 - fvu, rel=1e-12)
    assert float(cosines[0].compute()["cosine"]) == pytest.approx(cosine, rel=1e-12)


def test_a_large_mean_costs_no_accuracy_with_a_center():
    x, rebuilt = make(0, n=4000, offset=1e5)
    fvu, _ = reference(x, rebuilt)
    metric = FVU(7, center=x.mean(0))
    metric.update(x, rebuilt)
    assert float(metric.compute()["fvu"]) == pytest.approx(fvu, rel=1e-11)


def test_half_precision_features_are_summed_exactly():
    x, rebuilt = make(1, n=5000)
    metric = FVU(7)
    metric.update(x.half(), rebuilt)
    fvu, _ = reference(x.half(), rebuilt)
    assert float(metric.compute()["fvu"]) == pytest.approx(fvu, rel=1e-12)


def test_anchors():
    x, _ = make(2)
    perfect, mean = FVU(7), FVU(7)
    perfect.update(x, x)
    mean.update(x, x.double().mean(0).expand_as(x))
    assert float(perfect.compute()["fvu"]) == 0
    assert float(mean.compute()["fvu"]) == pytest.approx(1)
    opposite = Cosine()
    opposite.update(x, -2 * x)
    assert float(opposite.compute()["cosine"]) == pytest.approx(-1)


def test_cosine_about_a_center():
    x, rebuilt = make(4)
    metric = Cosine(center=x.mean(0))
    metric.update(x, rebuilt)
    _, expected = reference(x.double() - x.mean(0).double(), rebuilt.double() - x.mean(0).double())
    assert float(metric.compute()["cosine"]) == pytest.approx(expected, rel=1e-12)


def test_degenerate_input():
    constant = FVU(3)
    constant.update(torch.ones(4, 3), torch.zeros(4, 3))
    assert torch.isnan(constant.compute()["fvu"])
    zero = Cosine()
    zero.update(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    assert float(zero.compute()["cosine"]) == 0.5


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"shape \[N, 7\]; got \[4, 6\]"):
        FVU(7).update(torch.zeros(4, 6), torch.zeros(4, 6))
    with pytest.raises(ValueError, match="Flatten"):
        Cosine().update(torch.zeros(2, 4, 6), torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match="center of shape"):
        FVU(7, center=torch.zeros(6))
    with pytest.raises(ValueError, match="no sample"):
        FVU(7).compute()


def test_casting_the_parent_module_keeps_the_sums_precise():
    x, rebuilt = make(3, n=3000)
    parent = torch.nn.ModuleList([FVU(7, center=x.mean(0)), Cosine()])
    parent.to(torch.bfloat16)
    parent.half()
    for metric in parent:
        metric.update(x, rebuilt)
    fvu, cosine = reference(x, rebuilt)
    assert float(parent[0].compute()["fvu"]) == pytest.approx(fvu, rel=1e-12)
    assert float(parent[1].compute()["cosine"]) == pytest.approx(cosine, rel=1e-12)
