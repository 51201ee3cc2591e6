"""Sparse and dense codes answer every question alike, and as the matrix does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.saes import DenseCodes, SparseCodes

D_SAE, D = 15, 4


def matrix(share: float, n: int = 9, seed: int = 0) -> torch.Tensor:
    """Codes [n, D_SAE] with about ``share`` of them positive, some values equal, the third sample silent."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 9, (n, D_SAE), generator=generator).double() / 4
    values[2:3] = 0
    return values * (torch.rand(n, D_SAE, generator=generator) < share)


def both(dense: torch.Tensor):
    """The two kinds of codes with a frame, each differentiable in its own copy of ``dense``."""
    one, other = dense.clone().requires_grad_(), dense.clone().requires_grad_()
    frame = (torch.ones(len(dense), 1), torch.full((len(dense), 1), 2.0))
    sparse = SparseCodes.select(one, one.detach() > 0)
    sparse.frame = frame
    return (sparse, one), (DenseCodes(other, frame), other)


def answers(codes: SparseCodes, source: torch.Tensor, weights, W, bias, factors) -> list[torch.Tensor]:
    """Everything that codes can be asked, and the gradients of what is differentiable."""
    scaled = codes.map(lambda values, latents: values * factors[latents] - 1.0)
    some = codes.where(codes.latents % 2 == 0)
    double = codes.where(codes.latents % 3 == 0, 2 * codes.values)
    made = [scaled, some, double, codes.top(1), codes.top(3), codes.top(D_SAE), codes.top(3).top(2)]
    assert all(part.frame is codes.frame and part.d_sae == D_SAE for part in made)
    out = [
        codes.latents, codes.values, codes.offsets, codes.counts(), codes.rows(), codes.fired(), codes.to_dense(),
        codes.total(), codes.total(weights), codes.decode(W), codes.decode(W, bias), torch.tensor(codes.nnz),
        torch.tensor(codes.n_samples), *(part.to_dense() for part in made), *(part.counts() for part in made),
        *(part.decode(W) for part in made), *(part.fired() for part in made), *(part.total(weights) for part in made),
    ]  # fmt: skip
    slopes = torch.autograd.grad(sum((t.double() ** 2).sum() for t in out if t.requires_grad), source)
    return [*(t.detach() for t in out), slopes[0] * (source > 0)]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_sparse_and_dense_codes_agree_on_every_method(share):
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(D_SAE, D, generator=generator).double()
    weights, factors, bias = torch.rand(D_SAE).double(), 2 * torch.rand(D_SAE).double(), W[0]
    (sparse, one), (dense, other) = both(matrix(share))
    got, expected = answers(sparse, one, weights, W, bias, factors), answers(dense, other, weights, W, bias, factors)
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("kind", [0, 1], ids=["sparse", "dense"])
@settings(deadline=None, max_examples=30)
@given(share=st.floats(0, 1), n=st.integers(0, 6), seed=st.integers(0, 99), k=st.integers(0, D_SAE + 2))
def test_codes_are_what_the_matrix_says(kind, share, n, seed, k):
    dense = matrix(share, n, seed)
    codes = both(dense)[kind][0]
    rows, latents = dense.nonzero(as_tuple=True)
    assert codes.n_samples == n
    assert codes.nnz == len(rows)
    assert torch.equal(codes.rows(), rows)
    assert torch.equal(codes.latents, latents)
    assert torch.equal(codes.values, dense[rows, latents])
    assert codes.offsets.tolist() == [0, *(dense > 0).sum(1).cumsum(0).tolist()]
    assert torch.equal(codes.counts(), (dense > 0).sum(1))
    assert torch.equal(codes.fired(), (dense > 0).any(0))
    assert torch.equal(codes.to_dense(), dense)
    torch.testing.assert_close(codes.total().detach(), dense.sum())
    weights = torch.arange(float(D_SAE)).double()
    torch.testing.assert_close(codes.total(weights).detach(), (dense * weights).sum())
    top = torch.zeros_like(dense)
    for i, row in enumerate(dense.tolist()):
        for latent in sorted(range(D_SAE), key=lambda j, row=row: (-row[j], j))[:k]:
            top[i, latent] = row[latent]
    assert torch.equal(codes.top(k).to_dense(), top)


@pytest.mark.parametrize("kind", [0, 1], ids=["sparse", "dense"])
def test_map_drops_what_is_no_longer_positive(kind):
    dense = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    codes = both(dense)[kind][0].map(lambda values, _: values - 1.5)
    assert codes.to_dense().tolist() == [[0, 0, 1.5], [0, 0.5, 0]]
    assert codes.counts().tolist() == [1, 1]
    assert both(dense)[kind][0].map(lambda values, _: 5 - values).to_dense().tolist() == [[4, 0, 2], [0, 3, 0]]


def test_codes_round_trip_through_a_matrix():
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    codes = SparseCodes.select(dense, dense > 0)
    assert codes.counts().tolist() == [1, 0, 2]
    assert codes.rows().tolist() == [0, 2, 2]
    assert codes.latents.tolist() == [1, 0, 2]
    assert torch.equal(codes.to_dense(), dense)


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("kind", [0, 1], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling_tokens_into_images(how, kind, dtype):
    codes, source = both(matrix(0.3, n=12).to(dtype))[kind]
    images = source.unflatten(0, (-1, 4))
    expected = images.amax(1) if how == "max" else images.mean(1)
    pooled = codes.pool(4, how)
    torch.testing.assert_close(pooled.to_dense(), expected)
    assert pooled.n_samples == 3
    assert pooled.latents.tolist() == expected.detach().nonzero()[:, 1].tolist()
    slope = torch.autograd.grad(pooled.to_dense().square().sum(), source, retain_graph=True)[0]
    expected_slope = torch.autograd.grad(expected.square().sum(), source)[0]
    # lists give no gradient to silent tokens, which ReLU would not pass on either
    torch.testing.assert_close(slope * (source > 0), expected_slope * (source > 0))
    assert codes.pool(1) is codes


def test_pooling_refuses_what_cannot_be():
    codes, _ = both(matrix(0.3, n=12))[0]
    with pytest.raises(ValueError, match="12 samples are not whole images of 5 tokens"):
        codes.pool(5)
    with pytest.raises(ValueError, match="choose one of max, mean"):
        codes.pool(4, "median")


def test_lists_first_asked_for_without_gradient_have_one_later():
    (_, _), (codes, source) = both(matrix(0.5))
    with torch.no_grad():
        codes.latents  # noqa: B018  makes the lists
    assert torch.autograd.grad(codes.values.sum(), source)[0].any()
