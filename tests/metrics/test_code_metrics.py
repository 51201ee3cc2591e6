"""L0, Firing and the decoder's cosines against dense computations."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.metrics import L0, Firing, decoder_cosine
from sae_lightning.saes import SparseCodes


def codes_of(dense: torch.Tensor) -> SparseCodes:
    return SparseCodes.select(dense, dense != 0)


def random_codes(seed: int, n: int = 40, d_sae: int = 25) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, d_sae, generator=generator)
    dense[torch.rand(n, d_sae, generator=generator) < 0.93] = 0
    return dense


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 40), max_size=5), ranks=st.integers(1, 3))
def test_batches_and_ranks_do_not_matter(seed, cuts, ranks):
    dense = random_codes(seed)
    l0, firing = [L0() for _ in range(ranks)], [Firing(25) for _ in range(ranks)]
    edges = [0, *sorted(cuts), 40]
    for i, (start, stop) in enumerate(pairwise(edges)):
        l0[i % ranks].update(codes_of(dense[start:stop]))
        firing[i % ranks].update(codes_of(dense[start:stop]))
    for rank in range(1, ranks):
        l0[0].merge_state(l0[rank])
        firing[0].merge_state(firing[rank])
    active = dense.numpy() != 0
    assert float(l0[0].compute()["l0"]) == pytest.approx(active.sum(1).mean(), rel=1e-14)
    assert float(l0[0].deviations()["l0_std"]) == pytest.approx(np.std(active.sum(1)), rel=1e-12)
    np.testing.assert_array_equal(firing[0].counts.numpy(), active.sum(0))
    scores = firing[0].compute()
    assert int(scores["alive"]) == active.any(0).sum()
    assert float(scores["dead_share"]) == pytest.approx(1 - active.any(0).mean(), abs=1e-14)


def test_firing_refuses_codes_of_another_sae():
    with pytest.raises(ValueError, match="codes of 30 latents; got 25"):
        Firing(30).update(codes_of(random_codes(0)))


@pytest.mark.parametrize("block", [1, 5, 100])
def test_decoder_cosines_equal_the_full_matrix(block):
    W_dec = torch.randn(23, 6, generator=torch.Generator().manual_seed(0)) * 3
    unit = W_dec.double().numpy() / np.linalg.norm(W_dec.double().numpy(), axis=1, keepdims=True)
    cosines = unit @ unit.T
    different = ~np.eye(23, dtype=bool)
    scores = decoder_cosine(W_dec, rows=block)
    assert scores["decoder_cosine"] == pytest.approx(np.abs(cosines[different]).mean(), rel=1e-5)
    assert scores["decoder_orthogonality"] == pytest.approx(cosines[np.tril_indices(23, -1)].mean(), rel=1e-9)
    assert scores["decoder_squared_cosine"] == pytest.approx((cosines[different] ** 2).mean(), rel=1e-5)
    np.fill_diagonal(cosines, -np.inf)
    assert scores["decoder_nearest_cosine"] == pytest.approx(cosines.max(1).mean(), rel=1e-5)


def test_decoder_cosine_anchors():
    assert set(decoder_cosine(torch.eye(4)).values()) == {0.0}
    opposite = decoder_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    assert opposite == {
        "decoder_cosine": 1.0, "decoder_orthogonality": -1.0, "decoder_squared_cosine": 1.0,
        "decoder_nearest_cosine": -1.0,
    }  # fmt: skip
    aligned = decoder_cosine(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    assert aligned["decoder_orthogonality"] == aligned["decoder_squared_cosine"] == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="at least two"):
        decoder_cosine(torch.ones(1, 4))


def test_random_directions_are_orthogonal_in_the_signed_mean_and_one_over_d_in_in_the_squared():
    W_dec = torch.randn(800, 64, generator=torch.Generator().manual_seed(0))
    scores = decoder_cosine(W_dec)
    assert scores["decoder_squared_cosine"] == pytest.approx(1 / 64, rel=0.02)
    assert abs(scores["decoder_orthogonality"]) < 3 / 64**0.5 / (800 * 799 / 2) ** 0.5
