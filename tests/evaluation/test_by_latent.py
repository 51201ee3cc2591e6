"""Codes of images by latent, against slow readings of the dense matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from sae_lightning.evaluation.by_latent import ImagesOfLatents, dominant, top_images


def codes_of(seed: int, n: int = 30, d_sae: int = 12, share: float = 0.3) -> csr_matrix:
    """Sparse positive codes; latent 0 never fires."""
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((n, d_sae)) < share, rng.integers(1, 6, (n, d_sae)) / 2, 0).astype(np.float32)
    dense[:, 0] = 0
    return csr_matrix(dense)


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_images_of_a_latent_are_those_it_fires_on_strongest_first(share):
    codes = codes_of(0, share=share)
    dense, by_latent = codes.toarray(), ImagesOfLatents(codes)
    top = by_latent.top(9)
    for latent in range(codes.shape[1]):
        fired = sorted(np.flatnonzero(dense[:, latent]).tolist(), key=lambda i, j=latent: (-dense[i, j], i))
        assert [i for i in top[latent].tolist() if i >= 0] == fired[:9]
        shown = by_latent.bands(latent, 4)
        if len(fired) >= 12:
            middle = (len(fired) - 4) // 2
            assert [[i for i, _ in images] for _, images in shown] == [
                fired[:4], fired[middle : middle + 4], fired[-4:],
            ]  # fmt: skip
        for _, images in shown:
            assert images == [(i, float(dense[i, latent])) for i, _ in images]
        assert sum(by_latent.histogram(latent, 5)) == len(fired)
    assert by_latent.bands(0, 4) == []


# --- held-out images ------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_top_images_are_the_strongest(seed):
    rng = np.random.default_rng(seed)
    dense = np.round(rng.random((30, 6)) * (rng.random((30, 6)) < 0.25), 1)
    latents = np.array([4, 0, 2])
    found = top_images(csr_matrix(dense), 5, latents)
    for row, latent in zip(found, latents, strict=True):
        order = sorted((i for i in range(30) if dense[i, latent] > 0), key=lambda i: (-dense[i, latent], i))[:5]
        assert row.tolist() == order + [-1] * (5 - len(order))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.1, 0.6]))
def test_the_dominant_class_has_most_of_a_latents_activation(seed, share):
    rng = np.random.default_rng(seed)
    dense = (rng.integers(1, 5, (20, 6)) * (rng.random((20, 6)) < share)).astype(np.float32)
    labels = rng.integers(0, 3, 20)
    label, purity, images = dominant(csr_matrix(dense), labels, 3)
    for latent in range(6):
        masses = [float(dense[labels == c, latent].sum()) for c in range(3)]
        assert images[latent] == (dense[:, latent] > 0).sum()
        if sum(masses) == 0:
            assert (label[latent], purity[latent]) == (-1, 0)
        else:
            assert label[latent] == masses.index(max(masses))
            assert purity[latent] == pytest.approx(max(masses) / sum(masses))


def test_labels_of_another_number_of_images_are_refused():
    with pytest.raises(ValueError, match="one label for each of 4 images; got 3"):
        dominant(csr_matrix((4, 2)), np.zeros(3, dtype=np.int64), 2)
