"""Tar shards: samples, labels, splits, the index and its cache."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sae_lightning.data import DataError, load_images
from sae_lightning.data import tar_index as index_module
from sae_lightning.data.errors import DataWarning
from sae_lightning.data.tar_index import split_name
from sae_lightning.features.source import plain
from tests.data.making import NO_SPLITS, hf_cfg, pixels, png, tar_cfg, write_shards, write_tar
from tests.features.jobs import made

SPLITS = ("train", "val", "test")


def parts_of(cfg):
    return {split: load_images(cfg, split) for split in SPLITS}


def whole(path, **changes):
    """All images of the tars: nothing is cut."""
    return load_images(tar_cfg(path, held_out=0.0, **changes), "train")


def test_pictures_labels_captions_and_splits(tmp_path):
    parts = parts_of(tar_cfg(write_shards(tmp_path)))
    assert [len(p) for p in parts.values()] == [12, 6, 6]
    for part in parts.values():
        assert part.class_names == ["0", "1"]
        assert np.bincount(part.labels).tolist() == [len(part) // 2] * 2
        for i, image_id in enumerate(part.image_ids):
            shard, key = image_id.split("/")
            seed = 8 * int(shard[-3:]) + int(key)
            assert (np.asarray(part[i]) == pixels(seed)).all()
            assert part.captions[i] == f"picture {seed}"
            assert part.labels[i] == seed % 2
    everything = [i for part in parts.values() for i in part.image_ids]
    assert len(set(everything)) == 24
    assert parts["train"].image_ids == sorted(parts["train"].image_ids)


def test_splits_by_pattern_by_folder_and_by_what_is_left(tmp_path):
    write_shards(tmp_path / "flat")
    cfg = tar_cfg(tmp_path / "flat", splits=NO_SPLITS | {"val": "shard-001.tar"}, held_out=0.5)
    parts = parts_of(cfg)
    assert {i.split("/")[0] for i in parts["val"].image_ids} == {"shard-001"}
    assert {i.split("/")[0] for s in ("train", "test") for i in parts[s].image_ids} == {"shard-000", "shard-002"}
    assert [len(p) for p in parts.values()] == [8, 8, 8]
    named = parts_of(
        tar_cfg(tmp_path / "flat", splits=dict(zip(SPLITS, ("*0.tar", "*{1..1}.tar", "*2.tar"), strict=True)))
    )
    assert [len(p) for p in named.values()] == [8, 8, 8]
    for split, shards in (("train", 2), ("validation", 1)):
        write_shards(tmp_path / "nested" / split, shards)
    nested = parts_of(tar_cfg(tmp_path / "nested"))
    assert [len(p) for p in nested.values()] == [12, 8, 4]
    assert nested["val"].image_ids[0] == "validation/shard-000/00000"


def test_a_pattern_as_path(tmp_path):
    write_shards(tmp_path)
    some = whole(tmp_path / "shard-{002..001}.tar")
    assert [some.image_ids[0], some.image_ids[-1]] == ["shard-002/00000", "shard-001/00007"]
    assert (np.asarray(some[0]) == pixels(16)).all()
    assert len(whole(tmp_path / "shard-00?.tar")) == 24
    assert len(whole(tmp_path / "shard-000.tar")) == 8


def test_json_holds_labels_and_captions(tmp_path):
    members = {}
    for i, label in enumerate(("dog", "cat", "dog")):
        members[f"./x/{i}.v2.JPG"] = png(i)
        members[f"./x/{i}.json"] = json.dumps({"label": "no", "kind": label, "about": f"n {i}"}).encode()
    write_tar(tmp_path / "a.tar", members)
    images = whole(tmp_path, label_key="kind", caption_key="about")
    assert images.class_names == ["cat", "dog"]
    assert images.labels.tolist() == [1, 0, 1]
    assert list(images.captions) == ["n 0", "n 1", "n 2"]
    assert images.image_ids == ["a/x/0", "a/x/1", "a/x/2"]
    assert whole(tmp_path).class_names == ["no"]
    assert whole(tmp_path).captions is None


def labels_in(path, member, *contents, picture="png"):
    """A tar of samples with a picture and a member that holds these bytes."""
    members = {}
    for i, content in enumerate(contents):
        members |= {f"{i}.{picture}": png(i), f"{i}.{member}": content}
    return write_tar(path / "a.tar", members).parent


@pytest.mark.parametrize(
    ("member", "contents", "changes"),
    [
        ("v2.cls", (b"2", b"10"), {"picture": "v2.png"}),
        ("label.cls", (b"2", b"10"), {"picture": "image.png"}),
        ("cls.txt", (b"2", b"10"), {}),
        ("cls", (b"\xef\xbb\xbf2", b"10\r\n"), {}),  # a byte order mark, as Windows writes it
        ("v2.json", (b'{"label": 2}', b'{"label": 10.0}'), {}),
        ("label", (b"2", b"10"), {"label_suffix": "label"}),
        ("txt", (b"2", b"10"), {"label_suffix": ".txt"}),
        ("json", (b'{"class": "2"}', b'{"class": 10}'), {"label_key": "class"}),
    ],
)
def test_the_last_suffix_decides_what_a_member_is(tmp_path, member, contents, changes):
    picture = changes.pop("picture", "png")
    images = whole(labels_in(tmp_path, member, *contents, picture=picture), **changes)
    assert images.class_names == ["2", "10"]
    assert images.labels.tolist() == [0, 1]
    assert images.captions is None


@pytest.mark.parametrize(
    ("member", "content", "sentence"),
    [
        ("label", b"2", r"passed over: \.label in 3 samples\. Name a member with data\.label_suffix"),
        ("index", b"2", r"passed over: \.index in 3 samples"),
        ("label.txt", b"2", r"passed over: \.label\.txt in 3 samples"),
        (
            "json",
            b'{"class": 1, "caption": "x"}',
            r"passed over: key 'class' of \.json in 3 samples\. .*data\.label_key",
        ),
    ],
)
def test_members_that_may_be_labels_are_said_where_there_is_none(tmp_path, member, content, sentence):
    root = labels_in(tmp_path, member, content, content, content)
    for _ in range(2):  # the index is read, and read again from the cache
        with pytest.warns(DataWarning, match=f"'tars' has no labels .*{sentence}"):
            assert whole(root).class_names == ["unlabelled"]


def test_what_may_be_meant_is_said_where_some_have_no_label(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": png(0), "0.cls": b"1", "1.png": png(1), "1.label": b"2"})
    with pytest.raises(DataError, match=r"1 of 2 samples .* \(passed over: \.label in 1 samples\)"):
        whole(tmp_path)


def test_of_two_labels_the_plain_one_is_taken_or_one_chosen(tmp_path):
    members = {"0.png": png(0), "0.coarse.cls": b"a", "0.fine.cls": b"b"}
    write_tar(tmp_path / "two" / "a.tar", members)
    with pytest.raises(DataError, match=r"\.coarse\.cls and \.fine\.cls; choose with data\.label_suffix=coarse\.cls"):
        whole(tmp_path / "two")
    assert whole(tmp_path / "two", label_suffix="fine.cls").class_names == ["b"]
    write_tar(tmp_path / "three" / "a.tar", members | {"0.cls": b"c"})
    assert whole(tmp_path / "three").class_names == ["c"]


def test_members_of_other_kinds_may_hold_anything(tmp_path):
    members = {"0.png": png(0), "0.cls": b"a", "0.txt": b"caption", "0.boxes.json": b"[1]", "0.ocr.txt": b"\xff"}
    write_tar(tmp_path / "a.tar", members | {"__MACOSX/1.png": png(1), "@eaDir/2.png": png(2), "x/._3.png": png(3)})
    images = whole(tmp_path)
    assert (images.class_names, images.image_ids, list(images.captions)) == (["a"], ["a/0"], ["caption"])


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [((b"0", b"1"), b"-1", None), ((b"a", b"b"), b"\n", None), ((b"-1", b"1"), b"-1", ["-1", "1"])],
)
def test_a_withheld_label_is_none_where_train_has_no_such_class(tmp_path, train, test, expected):
    labels_in(tmp_path / "train", "cls", *train)
    labels_in(tmp_path / "test", "cls", train[0], test)
    cfg = tar_cfg(tmp_path, held_out=0.0)
    assert len(load_images(cfg, "train").class_names) == 2
    if expected is None:
        with pytest.raises(DataError, match=r"1 of 2 samples .* have no label \(first: '1'"):
            load_images(cfg, "test")
    else:
        assert load_images(cfg, "test").class_names == expected


def test_unusual_folders_of_splits_and_classes_that_train_lacks_are_said(tmp_path):
    labels_in(tmp_path / "Train", "cls", b"cafe\xcc\x81", b"b")
    labels_in(tmp_path / "testing", "cls", "caf\u00e9".encode(), b"z")
    with pytest.warns(DataWarning) as said:
        images = load_images(tar_cfg(tmp_path, held_out=0.0), "test")
    assert images.class_names == ["b", "caf\u00e9", "z"]
    assert images.labels.tolist() == [1, 2]
    sentences = " ".join(str(w.message) for w in said)
    assert "'testing' of" in sentences
    assert "'tars', train lacks 1: z." in sentences


def test_classes_are_given_as_a_list_or_a_file(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "names.txt").write_text("tench\n\ngoldfish \nshark\n")
    for classes in (["tench", "goldfish", "shark"], str(tmp_path / "names.txt")):
        images = whole(tmp_path, classes=classes)
        assert images.class_names == ["tench", "goldfish", "shark"]
        assert images.labels.tolist() == [0, 1] * 12


def test_numbers_are_sorted_as_numbers_and_classes_are_those_of_all_splits(tmp_path):
    for name, labels in (("train", (10, 9)), ("val", (2,))):
        write_tar(tmp_path / name / "0.tar", {k: v for i, y in enumerate(labels) for k, v in
                                              ((f"{i}.png", png(i)), (f"{i}.cls", b"%d\n" % y))})  # fmt: skip
    parts = {s: load_images(tar_cfg(tmp_path, held_out=0.0), s) for s in ("train", "val")}
    assert parts["val"].class_names == parts["train"].class_names == ["2", "9", "10"]
    assert parts["train"].labels.tolist() == [2, 1]


def test_members_that_are_apart_still_make_one_sample(tmp_path):
    pictures = {"1.png": png(0), "2.png": png(1), ".DS.png": b""}
    write_tar(tmp_path / "a.tar", pictures | {"readme.md": b"x", "lone.cls": b"7", "2.cls": b"b", "1.cls": b"a"})
    images = whole(tmp_path)
    assert images.labels.tolist() == [0, 1]
    assert images.class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.seg.PNG", ("a/b", "seg.png")), ("./x.jpg", ("x", "jpg")), ("dir.d/x.jpg", ("dir.d/x", "jpg")),
        ("x", ("x", "")), ("a/.x.jpg", ("", "x.jpg")),
    ],
)  # fmt: skip
def test_keys_end_at_the_first_dot_of_the_last_part(name, parts):
    assert split_name(name) == parts


def test_the_index_is_kept_until_a_tar_changes(tmp_path, caches, monkeypatch):
    made = []
    build = index_module._build
    monkeypatch.setattr(index_module, "_build", lambda tars, *how: made.append(len(tars)) or build(tars, *how))
    root = write_shards(tmp_path)
    first = whole(root).fingerprint
    assert whole(root).fingerprint == first
    assert made == [3]
    assert len(list((caches / "own" / "tar-index").iterdir())) == 1
    whole(root, label_key="other")
    assert made == [3, 3]
    write_tar(root / "shard-001.tar", {"0.png": png(77), "0.cls": b"1", "0.txt": b"new"})
    images = whole(root)
    assert len(images) == 17
    assert images.fingerprint != first
    assert (np.asarray(images[8]) == pixels(77)).all()
    os.utime(root / "shard-000.tar", ns=(5, 5))
    assert whole(root).fingerprint == images.fingerprint
    for file in (caches / "own" / "tar-index").iterdir():
        file.write_bytes(b"broken")
    assert len(whole(root)) == 17


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAE_LIGHTNING_CACHE", str(tmp_path / "file" / "below"))
    assert len(whole(write_shards(tmp_path / "tars"))) == 24


def test_many_threads_read_more_tars_than_are_kept_open(tmp_path):
    images = whole(write_shards(tmp_path, shards=140, per_shard=2))
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda i: np.asarray(images[i]), order))
    assert all((picture == pixels(i)).all() for picture, i in zip(pictures, order, strict=True))
    assert len(os.listdir("/proc/self/fd")) < 200 if os.path.isdir("/proc/self/fd") else True


def sample(**members):
    return {f"0.{suffix}": data for suffix, data in members.items()}


@pytest.mark.parametrize(
    ("members", "changes", "sentence"),
    [
        (sample(png=png(0), jpg=png(1)), {}, "two pictures of sample '0'"),
        (sample(png=png(0), json=b"{"), {}, r"'0\.json' in .*a\.tar cannot be read"),
        (sample(png=png(0), json=b"[1]"), {}, r"'0\.json' in .*a\.tar cannot be read"),
        (sample(png=png(0), json=b'{"label": [1]}'), {}, r"'0\.json' in .* holds \[1\] under 'label'; labels must be"),
        (sample(png=png(0), txt=b"\xff"), {}, r"'0\.txt' in .*a\.tar cannot be read"),
        (sample(png=png(0), cls=b"4"), {"classes": ["a", "b"]}, r"Label '4' .* none of the 2 data\.classes"),
        (sample(png=png(0), cls=b"-1"), {"classes": ["a", "b"]}, r"Label '-1' .* none of the 2 data\.classes"),
        (sample(png=png(0), cls=b"4") | {"1.png": png(1)}, {}, "1 of 2 samples .* no label .first: '1'"),
        (sample(png=png(0)), {"classes": ["a", "b"]}, "1 of 1 samples .* no label"),
        (sample(cls=b"4"), {}, "has no images"),
        (sample(png=png(0), cls=b"0"), {"classes": "/no/such.txt"}, r"data\.classes=/no/such\.txt cannot be read"),
        (sample(png=png(0), cls=b"0"), {"classes": []}, r"data\.classes=\[\] names no class"),
        (sample(png=png(0), cls=b"0"), {"splits": {"train": "*.tar", "val": "a.tar"}}, "belongs to two splits"),
        (sample(png=png(0), cls=b"0"), {"splits": {"val": "a.tar"}}, "All tars .* belong to other splits"),
        (sample(png=png(0), cls=b"0"), {"held_out": 0.5}, "add up to less than 1"),
    ],
)
def test_what_tars_cannot_say_is_refused(tmp_path, members, changes, sentence):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=sentence):
        load_images(tar_cfg(tmp_path, **{"held_out": 0.0} | changes), "train")


def test_broken_tars_are_named(tmp_path):
    root = write_shards(tmp_path)
    images = whole(root)
    data = (root / "shard-001.tar").read_bytes()
    (root / "shard-001.tar").write_bytes(data[:1500])
    with pytest.raises(DataError, match=r"shard-001\.tar ends .* truncated"):
        whole(root)
    with pytest.raises(DataError, match=r"shard-001\.tar has become shorter"):
        images[15]
    (root / "shard-002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-002\.tar cannot be read"):
        images[16]


def test_tars_that_are_cut_off_are_refused_or_read_as_far_as_they_go(tmp_path):
    """At every place: within a member, between two, in padding, and where the zeros of the end should be."""
    write_shards(tmp_path, shards=2, per_shard=3)
    path = tmp_path / "shard-001.tar"
    data = path.read_bytes()
    expected = {tuple(whole(tmp_path).image_ids)}
    end = max(data.rfind(b"picture 5"), 0) // 512 * 512 + 512
    for at in sorted({*range(0, end + 1, 512), 1, 700, end - 1, len(data) // 2 // 512 * 512 - 100}):
        path.write_bytes(data[:at])
        with pytest.raises(DataError, match=r"shard-001\.tar (ends|is) .*extract\.unreadable=skip"):
            whole(tmp_path)
        with pytest.warns(
            DataWarning, match="1 of 2 tars are cut off and read as far as they go, [0-3] pictures; .*shard-001"
        ):
            images = whole(tmp_path, unreadable="skip")
        assert images.image_ids == sorted(images.image_ids)
        assert [(np.asarray(images[i]) == pixels(i)).all() for i in range(len(images))] == [True] * len(images)
        assert images.labels.tolist() == [0, 1, 0, 0, 1, 0][: len(images)] or len(images) == 0
        expected.add(tuple(images.image_ids))
    assert sorted(map(len, expected)) == [3, 4, 5, 6]
    assert (
        plain(made(tmp_path, "data=webdataset", "data.path=x", "extract.unreadable=skip").data)["unreadable"] == "skip"
    )
    for streaming in (False, True):  # by the library, which takes any end for a good one
        with pytest.raises(DataError, match=r"shard-001\.tar ends without the zeros"):
            load_images(hf_cfg(tmp_path, streaming=streaming), "train")
    path.write_bytes(data[: end + 1])
    assert len(whole(tmp_path)) == 6
    assert len(load_images(hf_cfg(tmp_path, held_out=0.0, splits=dict.fromkeys(SPLITS, "train")), "train")) == 6
