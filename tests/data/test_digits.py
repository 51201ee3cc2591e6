"""Scikit-learn's digits as pictures."""

import pickle

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from sklearn import datasets

from sae_lightning.data import SPLITS, DataError, load_images
from tests.configs import CONF

CFG = OmegaConf.to_container(OmegaConf.load(CONF / "data" / "digits.yaml"))
FINGERPRINTS = {"train": "1f0ed6d1021d1307", "val": "1175e6c5f1dcb5a9", "test": "fd876b8092f8df71"}


@pytest.fixture(scope="module")
def parts():
    return {split: load_images(CFG, split) for split in SPLITS}


def test_every_digit_is_in_one_split_and_each_class_in_all(parts):
    ids = [i for part in parts.values() for i in part.image_ids]
    assert len(ids) == len(set(ids)) == 1797
    assert parts["train"].class_names == [str(c) for c in range(10)]
    whole = np.bincount(datasets.load_digits().target)
    for split, share in CFG["shares"].items():
        np.testing.assert_allclose(np.bincount(parts[split].labels), share * whole, atol=1)
    other = load_images(CFG | {"seed": 1}, "train")
    assert set(other.image_ids) != set(parts["train"].image_ids)


def test_pictures_are_the_digits_scaled_up(parts):
    found = datasets.load_digits()
    for part in pickle.loads(pickle.dumps(parts)).values():
        for i in range(0, len(part), 97):
            row = int(part.image_ids[i].removeprefix("digit-"))
            assert part.labels[i] == found.target[row]
            picture = part[i]
            assert (picture.size, picture.mode) == ((32, 32), "RGB")
            pixels = np.asarray(picture).astype(float)
            assert (pixels[..., 0] == pixels[..., 1]).all()
            assert (pixels[..., 0] == pixels[..., 2]).all()
            small = np.asarray(Image.fromarray(pixels[..., 0]).resize((8, 8), Image.Resampling.BOX))
            assert np.corrcoef(small.ravel(), found.images[row].ravel())[0, 1] > 0.98


@pytest.mark.parametrize("split", SPLITS)
def test_stores_of_the_digits_stay_valid(parts, split):
    assert parts[split].fingerprint.startswith(FINGERPRINTS[split])


def test_impossible_shares_are_told():
    with pytest.raises(DataError, match="shares to cut from train"):
        load_images(CFG | {"shares": {"train": 0.0, "val": 0.5, "test": 0.5}}, "train")
