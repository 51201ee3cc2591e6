"""Tests for the intervals of scores."""

import math

import numpy as np
import pytest
import torch

from sae_lightning.metrics.intervals import averaged
from sae_lightning.metrics.part import Column
from sae_lightning.metrics.reconstruction import Reconstruction
from sae_lightning.rendering.table import Measured, Unknown
from sae_lightning.runs.scores import put_scores, read_rows, scores_of


def test_intervals_are_those_of_means_and_of_ratios():
    rng = np.random.default_rng(0)
    for n in (40, 400, 5000):  # beyond a thousand, groups are drawn
        x = rng.normal(1, 1, n)
        score = averaged("m", x, draws=2000)
        assert score.value == pytest.approx(x.mean())
        assert (score.high - score.low) / 2 == pytest.approx(1.96 * x.std() / n**0.5, rel=0.15)
        assert (score.n, score.unit) == (n, "pictures")
    top, below = rng.random(400) < 0.6, rng.random(400) < 0.8
    ratio = averaged("m", top, of=below, n=400)
    assert ratio.value == pytest.approx(top.sum() / below.sum())
    draws = [(top[i].sum() / below[i].sum()) for i in rng.integers(0, 400, (4000, 400))]
    assert [ratio.low, ratio.high] == pytest.approx(np.percentile(draws, (2.5, 97.5)), abs=0.01)


def test_what_has_no_interval_says_so():
    assert math.isnan(averaged("m", []).value)
    assert math.isnan(averaged("m", [1, 2], of=[0, 0]).value)
    alone = averaged("m", [2.0, math.nan], unit="classes")
    assert (alone.value, alone.n, alone.low is None) == (2, 1, True)
    refused = averaged("m", [1.0, 2.0], why="so")
    assert math.isnan(refused.value)
    assert refused.why == "so"


@pytest.mark.parametrize("patches", [1, 4])
def test_fvu_has_its_interval_over_images(patches):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(320, patches, 16, generator=rng) * (1 + torch.rand(320, 1, 1, generator=rng))
    y = x + 0.4 * torch.randn(x.shape, generator=rng)
    metric = Reconstruction(16, x.flatten(0, 1).mean(0), patches)
    for some, other in zip(x.split(100), y.split(100), strict=True):
        metric.update(some.flatten(0, 1), other.flatten(0, 1))
    found, sure = metric.compute(), metric.sure()
    for name in ("fvu", "explained_variance", "cosine"):
        assert sure[name].value == pytest.approx(float(found[name]), rel=1e-4)
        assert sure[name].low < float(found[name]) < sure[name].high
        assert sure[name].n == 320
    residual, spread = ((a - b).square().flatten(1).sum(1) for a, b in ((x, y), (x, x.mean((0, 1)))))
    exact = averaged("fvu", residual, of=spread)
    assert sure["fvu"].high - sure["fvu"].low == pytest.approx(exact.high - exact.low, rel=0.3)


def test_tables_of_scores_keep_them(tmp_path):
    scores = [averaged("m", [0.0, 1, 1, 1], "k=1"), averaged("m", [], "k=2", why="there are none")]
    put_scores(tmp_path, "part", "test", "key", scores)
    assert repr(scores_of(tmp_path, "part", "test", "key")) == repr(scores)  # NaN is not itself
    rows = read_rows(tmp_path)
    assert Column("", "m", "k=1").cell(rows) == Measured(0.75, scores[0].low, scores[0].high, 4, "pictures")
    assert Column("", "m", "k=2").cell(rows) == Unknown("there are none")
    assert Column("", "m", "k=3").cell(rows).why
