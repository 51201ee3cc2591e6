"""Moran's I equals its definition summed over all pairs of patches, on any grid, kernel and batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.kernels import native
from sae_lightning.metrics.moran import Moran, grid_weights, morans_i
from sae_lightning.saes.codes import SparseCodes


def matrix(grid, contiguity="queen", row_standardized=False) -> np.ndarray:
    """w [P, P] from the patches' coordinates."""
    places = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    w = np.zeros((len(places), len(places)))
    for p, (r, c) in enumerate(places):
        for q, (y, x) in enumerate(places):
            far = (abs(r - y), abs(c - x))
            w[p, q] = max(far) == 1 if contiguity == "queen" else sum(far) == 1
    return w / w.sum(1, keepdims=True) if row_standardized else w


def definition(x: np.ndarray, w: np.ndarray) -> float:
    """Equation 2 as it stands."""
    off = x - x.mean()
    return len(x) / w.sum() * sum(w[p, q] * off[p] * off[q] for p in range(len(x)) for q in range(len(x))) / (off @ off)


def activations(images: int, patches: int, d_sae: int = 6, share: float = 0.5, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(images, patches, d_sae, generator=g) + 0.1
    return values * (torch.rand(images, patches, d_sae, generator=g) < share)


def codes_of(dense: torch.Tensor) -> SparseCodes:
    flat = dense.flatten(0, 1)
    return SparseCodes.select(flat, flat > 0)


@pytest.mark.parametrize("kernels", ["native", "portable"])
@pytest.mark.parametrize("contiguity", ["queen", "rook"])
@pytest.mark.parametrize("row_standardized", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7)])
def test_equals_the_definition(grid, contiguity, row_standardized, kernels, monkeypatch):
    if kernels == "portable":
        monkeypatch.setattr(native, "available", lambda *_: False)
    dense = activations(4, grid[0] * grid[1])
    w = matrix(grid, contiguity, row_standardized)
    latents, images, found = morans_i(codes_of(dense), grid_weights(grid, contiguity, row_standardized), 2)
    assert len(found) == 24
    for latent, image, i in zip(latents.tolist(), images.tolist(), found.tolist(), strict=True):
        x = dense[image, :, latent].double().numpy()
        if (x > 0).sum() >= 2 and x.var() > 1e-8:
            assert i == pytest.approx(definition(x, w), rel=1e-9)
        else:
            assert np.isnan(i)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(0, 1), st.integers(2, 5), st.integers(2, 5))
def test_native_and_portable_agree(seed, share, rows, columns):
    codes = codes_of(activations(3, rows * columns, share=share, seed=seed))
    weights = grid_weights((rows, columns))
    fast = morans_i(codes, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda *_: False)
        slow = morans_i(codes, weights)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_blob_is_coherent_a_chessboard_is_not_and_shuffled_patches_are_at_the_null():
    grid = (8, 8)
    r, c = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    blob = ((r < 4) & (c < 4)).float().flatten()
    chess = ((r + c) % 2).float().flatten()
    g = torch.Generator().manual_seed(0)
    shuffled = torch.stack([blob[torch.randperm(64, generator=g)] for _ in range(2000)])
    dense = torch.stack([blob.expand(2000, -1), chess.expand(2000, -1), shuffled], dim=2)
    metric = Moran(3, grid)
    metric.update(codes_of(dense))
    coherent, alternating, random = metric.scores().tolist()
    assert coherent > 0.7
    assert Moran(3, grid, "rook").weights.whole == 2 * 2 * 7 * 8
    assert alternating < 0
    assert random == pytest.approx(-1 / 63, abs=0.005)


def test_who_is_evaluable_and_what_is_summed_up():
    dense = activations(60, 16, d_sae=5, share=0.6)
    dense[:, :, 1] = 0  # never
    dense[:, 4:, 2] = 0  # at most 4 patches
    dense[:, :, 3] = 1  # without variance
    dense[20:, :, 4] = 0  # on 20 images
    metric = Moran(5, (4, 4))
    for part in dense.split(7):
        metric.update(codes_of(part))
    assert metric.scores().isnan().tolist() == [False, True, True, True, True]
    w = matrix((4, 4))
    mean = np.mean([definition(x, w) for x in dense[:, :, 0].double().numpy() if (x > 0).sum() >= 5])
    out = metric.compute()
    assert float(out["moran"]) == pytest.approx(mean)
    assert float(out["moran_evaluable"]) == 0.2
    assert float(out["moran_null"]) == pytest.approx(-1 / 15)
    assert Moran(5, (4, 4)).compute()["moran"].isnan()


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="choose one of rook, queen"):
        grid_weights((4, 4), "king")
    with pytest.raises(ValueError, match="1 x 1 patches has no neighbours"):
        Moran(5, (1, 1))
    with pytest.raises(ValueError, match="not whole images of 16 patches"):
        Moran(6, (4, 4)).update(codes_of(activations(1, 9)))
    with pytest.raises(ValueError, match="Expected codes of 5 latents"):
        Moran(5, (4, 4)).update(codes_of(activations(1, 16)))


@pytest.mark.slow
@pytest.mark.parametrize("contiguity", ["queen", "rook"])
@pytest.mark.parametrize("transformation", ["B", "R"])
@pytest.mark.parametrize("grid", [(14, 14), (5, 9)])
def test_equals_esda_on_random_sparse_maps(grid, contiguity, transformation):
    """esda's weights and statistic, binary and row-standardised."""
    esda, libpysal = pytest.importorskip("esda"), pytest.importorskip("libpysal")
    dense = activations(5, grid[0] * grid[1], d_sae=4, share=0.15)
    latents, images, found = morans_i(codes_of(dense), grid_weights(grid, contiguity, transformation == "R"))
    w = libpysal.weights.lat2W(*grid, rook=contiguity == "rook")
    assert int((~found.isnan()).sum()) > 10
    for latent, image, i in zip(latents.tolist(), images.tolist(), found.tolist(), strict=True):
        if not np.isnan(i):
            x = dense[image, :, latent].double().numpy()
            assert i == pytest.approx(esda.Moran(x, w, transformation=transformation, permutations=0).I, rel=1e-9)
