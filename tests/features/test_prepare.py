"""Whatever goes wrong with one picture on its way to the encoder names it, and leaves the others alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sae_lightning.data import DataError, ImageData
from sae_lightning.features import FeatureStore
from sae_lightning.features.prepare import Pictures, collate
from tests.features.jobs import Noise, PixelEncoder, as_pixels, extract_pixels


def encoded(picture: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


class Mixed(Noise):
    """Noise, but for the pictures in ``other``."""

    def __init__(self, other: dict[int, Image.Image | bytes]) -> None:
        super().__init__()
        self.other = other

    def __call__(self, i: int) -> Image.Image | bytes:
        return self.other.get(i) or super().__call__(i)


def images(other: dict[int, Image.Image | bytes]) -> ImageData:
    return ImageData("mixed", "train", ["a"], [0] * 9, [f"image-{i}" for i in range(9)], Mixed(other))


def cut_avif() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    return encoded(Image.fromarray(noise), "AVIF")[:-200]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (cut_avif(), "cannot be read"),
        (encoded(Image.new("F", (8, 8)), "TIFF")[:-40], "cannot be read .*truncated"),
        (encoded(Image.new("L", (60000, 1)), "PNG"), "has 60000 x 1 pixels; one edge is more than 1000 times"),
        (Image.new("RGB", (5, 4)), r"becomes \[3, 4, 5\] where the encoder takes \[3, 4, 4\]"),
    ],
    ids=["AVIF", "TIFF", "long", "another shape"],
)  # fmt: skip
def test_a_picture_that_cannot_be_encoded_is_named_or_skipped_and_counted(source, sentence, tmp_path):
    with pytest.raises(DataError, match=rf"Image 'image-5' {sentence}.*extract\.unreadable=skip"):
        extract_pixels(tmp_path / "refused", images({5: source}))
    extract_pixels(tmp_path / "s", images({5: source}), unreadable="skip")
    store = FeatureStore.open(tmp_path / "s")
    assert store.image_ids == [f"image-{i}" for i in range(9) if i != 5]
    assert store.manifest.skipped_images == 1


class Choosy(PixelEncoder):
    """Cannot resize pictures that begin with black."""

    @staticmethod
    def transform(picture: Image.Image) -> torch.Tensor:
        if not np.asarray(picture)[0, 0].any():
            raise MemoryError
        return as_pixels(picture)


def test_an_error_in_resizing_is_one_of_the_picture(tmp_path):
    black = {2: Image.new("RGB", (4, 4))}
    with pytest.raises(DataError, match=r"Image 'image-2' cannot be read or resized \(MemoryError"):
        extract_pixels(tmp_path / "s", images(black), Choosy())
    extract_pixels(tmp_path / "s", images(black), Choosy(), unreadable="skip")
    assert FeatureStore.open(tmp_path / "s").manifest.skipped_images == 1


def test_what_workers_see_of_pictures_is_said_once(tmp_path, recwarn):
    deep = {i: Image.fromarray(np.full((4, 4), 4095, np.uint16)) for i in range(9)}
    extract_pixels(tmp_path / "s", images(deep), num_workers=2)
    said = " ".join(str(warning.message) for warning in recwarn)
    assert said.count("Pictures of 16-bit integers (first: 'image-0') are read with 0 as black and 4095 as white") == 1
    loader = DataLoader(Pictures(images(deep), PixelEncoder()), 9, collate_fn=collate)
    assert all(pixels.min() == 255 for pixels, _, _ in loader)
