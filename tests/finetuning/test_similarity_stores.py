"""Similarity embeddings in the order of the images, and stores that do not fit."""

import numpy as np
import pytest
import torch

from sae_lightning.finetuning.data import FinetuneError, align, similarity_store
from sae_lightning.finetuning.fit import load_split
from tests.conftest import fill_store


@pytest.fixture
def images(settings):
    return load_split(settings(), "train")


def store_of(images, folder, order, **changes):
    """A store whose embedding of image i is (i, 1, 0); images in ``order``, named as ``images`` names them."""
    features = torch.stack([torch.tensor([float(i), 1.0, 0.0]) for i in order])[:, None]
    changes = {"kind": "embedding", "layer": None, "grid": (1, 1)} | changes
    store = fill_store(folder, features, images_per_shard=100, **changes)
    store.__dict__["image_ids"] = [images.image_ids[i] if i < len(images) else f"other-{i}" for i in order]
    return store


def test_rows_follow_the_images_whatever_the_order_of_the_store(images, tmp_path):
    order = np.random.default_rng(0).permutation(len(images) + 5).tolist()  # some images more than needed
    store = store_of(images, tmp_path / "store", order)
    found = align(store, images)
    assert found.shape == (len(images), 3)
    assert found[:, 0].tolist() == list(range(len(images)))


def test_an_image_without_embedding_is_named(images, tmp_path):
    store = store_of(images, tmp_path / "store", list(range(len(images) - 2)))
    with pytest.raises(FinetuneError, match=r"no embedding of 2 of the 32 train images.*, '.*' among them"):
        align(store, images)


def test_a_given_store_of_other_images_or_of_patches_is_refused(settings, images, tmp_path):
    fill_store(tmp_path / "other", torch.randn(5, 1, 3), kind="embedding", layer=None, grid=(1, 1))
    cfg = settings(f"similarity_store.train={tmp_path / 'other'}")
    with pytest.raises(FinetuneError, match="no embedding of 32 of the 32 train images"):
        align(similarity_store(cfg, "train"), load_split(cfg, "train"))
    fill_store(tmp_path / "patches", torch.randn(5, 4, 3), grid=(2, 2))
    with pytest.raises(FinetuneError, match=r"holds 4 vectors an image.*features=embedding"):
        similarity_store(settings(f"similarity_store.train={tmp_path / 'patches'}"), "train")


def test_the_default_is_the_embedding_of_clip(settings):
    store = similarity_store(settings(), "train")
    assert (store.backbone, store.kind, store.d_in) == ("clip (tiny)", "embedding", 128)
