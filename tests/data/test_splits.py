"""Cutting splits from train, samples of classes, and which of a data set's splits are ours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.data import DataError
from sae_lightning.data.arrange import stratified_sample
from sae_lightning.data.splits import choose_splits, cut, missing_splits, split_indices
from tests.data.making import SHARES

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(0, 9))
def test_stratified_parts_are_disjoint_complete_and_fair_to_every_class(labels, seed):
    parts = split_indices(labels, SHARES, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    for name, share in SHARES.items():
        taken, there = (np.bincount(x, minlength=5) for x in (labels[parts[name]], labels))
        assert np.abs(taken - share * there).max() <= 1


@settings(max_examples=60, deadline=None)
@given(LABELS, st.integers(0, 9), st.data())
def test_a_sample_has_its_size_and_every_class_its_share(labels, seed, data):
    size = data.draw(st.integers(1, len(labels)))
    chosen = stratified_sample(labels, size, seed)
    assert len(chosen) == size
    assert (np.diff(chosen) > 0).all()
    exact = np.bincount(labels) * size / len(labels)
    assert np.abs(np.bincount(labels[chosen], minlength=len(exact)) - exact).max() < 1


def test_samples_are_seeded():
    labels = np.arange(100) % 3
    first, again, other = (stratified_sample(labels, 30, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("wanted", "present", "expected"),
    [
        ({}, ["train", "validation", "test"], ("train", "validation", "test")),
        ({}, ["train", "val"], ("train", "val", "train")),
        ({"train": "train", "val": None, "test": None}, ["train"], ("train", "train", "train")),
        ({"val": "test"}, ["train", "test"], ("train", "test", "train")),  # test is taken, so it is cut
        ({"val": "train"}, ["train", "valid"], ("train", "train", "train")),  # cut although valid is there
        ({"train": "full"}, ["full", "test"], ("full", "full", "test")),
    ],
)
def test_splits_are_found_by_usual_names_or_cut(wanted, present, expected):
    names = choose_splits(wanted, present, "x")
    assert tuple(names.values()) == expected
    assert missing_splits(names) == [s for s in ("val", "test") if names[s] == names["train"]]


@pytest.mark.parametrize(
    ("wanted", "present", "sentence"),
    [
        ({"val": "dev"}, ["train", "test"], r"no split 'dev'; it has \['train', 'test'\]"),
        ({}, ["full"], r"no split 'train'; it has \['full'\]"),
    ],
)
def test_splits_that_are_not_there_are_named(wanted, present, sentence):
    with pytest.raises(DataError, match=sentence):
        choose_splits(wanted, present, "x")


@pytest.mark.parametrize("held_out", [{"val": 1.0}, {"val": 0.6, "test": 0.5}, {"val": -0.1}])
def test_impossible_shares_are_refused(held_out):
    with pytest.raises(DataError, match="add up to less than 1"):
        cut(np.zeros(10, int), held_out, "val", 0)
