"""Captions measured in the pixels."""

import numpy as np
import pytest

from experiments.demo_data.captions import background_colour, caption, tone, vocabulary


def flat(colour):
    return np.tile(np.array(colour, np.uint8), (20, 20, 1))


@pytest.mark.parametrize(
    ("colour", "word"),
    [((30, 60, 200), "blue"), ((40, 160, 50), "green"), ((128, 128, 128), "grey"), ((110, 80, 50), "brown")],
)
def test_captions_read_colour_and_light_off_the_picture(colour, word):
    assert background_colour(flat(colour)) == word
    assert tone(flat((10, 10, 10))) == "dark"
    assert tone(flat((250, 250, 250))) == "bright"
    known = set(vocabulary(["airplane", "dog"]))
    for seed in range(20):
        text = caption(flat(colour), "airplane", np.random.default_rng(seed))
        assert "an airplane" in text
        assert set(text.replace(",", " ").split()) <= known
