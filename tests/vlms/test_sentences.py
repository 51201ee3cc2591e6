"""The sentences that the captioner learns say what is in the pixels."""

import colorsys

import numpy as np
import pytest

from experiments.tiny_captioner.measure import colours_said, judged
from experiments.tiny_captioner.pixels import COLOURS, colours_of, measure
from experiments.tiny_captioner.sentences import sentence
from sae_lightning.data.bundled import CIFAR10_CLASSES
from sae_lightning.vlms.words import concepts_in

RGB = {"white": (240, 240, 240), "black": (20, 20, 20), "red": (210, 20, 20), "blue": (40, 80, 220),
       "green": (40, 150, 50), "grey": (128, 128, 128), "brown": (110, 70, 40)}  # fmt: skip


def picture(inside: str, outside: str, rows: slice = slice(10, 22), columns: slice = slice(10, 22)) -> np.ndarray:
    image = np.full((32, 32, 3), RGB[outside], dtype=np.uint8)
    image[rows, columns] = RGB[inside]
    return image


@pytest.mark.parametrize("colour", RGB)
def test_pure_colours_have_their_names(colour):
    assert COLOURS[int(colours_of(np.array(RGB[colour])))] == colour


def test_hues_go_around_the_circle_in_order():
    wheel = np.array([colorsys.hsv_to_rgb(h / 360, 1, 1) for h in range(360)]) * 255
    names = [COLOURS[i] for i in colours_of(wheel)]
    turns = [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    assert turns == ["red", "orange", "yellow", "green", "blue", "purple", "red"]


@pytest.mark.parametrize(("inside", "outside"), [("red", "white"), ("white", "blue"), ("black", "green")])
def test_the_object_is_told_from_its_background(inside, outside):
    m = measure(picture(inside, outside))
    assert m.colours == (inside,)
    assert m.background == m.above == m.below == outside
    assert m.busy == 0
    assert m.size == pytest.approx(144 / 1024)
    assert m.side == pytest.approx(0, abs=1e-9)


def test_sides_sizes_and_halves():
    assert measure(picture("red", "white", columns=slice(0, 12))).side < -0.3
    assert measure(picture("red", "white", columns=slice(20, 32))).side > 0.3
    assert measure(picture("white", "white")).size is None  # nothing stands out
    halves = np.concatenate([picture("red", "blue")[:16], picture("red", "green")[16:]])
    assert (measure(halves).above, measure(halves).below) == ("blue", "green")


def test_sentences_name_the_class_its_colour_and_what_supports_a_place():
    rng = np.random.default_rng(0)
    for label, name in enumerate(CIFAR10_CLASSES):
        for _ in range(30):
            text = sentence(label, measure(picture("red", "blue")), rng)
            assert concepts_in(text, CIFAR10_CLASSES) == [name]
            assert colours_said(text)[0] == ["red"]
            assert set(colours_said(text)[1]) <= {"blue"}
            assert len(text.split()) <= 24
            assert " a o" not in text
    water = [sentence(8, measure(picture("red", "blue")), rng) for _ in range(20)]
    assert all("water" in text for text in water)
    green = [sentence(8, measure(picture("red", "brown")), rng) for _ in range(20)]
    assert not any("water" in text for text in green)


def test_judging_counts_only_what_is_said():
    from types import SimpleNamespace

    m = measure(picture("red", "blue"))
    of = SimpleNamespace(labels=[8, 8, 8], measured=[m, m, m])
    found = judged(["a red boat on blue water", "a dark photo of a green and red car", "a ship and a dog"], of)
    assert found["class"].tolist() == [True, False, False]
    assert found["colour of the object"].tolist() == [True, False]
    assert found["other colours"].tolist() == [True]
    assert found["dark"].tolist() == [m.tone == "dark"]
    assert found["bright"].tolist() == []
