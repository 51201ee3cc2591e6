"""Codes kept on disk against the dense matrix they came from, and the bands cut from them."""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.evaluation.by_latent import _spans, bands, ranked, spread_ranks
from sae_lightning.evaluation.image_codes import ImageCodes
from sae_lightning.saes import SparseCodes


def make(seed: int, n: int = 40, d_sae: int = 15) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, d_sae, generator=generator)
    dense[torch.rand(n, d_sae, generator=generator) < 0.7] = 0
    dense[:, 3] = 0
    return dense


def kept(dense: torch.Tensor, folder, cuts=()) -> closing[ImageCodes]:
    codes = ImageCodes(dense.shape[1], folder)
    for start, stop in pairwise([0, *sorted(cuts), len(dense)]):
        codes.append(SparseCodes.select(dense[start:stop], dense[start:stop] > 0))
    return closing(codes)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    span=st.tuples(st.integers(-50, 50), st.integers(-50, 50)),
)
def test_images_come_back_as_they_were(tmp_path_factory, seed, cuts, span):
    dense = make(seed)
    with kept(dense, tmp_path_factory.getbasetemp(), cuts) as codes:
        assert (len(codes), codes.nnz) == (40, int((dense > 0).sum()))
        torch.testing.assert_close(codes.images(slice(*span)).to_dense(), dense[slice(*span)], rtol=0, atol=0)
        torch.testing.assert_close(codes.images(slice(None)).to_dense(), dense, rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), wanted=st.lists(st.integers(0, 14), unique=True, max_size=15))
def test_latents_come_back_with_all_their_images(tmp_path_factory, seed, wanted):
    dense = make(seed)
    with kept(dense, tmp_path_factory.getbasetemp(), [11, 12]) as codes:
        entries = codes.of_latents(torch.tensor(wanted, dtype=torch.long))
        for i, latent in enumerate(wanted):
            own = slice(int(entries.offsets[i]), int(entries.offsets[i + 1]))
            images = dense[:, latent].nonzero().squeeze(1)
            assert entries.images[own].tolist() == images.tolist()
            torch.testing.assert_close(entries.values[own], dense[images, latent], rtol=0, atol=0)


def test_many_parts_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_lightning.evaluation.image_codes.BLOCK", 7)
    dense = make(1)
    with kept(dense, tmp_path) as codes:
        assert codes.of_latents(torch.tensor([9])).images.tolist() == dense[:, 9].nonzero().squeeze(1).tolist()


def test_reading_and_appending_may_alternate_and_nothing_is_left(tmp_path):
    dense = make(2)
    with kept(dense[:20], tmp_path) as codes:
        assert codes.images(slice(0, 20)).n_samples == 20
        codes.append(SparseCodes.select(dense[20:], dense[20:] > 0))
        torch.testing.assert_close(codes.images(slice(None)).to_dense(), dense)
        with pytest.raises(ValueError, match="codes of 15 latents; got 9"):
            codes.append(SparseCodes.select(torch.zeros(2, 9), torch.zeros(2, 9) > 0))
        with pytest.raises(ValueError, match="a step of 2"):
            codes.images(slice(0, 9, 2))
        with pytest.raises(ValueError, match="named twice"):
            codes.of_latents(torch.tensor([1, 1]))


def test_no_code_at_all(tmp_path):
    with kept(torch.zeros(5, 4), tmp_path) as codes:
        assert codes.images(slice(None)).to_dense().tolist() == torch.zeros(5, 4).tolist()
        assert codes.of_latents(torch.tensor([2, 0])).offsets.tolist() == [0, 0, 0]
        images, values = bands(codes, torch.tensor([2, 0]), 3)
        assert (images == -1).all()
        assert (values == 0).all()


@given(count=st.integers(0, 60), n=st.integers(1, 9))
def test_bands_never_overlap(count, n):
    spans = _spans(count, n)
    sizes = [stop - start for start, stop in spans]
    assert spans[0][0] == 0
    assert spans[-1][1] == count
    assert spans[0][1] <= spans[1][0] <= spans[1][1] <= spans[2][0]
    assert max(sizes) <= n
    if count >= 3 * n:
        assert sizes == [n, n, n]
        assert abs((spans[1][0] + spans[1][1]) - count) <= 1  # in the middle
    else:
        assert sum(sizes) == count
        assert max(sizes) - min(sizes) <= 1


def test_bands_are_cut_from_the_sorted_images(tmp_path):
    dense = make(5, n=60)
    with kept(dense, tmp_path, [30]) as codes:
        images, values = bands(codes, torch.arange(15), 4)
    for latent in range(15):
        a = dense[:, latent].numpy()
        order = [n for n in np.argsort(-a, kind="stable") if a[n] > 0]
        for band, (start, stop) in enumerate(_spans(len(order), 4)):
            expected = order[start:stop]
            assert images[latent, band].tolist() == expected + [-1] * (4 - len(expected))
            np.testing.assert_array_equal(values[latent, band, : len(expected)], a[expected])
    assert (images[3] == -1).all()


def test_of_equal_activations_the_earlier_image_comes_first(tmp_path):
    dense = torch.tensor([[0.0], [2.0], [1.0], [2.0], [1.0]])
    with kept(dense, tmp_path) as codes:
        assert bands(codes, torch.tensor([0]), 2)[0].tolist() == [[[1, 3], [2, -1], [4, -1]]]


@given(d_sae=st.integers(1, 500), n=st.integers(1, 30))
def test_ranks_are_spread_and_the_same_for_all_runs(d_sae, n):
    ranks = spread_ranks(d_sae, n).tolist()
    assert ranks == spread_ranks(d_sae, n).tolist()
    assert len(ranks) == len(set(ranks)) == min(n, d_sae)
    assert ranks == sorted(ranks)
    assert ranks[0] >= 0
    assert ranks[-1] < d_sae
    assert max(b - a for a, b in pairwise([-1, *ranks, d_sae])) <= 2 * -(-d_sae // min(n, d_sae))


def test_ranking_is_by_score_then_latent():
    assert ranked(torch.tensor([0.5, 0.9, 0.0, 0.9])).tolist() == [1, 3, 0, 2]
