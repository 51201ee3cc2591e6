"""Hugging Face data sets with random access, from every kind of local path."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_lightning.data import DataError, load_images
from sae_lightning.data.columns import Columns, find_columns
from tests.data.making import class_folders, hf_cfg, pixels, png, write_pictures

SPLITS = ("train", "val", "test")
IMAGE, TEXT, NUMBER = datasets.Image(), datasets.Value("string"), datasets.Value("int64")
LABEL = datasets.ClassLabel(names=["cat", "dog"])


def made(n=10, **columns):
    """A Dataset with pictures of the seeds 0 … n-1, and the given columns as (feature, values)."""
    held = {"image": (IMAGE, [{"bytes": png(i), "path": None} for i in range(n)])} | columns
    return datasets.Dataset.from_dict(
        {name: values for name, (_, values) in held.items()},
        datasets.Features({name: kind for name, (kind, _) in held.items()}),
    )


def labelled(n=10, **columns):
    return made(n, label=(LABEL, [i % 2 for i in range(n)]), **columns)


def parts_of(cfg):
    return {split: load_images(cfg, split) for split in SPLITS}


def check(images, seeds):
    for i, seed in enumerate(seeds):
        assert (np.asarray(images[i]) == pixels(seed)).all()


def test_a_folder_of_parquet_files_with_its_own_splits(tmp_path, caplog):
    labelled(20).to_parquet(tmp_path / "train.parquet")
    labelled(6).to_parquet(tmp_path / "validation.parquet")
    (tmp_path / "README.md").write_text("Not the hub's card.")
    parts = parts_of(hf_cfg(tmp_path))
    assert not caplog.records
    assert [len(p) for p in parts.values()] == [16, 6, 4]  # test is cut from train
    assert np.bincount(parts["test"].labels).tolist() == [2, 2]
    assert parts["val"].image_ids[:2] == ["validation-00000000", "validation-00000001"]
    assert parts["val"].class_names == ["cat", "dog"]
    check(parts["val"], range(6))
    rows = [int(i.split("-")[1]) for i in parts["train"].image_ids]
    check(parts["train"], rows)
    assert parts["train"].name == tmp_path.name
    held = {i for s in ("train", "test") for i in parts[s].image_ids}
    assert held == {f"train-{i:08d}" for i in range(20)}


def test_one_parquet_file_and_a_saved_data_set_and_a_folder_of_pictures(tmp_path):
    labelled(20).to_parquet(tmp_path / "some.parquet")
    labelled(20).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=labelled(20), test=labelled(4)).save_to_disk(tmp_path / "several")
    class_folders(tmp_path / "pictures")
    for name, sizes in {
        "some.parquet": (12, 4, 4), "one": (12, 4, 4), "several": (16, 4, 4), "pictures": (12, 4, 4),
    }.items():  # fmt: skip
        parts = parts_of(hf_cfg(tmp_path / name))
        assert tuple(len(p) for p in parts.values()) == sizes
        assert parts["test"].class_names == ["cat", "dog"]
        if name == "pictures":
            continue
        check(parts["val"], [int(i.split("-")[1]) for i in parts["val"].image_ids])


def test_captions_and_labels_without_declared_classes(tmp_path):
    texts = (TEXT, [f"number {i}" for i in range(20)])
    labels = (NUMBER, [(2, 10, 30)[i % 3] for i in range(20)])
    made(20, category=labels, caption=texts).to_parquet(tmp_path / "train.parquet")
    made(2, category=(NUMBER, [30, 7]), caption=(TEXT, ["x", None])).to_parquet(tmp_path / "test.parquet")
    parts = parts_of(hf_cfg(tmp_path, shuffle=True))
    assert all(p.class_names == ["2", "7", "10", "30"] for p in parts.values())
    assert sorted(parts["test"].labels) == [1, 3]
    train = parts["train"]
    assert list(train.captions) == [f"number {int(i.split('-')[1])}" for i in train.image_ids]
    assert set(parts["test"].captions) == {"x", ""}


def test_pictures_that_nobody_declared_and_no_labels(tmp_path):
    pq.write_table(pa.table({"png": [png(i) for i in range(10)], "width": [8] * 10}), tmp_path / "train.parquet")
    parts = parts_of(hf_cfg(tmp_path))
    assert [len(p) for p in parts.values()] == [6, 2, 2]
    assert parts["train"].class_names == ["unlabelled"]
    check(parts["val"], [int(i.split("-")[1]) for i in parts["val"].image_ids])


def test_empty_cells_are_named_when_they_are_read(tmp_path):
    made(5).to_parquet(tmp_path / "train.parquet")
    table = pq.read_table(tmp_path / "train.parquet")
    column = pa.array([*table["image"].to_pylist()[:-1], None], table["image"].type)
    pq.write_table(table.set_column(0, table.schema.field("image"), column), tmp_path / "train.parquet")
    images = load_images(hf_cfg(tmp_path, held_out=0.0), "train")
    check(images, range(4))
    with pytest.raises(DataError, match="Image 'train-00000004' is empty"):
        images[4]


def test_a_split_without_labels_is_told_and_can_be_cut_instead(tmp_path):
    labelled(20).to_parquet(tmp_path / "train.parquet")
    made(4, label=(LABEL, [-1] * 4)).to_parquet(tmp_path / "test.parquet")
    cfg = hf_cfg(tmp_path)
    assert len(load_images(cfg, "train")) == 16
    with pytest.raises(DataError, match=r"split 'test' .* have no label.*data\.splits"):
        load_images(cfg, "test")
    cut = parts_of(cfg | {"splits": {"train": "train", "val": None, "test": "train"}})
    assert [len(p) for p in cut.values()] == [12, 4, 4]


PRINT = """
import sys, json
from sae_lightning.data import load_images
print("is", load_images(json.loads(sys.argv[1]), "train").fingerprint)
"""


@pytest.mark.slow
def test_fingerprints_hold_in_other_processes_and_caches_and_follow_the_files(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    labelled(20).to_parquet(root / "train.parquet")
    cfg = hf_cfg(root)
    first = load_images(cfg, "train").fingerprint
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "another")}
    other = subprocess.run(
        [sys.executable, "-c", PRINT, json.dumps(cfg)], env=environment, capture_output=True, text=True, check=True
    )
    assert f"is {first}" in other.stdout
    changes = [{"seed": 1}, {"image_column": "image"}, {"held_out": 0.1}, {"streaming": True}, {"shuffle": True}]
    prints = [load_images(cfg | change, "train").fingerprint for change in changes]
    assert [p == first for p in prints] == [False, True, False, False, False]
    stamp = (root / "train.parquet").stat()
    labelled(20, extra=(NUMBER, list(range(20)))).to_parquet(root / "train.parquet")
    assert load_images(cfg, "train").fingerprint != first
    labelled(20).to_parquet(root / "train.parquet")
    os.utime(root / "train.parquet", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load_images(cfg, "train").fingerprint == first
    (tmp_path / "moved").mkdir()
    assert load_images(hf_cfg(root.rename(tmp_path / "moved" / "data")), "train").fingerprint == first


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_on_the_hub_are_known_by_their_commit(tmp_path, monkeypatch, streaming):
    labelled(20).to_parquet(tmp_path / "train.parquet")
    real, asked = datasets.load_dataset_builder, []

    def hub(path, name=None, revision=None):
        asked.append((path, name, revision))
        builder = real(str(tmp_path))
        builder.hash = f"commit of {revision}"
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", hub)
    cfg = hf_cfg("someone/birds", streaming=streaming)
    images = load_images(cfg, "train")
    assert asked == [("someone/birds", None, None)]
    assert images.name == "someone/birds"
    assert load_images(cfg, "train").fingerprint == images.fingerprint
    os.utime(tmp_path / "train.parquet", ns=(1, 1))
    assert load_images(cfg, "train").fingerprint == images.fingerprint
    assert load_images(cfg | {"revision": "v2"}, "train").fingerprint != images.fingerprint
    assert asked[-1] == ("someone/birds", None, "v2")


@pytest.mark.parametrize(
    ("features", "given", "expected"),
    [
        ({"img": IMAGE, "fine": LABEL}, {}, ("img", "fine", None)),
        ({"image": IMAGE, "mask": IMAGE, "label": NUMBER, "id": NUMBER}, {}, ("image", "label", None)),
        ({"a": IMAGE, "b": IMAGE, "url": TEXT}, {"image_column": "b"}, ("b", None, None)),
        ({"image": IMAGE, "x": LABEL, "y": LABEL}, {"label_column": "y"}, ("image", "y", None)),
        ({"image": IMAGE, "label": LABEL, "group": LABEL}, {}, ("image", "label", None)),
        ({"jpg": IMAGE, "cls": NUMBER, "txt": TEXT}, {}, ("jpg", "cls", "txt")),
        ({"image": {"bytes": datasets.Value("binary"), "path": TEXT}}, {}, ("image", None, None)),
        ({"image": IMAGE, "captions": datasets.List(TEXT)}, {}, ("image", None, "captions")),
        ({"image": IMAGE, "who": TEXT}, {"label_column": "who", "caption_column": "who"}, ("image", "who", "who")),
    ],
)
def test_columns_are_found_by_type_and_name(features, given, expected):
    assert find_columns(datasets.Features(features), given, "x") == Columns(*expected)


@pytest.mark.parametrize(
    ("features", "given", "sentence"),
    [
        ({"a": IMAGE, "b": IMAGE}, {}, r"several columns .*\['a', 'b'\].*data\.image_column"),
        ({"image": IMAGE, "fine": LABEL, "coarse": LABEL}, {}, r"\['fine', 'coarse'\].*data\.label_column"),
        ({"image": IMAGE, "text": TEXT, "caption": TEXT}, {}, r"\['text', 'caption'\].*data\.caption_column"),
        ({"label": LABEL}, {}, r"no column of pictures; it has \['label'\]"),
        ({"image": IMAGE}, {"label_column": "kind"}, r"no column 'kind'; it has \['image'\]"),
        ({"image": IMAGE, "tags": datasets.List(TEXT)}, {"label_column": "tags"}, "whole numbers or texts"),
    ],
)
def test_columns_that_are_missing_or_ambiguous_are_listed(features, given, sentence):
    with pytest.raises(DataError, match=sentence):
        find_columns(datasets.Features(features), given, "x")


@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_loaded_is_told(tmp_path, streaming):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    labelled(10).to_parquet(tmp_path / "good.parquet")
    for name, sentence, changes in (
        ("nowhere", "cannot be loaded", {}),
        ("x.csv", "is no parquet file", {}),
        ("bad.parquet", "is no whole parquet file", {}),
        ("good.parquet", "no split 'dev'", {"splits": {"train": "train", "val": "dev", "test": None}}),
        ("good.parquet", "held_out|less than 1", {"held_out": 0.5}),
    ):
        with pytest.raises(DataError, match=sentence):
            load_images(hf_cfg(tmp_path / name, streaming=streaming, **changes), "train")


def test_flat_local_folders_of_pictures_have_one_class(tmp_path):
    images = load_images(hf_cfg(write_pictures(tmp_path, *(f"{i}.png" for i in range(10)))), "train")
    assert images.class_names == ["unlabelled"]
    assert images[0].size == (8, 8)
