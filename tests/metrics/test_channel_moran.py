"""Moran's I of raw channels equals its definition, and that of sparse codes where both are defined."""

import numpy as np
import pytest
import torch

from sae_lightning.metrics import ChannelMoran, Moran
from sae_lightning.metrics.moran import channel_morans_i, grid_weights
from sae_lightning.saes.codes import SparseCodes
from tests.metrics.test_moran import definition, matrix


def maps(images: int, patches: int, d_in: int = 5, seed: int = 0) -> torch.Tensor:
    """Channels of any sign, far from zero against their spread, one of them constant on the first image."""
    x = torch.randn(images, patches, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x + torch.linspace(-20, 20, d_in)
    x[0, :, 2] = 3.0
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("contiguity", ["queen", "rook"])
@pytest.mark.parametrize("row_standardized", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7)])
def test_equals_the_definition(grid, contiguity, row_standardized, dtype):
    x = maps(3, grid[0] * grid[1]).to(dtype)
    found = channel_morans_i(x, grid_weights(grid, contiguity, row_standardized))
    w = matrix(grid, contiguity, row_standardized)
    near = {"rel": 1e-9, "abs": 1e-12} if dtype == torch.float64 else {"rel": 1e-4, "abs": 1e-5}
    for image in range(3):
        for channel in range(5):
            values = x[image, :, channel].double().numpy()
            if np.ptp(values) == 0:
                assert found[image, channel].isnan()
            else:
                assert float(found[image, channel]) == pytest.approx(definition(values, w), **near)


def test_more_than_one_part_of_images_gives_the_same(monkeypatch):
    x, weights = maps(7, 12), grid_weights((3, 4))
    whole = channel_morans_i(x, weights)
    monkeypatch.setattr("sae_lightning.metrics.moran.PART", 2 * 12 * 5)
    torch.testing.assert_close(channel_morans_i(x, weights), whole, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_channels_that_are_never_negative_score_as_the_same_latents():
    x = maps(60, 16).abs().float()
    channels, latents = ChannelMoran(5, (4, 4)), Moran(5, (4, 4))
    for part in x.split(13):
        channels.update(part)
        flat = part.flatten(0, 1)
        latents.update(SparseCodes.select(flat, flat > 0))
    assert channels.images.tolist() == [60, 60, 59, 60, 60]
    expected = {f"channel_{name}": float(value) for name, value in latents.compute().items()}
    found = {name: float(value) for name, value in channels.compute().items()}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert {"channel_moran", "channel_moran_z", "channel_moran_null"} < set(found)


def test_a_gradient_is_coherent_and_noise_is_at_the_null():
    r, c = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 196, 3, generator=g)
    x = torch.cat([(r + 2 * c).flatten().expand(500, -1)[:, :, None], noise], dim=2)
    metric = ChannelMoran(4, (14, 14))
    metric.update(x)
    scores = metric.scores()
    assert scores[0] > 0.8
    errors = (metric.squares / 500 - scores.square()).clamp_min(0).sqrt() / 500**0.5
    assert bool(((scores[1:] + 1 / 195).abs() < 4 * errors[1:]).all())


def test_few_images_and_bad_shapes():
    metric = ChannelMoran(5, (4, 4), min_images=3)
    metric.update(maps(3, 16))
    assert metric.scores().isnan().tolist() == [False, False, True, False, False]
    assert float(metric.compute()["channel_moran_evaluable"]) == 0.8
    with pytest.raises(ValueError, match="features of 5 channels; got 6"):
        metric.update(torch.zeros(2, 16, 6))
    with pytest.raises(ValueError, match=r"features \[n, 16, d_in\]"):
        metric.update(torch.zeros(2, 9, 5))
