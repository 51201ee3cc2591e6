"""Pictures become what the image processor of transformers makes of them, whatever its flags say."""

import json

import numpy as np
import pytest
import torch
import transformers as library
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sae_lightning.backbones.backbone import BackboneError
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.transformers_images import Processed, processor_transform
from sae_lightning.data.geometry import steps_of, through
from sae_lightning.finetuning.data import FinetuneError, Preprocess
from tests.backbones.models import VISION, picture, transformers
from tests.data.making import pixels

EDGE = 24
# with Pillow and with torchvision; plain ones, some whose steps are their own, and one of both sorts
KINDS = (
    "CLIPImageProcessorPil", "CLIPImageProcessor", "SiglipImageProcessorPil", "ViTImageProcessor",
    "BitImageProcessorPil", "DeiTImageProcessor", "BeitImageProcessorPil", "DINOv3ViTImageProcessor",
    "EfficientNetImageProcessorPil", "LevitImageProcessorPil", "BlipImageProcessor",
)  # fmt: skip


def of_processor(processor, image):
    return torch.as_tensor(np.asarray(processor(images=image, return_tensors="pt")["pixel_values"][0])).float()


FLAGS = st.fixed_dictionaries(
    {
        "do_rescale": st.booleans(), "do_normalize": st.booleans(), "do_resize": st.booleans(),
        "do_center_crop": st.booleans(), "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 0.01]),
        "resample": st.sampled_from([0, 2, 3]), "shorter": st.integers(EDGE, EDGE + 5),
        "image_mean": st.lists(st.floats(0, 1), min_size=3, max_size=3),
        "image_std": st.lists(st.floats(0.1, 1), min_size=3, max_size=3),
    }
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(KINDS), FLAGS, st.tuples(st.integers(17, 60), st.integers(17, 60)), st.integers(0, 9))
def test_pixels_are_those_of_the_processor_for_all_flags(kind, flags, shape, seed):
    shorter = flags.pop("shorter")
    square = {"height": EDGE, "width": EDGE}
    cut = flags["do_center_crop"] and not kind.startswith("DINO")
    flags |= {"size": {"shortest_edge": shorter} if cut else square, "crop_size": square}
    if kind.startswith("DINO"):
        flags["do_rescale"] = True  # without it the processor fails
    image = Image.fromarray(pixels(seed, 60)[: shape[0], : shape[1]])
    processor = getattr(library, kind)(**flags)
    expected = of_processor(processor, image)
    torch.testing.assert_close(processor_transform(processor, EDGE)(image), expected, rtol=1e-5, atol=1e-4)


def write_model(folder, **processor):
    library.ViTModel(library.ViTConfig(**VISION)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor"} | processor)
    )
    return transformers(None, weights=str(folder), pretrained=True)


@pytest.mark.parametrize(
    ("flags", "value"),  # of a white picture
    [({"do_normalize": False}, 1.0), ({"rescale_factor": 1 / 127.5, "do_normalize": False}, 2.0),
     ({"do_rescale": False, "image_mean": [5, 5, 5], "image_std": [0.5, 0.5, 0.5]}, 500.0)],
)  # fmt: skip
def test_a_folders_flags_are_followed(flags, value, tmp_path):
    backbone = load_backbone(write_model(tmp_path, size={"height": 32, "width": 32}, **flags))
    made = backbone.transform(Image.new("RGB", (50, 40), "white"))
    torch.testing.assert_close(made, torch.full((3, 32, 32), value))
    expected = of_processor(library.AutoImageProcessor.from_pretrained(tmp_path, backend="pil"), picture())
    torch.testing.assert_close(backbone.transform(picture()), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["DeiTImageProcessorPil", "DeiTImageProcessor"])
def test_sizes_stay_in_proportion_at_another_resolution(kind):
    about = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 28, "width": 28}}
    larger = {"size": {"height": 64, "width": 64}, "crop_size": {"height": 56, "width": 56}}
    found = processor_transform(getattr(library, kind)(**about), 56)(picture(90, 45))
    expected = of_processor(getattr(library, kind)(**larger), picture(90, 45))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_processor_that_makes_no_squares_is_refused(tmp_path):
    cfg = write_model(tmp_path, size={"height": 32, "width": 16})
    with pytest.raises(
        BackboneError, match=r"makes \[3, 32, 16\] of a picture of 32 x 32 pixels; expected \[3, 32, 32\]"
    ):
        load_backbone(cfg)


def test_masks_and_augmentation_follow_a_processor_where_its_steps_are_known():
    about = {"size": {"shortest_edge": 30}, "crop_size": {"height": 25, "width": 25}, "do_center_crop": True}
    known = processor_transform(
        library.CLIPImageProcessor(**about, rescale_factor=1 / 127.5, image_mean=0.5, image_std=0.5), 25
    )
    assert isinstance(known, Processed)
    rows, columns = through(steps_of(known), 30, 40)
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (2, 26, 7, 31)
    assert Preprocess.of(known, 25).mean == pytest.approx((0.25,) * 3)
    assert Preprocess.of(known, 25).std == pytest.approx((0.25,) * 3)
    with pytest.raises(FinetuneError, match="LevitImageProcessorPil, which augmentation cannot follow"):
        Preprocess.of(processor_transform(library.LevitImageProcessorPil(), 224), 224)
