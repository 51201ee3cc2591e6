"""Pictures joined from two images of the demo, and their masks."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sae_lightning.data import SPLITS, DataError, load_images, load_masks
from sae_lightning.data.bundled import draw, part_of_first
from tests.configs import CONF

CFG = OmegaConf.to_container(OmegaConf.load(CONF / "data" / "mosaic.yaml"))
SMALL = CFG | {"sizes": {"train": 60, "val": 40, "test": 50}}
FINGERPRINTS = {"train": "4e6b519ed11cbf27", "val": "fb03c0fe6355c3b7", "test": "4d819504ab185ddb"}


def test_every_pixel_is_that_of_the_image_whose_class_the_mask_shows():
    demo = load_images({"source": "demo"}, "val")
    by_class = [np.stack([np.asarray(demo[i]) for i in np.flatnonzero(demo.labels == c)]) for c in range(10)]
    images, masks = load_images(SMALL, "val"), load_masks(SMALL, "val")
    assert masks.class_names == images.class_names == demo.class_names
    for i in range(0, 40, 4):
        picture, mask = np.asarray(images[i]), masks.mask(i)
        for label in np.unique(mask):
            here = mask == label
            equal = (by_class[label][:, here] == picture[here]).all((1, 2))
            assert equal.sum() == 1


@pytest.mark.parametrize("split", SPLITS)
def test_masks_have_two_classes_whose_larger_is_the_label(split):
    images, masks = load_images(SMALL, split), load_masks(SMALL, split)
    assert len(images) == len(masks) == SMALL["sizes"][split]
    assert images.image_ids == masks.image_ids
    for i, label in enumerate(images.labels):
        found, pixels = np.unique(masks.mask(i), return_counts=True)
        assert len(found) == 2
        assert pixels.min() >= 0.25 * 32 * 32
        assert pixels[found == label] == pixels.max()


def test_pictures_are_the_same_each_time_also_in_workers_and_other_ones_with_another_seed():
    first, again, other = (load_images(SMALL | {"seed": seed}, "test") for seed in (42, 42, 43))
    again = pickle.loads(pickle.dumps(again))
    assert all((np.asarray(first[i]) == np.asarray(again[i])).all() for i in range(50))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert any((np.asarray(first[i]) != np.asarray(other[i])).any() for i in range(3))


@pytest.mark.parametrize("split", SPLITS)
def test_stores_of_the_mosaic_stay_valid(split):
    assert load_images(CFG, split).fingerprint.startswith(FINGERPRINTS[split])


def test_limit_and_order_are_those_of_the_pictures():
    cfg = SMALL | {"limit": 20, "shuffle": True, "seed": 5}
    images, masks = load_images(cfg, "train"), load_masks(cfg, "train")
    assert images.image_ids == masks.image_ids != sorted(images.image_ids)
    assert len(masks) == 20
    for i in range(20):
        assert np.bincount(masks.mask(i).ravel()).argmax() == images.labels[i]


@settings(max_examples=30, deadline=None)
@given(degrees=st.integers(0, 359), percent=st.integers(30, 70), side=st.sampled_from([8, 31, 32]))
def test_the_border_is_a_straight_line(degrees, percent, side):
    part = part_of_first(side, degrees, percent)
    rows, columns = np.mgrid[:side, :side]
    along = columns * np.cos(np.deg2rad(degrees)) + rows * np.sin(np.deg2rad(degrees))
    assert along[part].max() < along[~part].min() + 1e-6
    assert percent / 100 - 1 / side**2 <= part.mean() <= percent / 100 + 1.01 / side


@settings(max_examples=20, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=2, max_size=30), seed=st.integers(0, 99))
def test_the_two_images_are_of_different_classes(labels, seed):
    labels = np.array(labels)
    if len(set(labels)) == 1:
        with pytest.raises(DataError, match="one class only"):
            draw(labels, 5, seed, "train")
        return
    plan = draw(labels, 50, seed, "train")
    assert (labels[plan.first] != labels[plan.second]).all()
    assert any((a != b).any() for a, b in zip(plan, draw(labels, 50, seed, "val"), strict=True))


@pytest.mark.parametrize("size", [0, None, 1.5])
def test_impossible_sizes_are_told(size):
    with pytest.raises(DataError, match=r"data\.sizes\.val="):
        load_images(CFG | {"sizes": {"val": size}}, "val")
