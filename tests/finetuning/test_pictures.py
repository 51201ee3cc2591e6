"""The order of training, the augmentations, and what the model gets to see without chance."""

import numpy as np
import pytest
import torch
from PIL import Image

from sae_lightning.backbones.registry import load_backbone
from sae_lightning.finetuning.data import AugmentedPictures, EpochBatches, FinetuneError, Pictures, Preprocess, Shift
from sae_lightning.finetuning.fit import load_split
from tests.backbones.models import CLIP, backbone, picture, timm, transformers


@pytest.fixture
def images(settings):
    return load_split(settings(), "train")


def test_every_epoch_is_another_permutation_in_whole_batches():
    batches = EpochBatches(10, 4, seed=1)
    first, second = list(batches), list(batches)
    assert [len(b) for b in first] == [4, 4]
    assert {epoch for batch in first for epoch, _ in batch} == {0}
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    seen = [i for batch in first for _, i in batch]
    assert len(set(seen)) == 8
    assert seen != [i for batch in second for _, i in batch]


def test_ranks_divide_the_batches_of_one_process():
    whole, halves = list(EpochBatches(12, 4, 1)), [list(EpochBatches(12, 4, 1, rank, 2)) for rank in range(2)]
    for batch, one, two in zip(whole, *halves, strict=True):
        assert batch == [x for pair in zip(one, two, strict=True) for x in pair]


def test_seeking_goes_on_in_the_middle_of_an_epoch():
    whole, resumed = EpochBatches(12, 4, 1), EpochBatches(12, 4, 1)
    epochs = [list(whole) for _ in range(3)]
    resumed.seek(1, 2)
    assert list(resumed) == epochs[1][2:]
    assert list(resumed) == epochs[2]


@pytest.mark.parametrize(("size", "world", "sentence"), [(20, 1, "exceeds the 12 images"), (5, 2, "multiple of the 2")])
def test_batches_that_do_not_fit_are_refused(size, world, sentence):
    with pytest.raises(FinetuneError, match=sentence):
        EpochBatches(12, size, 1, world=world)


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_chance_depends_on_seed_epoch_and_image_alone(augment, images):
    preprocess = Preprocess(32, 32, "bicubic", (0.5,) * 3, (0.25,) * 3)
    made = [AugmentedPictures(images, preprocess.training(augment), seed) for seed in (1, 1, 2)]
    state = torch.get_rng_state()
    pixels, label, index = made[0][3, 7]
    assert torch.equal(torch.get_rng_state(), state)
    assert (label, index) == (int(images.labels[7]), 7)
    made[1][0, 7]
    assert torch.equal(made[1][3, 7][0], pixels)
    others = [made[0][4, 7], made[2][3, 7], made[0][3, 8]]
    assert not any(torch.equal(other[0], pixels) for other in others)


def test_a_shift_moves_by_an_eighth_at_most():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[16, 16] = 255
    shift = Shift()
    places = set()
    for _ in range(200):
        moved = np.asarray(shift(Image.fromarray(pixels)))
        assert moved.shape == (32, 32, 3)
        row, column = np.argwhere(moved[..., 0])[0]
        places.add((int(row) - 16, int(column) - 16))
    assert {row for row, _ in places} == set(range(-4, 5))
    assert {column for _, column in places} == set(range(-4, 5))


@pytest.mark.parametrize(
    "cfg", [backbone("deit"), timm("resnet10t"), transformers(CLIP)], ids=["tiny", "timm", "transformers"]
)
def test_evaluation_sees_what_the_encoder_was_made_for(cfg):
    encoder = load_backbone(cfg)
    preprocess = Preprocess.of(encoder.transform, encoder.image_size)
    for size in ((40, 56), (32, 32), (300, 260)):
        image = picture(*size)
        ours = preprocess.evaluation("resized_crop")(image)
        torch.testing.assert_close(ours, encoder.transform(image))
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess


def test_where_pictures_are_only_shifted_evaluation_sees_all_of_them():
    preprocess = Preprocess(16, 24, "bilinear", (0.0,) * 3, (1.0,) * 3)
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[0] = 255
    image = Image.fromarray(pixels)
    assert preprocess.evaluation("crop")(image)[:, 0].max() > 0.4
    assert preprocess.evaluation("none")(image)[:, 0].max() == 0  # the centre of 24 pixels


def test_an_item_holds_pixels_label_and_place(images):
    pixels, label, index = Pictures(images, Preprocess(32, 32, "bicubic", (0.5,) * 3, (0.5,) * 3).evaluation("none"))[5]
    assert pixels.shape == (3, 32, 32)
    assert pixels.abs().max() <= 1
    assert (label, index) == (int(images.labels[5]), 5)
