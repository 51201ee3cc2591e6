"""CKNNA equals its definitions pair by pair, whatever holds the codes, and has its known values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.kernels import native
from sae_lightning.metrics.cknna import alignment, cknna, neighbours
from sae_lightning.saes.codes import DenseCodes, SparseCodes


def slowly(first: np.ndarray, second: np.ndarray, k: int, form: str, normalize: bool) -> float:
    """The definitions with full matrices and loops over pairs."""
    if normalize:
        first, second = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (first, second))
    K, L, n = first @ first.T, second @ second.T, len(first)

    def near(M):
        return [set(sorted((j for j in range(n) if j != i), key=lambda j: -M[i, j])[:k]) for i in range(n)]

    near_k, near_l = near(K), near(L)

    def align(A, B, near_a, near_b):
        if form == "unbiased":
            a, b = np.zeros((n, n)), np.zeros((n, n))
            for i in range(n):
                for j in near_a[i] & near_b[i]:
                    a[i, j], b[i, j] = A[i, j], B[i, j]
            one = np.ones(n)
            whole = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
            return np.trace(a @ b) + whole - 2 * one @ a @ b @ one / (n - 2)
        total = 0.0
        for i in range(n):
            for j in near_a[i] & near_b[i]:
                total += (A[i, j] - A[i].mean()) * (B[i, j] - B[i].mean())
        return total

    def hsic(A):
        return sum((A[i, j] - A[i].mean()) ** 2 for i in range(n) for j in range(n))

    if form == "hsic":
        return align(K, L, near_k, near_l) / np.sqrt(hsic(K) * hsic(L))
    return align(K, L, near_k, near_l) / np.sqrt(align(K, K, near_k, near_k) * align(L, L, near_l, near_l))


def spaces(seed: int, n: int = 40, d: int = 6, d_sae: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, off centre, and codes of them, most of them next to nothing; [n, d] and [n, d_sae] float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    z = torch.relu(x @ torch.randn(d, d_sae, generator=g, dtype=torch.float64) - 2)
    return x + 0.5, z + 1e-3 * torch.rand(n, d_sae, generator=g, dtype=torch.float64)  # so that no neighbours tie


def codes_of(dense: torch.Tensor) -> SparseCodes:
    return SparseCodes.select(dense, dense > 0)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from(["unbiased", "centered", "hsic"]), st.booleans(), st.integers(2, 12))
def test_equals_the_definition(seed, form, normalize, k):
    x, z = spaces(seed)
    expected = slowly(x.numpy(), z.numpy(), k, form, normalize)
    assert cknna(x, codes_of(z), k, form, normalize) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kernels", ["native", "portable"])
@pytest.mark.parametrize("normalize", [True, False])
def test_codes_score_as_the_matrix_that_they_are_in_any_blocks(normalize, kernels, monkeypatch):
    if kernels == "portable":
        monkeypatch.setattr(native, "available", lambda *_: False)
    x, z = (t.float() for t in spaces(0, n=150))
    one = alignment(neighbours(x, 5, normalize), neighbours(z, 5, normalize))
    for codes in (codes_of(z), DenseCodes(z)):
        for rows in (7, 150, 512):
            two = alignment(neighbours(x, 5, normalize, rows), neighbours(codes, 5, normalize, rows))
            assert two == pytest.approx(one, rel=1e-5)


def test_a_space_is_aligned_with_itself_its_rotation_and_its_multiple():
    x, _ = spaces(1, n=200)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    for form in ("unbiased", "centered"):
        assert cknna(x, x, form=form) == pytest.approx(1)
        assert cknna(x, 3 * x @ turn, form=form) == pytest.approx(1)
        assert cknna(x, 3 * x @ turn, form=form, normalize=False) == pytest.approx(1)


def test_unrelated_spaces_share_neighbours_by_chance_alone():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1000, 16, generator=g), torch.randn(1000, 16, generator=g)
    chance = 10 / 999  # the share of pairs near in one space that are near in the other
    assert cknna(x, y, form="centered") == pytest.approx(chance, abs=4 * (chance / 10_000) ** 0.5)
    assert abs(cknna(x, y)) < 0.01


def test_with_the_full_hsic_below_even_a_space_with_itself_is_near_zero():
    """Why MSAE's printed formula cannot have given its printed 0.7 to 0.9."""
    x, _ = spaces(2, n=600, d=30)
    assert cknna(x, x, form="hsic") < 0.1
    assert cknna(x, x, form="hsic", k=599) > 0.8


def test_four_samples_by_hand():
    """Two pairs at right angles: with k = 2 each sample's partner and one at product 0 are near."""
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.1], [1, 0.2], [0.1, 1], [0.3, 1]], dtype=torch.float64)
    assert cknna(x, y[[0, 2, 1, 3]], k=2) < cknna(x, y, k=2)
    found = neighbours(x, 2, normalize=False)
    assert found.near[:, 0].tolist() == [1, 0, 3, 2]
    assert found.product.tolist() == [[1, 0]] * 4
    assert found.mean.tolist() == [0.5] * 4
    assert found.spread == pytest.approx(16 * 0.25)


def test_silent_samples_have_no_say_and_all_silent_none():
    x, z = spaces(3)
    z[7], z[z < 0.01] = 0, 0
    assert np.isfinite(cknna(x, codes_of(z)))
    assert np.isnan(cknna(x, codes_of(torch.zeros_like(z))))


def test_refuses_what_does_not_fit():
    x, z = spaces(4)
    with pytest.raises(ValueError, match="Unknown form=biased; choose one of unbiased, centered, hsic"):
        cknna(x, z, form="biased")
    for k in (1, 40):
        with pytest.raises(ValueError, match=f"got k={k} and n=40"):
            cknna(x, z, k=k)
    with pytest.raises(ValueError, match="the same samples and k"):
        cknna(x, z[1:])
