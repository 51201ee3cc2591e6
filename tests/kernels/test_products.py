"""The sparse products of every implementation against dense autograd, values and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.kernels import (
    dense_levels,
    level_errors,
    native,
    nested_decode,
    portable,
    reference,
    sparse_decode,
    sparse_pre_acts,
)
from sae_lightning.kernels.products import choose, forced

D_SAE, D = 23, 7
WAYS = [
    ("reference", torch.float64), ("portable", torch.float64),
    ("reference", torch.float32), ("portable", torch.float32), ("native", torch.float32),
]  # fmt: skip
PATTERNS = ["a tenth", "empty rows", "nothing", "one latent", "every third", "everything", "growing", "one row"]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{str(way[1])[6:]}")
def dtype(request):
    """The float type of a way, with its implementation in use."""
    name, dtype = request.param
    if name == "native" and not native.available(torch.zeros(1)):
        pytest.skip("there is no C compiler here")
    with forced(name):
        yield dtype


def pattern(name: str, n: int = 13) -> torch.Tensor:
    """Which entries [n, D_SAE] are active."""
    some = torch.rand(n, D_SAE, generator=torch.Generator().manual_seed(1)) < 0.1
    latents, rows = torch.arange(D_SAE), torch.arange(n)
    return {
        "a tenth": some,
        "empty rows": some & (rows % 3 == 1)[:, None],
        "nothing": torch.zeros_like(some),
        "one latent": (latents == 5).expand(n, -1),
        "every third": (latents % 3 == 0).expand(n, -1),
        "everything": torch.ones_like(some),
        "growing": latents < rows[:, None],
        "one row": some[:1] | (latents < 6),
    }[name]


def entries(active: torch.Tensor, seed: int = 0):
    """Latents, values (float64) and offsets, gathered row by row."""
    latents, offsets = [], [0]
    for row in active.tolist():
        latents += [latent for latent, on in enumerate(row) if on]
        offsets.append(len(latents))
    values = torch.randn(len(latents), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(latents, dtype=torch.long), values, torch.tensor(offsets)


def dense_of(values, active):
    """Dense codes [N, D_SAE] that carry the gradient of ``values``."""
    place = active.flatten().cumsum(0) - 1
    return torch.where(active.flatten(), torch.cat([values, values.new_zeros(1)])[place], 0).view(active.shape)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leaves(dtype, *tensors):
    """Copies of the tensors in ``dtype`` that collect gradients."""
    return [t.to(dtype, copy=True).requires_grad_() for t in tensors]


def assert_same(sparse, dense, inputs, dense_inputs, cotangent):
    """Equal outputs and gradients: to 1e-9 in float64, to 1e-5 of the largest in float32."""
    tolerance = 1e-9 if sparse.dtype == torch.float64 else 1e-5
    got = [sparse, *torch.autograd.grad(sparse, inputs, cotangent.to(sparse.dtype))]
    expected = [dense, *torch.autograd.grad(dense, dense_inputs, cotangent, materialize_grads=True)]
    for one, other in zip(got, expected, strict=True):
        scale = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * max(1.0, scale))


@pytest.mark.parametrize("active", PATTERNS)
@pytest.mark.parametrize("biased", [True, False])
def test_decode_is_the_dense_product(dtype, active, biased):
    active = pattern(active)
    latents, values, offsets = entries(active)
    dense = leaves(torch.float64, values, normal(D_SAE, D, seed=2), normal(D, seed=3))[: 3 if biased else 2]
    sparse = leaves(dtype, *dense)
    out = sparse_decode(latents, sparse[0], offsets, *sparse[1:])
    expected = dense_of(dense[0], active) @ dense[1] + (dense[2] if biased else 0)
    assert_same(out, expected, sparse, dense, normal(len(active), D, seed=4))


@pytest.mark.parametrize("active", PATTERNS)
@pytest.mark.parametrize("h", [1, 3])
def test_nested_decode_sums_the_groups_up_to_each_level(dtype, active, h):
    active = pattern(active)
    group = torch.randint(h, active.shape, generator=torch.Generator().manual_seed(5))
    bags = torch.stack([active & (group == g) for g in range(h)], 1)  # [N, h, D_SAE]: one row for each group
    latents, values, offsets = entries(bags.flatten(0, 1))
    dense = leaves(torch.float64, values, normal(D_SAE, D, seed=2), normal(D, seed=3))
    sparse = leaves(dtype, *dense)
    out = nested_decode(latents, sparse[0], offsets, sparse[1], sparse[2], h)
    codes = dense_of(dense[0], bags.flatten(0, 1)).view(bags.shape)
    expected = torch.stack([codes[:, : level + 1].sum(1) @ dense[1] + dense[2] for level in range(h)], 1)
    assert_same(out, expected, sparse, dense, normal(len(active), h, D, seed=4))


def levels_of(dense: torch.Tensor, ks: list[int], W: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[N, h, d]: reconstructions of each row's ks[level] largest, and at last of all, by dense masks."""
    rank = dense.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return torch.stack([(dense * (rank < k)) @ W + bias for k in [*ks[:-1], dense.shape[1]]], 1)


@pytest.mark.parametrize("active", PATTERNS)
@pytest.mark.parametrize("ks", [[D_SAE], [3], [2, 4, 8, 16, D_SAE], [1, 20], [15, 16, 17], [1, 2, 3]], ids=str)
def test_levels_of_dense_codes_are_those_of_masks(dtype, active, ks):
    given = (normal(13, D_SAE, seed=1).abs() + 0.1) * pattern(active)
    dense = leaves(torch.float64, given, normal(D_SAE, D, seed=2), normal(D, seed=3))
    sparse = leaves(dtype, *dense)
    out = dense_levels(*sparse, torch.tensor(ks))
    expected, cotangent = levels_of(dense[0], ks, *dense[1:]), normal(13, len(ks), D, seed=4)
    on = (given > 0).double()  # what is not active passes no gradient on
    got = [out, *torch.autograd.grad(out, sparse, cotangent.to(dtype))]
    wanted = [expected, *torch.autograd.grad(expected, dense, cotangent)]
    got[1], wanted[1] = got[1] * on, wanted[1] * on
    for one, other in zip(got, wanted, strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one.double(), other, rtol=0, atol=scale * (1e-9 if dtype == torch.float64 else 1e-5))


def test_levels_of_many_dense_codes_are_those_of_masks():
    ks = [4, 8, 16, 32, 64, 128, 256, 400]
    given = normal(300, 400, seed=1).round(decimals=2).relu()  # with ties
    given[5, 3] = 1e6  # one outlier
    given[6] = 1 + given[6] * 1e-6  # hardly different
    dense = leaves(torch.float64, given, normal(400, 64, seed=2), normal(64, seed=3))
    sparse = leaves(torch.float32, *dense)
    out, expected = dense_levels(*sparse, torch.tensor(ks)), levels_of(dense[0].float().double(), ks, *dense[1:])
    torch.testing.assert_close(out[7:].double(), expected[7:], rtol=0, atol=1e-3)
    cotangent = normal(300, 8, 64, seed=4)
    cotangent[5:7] = 0
    got = torch.autograd.grad(out, sparse, cotangent.float())
    wanted = torch.autograd.grad(expected, dense, cotangent)
    for one, other in zip((got[0] * (given > 0), *got[1:]), (wanted[0] * (given > 0), *wanted[1:]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("given_values", [True, False])
@pytest.mark.parametrize("active", PATTERNS)
def test_pre_acts_are_entries_of_the_encoders_product(dtype, active, given_values):
    active = pattern(active)
    latents, _, offsets = entries(active)
    dense = leaves(
        torch.float64,
        normal(len(active), D, seed=1), normal(D, seed=2), normal(D_SAE, D, seed=3), normal(D_SAE, seed=4),
    )  # fmt: skip
    sparse = leaves(dtype, *dense)
    expected = ((dense[0] - dense[1]) @ dense[2].T + dense[3])[active]
    values = expected.detach().to(dtype) if given_values else None
    out = sparse_pre_acts(*sparse, latents, offsets, values)
    assert_same(out, expected, sparse, dense, normal(len(latents), seed=5))
    with torch.no_grad():
        assert not sparse_pre_acts(*sparse, latents, offsets, values).requires_grad


def test_pre_acts_take_the_values_that_they_are_given(dtype):
    latents, _, offsets = entries(pattern("a tenth"))
    given = torch.arange(len(latents), dtype=dtype)
    x, W = torch.zeros(13, D, dtype=dtype), torch.zeros(D_SAE, D, dtype=dtype, requires_grad=True)
    out = sparse_pre_acts(x, x[0], W, W[:, 0], latents, offsets, given)
    assert torch.equal(out, given)
    assert out.requires_grad


@pytest.mark.parametrize("h", [1, 4])
def test_level_errors_are_mean_squared_errors(dtype, h):
    (dense,) = leaves(torch.float64, normal(9, h, D, seed=0))
    (sparse,) = leaves(dtype, dense)
    x = normal(9, D, seed=1)
    expected = (dense - x[:, None]).square().mean(dim=(0, 2))
    assert_same(level_errors(sparse, x.to(dtype)), expected, [sparse], [dense], normal(h, seed=2))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 70), st.floats(0, 1), st.sampled_from(WAYS), st.integers(0, 9)
)
def test_products_agree_with_dense_ones_for_any_shape(n, d_sae, d, share, way, seed):
    name, dtype = way
    if name == "native" and not native.available(torch.zeros(1)):
        return
    active = torch.rand(n, d_sae, generator=torch.Generator().manual_seed(seed)) < share
    latents, values, offsets = entries(active)
    dense = leaves(torch.float64, values, normal(d_sae, d, seed=seed), normal(d, seed=3))
    sparse = leaves(dtype, *dense)
    with forced(name):
        out = sparse_decode(latents, sparse[0], offsets, sparse[1], sparse[2])
        expected = dense_of(dense[0], active) @ dense[1] + dense[2]
        assert_same(out, expected, sparse, dense, normal(n, d, seed=4))
        x, b_enc = normal(n, d, seed=5), normal(d_sae, seed=6)
        dense = leaves(torch.float64, x, dense[2], dense[1], b_enc)
        sparse = leaves(dtype, *dense)
        expected = ((dense[0] - dense[1]) @ dense[2].T + dense[3])[active]
        assert_same(sparse_pre_acts(*sparse, latents, offsets), expected, sparse, dense, values)


@pytest.mark.parametrize("name", ["portable", "native"])
def test_products_shared_among_threads_are_dense_ones(name):
    if name == "native" and not native.available(torch.zeros(1)):
        pytest.skip("there is no C compiler here")
    active = torch.rand(301, 700, generator=torch.Generator().manual_seed(0)) < 0.06
    active[7] = True  # one long row, and one latent of every sample
    active[:, 5] = True
    latents, values, offsets = entries(active)
    dense = leaves(torch.float64, values, normal(700, 257, seed=2), normal(257, seed=3))
    sparse = leaves(torch.float32, *dense)
    with forced(name):
        out = sparse_decode(latents, sparse[0], offsets, sparse[1], sparse[2])
        expected = dense_of(dense[0], active) @ dense[1] + dense[2]
        assert_same(out, expected, sparse, dense, normal(301, 257, seed=4))
        dense = leaves(torch.float64, normal(301, 257, seed=5), dense[2], dense[1], normal(700, seed=6))
        sparse = leaves(torch.float32, *dense)
        expected = ((dense[0] - dense[1]) @ dense[2].T + dense[3])[active]
        assert_same(sparse_pre_acts(*sparse, latents, offsets), expected, sparse, dense, values)


def test_gradients_that_are_kept_are_not_overwritten_by_later_ones():
    latents, values, offsets = entries(pattern("a tenth"))
    values, W = values.float(), torch.randn(D_SAE, 20_000, requires_grad=True)  # large enough for shared memory
    kept = [
        torch.autograd.grad(sparse_decode(latents, scale * values, offsets, W).sum(), W)[0] for scale in (1.0, 2.0, 3.0)
    ]
    torch.testing.assert_close(kept[1], 2 * kept[0])
    torch.testing.assert_close(kept[2], 3 * kept[0])


def test_kernels_are_chosen_by_type_and_density():
    usual = native if native.available(torch.zeros(1)) else portable
    assert choose(torch.zeros(1), density=0.01) is usual
    assert choose(torch.zeros(1, dtype=torch.float64), density=0.01) is portable
    assert choose(torch.zeros(1), density=0.5) is reference
    with forced("portable"), forced("reference"):
        assert choose(torch.zeros(1), density=0.01) is reference
    assert choose(torch.zeros(1), density=0.01) is usual
    with pytest.raises(ValueError, match="Unknown kernels=cuda"), forced("cuda"):
        pass


@pytest.mark.parametrize("share", [0.05, 0.9])
def test_decode_under_autocast_has_gradients_outside_it(share):
    active = torch.rand(30, D_SAE, generator=torch.Generator().manual_seed(0)) < share
    latents, values, offsets = entries(active)
    dense = leaves(torch.float64, values, normal(D_SAE, D, seed=2))
    sparse = leaves(torch.float32, *dense)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_decode(latents, sparse[0], offsets, sparse[1])
    got = torch.autograd.grad(out.float().square().sum(), sparse)
    expected = torch.autograd.grad((dense_of(dense[0], active) @ dense[1]).square().sum(), dense)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize("each", [1, 30], ids=["seldom read", "packed"])
def test_long_rows_decode_in_columns_as_whole(each):
    """Rows of 900 numbers, in the native kernel gone through in three parts where each is read often enough."""
    if not native.available(torch.zeros(1)):
        pytest.skip("there is no C compiler here")
    n, latents = 11, torch.arange(11 * each) * 7 % 5
    values, W, bias = normal(n * each, seed=0), normal(5, 900, seed=1), normal(900, seed=2)
    offsets = torch.arange(n + 1) * each
    expected = torch.zeros(n, 900, dtype=torch.float64).index_add_(
        0, torch.arange(n).repeat_interleave(each), values[:, None] * W[latents]
    )
    found = native.decode(latents, values.float(), offsets, W.float(), bias.float())
    torch.testing.assert_close(found.double(), expected + bias, atol=1e-4, rtol=1e-4)
