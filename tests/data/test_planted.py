"""An attribute put into pictures: visible, reproducible, and correlated with the class as it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sae_lightning.apps.bias.planted import ATTRIBUTES, assign, mark, planted
from sae_lightning.data.errors import DataError
from sae_lightning.data.images import ImageData

GREY = Image.new("RGB", (30, 30), (100, 100, 100))


def images() -> ImageData:
    pictures = [Image.new("RGB", (30, 30), (i, i, i)) for i in (50, 90, 130)]
    return ImageData("grey", "test", ["a", "b"], [0, 1, 1], ["x", "y", "z"], pictures.__getitem__, b"grey")


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_attribute_changes_the_picture_more_the_stronger_it_is(attribute):
    before = np.asarray(GREY, dtype=float)
    weak, strong = (np.abs(np.asarray(mark(GREY, attribute, s)) - before).mean() for s in (0.3, 0.9))
    assert 0 < weak < strong


def test_what_each_attribute_draws():
    assert np.asarray(mark(GREY, "tint", 0.5))[3, 4].tolist() == [178, 110, 50]
    assert np.asarray(mark(GREY, "dark", 0.4))[3, 4].tolist() == [60, 60, 60]
    framed, cornered = (np.asarray(mark(GREY, name, 1.0)) for name in ("frame", "corner"))
    assert framed[2, 15].tolist() == framed[15, 27].tolist() == [255, 0, 0]
    assert framed[3, 3].tolist() == [100] * 3
    assert cornered[9, 9].tolist() == [255, 255, 0]
    assert cornered[10, 9].tolist() == [100] * 3


def test_planted_pictures_keep_labels_and_ids_and_get_another_fingerprint():
    plain, marked = images(), planted(images(), "tint", 0.5)
    assert marked.image_ids == plain.image_ids
    assert marked.labels.tolist() == plain.labels.tolist()
    assert np.array_equal(np.asarray(marked[1]), np.asarray(mark(plain[1], "tint", 0.5)))
    prints = {plain.fingerprint, marked.fingerprint, planted(images(), "tint", 0.6).fingerprint}
    assert len(prints) == 3
    assert planted(images(), "tint", 0.5).fingerprint == marked.fingerprint
    assert np.array_equal(np.asarray(marked.take([2])[0]), np.asarray(mark(plain[2], "tint", 0.5)))


@given(st.integers(20, 80), st.floats(-1, 1), st.integers(0, 5))
def test_the_share_with_the_attribute_in_each_class(n, correlation, seed):
    truth = np.arange(2 * n) < n
    has = assign(truth, correlation, seed)
    assert has[truth].sum() == round((1 + correlation) / 2 * n)
    assert has[~truth].sum() == round((1 - correlation) / 2 * n)


def test_the_correlation_is_the_phi_coefficient_and_the_draw_is_seeded():
    truth = np.tile([True, False], 500)
    has = assign(truth, 0.6, 1)
    assert np.corrcoef(has, truth)[0, 1] == pytest.approx(0.6)
    assert (has == assign(truth, 0.6, 1)).all()
    assert (has != assign(truth, 0.6, 2)).any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mark(GREY, "hat", 0.5), "Unknown attribute to plant=hat"),
        (lambda: mark(GREY, "tint", 0.0), "above 0 and at most 1"),
        (lambda: assign(np.array([True, False]), 1.5, 0), "between -1 and 1"),
    ],
)
def test_what_cannot_be_planted_is_refused(call, words):
    with pytest.raises(DataError, match=words):
        call()
