"""MS of latents and of channels by the definition, the share of ranks, and the rows of a run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from sae_lightning.metrics.ms_score import PART, above_by_rank, ms_scores
from sae_lightning.metrics.part import ImageFeatures
from sae_lightning.saes import VARIANTS
from tests.metrics.test_monoscore import embeddings, latents, pairwise

NONE = [3, 4, 5]  # of ``latents``: constant, never active, active once


def expected(a: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Pair after pair; NaN for the latents of ``latents`` that have no two images above their least value."""
    found = pairwise(a, h)
    found[NONE] = np.nan
    return found


@pytest.mark.parametrize("form", ["codes", "channels"])
def test_is_the_pairwise_definition_of_codes_and_of_signed_channels(form, monkeypatch):
    monkeypatch.setattr("sae_lightning.metrics.ms_score.IMAGES", 7)
    a, h = latents(40).numpy(), embeddings(40)
    given = csr_matrix(a) if form == "codes" else a - 2.5  # moved: the same by min–max
    np.testing.assert_allclose(ms_scores(given, h), expected(a, h.numpy()), rtol=1e-7)  # moving rounds


def test_ranks_are_shares_where_there_are_more_latents_than_channels():
    nan, inf = float("nan"), float("inf")
    channels = torch.tensor([0.1, 0.5, nan, 0.3])
    assert above_by_rank(torch.tensor([0.2, 0.2, 0.6]), channels) == pytest.approx(2 / 3)  # .2, .2, .6 / .1, .3, .5
    many = torch.tensor([nan, 0.0, 0.2, 0.9, 0.25, 0.3, 0.4])  # the middles of thirds of six: 0.2, 0.3, 0.9
    assert above_by_rank(many, channels) == pytest.approx(2 / 3)
    assert np.isnan(above_by_rank(torch.tensor([nan]), torch.tensor([inf])))


@pytest.mark.parametrize("sae", ["matryoshka", "batchtopk"])
def test_rows_of_a_run(sae):
    a, h = latents(40).numpy(), embeddings(40)
    raw = np.random.default_rng(0).normal(size=(40, 4))
    fractions = {"fractions": (0.25, 1.0)} if sae == "matryoshka" else {}
    written = {}
    images = ImageFeatures(raw, raw, csr_matrix(a), np.zeros(40, int), ["one"])
    run = SimpleNamespace(
        images=lambda: images, shared=lambda name, make: make(), embeddings=lambda part: h, labelled=False,
        write_latents=written.update, sae=VARIANTS[sae](4, 8, k=2, **fractions),
    )  # fmt: skip
    rows = {(score.metric, score.setting): score.value for score in PART.scores(run)}
    ours, theirs = expected(a, h.numpy()), pairwise(raw, h.numpy())
    np.testing.assert_allclose(written["ms"], ours, rtol=1e-9)
    by_hand = {
        "ms_peak": np.nanmax(ours), "ms_mean": np.nanmean(ours), "ms_peak_raw": theirs.max(),
        "ms_mean_raw": theirs.mean(), "ms_gain": np.nanmax(ours) - theirs.max(), "ms_scored_share": 5 / 8,
    }  # fmt: skip
    assert {name: rows[name, ""] for name in by_hand} == pytest.approx(by_hand)
    ranked = np.sort(ours[~np.isnan(ours)])[[0, 1, 3, 4]]  # the middles of quarters of five
    assert rows["ms_above_raw", ""] == (ranked > np.sort(theirs)).mean()
    groups = {setting: value for (_, setting), value in rows.items() if setting}
    each = {"prefix=0.25": np.nanmean(ours[:2]), "prefix=1": np.nanmean(ours[2:])}
    assert groups == pytest.approx(each if sae == "matryoshka" else {})
