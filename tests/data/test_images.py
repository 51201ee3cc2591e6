"""ImageData: decoding to RGB, taking images, workers."""

import io
import multiprocessing
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from sae_lightning.data import DataError, ImageData, Item, decode, load_images
from tests.data.making import class_folders, folder_cfg, hf_cfg, pixels, png, tar_cfg, write_shards


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(source):
    picture = decode(Item(source, "x", 0))
    assert picture.mode == "RGB"
    return np.asarray(picture)


COLOUR = Image.fromarray(pixels(0))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    picture = COLOUR.convert(mode)
    assert (rgb(encoded(picture, kind)) == np.asarray(picture.convert("RGB"))).all()
    assert (rgb(picture) == np.asarray(picture.convert("RGB"))).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    out = rgb(encoded(Image.fromarray(grey)))
    assert np.abs(out.astype(int) - np.round(grey / 257)[..., None]).max() <= 1
    assert out.min() == 0
    assert out.max() == 255


def test_transparent_palettes_do_not_warn():
    picture = COLOUR.convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rgb(encoded(picture, transparency=bytes([0] * 10 + [255] * 246))).shape == (8, 8, 3)


def test_exif_orientation_is_ignored():
    wide = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    assert rgb(encoded(wide, "JPEG", exif=exif)).shape == (4, 8, 3)


@pytest.mark.parametrize("damage", [lambda b: b[:60], lambda b: b"not a picture", lambda b: b"", lambda b: b[:8]])
def test_broken_pictures_are_named(damage):
    with pytest.raises(DataError, match=r"Image 'cat/7\.png'.*(cannot be read|is empty)"):
        decode(Item(damage(encoded(Image.fromarray(pixels(0, 64)))), "cat/7.png", 0))


def test_unreadable_files_are_named(tmp_path):
    images = load_images(folder_cfg(class_folders(tmp_path)), "train")
    (tmp_path / images.image_ids[0]).write_bytes(b"not a picture")
    (tmp_path / images.image_ids[1]).unlink()
    for i in (0, 1):
        with pytest.raises(DataError, match=f"Image '{images.image_ids[i]}' cannot be read"):
            images[i]


def made(n=6, **changes):
    given = {
        "name": "made", "split": "train", "class_names": ["a", "b", "c"], "labels": np.arange(n) % 3,
        "image_ids": [f"i{i}" for i in range(n)], "read": png, "content": lambda i: b"%d" % i,
        "captions": [f"c{i}" for i in range(n)],
    }  # fmt: skip
    return ImageData(**given | changes)


def test_take_follows_with_everything_and_composes():
    images = made()
    taken = images.take([4, 0, 3]).take(np.array([False, True, True]))
    assert taken.image_ids == ["i0", "i3"]
    assert taken.labels.tolist() == [0, 0]
    assert list(taken.captions) == ["c0", "c3"]
    assert (np.asarray(taken[1]) == pixels(3)).all()
    assert taken.item(1) == Item(png(3), "i3", 0, "c3")
    assert len(images) == 6
    assert images.take(slice(2, None)).image_ids == ["i2", "i3", "i4", "i5"]
    assert images.index_of(taken.image_ids).tolist() == [0, 3]


def test_the_fingerprint_of_what_was_taken_is_that_of_the_same_images():
    images = made()
    images.fingerprint  # noqa: B018  # must not be carried along
    assert images.take([0, 1, 2]).fingerprint == made(3).fingerprint
    assert images.take([1, 0, 2]).fingerprint != made(3).fingerprint
    assert images.take(range(6)).fingerprint == images.fingerprint


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: made().take([1, 1]), "taken once"),
        (lambda: made().take([]), "at least one"),
        (lambda: made().index_of(["i0", "i9"]), "no image 'i9'"),
        (lambda: made(labels=[0, 1, 2, 3, 0, 0]), "span 0 to 3, but it names 3 classes"),
        (lambda: made(image_ids=["i"] * 6), "6 labels but 1 different image ids"),
        (lambda: made(0), "has no images"),
    ],
)
def test_what_does_not_fit_together_is_refused(act, sentence):
    with pytest.raises(DataError, match=sentence):
        act()


def test_positions_outside_are_refused():
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"Image {index} of 6"):
            made()[index]


class Arrays(Dataset):
    """The pictures as tensors."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(np.asarray(self.images[index]).copy())


@pytest.fixture
def sources(tmp_path):
    """One small ImageData from each kind of source."""
    folder = class_folders(tmp_path / "folder")
    demo = load_images({"source": "demo"}, "val").take(range(8))
    return {
        "demo": demo,
        "folder": load_images(folder_cfg(folder, shuffle=True), "train"),
        "hf": load_images(hf_cfg(folder, shuffle=True), "train"),
        "webdataset": load_images(tar_cfg(write_shards(tmp_path / "tars")), "train"),
    }


def test_sources_can_be_pickled(sources):
    for images in sources.values():
        images[0]  # opens what is opened lazily
        copied = pickle.loads(pickle.dumps(images))
        assert copied.fingerprint == images.fingerprint
        assert (np.asarray(copied[3]) == np.asarray(images[3])).all()
        assert (list(copied.captions) if copied.captions else None) == (
            list(images.captions) if images.captions else None
        )


def test_threads_read_the_same_pictures(sources):
    for images in sources.values():
        expected = [np.asarray(images[i]) for i in range(len(images))]
        order = list(range(len(images))) * 20
        with ThreadPoolExecutor(8) as pool:
            pictures = list(pool.map(lambda i: np.asarray(decode(images.item(i))), order))  # noqa: B023
        assert all((picture == expected[i]).all() for picture, i in zip(pictures, order, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_read_the_same_pictures_from_every_source(sources, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    together = ConcatDataset([Arrays(images) for images in sources.values()])
    expected = [together[i] for i in range(len(together))]
    context = multiprocessing.get_context(method)
    loader = DataLoader(together, batch_size=None, num_workers=2, multiprocessing_context=context)
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))
