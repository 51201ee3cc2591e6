"""Which words of a caption stand for which concept."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lightning.data.bundled import CIFAR10_CLASSES
from sae_lightning.vlms.words import CLASS_WORDS, concepts_in, mentions, share_naming, words_for


def test_every_class_of_cifar10_has_words_that_no_other_has():
    assert list(CLASS_WORDS) == CIFAR10_CLASSES
    words = [word for several in CLASS_WORDS.values() for word in several]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    ("caption", "concept", "named"),
    [
        ("a grey boat on blue water", "ship", True),
        ("Two VESSELS, at sea.", "ship", True),
        ("a spaceship", "ship", False),  # whole words
        ("a car in front of a cat", "cat", True),
        ("a cart", "automobile", False),
        ("a sea  lion asleep", "sea_lion", True),  # a class without synonyms, by its name
        ("a lion in the sea", "sea_lion", False),
        ("a gray dog", "grey", True),
    ],
)
def test_mentions(caption, concept, named):
    assert mentions(caption, concept) == named


@given(st.sampled_from(CIFAR10_CLASSES), st.integers(0, 2), st.sampled_from(("a {}", "the {} , seen", "{}s", "{}.")))
def test_each_word_of_a_class_names_it_and_no_other_class(name, which, frame):
    words = words_for(name)
    assert concepts_in(frame.format(words[which % len(words)]), CIFAR10_CLASSES) == [name]


def test_share_naming():
    assert share_naming(["a ship", "a boat", "a dog", "water"], "ship") == 0.5
    assert math.isnan(share_naming([], "ship"))
