"""Masks: where they come from, how they follow the encoder's view of a picture, and what they say of patches."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.transformers_images import processor_transform
from sae_lightning.data import DataError, Masks, load_images, load_masks
from sae_lightning.data.geometry import nearest, steps_of, through
from sae_lightning.data.geometry import seen as seen_part
from sae_lightning.data.masks import IGNORE, patch_labels, patch_pixels
from tests.backbones.models import backbone
from tests.data.making import folder_cfg, hf_cfg, pixels, png

MASK = {"mask_first": 1, "mask_classes": 5}


def mask_pixels(seed: int, height: int = 12, width: int = 20, low: int = 0, high: int = 6) -> np.ndarray:
    """A mask of blocks of random values [height, width] uint8."""
    blocks = np.random.default_rng(seed).integers(low, high, (height // 4 + 1, width // 4 + 1))
    return np.kron(blocks, np.ones((4, 4)))[:height, :width].astype(np.uint8)


def as_png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture.putpalette([c for i in range(256) for c in (i * 7 % 256, i, 255 - i)])
    (picture if mode in (None, "P") else picture.convert(mode)).save(buffer, "PNG")
    return buffer.getvalue()


def masks_of(*pixels: np.ndarray, transform=None, first=0, classes=6) -> Masks:
    """Masks of these pixels, with the ids 0, 1 …"""
    sources = [as_png(p) for p in pixels]
    names = [f"class {c}" for c in range(classes)]
    return Masks("made", "train", names, [str(i) for i in range(len(pixels))], sources.__getitem__, first, transform)


# --- geometry -------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), target=st.integers(1, 300))
def test_the_nearest_pixel_is_pillows(size, target):
    row = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    expected = np.asarray(row.resize((target, 1), Image.Resampling.NEAREST))[0]
    decided = (2 * np.arange(target) + 1) * size % (2 * target) != 0  # not on the border of two pixels
    np.testing.assert_array_equal(nearest(size, target)[decided], expected[decided])


CUTTING = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
SQUEEZING = SiglipImageProcessorPil(size={"height": 32, "width": 32})
VIEWS = {
    "timm": create_transform((3, 32, 32), crop_pct=1.0, interpolation="bicubic", is_training=False),
    "timm, the middle": create_transform((3, 32, 32), crop_pct=0.875, is_training=False),
    "timm, squeezed": create_transform((3, 32, 32), crop_pct=0.9, crop_mode="squash", is_training=False),
    "transformers, the middle": processor_transform(CUTTING, 32),
    "transformers, squeezed": processor_transform(SQUEEZING, 32),
}


@pytest.mark.parametrize("transform", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("shape", [(41, 41), (33, 57), (91, 33), (21, 25)])  # odd: no centre between two pixels
def test_a_mask_goes_where_its_picture_goes(transform, shape):
    by_nearest = transforms.Compose(
        [
            transforms.Resize(step.size, InterpolationMode.NEAREST) if isinstance(step, transforms.Resize) else step
            for step in transform.transforms
            if isinstance(step, transforms.Resize | transforms.CenterCrop)
        ]
    )
    values = mask_pixels(0, *shape)
    seen = masks_of(values, transform=transform).mask(0)
    assert seen.shape == (32, 32)
    np.testing.assert_array_equal(seen, np.asarray(by_nearest(Image.fromarray(values))))


@pytest.mark.parametrize("transform", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("shape", [(41, 41), (40, 60), (90, 32), (20, 24)])
def test_what_the_encoder_sees_of_a_picture_lies_where_its_mask_says(transform, shape):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    values = (2 * (rows > 0.4 * shape[0]) + (columns > 0.55 * shape[1])).astype(np.uint8)  # four fields
    view = transform(Image.fromarray(np.repeat((values * 80)[..., None], 3, -1)))[0].numpy()
    levels = [transform(Image.new("RGB", shape[::-1], (80 * c,) * 3))[0, 16, 16].item() for c in range(4)]
    found = np.abs(view[..., None] - np.array(levels)).argmin(-1)
    seen = masks_of(values, transform=transform).mask(0)
    inside = minimum_filter(seen, 3) == maximum_filter(seen, 3)  # not at a border, where filters mix
    assert inside.mean() > 0.8
    np.testing.assert_array_equal(found[inside], seen[inside])


def test_the_tiny_backbones_see_a_mosaic_pixel_by_pixel():
    transform = load_backbone(backbone("dinov2")).transform
    cfg = {"source": "mosaic", "name": "mosaic", "sizes": {"val": 3}, "seed": 0}
    seen, whole = load_masks(cfg, "val", transform), load_masks(cfg, "val")
    for i in range(3):
        np.testing.assert_array_equal(seen.mask(i), whole.mask(i))


def test_what_padding_adds_is_no_class():
    seen = masks_of(mask_pixels(0, 8, 8), transform=transforms.CenterCrop(13)).mask(0)
    np.testing.assert_array_equal(seen[2:10, 2:10], mask_pixels(0, 8, 8))
    assert (seen == IGNORE).sum() == 13 * 13 - 64
    padded = transforms.CenterCrop(13)(Image.fromarray(mask_pixels(0, 8, 8) + 1))
    np.testing.assert_array_equal(np.asarray(padded) == 0, seen == IGNORE)


@pytest.mark.parametrize("size", [(500, 375), (300, 641), (256, 256), (60, 40)])
@pytest.mark.parametrize("steps", [
    [transforms.Resize(256), transforms.CenterCrop(224)], [transforms.Resize((224, 224))], [transforms.CenterCrop(300)],
])  # fmt: skip
def test_what_is_shown_of_a_picture_is_what_the_encoder_sees(size, steps):
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    picture = Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))
    transform = transforms.Compose(steps)
    shown = seen_part(picture, transform)
    assert shown.width == shown.height
    given = transform(picture).resize(shown.size, Image.Resampling.BILINEAR)
    apart = np.abs(np.asarray(shown).astype(int) - np.asarray(given).astype(int))
    assert apart.mean() < 4  # of 255: about a pixel of the smallest picture
    if len(steps) == 2:
        assert shown.width < min(size)  # less than the whole centred square


def test_unknown_steps_are_refused():
    assert [axis.tolist() for axis in through(steps_of(None), 2, 3)] == [[0, 1], [0, 1, 2]]
    for step in (transforms.RandomResizedCrop(8), transforms.Resize(8, max_size=9), torch.nn.Identity()):
        with pytest.raises(DataError, match="only Resize and CenterCrop"):
            masks_of(mask_pixels(0), transform=transforms.Compose([transforms.Resize(8), step]))


# --- values ---------------------------------------------------------------------------------------------------------
def test_values_below_the_first_and_255_are_no_class():
    pixels = np.array([[0, 1, 2], [5, 255, 1]], dtype=np.uint8)
    assert masks_of(pixels, first=1, classes=5).mask(0).tolist() == [[255, 0, 1], [4, 255, 0]]
    assert masks_of(pixels, first=0, classes=6).mask(0).tolist() == [[0, 1, 2], [5, 255, 1]]
    with pytest.raises(DataError, match=r"image '0' of 'made' holds 5, but its classes are 0 to 4"):
        masks_of(pixels, classes=5).mask(0)


@pytest.mark.parametrize("mode", ["P", "I;16", "1"])
def test_masks_of_other_modes(mode):
    pixels = mask_pixels(1) if mode != "1" else mask_pixels(1, high=2)
    source = as_png(pixels * 255 if mode == "1" else pixels, mode)
    masks = Masks("made", "val", [str(c) for c in range(6)], ["a"], lambda i: source)
    np.testing.assert_array_equal(masks.mask(0), pixels)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (png(0), "has mode RGB; expected one channel"),
        (b"no picture", "mask of image 'a' cannot be read"),
        (b"", "has no mask"),
        (as_png(mask_pixels(0))[:-30], "mask of image 'a' cannot be read"),
    ],
)
def test_what_is_no_mask_is_told(source, sentence):
    with pytest.raises(DataError, match=sentence):
        Masks("made", "val", ["x"], ["a"], lambda i: source).mask(0)


@pytest.mark.parametrize("count", [0, 256])
def test_impossible_numbers_of_classes(count):
    with pytest.raises(DataError, match=f"have {count} classes"):
        Masks("made", "val", [str(c) for c in range(count)], ["a"], lambda i: b"")


def test_masks_of_chosen_images():
    masks = masks_of(*(mask_pixels(i) for i in range(5)))
    assert masks.of(["0", "1", "2", "3", "4"]) is masks
    chosen = masks.of(["3", "0"]).of(["0", "3"]).of(["3"])
    assert (chosen.image_ids, len(chosen)) == (["3"], 1)
    np.testing.assert_array_equal(chosen.mask(0), mask_pixels(3))
    np.testing.assert_array_equal(masks.of(["4"]).patch_labels((3, 5)), masks.patch_labels((3, 5))[4:])
    with pytest.raises(DataError, match="no mask of image 'x'"):
        masks.of(["3", "x"])


# --- patches --------------------------------------------------------------------------------------------------------
def test_majority_of_a_patch_by_hand():
    mask = np.array([
        [0, 0, 7, 255],
        [0, 3, 255, 255],
        [2, 2, 255, 255],
        [1, 1, 255, 255],
    ], dtype=np.uint8)  # fmt: skip
    assert patch_labels(mask, (2, 2)).tolist() == [0, 7, 1, 255]
    assert patch_labels(mask, (1, 1)).tolist() == [0]
    assert patch_labels(mask, (4, 1)).tolist() == [0, 0, 2, 1]


def slow_patches(mask: np.ndarray, grid: tuple[int, int]) -> list[list[int]]:
    """The labelled pixels of each patch."""
    found: list[list[int]] = [[] for _ in range(grid[0] * grid[1])]
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            if mask[y, x] != IGNORE:
                place = int(y / mask.shape[0] * grid[0] + 1e-9), int(x / mask.shape[1] * grid[1] + 1e-9)
                found[place[0] * grid[1] + place[1]].append(int(mask[y, x]))
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 7), columns=st.integers(1, 7), share=st.floats(0, 1))
def test_patches_equal_a_loop_over_pixels(seed, rows, columns, share):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 4, (rng.integers(1, 15), rng.integers(1, 15))).astype(np.uint8)
    mask[rng.random(mask.shape) < share] = IGNORE
    expected = slow_patches(mask, (rows, columns))
    majority = [min(set(p), key=lambda c: (-p.count(c), c)) if p else IGNORE for p in expected]
    assert patch_labels(mask, (rows, columns)).tolist() == majority
    counted = patch_pixels(mask, (rows, columns))
    triples = [(i, c, p.count(c)) for i, p in enumerate(expected) for c in sorted(set(p))]
    assert list(zip(*(column.tolist() for column in counted), strict=True)) == triples


def test_patches_of_all_masks_are_those_of_each():
    pixels = [mask_pixels(i) for i in range(4)]
    pixels[2][:] = IGNORE
    masks = masks_of(*pixels)
    np.testing.assert_array_equal(masks.patch_labels((3, 5)), [patch_labels(p, (3, 5)) for p in pixels])
    counted = masks.patch_pixels((3, 5))
    assert counted is masks.patch_pixels((3, 5))
    for i, p in enumerate(pixels):
        here = counted.patch // 15 == i
        for found, expected in zip(counted, patch_pixels(p, (3, 5)), strict=True):
            np.testing.assert_array_equal(found[here] - (15 * i if found is counted.patch else 0), expected)


# --- sources --------------------------------------------------------------------------------------------------------
def from_one(values: np.ndarray) -> np.ndarray:
    """The classes of a mask in which 1 is the first."""
    return np.where(values == 0, IGNORE, values.astype(int) - 1)


def pairs(n: int, first_seed: int = 0) -> datasets.Dataset:
    image, seeds = datasets.Image(), range(first_seed, first_seed + n)
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(s), "path": None} for s in seeds],
            "annotation": [{"bytes": as_png(mask_pixels(s)), "path": None} for s in seeds],
            "scene": [s % 3 for s in seeds],
        },
        datasets.Features({"image": image, "annotation": image, "scene": datasets.Value("int64")}),
    )


def test_masks_in_a_column_of_a_hugging_face_data_set(tmp_path):
    pairs(20).to_parquet(tmp_path / "train.parquet")
    pairs(6, 100).to_parquet(tmp_path / "validation.parquet")
    splits = {"train": "train", "val": None, "test": "validation"}
    cfg = hf_cfg(tmp_path, splits=splits, shuffle=True, limit=10, mask_column="annotation", **MASK)
    for split, start in (("train", 0), ("val", 0), ("test", 100)):
        images, masks = load_images(cfg, split), load_masks(cfg, split)
        assert masks.image_ids == images.image_ids
        assert masks.class_names == ["1", "2", "3", "4", "5"]
        for i, image_id in enumerate(images.image_ids):
            seed = start + int(image_id.split("-")[1])
            np.testing.assert_array_equal(np.asarray(images[i]), pixels(seed))
            np.testing.assert_array_equal(masks.mask(i), from_one(mask_pixels(seed)))
    with pytest.raises(DataError, match="streaming=false"):
        load_masks(cfg | {"streaming": True}, "train")


def test_images_without_a_mask_are_named(tmp_path):
    pairs(4).to_parquet(tmp_path / "train.parquet")
    table = pq.read_table(tmp_path / "train.parquet")
    held = [*table["annotation"].to_pylist()[:3], None]
    column = datasets.Features({"a": datasets.Image()}).arrow_schema.field("a").type
    table = table.set_column(1, table.schema.field("annotation"), pa.array(held, column))
    pq.write_table(table, tmp_path / "train.parquet")
    cfg = hf_cfg(tmp_path, held_out=0.0, mask_column="annotation", **MASK)
    with pytest.raises(DataError, match=r"'train-00000003' has no mask.*data\.splits"):
        load_masks(cfg, "train").mask(3)


@pytest.fixture
def ade(tmp_path):
    """Pictures and masks in the folders of ADE20K's scene parsing release."""
    for split, count in {"training": 10, "validation": 4}.items():
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            seed = i + 100 * (split == "validation")
            Image.fromarray(np.full((9, 13, 3), seed, np.uint8)).save(tmp_path / f"images/{split}/{seed:03d}.jpg")
            (tmp_path / f"annotations/{split}/{seed:03d}.png").write_bytes(as_png(mask_pixels(seed, 9, 13)))
    folders = {"train": "images/training", "val": None, "test": "images/validation"}
    return folder_cfg(
        tmp_path, folders=folders, image_folder="images", mask_folder="annotations", shuffle=True,
        shares={"train": 0.8, "val": 0.2, "test": 0.0}, **MASK,
    )  # fmt: skip


def test_masks_in_a_folder_beside_the_pictures(ade):
    sizes = {"train": 8, "val": 2, "test": 4}
    for split, size in sizes.items():
        images, masks = load_images(ade, split), load_masks(ade | {"mask_classes": list("abcde")}, split)
        assert masks.image_ids == images.image_ids
        assert (len(masks), masks.class_names) == (size, list("abcde"))
        for i, path in enumerate(images.image_ids):
            seed = round(np.asarray(images[i]).mean())
            assert path.endswith(f"{seed:03d}.jpg")
            np.testing.assert_array_equal(masks.mask(i), from_one(mask_pixels(seed, 9, 13)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mask_folder": None}, "has no masks. Take data=mosaic"),
        ({"mask_folder": "masks"}, "cannot be read"),
        ({"image_folder": "pictures"}, r"does not lie in data\.image_folder=pictures"),
        ({"mask_classes": None}, r"data\.mask_classes=None must be"),
        ({"mask_classes": "many"}, r"data\.mask_classes=many must be"),
        ({"folders": {"train": "images/train"}}, "There is no folder .*images/train"),
        ({"folders": {"test": "images/validation"}}, "must name the folder of train"),
        ({"path": None}, r"data\.path is missing"),
    ],
)
def test_what_is_missing_is_told(ade, changes, sentence):
    with pytest.raises(DataError, match=sentence):
        load_masks(ade | changes, "train").mask(0)


def test_data_without_masks_is_told():
    with pytest.raises(DataError, match="data=demo has no masks"):
        load_masks({"name": "demo", "source": "demo"}, "train")
