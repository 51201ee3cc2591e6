"""The configs of other domains load data in the layouts that they describe."""

import datasets
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from sae_lightning.data import SPLITS, DataError, load_images, load_masks
from tests.configs import CONF
from tests.data.making import class_folders, png


def config(name: str, **changes) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONF / "data" / f"{name}.yaml"), resolve=True) | changes


def parts_of(cfg: dict) -> dict:
    return {split: load_images(cfg, split) for split in SPLITS}


@pytest.mark.parametrize(
    ("name", "test", "other"),
    [("dtd", "test", {}), ("cub200", "test", {}), ("imagenette", "validation", {"config": None})],
)
def test_a_local_copy_of_the_hubs_files_will_do(tmp_path, name, test, other):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    for split, count in {"train": 20, test: 8}.items():
        rows = {
            "image": [{"bytes": png(i), "path": None} for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    parts = parts_of(config(name, id=str(tmp_path), **other))
    assert [len(p) for p in parts.values()] == [18, 2, 8]
    assert {p.name for p in parts.values()} == {name}
    assert parts["test"].class_names == ["b", "a"]


@pytest.mark.parametrize(("name", "sizes"), [("dtd", [60, 7, 33]), ("cub200", [45, 5, 50])])
def test_textures_and_birds_by_folders(tmp_path, name, sizes):
    images = class_folders(tmp_path / "images", 100, ("braided", "dotted"))
    parts = parts_of(config(name, source="folder", path=str(images)))
    assert [len(p) for p in parts.values()] == [2 * size for size in sizes]
    halves = tmp_path / "halves"
    for split, count in {"train": 40, "test": 4}.items():
        class_folders(halves / split, count, ("braided", "dotted"))
    parts = parts_of(config(name, source="folder", path=str(halves)))
    assert len(parts["test"]) == 8
    assert len(parts["train"]) + len(parts["val"]) == 80


def test_species_by_the_official_folders(tmp_path):
    with pytest.raises(DataError, match=r"data\.path is missing"):
        load_images(config("inaturalist"), "train")
    species = ("00000_Animalia", "00001_Plantae", "00002_Fungi")
    class_folders(tmp_path / "train_mini", 20, species)
    class_folders(tmp_path / "val", 5, species)
    parts = parts_of(config("inaturalist", path=str(tmp_path)))
    assert [np.bincount(p.labels).tolist() for p in parts.values()] == [[18] * 3, [2] * 3, [5] * 3]
    assert parts["val"].class_names == list(species)
    assert all(i.startswith("val/") for i in parts["test"].image_ids)
    assert all(i.startswith("train_mini/") for i in parts["val"].image_ids + parts["train"].image_ids)


def test_scenes_by_the_official_folders(tmp_path):
    for split, count in {"training": 10, "validation": 3}.items():
        for kind, suffix in (("images", "jpg"), ("annotations", "png")):
            (tmp_path / kind / split).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8), 150 - i, np.uint8)).save(tmp_path / kind / split / f"{i}.{suffix}")
    cfg = config("ade20k", source="folder", path=str(tmp_path))
    assert [len(p) for p in parts_of(cfg).values()] == [9, 1, 3]
    masks = load_masks(cfg, "test")
    assert len(masks.class_names) == 150
    assert sorted(int(masks.mask(i)[0, 0]) for i in range(3)) == [147, 148, 149]


def test_scenes_by_a_local_copy_of_the_hubs_files(tmp_path):
    image = datasets.Image()
    features = datasets.Features({"image": image, "annotation": image, "scene_category": datasets.Value("int64")})
    grey = [{"bytes": png(i), "path": None} for i in range(20)]
    for split, count in {"train": 20, "validation": 6, "test": 4}.items():
        rows = {
            "image": grey[:count],
            "annotation": [
                None if split == "test" else Image.fromarray(np.full((8, 8), i, np.uint8)) for i in range(count)
            ],
            "scene_category": [i % 3 for i in range(count)],
        }
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    cfg = config("ade20k", id=str(tmp_path))
    assert [len(p) for p in parts_of(cfg).values()] == [18, 2, 6]
    masks = load_masks(cfg, "test")
    assert sorted(int(masks.mask(i)[0, 0]) for i in range(6)) == [0, 1, 2, 3, 4, 255]
