"""Cutting splits from train, samples of classes, and which of a data set's splits are ours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.data import DataError
from sae_lightning.data.errors import DataWarning
from sae_lightning.data.splits import choose_splits, cut, missing_splits, split_indices, stratified_sample
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
@given(LABELS, st.integers(0, 9), st.sampled_from([(0.8, 0.1, 0.1), (0.45, 0.05, 0.5), (0.9, 0.1, 0.0)]))
def test_a_class_of_three_has_one_in_each_part_that_has_a_share(labels, seed, shares):
    parts = split_indices(labels, dict(zip("abc", shares, strict=True)), seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    for part, share in zip(parts.values(), shares, strict=True):
        taken = np.bincount(labels[part], minlength=5)
        assert ((taken > 0) == (share > 0))[np.bincount(labels, minlength=5) >= 3].all()
        assert share or not len(part)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([4] * 40, [80, 40, 40]),
        ([5] * 40, [120, 40, 40]),
        ([6] * 40, [160, 40, 40]),
        ([2] * 100, [160, 20, 20]),
        ([1] * 100, [80, 10, 10]),
        ([14] * 100, [1120, 140, 140]),
        ([1, 1, 2, 500, 3, 4], [407, 52, 52]),
    ],
)
def test_small_classes_are_divided_over_the_whole_set(sizes, expected):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    for seed in (0, 1):
        parts = split_indices(labels, {"train": 0.8, "val": 0.1, "test": 0.1}, seed)
        assert [len(part) for part in parts.values()] == expected
        assert (np.bincount(labels[parts["train"]], minlength=len(sizes))[np.array(sizes) > 1] > 0).all()


def test_classes_that_are_large_are_rounded_each_by_itself():
    sizes = [178, 182, 177, 183]  # of which a store's name has depended since shares were rounded so
    parts = split_indices(np.repeat(np.arange(4), sizes), {"train": 0.6, "val": 0.1, "test": 0.3}, 0)
    assert [len(part) for part in parts.values()] == [107 + 109 + 106 + 110, 18 * 4, 53 + 55 + 53 + 55]


def test_a_cut_of_small_classes_says_its_counts_and_an_empty_one_is_refused():
    labels = np.repeat(np.arange(40), 4)
    held_out = {"val": 0.1, "test": 0.1}
    with pytest.warns(
        DataWarning, match=r"160 images of 40 classes \(the smallest has 4\), .* train 80, val 40, test 40"
    ):
        assert len(cut(labels, held_out, "test", 0)) == 40
    with pytest.raises(
        DataError, match=r"2 images of 1 class .* train 2, val 0, test 0, so val is empty.*data\.shares"
    ):
        cut(np.zeros(2, int), held_out, "val", 0)


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
        ({"train": "train"}, ["Training", "Valid", "testing"], ("Training", "Valid", "testing")),
        ({}, ["train", "dev", "Test_Images"], ("train", "dev", "Test_Images")),
        ({}, ["train", "valid", "Validation"], ("train", "valid", "train")),  # the usual name first
    ],
)
def test_splits_are_found_by_usual_names_or_cut(wanted, present, expected):
    names = choose_splits(wanted, present, "x")
    assert tuple(names.values()) == expected
    assert missing_splits(names) == [s for s in ("val", "test") if names[s] == names["train"]]


def test_names_that_are_less_usual_are_said():
    with pytest.warns(DataWarning) as said:
        choose_splits({}, ["Train", "valid", "testset"], "x", "data.folders")
    sentences = [str(w.message) for w in said if w.category is DataWarning]
    assert sentences == [
        "'Train' of x is taken for its train split; name another with data.folders.train.",
        "'testset' of x is taken for its test split; name another with data.folders.test.",
    ]


def test_a_name_that_is_asked_for_is_not_said(recwarn):
    choose_splits({"train": "Train", "val": "Val", "test": None}, ["Train", "Val"], "x")
    assert not recwarn


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
