"""Normalising in one pass gives the bits of PyTorch's three."""

import pytest
import torch

from sae_lightning.kernels import products
from sae_lightning.kernels.products import normalize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (1, 8), (5, 4, 19), (0, 5), (300, 130)])
@pytest.mark.parametrize("name", ["native", "portable"])
def test_bits_equal(dtype, shape, name):
    generator = torch.Generator().manual_seed(0)
    x = (100 * torch.randn(shape, generator=generator)).to(dtype)
    mean, std = 30 * torch.randn(shape[-1], generator=generator), torch.tensor(2.7)
    with products.forced(name):
        got = normalize(x, mean, std)
    assert got.dtype == torch.float32
    assert torch.equal(got, (x.float() - mean) / std) or dtype == torch.float64


def test_every_float16_is_read_rightly():
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    finite = every[every.isfinite()]
    for width in (1, 9):  # the vector loop, and what is left of it
        x = finite[: len(finite) // width * width].reshape(-1, width)
        with products.forced("native"):
            assert torch.equal(normalize(x, torch.zeros(width), torch.tensor(1.0)), x.float())


def test_a_view_and_a_gradient():
    x = torch.randn(6, 10).half()
    mean, std = torch.randn(5), torch.tensor(0.5)
    assert torch.equal(normalize(x[:, ::2], mean, std), (x[:, ::2].float() - mean) / std)
    y = torch.randn(4, 5, requires_grad=True)
    normalize(y, mean, std).sum().backward()
    assert torch.equal(y.grad, torch.full((4, 5), 2.0))
