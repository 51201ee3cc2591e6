"""Sparse decode against the dense product, values and gradients, on both sides of its density switch."""

import pytest
import torch

from sae_lightning.kernels import sparse_decode
from sae_lightning.saes import SparseCodes


@pytest.mark.parametrize("active", [0.02, 0.5])
def test_sparse_decode_equals_the_dense_product(active):
    torch.manual_seed(0)
    n, d_sae, d_in = 17, 60, 9
    dense = torch.rand(n, d_sae, dtype=torch.float64) * (torch.rand(n, d_sae) < active)
    dense[3] = 0  # a sample without active latents
    dense.requires_grad_()
    W = torch.randn(d_sae, d_in, dtype=torch.float64, requires_grad=True)
    codes = SparseCodes.select(dense, dense.detach() > 0)
    out = sparse_decode(codes.latents, codes.values, codes.offsets, W)
    torch.testing.assert_close(out, dense @ W)
    cotangent = torch.randn_like(out)
    got = torch.autograd.grad(out, (dense, W), cotangent)
    expected = torch.autograd.grad(dense @ W, (dense, W), cotangent)
    torch.testing.assert_close(got[0], expected[0] * (dense > 0))
    torch.testing.assert_close(got[1], expected[1])


def test_codes_round_trip_through_dense():
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    codes = SparseCodes.select(dense, dense > 0)
    assert codes.counts().tolist() == [1, 0, 2]
    assert codes.rows().tolist() == [0, 2, 2]
    assert codes.latents.tolist() == [1, 0, 2]
    assert torch.equal(codes.to_dense(), dense)
