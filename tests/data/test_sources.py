"""Image sources: the bundled demo, folders, parquet files, and what is refused."""

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sae_lightning.data import DataError, load_images
from sae_lightning.data.captions import background_colour, caption, tone, vocabulary
from sae_lightning.data.images import split_indices
from sae_lightning.data.parquet import DEMO

DEMO_CFG = {"source": "demo"}
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def png(seed: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


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


def test_demo_file_is_the_recorded_one_and_opens_as_a_hugging_face_data_set(tmp_path):
    import json

    import datasets

    about = json.loads((DEMO / "demo.json").read_text())
    assert hashlib.sha256((DEMO / "demo.parquet").read_bytes()).hexdigest() == about["sha256"]
    data = datasets.load_dataset(
        "parquet", data_files=str(DEMO / "demo.parquet"), split="train[:3]", cache_dir=str(tmp_path)
    )
    assert data[0]["image"].size == (32, 32)
    assert data.features["label"].names == about["class_names"]


def test_a_plain_folder_is_split_by_class_and_seed(tmp_path):
    for c in ("cat", "dog"):
        (tmp_path / c).mkdir()
        for i in range(10):
            (tmp_path / c / f"{i}.png").write_bytes(png(i))
    cfg = {"source": "folder", "name": "mine", "path": str(tmp_path), "shares": SHARES, "seed": 1}
    parts = {s: load_images(cfg, s) for s in SHARES}
    assert [len(p) for p in parts.values()] == [12, 4, 4]
    assert all(p.labels.sum() * 2 == len(p) for p in parts.values())
    everything = sorted(i for p in parts.values() for i in p.image_ids)
    assert everything == sorted(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(10))
    assert load_images(cfg, "val").image_ids == parts["val"].image_ids
    assert load_images(cfg | {"seed": 2}, "train").image_ids != parts["train"].image_ids


def test_fingerprint_follows_content(tmp_path):
    (tmp_path / "c").mkdir()
    for i in range(10):
        (tmp_path / "c" / f"{i}.png").write_bytes(png(i))
    cfg = {"source": "folder", "name": "mine", "path": str(tmp_path), "shares": SHARES, "seed": 1}
    before = load_images(cfg, "train").fingerprint
    assert load_images(cfg, "train").fingerprint == before
    for i in range(10):
        (tmp_path / "c" / f"{i}.png").write_bytes(png(i + 50, size=9))
    assert load_images(cfg, "train").fingerprint != before


def test_imagenet_layout_names_classes_and_holds_out_val(tmp_path):
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            (tmp_path / split / wnid).mkdir(parents=True)
            for i in range(10):
                (tmp_path / split / wnid / f"{split}{i}.JPEG").write_bytes(png(i))
    cfg = {"source": "imagenet", "path": str(tmp_path), "val_share": 0.2, "seed": 0}
    train, val, test = (load_images(cfg, s) for s in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (16, 4, 20)
    assert not set(train.image_ids) & set(val.image_ids)
    assert all(i.startswith("val/n") for i in test.image_ids)
    assert "goldfish" in " ".join(train.class_names)


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


def test_hub_data_sets_load_from_a_local_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "data" / label / f"{i}.png").write_bytes(png(i))
    cfg = {
        "source": "hub", "name": "local", "id": str(tmp_path / "data"), "config": None, "image_column": "image",
        "label_column": "label", "splits": {"train": "train", "val": None, "test": None}, "held_out": 0.2, "seed": 0,
    }  # fmt: skip
    parts = {s: load_images(cfg, s) for s in ("train", "val", "test")}
    assert [len(p) for p in parts.values()] == [12, 4, 4]
    assert parts["train"].class_names == ["a", "b"]
    assert parts["train"][0].size == (8, 8)
    with pytest.raises(DataError, match="no column 'picture'"):
        load_images(cfg | {"image_column": "picture"}, "train")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_images(cfg | {"id": str(tmp_path / "nowhere")}, "train")


@pytest.mark.parametrize(
    ("cfg", "split", "sentence"),
    [
        (DEMO_CFG, "dev", "Unknown split 'dev'"),
        ({"source": "webcam"}, "train", r"data\.source=webcam"),
        ({"source": "folder", "name": "x", "path": "/no/such", "shares": SHARES, "seed": 0}, "train", "no folder"),
    ],
)
def test_bad_choices_fail_with_a_sentence(cfg, split, sentence):
    with pytest.raises(DataError, match=sentence):
        load_images(cfg, split)


def test_empty_folders_and_unreadable_pictures_are_named(tmp_path):
    (tmp_path / "c").mkdir()
    cfg = {"source": "folder", "name": "x", "path": str(tmp_path), "shares": SHARES, "seed": 0}
    with pytest.raises(DataError, match="No images"):
        load_images(cfg, "train")
    for i in range(5):
        (tmp_path / "c" / f"{i}.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"Image 'c/\d\.png'.*cannot be read"):
        load_images(cfg, "train")[0]


def test_stratified_parts_are_disjoint_and_complete():
    labels = np.array([0] * 10 + [1] * 30 + [2] * 5)
    parts = split_indices(labels, SHARES, 3)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(45))
    assert np.bincount(labels[parts["train"]]).tolist() == [6, 18, 3]


def flat(colour):
    return np.tile(np.array(colour, np.uint8), (20, 20, 1))


@pytest.mark.parametrize(
    ("colour", "word"),
    [((30, 60, 200), "blue"), ((40, 160, 50), "green"), ((128, 128, 128), "grey"), ((110, 80, 50), "brown")],
)
def test_captions_read_colour_and_light_off_the_picture(colour, word):
    assert background_colour(flat(colour)) == word
    assert tone(flat((10, 10, 10))) == "dark"
    assert tone(flat((250, 250, 250))) == "bright"
    known = set(vocabulary(["airplane", "dog"]))
    for seed in range(20):
        text = caption(flat(colour), "airplane", np.random.default_rng(seed))
        assert "an airplane" in text
        assert set(text.replace(",", " ").split()) <= known
