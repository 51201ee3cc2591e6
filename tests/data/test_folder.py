"""Pictures in folders as users have them."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sae_lightning.data import DataError, contents, load_images
from sae_lightning.data.errors import DataWarning
from tests.data.making import SHARES, class_folders, folder_cfg, pixels, png, write_pictures


def parts_of(cfg):
    return {split: load_images(cfg, split) for split in SHARES}


def all_ids(parts):
    return sorted(i for part in parts.values() for i in part.image_ids)


def test_a_plain_folder_is_split_by_class_and_seed(tmp_path):
    cfg = folder_cfg(class_folders(tmp_path))
    parts = parts_of(cfg)
    assert [len(p) for p in parts.values()] == [12, 4, 4]
    assert all(p.labels.sum() * 2 == len(p) for p in parts.values())
    assert all_ids(parts) == sorted(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(10))
    assert load_images(cfg, "val").image_ids == parts["val"].image_ids
    assert load_images(cfg | {"seed": 2}, "train").image_ids != parts["train"].image_ids
    place = {f"{c}/{i}.png": 10 * k + i for k, c in enumerate(("cat", "dog")) for i in range(10)}
    train = parts["train"]
    for i, image_id in enumerate(train.image_ids):
        assert (np.asarray(train[i]) == pixels(place[image_id])).all()
        assert train.class_names[train.labels[i]] == image_id.split("/")[0]


def test_folders_of_splits_are_taken_as_they_are_with_the_same_classes(tmp_path):
    root = write_pictures(
        tmp_path, "train/b/0.png", "train/c/1.png", "train/c/2.png", "validation/c/3.png", "test/a/4.png"
    )
    parts = parts_of(folder_cfg(root))
    assert parts["val"].image_ids == ["validation/c/3.png"]
    assert all(part.class_names == ["a", "b", "c"] for part in parts.values())
    assert [p.labels.tolist() for p in parts.values()] == [[1, 2, 2], [2], [0]]


@pytest.mark.parametrize("given", [("train", "val"), ("train", "test"), ("train",)])
def test_missing_splits_are_cut_from_train(tmp_path, given):
    root = write_pictures(tmp_path, *(f"{s}/{c}/{i}.png" for s in given for c in "ab" for i in range(10)))
    parts = parts_of(folder_cfg(root))
    assert all_ids(parts) == sorted(f"{s}/{c}/{i}.png" for s in given for c in "ab" for i in range(10))
    missing = [s for s in ("val", "test") if s not in given]
    assert len(parts["train"]) == 20 - 4 * len(missing)
    for split in ("val", "test"):
        assert np.bincount(parts[split].labels).tolist() == ([2, 2] if split in missing else [10, 10])


def test_pictures_without_class_folders_are_one_class(tmp_path):
    flat = write_pictures(tmp_path / "flat", *(f"{i}.png" for i in range(10)))
    (flat / "notes").mkdir()
    parts = parts_of(folder_cfg(flat))
    assert [len(p) for p in parts.values()] == [6, 2, 2]
    assert parts["train"].class_names == ["unlabelled"]
    split = write_pictures(tmp_path / "split", *(f"{s}/{i}.png" for s in ("train", "test") for i in range(5)))
    parts = parts_of(folder_cfg(split))
    assert [len(p) for p in parts.values()] == [4, 1, 5]
    mixed = write_pictures(tmp_path / "mixed", "train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "test/0.png")
    assert load_images(folder_cfg(mixed), "test").class_names == ["cat", "dog", "unlabelled"]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("Train", "Val"), [16, 20, 4]),
        (("training", "testing"), [16, 4, 20]),
        (("TRAIN", "VALID", "TEST"), [20, 20, 20]),
        (("train_images", "test-images", "notes"), [16, 4, 20]),
        (("train2017", "val2017"), [16, 20, 4]),
        (("01_train", "02_test1", "02_test2"), [12, 4, 4]),  # which of two is not clear
        (("seg_train", "seg_test"), [16, 4, 20]),
    ],
)
def test_less_usual_names_of_splits_are_taken_and_said(tmp_path, folders, expected):
    root = write_pictures(tmp_path, *(f"{s}/{c}/{i}.png" for s in folders for c in "ab" for i in range(10)))
    with pytest.warns(DataWarning, match=rf"'{folders[0]}' of .* is taken for its train split.*data\.folders"):
        parts = parts_of(folder_cfg(root))
    assert [len(p) for p in parts.values()] == expected
    assert all(p.class_names == ["a", "b"] for p in parts.values())


def test_folders_beside_those_of_splits_and_classes_that_train_lacks_are_said(tmp_path):
    root = write_pictures(tmp_path, "train/a/0.png", "train/b/1.png", "val/a/2.png", "test/c/3.png", "more/4.png")
    (root / "notes").mkdir()
    with pytest.warns(DataWarning) as said:
        assert load_images(folder_cfg(root), "test").class_names == ["a", "b", "c"]
    sentences = " ".join(str(w.message) for w in said)
    assert "its pictures in more are passed over." in sentences
    assert "train lacks 1: c." in sentences


def test_a_name_typed_in_two_ways_is_one_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = write_pictures(tmp_path, f"train/{composed}/0.png", "train/tea/1.png", f"val/{decomposed}/2.png",
                          f"test/{composed}/3.png", f"test/{decomposed}/4.png")  # fmt: skip
    parts = parts_of(folder_cfg(root))
    assert all(p.class_names == [composed, "tea"] for p in parts.values())
    assert [p.labels.tolist() for p in parts.values()] == [[0, 1], [0], [0, 0]]
    assert set(parts["test"].image_ids) == {f"test/{composed}/3.png", f"test/{decomposed}/4.png"}


def test_litter_and_empty_folders_are_no_classes_and_other_files_are_counted(tmp_path):
    root = class_folders(tmp_path, 5)
    write_pictures(
        root, "__MACOSX/cat/._0.png", "@eaDir/0.png", "cat/@eaDir/0.png/THUMB.jpg", "cat/._0.jpg", ".x/0.png"
    )
    (root / "empty" / "below").mkdir(parents=True)
    for name in ("cat/Thumbs.db", ".DS_Store", "cat/.DS_Store", "cat/1.HEIC", "dog/2.heic", "dog/3", "dog/0.jpg~",
                 "dog/notes.txt", "raw/4.CR2"):  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    with pytest.warns(
        DataWarning, match=r"in .*, 6 are left out.*: 2 \.heic, 1 without a suffix, 1 \.cr2, 1 \.jpg~, 1 \.txt"
    ):
        parts = parts_of(folder_cfg(root))
    assert parts["train"].class_names == ["cat", "dog"]
    assert all_ids(parts) == sorted(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(5))
    only = write_pictures(tmp_path / "only", "a/0.heic", "b/1.heic")
    with pytest.raises(DataError, match=r"No images lie in .*only/? \(there are 2 \.heic\)"):
        load_images(folder_cfg(only), "train")


def test_small_classes_have_an_image_in_each_split(tmp_path):
    root = class_folders(tmp_path, 4, ("a", "b", "c"))
    with pytest.warns(DataWarning, match="train 6, val 3, test 3"):
        parts = parts_of(folder_cfg(root, shares={"train": 0.8, "val": 0.1, "test": 0.1}))
    assert [np.bincount(p.labels).tolist() for p in parts.values()] == [[2] * 3, [1] * 3, [1] * 3]


@pytest.mark.parametrize(
    "classes", [("bus", "train"), ("test_tube", "train_station"), ("train", "training"), ("val_x",)]
)
def test_a_class_may_be_called_train(tmp_path, classes):
    root = write_pictures(tmp_path, *(f"{c}/{i}.png" for c in classes for i in range(5)))
    assert load_images(folder_cfg(root), "train").class_names == list(classes)


def test_nesting_odd_suffixes_links_and_hidden_files(tmp_path):
    root = write_pictures(
        tmp_path / "root", "cat/a/b/0.PNG", "cat/.hidden.png", "cat/.cache/1.png", "dog/2.Jpeg", ".trash/3.png"
    )
    (root / "dog" / "readme.md").write_text("no picture")
    write_pictures(tmp_path / "elsewhere", "4.png")
    (root / "emu").symlink_to(tmp_path / "elsewhere")
    (root / "dog" / "5.png").symlink_to(tmp_path / "elsewhere" / "4.png")
    (root / "dog" / "again").symlink_to(root)  # a loop
    cfg = folder_cfg(root, shares={"train": 1.0, "val": 0.0, "test": 0.0})
    assert Counter(load_images(cfg, "train").image_ids) == Counter(
        ["cat/a/b/0.PNG", "dog/2.Jpeg", "dog/5.png", "emu/4.png"]
    )


def test_texts_beside_all_pictures_are_captions(tmp_path):
    root = class_folders(tmp_path)
    for picture in root.rglob("*.png"):
        picture.with_suffix(".txt").write_text(f"number {picture.stem}\n")
    images = load_images(folder_cfg(root, shuffle=True), "train")
    assert list(images.captions) == [f"number {i.split('/')[1][:-4]}" for i in images.image_ids]
    assert images.item(3).caption == images.captions[3]
    assert list(images.captions[1:3]) == [images.captions[1], images.captions[2]]
    (root / "cat" / "0.txt").unlink()
    assert load_images(folder_cfg(root), "train").captions is None


def test_the_fingerprint_follows_content_names_labels_and_order(tmp_path):
    root = class_folders(tmp_path)
    cfg = folder_cfg(root)
    seen = [load_images(cfg, "train").fingerprint]
    assert load_images(cfg, "train").fingerprint == seen[0]
    for path in root.rglob("*.png"):
        path.write_bytes(png(50, size=9))
    seen.append(load_images(cfg, "train").fingerprint)
    seen.append(load_images(cfg | {"shuffle": True}, "train").fingerprint)
    seen.append(load_images(cfg | {"limit": 8}, "train").fingerprint)
    (root / "dog").rename(root / "wolf")
    seen.append(load_images(cfg, "train").fingerprint)
    assert len(set(seen)) == len(seen)


def test_the_same_pictures_elsewhere_under_another_name_or_date_have_the_same_fingerprint(tmp_path):
    root = class_folders(tmp_path / "first")
    first = load_images(folder_cfg(root), "train").fingerprint
    os.utime(root / load_images(folder_cfg(root), "train").image_ids[0], ns=(1, 1))
    assert load_images(folder_cfg(root), "train").fingerprint == first
    copied = Path(shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile))
    assert load_images(folder_cfg(copied, name="theirs"), "train").fingerprint == first
    assert load_images(folder_cfg(root.rename(tmp_path / "moved")), "train").fingerprint == first


def test_a_picture_replaced_by_one_of_the_same_size_and_date_is_another(tmp_path):
    root = class_folders(tmp_path)
    first = load_images(folder_cfg(root), "train")
    before, path = first.fingerprint, root / first.image_ids[0]
    was = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert load_images(folder_cfg(root), "train").fingerprint != before


def test_pictures_are_read_once_for_their_fingerprint(tmp_path, monkeypatch, caches):
    root = class_folders(tmp_path)
    first = load_images(folder_cfg(root), "train").fingerprint
    read = []
    digest = contents._digest
    monkeypatch.setattr(contents, "_digest", lambda path: read.append(path.name) or digest(path))
    assert load_images(folder_cfg(root), "train").fingerprint == first
    assert read == []
    (root / "cat" / "new.png").write_bytes(png(7))
    assert len({load_images(folder_cfg(root), split).fingerprint for split in SHARES}) == 3
    assert len(read) == 21 - 12  # those of train were known
    for file in (caches / "own" / "contents").iterdir():
        file.write_bytes(b"broken")
    (root / "cat" / "new.png").unlink()
    assert load_images(folder_cfg(root), "train").fingerprint == first


def test_a_shuffled_split_is_the_same_images_in_a_seeded_order(tmp_path):
    cfg = folder_cfg(class_folders(tmp_path, per_class=50))
    ordered, shuffled, again, other = (
        load_images(cfg | extra, "train")
        for extra in ({}, {"shuffle": True}, {"shuffle": True}, {"shuffle": True, "seed": 7})
    )
    assert ordered.labels.tolist() == sorted(ordered.labels)
    assert sorted(shuffled.image_ids) == sorted(ordered.image_ids)
    assert shuffled.image_ids == again.image_ids != other.image_ids
    assert 5 < shuffled.labels[:30].sum() < 25
    assert all(
        i.startswith("cat") == (label == 0) for i, label in zip(shuffled.image_ids, shuffled.labels, strict=True)
    )


def test_a_limit_takes_a_share_of_every_class(tmp_path):
    images = load_images(folder_cfg(class_folders(tmp_path, per_class=50), limit=10, shuffle=True), "train")
    assert np.bincount(images.labels).tolist() == [5, 5]
    for limit in (0, 2.5):
        with pytest.raises(DataError, match=r"data\.limit"):
            load_images(folder_cfg(tmp_path, limit=limit), "train")


def test_imagenet_layout_names_classes_and_holds_out_val(tmp_path):
    wnids = ("n01440764", "n01443537")
    write_pictures(tmp_path, *(f"{s}/{w}/{s}{i}.JPEG" for s in ("train", "val") for w in wnids for i in range(10)))
    cfg = {"source": "imagenet", "path": str(tmp_path), "val_share": 0.2, "seed": 0, "shuffle": True}
    train, val, test = (load_images(cfg, s) for s in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (16, 4, 20)
    assert not set(train.image_ids) & set(val.image_ids)
    assert all(i.startswith("val/n") for i in test.image_ids)
    assert "goldfish" in " ".join(train.class_names)


def test_classes_named_by_wnid_read_as_words_under_the_same_fingerprint(tmp_path, monkeypatch):
    wnids = ("cats", "n01440764")
    write_pictures(tmp_path, *(f"{s}/{w}/{i}.png" for s in ("train", "val") for w in wnids for i in "ab"))
    found = load_images(folder_cfg(tmp_path), "train")
    assert found.class_names == ["cats", "tench"]
    monkeypatch.setattr("sae_lightning.data.images.in_words", list)
    plain = load_images(folder_cfg(tmp_path), "train")
    assert plain.class_names == list(wnids)
    assert found.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        (["train/tench/0.png", "val/tench/0.png"], "tench is not named by a wnid.*data=folder"),
        (["train/n01440764/0.png", "val/0.png"], "without class folders"),
        (["train/n01440764/0.png"], "There is no folder .*val"),
        (["train/n01440764/0.png", "val/n01443537/0.png"], "n01443537 that .*train lacks"),
    ],
)
def test_what_is_not_imagenet_is_told_apart(tmp_path, paths, sentence):
    cfg = {"source": "imagenet", "path": str(write_pictures(tmp_path, *paths)), "val_share": 0.2, "seed": 0}
    with pytest.raises(DataError, match=sentence):
        load_images(cfg, "test")


@pytest.mark.parametrize(
    ("paths", "changes", "sentence"),
    [
        ([], {}, "No images"),
        (["0.png", "cat/1.png"], {}, r"itself \(0\.png\) and in folders below it \(cat/1\.png\)"),
        (["val/cat/0.png", "test/cat/0.png"], {}, "test and val but no train"),
        (["cat/0.png"], {"shares": {"train": 0.8, "val": 0.1, "test": 0.2}}, "add up to 1"),
        (["cat/0.png"], {"shares": {"train": 0.8}}, "must give train, val and test"),
    ],
)
def test_folders_that_cannot_be_understood_are_refused(tmp_path, paths, changes, sentence):
    with pytest.raises(DataError, match=sentence):
        load_images(folder_cfg(write_pictures(tmp_path, *paths), **changes), "train")


def test_a_link_to_nothing_is_named(tmp_path):
    (class_folders(tmp_path) / "cat" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"lost\.png cannot be read"):
        load_images(folder_cfg(tmp_path), "train")


@pytest.mark.parametrize("place", ["", "cat"])
def test_a_link_that_leads_to_itself_is_named(place, tmp_path):
    loop = class_folders(tmp_path) / place / "loop"
    loop.symlink_to("loop")
    with pytest.raises(DataError, match=rf"{loop} cannot be read \(Too many levels of symbolic links\)"):
        load_images(folder_cfg(tmp_path), "train")
