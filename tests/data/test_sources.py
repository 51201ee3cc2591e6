"""The bundled demo, CIFAR-10's parquet files, and what is refused whatever the source."""

import hashlib
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_lightning.data import DataError, data_source, load_images
from sae_lightning.data.bundled import DEMO
from tests.data.making import folder_cfg, png

DEMO_CFG = {"source": "demo"}
FINGERPRINTS = {"train": "9fae27348e39ddc9", "val": "345b380d99872b6d", "test": "a03837cc23cf3398"}


def test_demo_is_balanced_disjoint_and_captioned():
    parts = {split: load_images(DEMO_CFG, split) for split in ("train", "val", "test")}
    assert {s: len(p) for s, p in parts.items()} == {"train": 5000, "val": 1000, "test": 2000}
    digests = []
    for part in parts.values():
        assert set(np.bincount(part.labels)) == {len(part) // 10}
        digests += [hashlib.sha256(np.asarray(part[i]).tobytes()).hexdigest() for i in range(len(part))]
        names = [part.class_names[label] for label in part.labels]
        assert all(name in text for name, text in zip(names, part.captions, strict=True))
        assert part[0].size == (32, 32)
    assert len(set(digests)) == len(digests)
    ids = [i for p in parts.values() for i in p.image_ids]
    assert all(i.startswith("train-") for i in parts["train"].image_ids)
    assert not any(i.startswith("train-") for i in parts["test"].image_ids + parts["val"].image_ids)
    assert len(set(ids)) == len(ids)
    groups = parts["train"].sibling_groups
    assert sorted(name for group in groups.values() for name in group) == sorted(parts["train"].class_names)


@pytest.mark.parametrize("split", FINGERPRINTS)
def test_stores_of_the_demo_stay_valid(split):
    assert load_images(DEMO_CFG, split).fingerprint.startswith(FINGERPRINTS[split])


def test_demo_file_is_the_recorded_one_and_opens_as_a_hugging_face_data_set(tmp_path):
    about = json.loads((DEMO / "demo.json").read_text())
    assert hashlib.sha256((DEMO / "demo.parquet").read_bytes()).hexdigest() == about["sha256"]
    data = datasets.load_dataset(
        "parquet", data_files=str(DEMO / "demo.parquet"), split="train[:3]", cache_dir=str(tmp_path)
    )
    assert data[0]["image"].size == (32, 32)
    assert data.features["label"].names == about["class_names"]


def test_cifar10_parquet_and_what_it_refuses(tmp_path):
    cfg = {"source": "cifar10", "path": str(tmp_path), "val_share": 0.5, "seed": 0}
    with pytest.raises(DataError, match=r"set data\.path"):
        load_images(cfg, "train")
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(20)]
    pq.write_table(pa.table({"image": images, "label": [i % 10 for i in range(20)]}), tmp_path / "train.parquet")
    assert len(load_images(cfg, "train")) + len(load_images(cfg, "val")) == 20
    pq.write_table(pa.table({"image": images}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match="no column"):
        load_images(cfg, "test")
    (tmp_path / "test.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="truncated or not parquet"):
        load_images(cfg, "test")
    with pytest.raises(DataError, match="shares to cut from train"):
        load_images(cfg | {"val_share": 1.0}, "train")


def test_a_source_of_another_package_is_read_by_its_name(monkeypatch):
    monkeypatch.setitem(data_source, "mine", lambda cfg, split: load_images(DEMO_CFG, split))
    assert len(load_images({"source": "mine", "limit": 30}, "val")) == 30


@pytest.mark.parametrize(
    ("cfg", "split", "sentence"),
    [
        (DEMO_CFG, "dev", "Unknown split=dev"),
        ({"source": "webcam"}, "train", r"data\.source=webcam"),
        (folder_cfg("/no/such"), "train", "There is no folder"),
    ],
)
def test_bad_choices_fail_with_a_sentence(cfg, split, sentence):
    with pytest.raises(DataError, match=sentence):
        load_images(cfg, split)
