"""Labels of Hugging Face data sets: their types, one number for a class in all splits, and what is no label."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_lightning.data import DataError, load_images
from sae_lightning.data.columns import find_columns
from sae_lightning.data.errors import DataWarning
from tests.data.making import hf_cfg, png, write_pictures
from tests.data.test_hf import IMAGE, LABEL, NUMBER, TEXT, made

FLOAT, ONE_HOT = datasets.Value("float64"), datasets.List(NUMBER)
ANIMALS = ["cat", "dog", "fox"] * 2


def classes(*names):
    return datasets.ClassLabel(names=list(names))


def parquet(root, split="train", **columns):
    """``root/<split>.parquet`` with pictures and the columns as Arrow arrays."""
    root.mkdir(exist_ok=True)
    rows = len(next(iter(columns.values())))
    pictures = [{"bytes": png(i), "path": None} for i in range(rows)]
    pq.write_table(pa.table({"image": pictures, **columns}), root / f"{split}.parquet")
    return root


def saved(root, **splits):
    """A saved DatasetDict: of each split the feature of its label and the labels."""
    datasets.DatasetDict(
        {split: made(len(labels), label=(kind, labels)) for split, (kind, labels) in splits.items()}
    ).save_to_disk(root)
    return root


def named(path, split, **changes):
    """The name of each image's class."""
    images = load_images(hf_cfg(path, **{"held_out": 0.0, "seed": 0} | changes), split)
    if changes.get("streaming"):
        items = list(images.items())
        return [i.label if images.class_names is None else images.class_names[i.label] for i in items]
    return [images.class_names[label] for label in images.labels]


ALONE = {"splits": {"train": "train", "val": "train", "test": "train"}}


LABELS = {
    "floats": (pa.array([0.0, 1.0, 2.0]), ["0", "1", "2"]),
    "half floats": (pa.array([0, 1, 2], pa.float16()), ["0", "1", "2"]),
    "string views": (pa.array(["cat", "dog", "x"]).cast(pa.string_view()), ["cat", "dog", "x"]),
    "dictionary": (pa.array(["cat", "dog", "cat"]).dictionary_encode(), ["cat", "dog", "cat"]),
    "numbers": (pa.array([7, 3, 7]).dictionary_encode(), ["7", "3", "7"]),
    "booleans": (pa.array([True, False, True]), ["true", "false", "true"]),
    "composed": (pa.array(["cafe\u0301", "caf\u00e9", "tea"]), ["caf\u00e9", "caf\u00e9", "tea"]),
}
NO_LABELS = {
    "gap": ([0.0, None, 2.0], "have no label|has no label"),
    "nan": ([0.0, float("nan"), 2.0], "have no label|has no label"),
    "halves": ([0.0, 1.5, 2.0], r"1\.5; numbers that are labels must be whole.*data\.label_column=none"),
    "one-hot": ([[0, 1], [1, 0], [0, 1]], r"'one-hot' of .* holds List\(Value\('int64'\)\); labels must be"),
    "lists": ([["cat"], ["cat", "dog"], []], r"'lists' of .* holds List\(Value\('string'\)\); labels must be"),
    "structs": ([{"id": 1}] * 3, r"'structs' of .* holds \{'id': Value\('int64'\)\}; labels must be"),
    "bytes": ([b"cat", b"dog", b"cat"], "'bytes' of .* holds binary; labels must be"),
}


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_labels_and_such_as_are_none(tmp_path, streaming):
    columns = {name: values for name, (values, _) in LABELS.items()}
    root = parquet(tmp_path, **columns, **{name: pa.array(values) for name, (values, _) in NO_LABELS.items()})
    for name, (_, expected) in LABELS.items():
        assert named(root, "train", streaming=streaming, label_column=name, **ALONE) == expected, name
    for name, (_, sentence) in NO_LABELS.items():
        with pytest.raises(DataError, match=sentence):
            named(root, "train", streaming=streaming, label_column=name, **ALONE)


def test_a_column_called_label_that_is_none_is_refused_unless_none_is_wanted(tmp_path):
    root = parquet(tmp_path, label=pa.array([[0, 1], [1, 0], [0, 1]]))
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"'label' of .* holds List.*data\.label_column=none"):
            named(root, "train", streaming=streaming, **ALONE)
        assert set(named(root, "train", streaming=streaming, label_column="none", **ALONE)) == {"unlabelled"}


def test_the_gap_is_counted_and_its_row_named(tmp_path):
    with pytest.raises(DataError, match=r"1 of 3 images .*\(first: row 1\); take another data\.label_column"):
        named(parquet(tmp_path, label=pa.array([0.0, None, 2.0])), "train", **ALONE)


def test_unlabelled_says_what_was_passed_over_unless_none_is_wanted(tmp_path, recwarn):
    root = parquet(tmp_path, score=pa.array([0.1] * 3), url=pa.array(["a"] * 3))
    with pytest.warns(DataWarning, match=r"passed over: score \(float64\), url \(string\)\. Name .*data\.label_column"):
        assert set(named(root, "train", **ALONE)) == {"unlabelled"}
    recwarn.clear()
    assert set(named(root, "train", label_column="none", **ALONE)) == {"unlabelled"}
    assert not [w for w in recwarn if w.category is DataWarning]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"split": LABEL, "label": NUMBER}, "label"),  # a usual name comes before a type
        ({"split": LABEL, "Label": TEXT}, "Label"),
        ({"label": NUMBER, "Label": TEXT}, "label"),
        ({"meta.label": NUMBER}, "meta.label"),
        ({"none": NUMBER}, "none"),
    ],
)
def test_a_usual_name_comes_before_a_type(features, expected):
    given = {"label_column": "none"} if "none" in features else {}
    assert find_columns(datasets.Features({"image": IMAGE, **features}), given, "x").label == expected


def test_a_label_of_another_type_beside_the_one_that_is_taken_is_said():
    features = datasets.Features({"image": IMAGE, "label": ONE_HOT, "kind": LABEL})
    with pytest.warns(DataWarning, match=r"its column 'kind'\. Column 'label' of 'x' holds List"):
        assert find_columns(features, {}, "x").label == "kind"


def test_two_usual_names_are_both_named():
    with pytest.raises(DataError, match=r"\['label', 'category'\]\. Choose one with data\.label_column"):
        find_columns(datasets.Features({"image": IMAGE, "label": NUMBER, "category": LABEL}), {}, "x")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "test", "expected"),
    [
        (["fox", "cat", "dog"], ANIMALS, ["cat", "dog", "fox"]),
        (["cat", "fox"], ["cat", "fox"], ["cat", "dog", "fox"]),
        (["ant", "cat", "dog", "fox"], ["ant", *ANIMALS], ["cat", "dog", "fox", "ant"]),
    ],
    ids=["another order", "one fewer", "one more"],
)
def test_a_class_has_one_number_in_all_splits(tmp_path, names, test, expected, streaming):
    root = saved(
        tmp_path / "x",
        train=(classes("cat", "dog", "fox"), [0, 1, 2] * 2),
        test=(classes(*names), [names.index(a) for a in test]),
    )
    cfg = hf_cfg(root, streaming=streaming)
    assert load_images(cfg, "train").class_names == load_images(cfg, "test").class_names == expected
    assert named(root, "test", streaming=streaming) == test


def test_declared_classes_in_train_and_texts_elsewhere_are_told_by_name(tmp_path):
    root = saved(tmp_path / "x", train=(classes("fox", "cat"), [0, 1]), test=(TEXT, ["cat", "ant"]))
    with pytest.warns(DataWarning, match=r"test split of 'x', train lacks 1: ant"):
        assert named(root, "test") == ["cat", "ant"]
    assert load_images(hf_cfg(root), "train").class_names == ["fox", "cat", "ant"]
    numbers = saved(tmp_path / "y", train=(classes("fox", "cat"), [0, 1]), test=(NUMBER, [0, 1]))
    with pytest.raises(DataError, match="bare numbers in split 'test'"):
        named(numbers, "test")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "train", "test", "expected"),
    [
        (NUMBER, [0, 1, 2], [-1, -1], None),
        (FLOAT, [0.0, 1.0], [1.0, -1.0], None),
        (TEXT, ["cat", "dog"], ["", ""], None),
        (LABEL, [0, 1], [0, -1], None),
        (NUMBER, [-1, 1], [1, -1], ["1", "-1"]),  # as CelebA's attributes
        (TEXT, ["", "x"], ["x", ""], ["x", ""]),
    ],
)
def test_a_withheld_label_is_none_where_train_has_no_such_class(tmp_path, kind, train, test, expected, streaming):
    root = saved(tmp_path / "x", train=(kind, train), test=(kind, test))
    if expected is None:
        with pytest.raises(DataError, match=r"no label.*data\.label_column"):
            named(root, "test", streaming=streaming)
        assert len(set(named(root, "train", streaming=streaming))) == len(train)
    else:
        assert named(root, "test", streaming=streaming) == expected


def test_empty_labels_of_train_are_said_to_be_a_class(tmp_path):
    root = parquet(tmp_path, label=pa.array(["cat", "", "dog"]))
    with pytest.warns(DataWarning, match="Some labels in the train split of .* are empty"):
        assert named(root, "train", **ALONE) == ["cat", "", "dog"]


def test_a_split_without_the_column_of_train_is_refused(tmp_path):
    datasets.DatasetDict(train=made(2, label=(LABEL, [0, 1])), test=made(2)).save_to_disk(tmp_path / "x")
    with pytest.raises(DataError, match=r"'test' of 'x' has no column 'label'.*data\.splits\.test=train"):
        named(tmp_path / "x", "test")


def pictures_in(root, *folders, each=5):
    return write_pictures(root, *(f"{folder}/{i}.png" for folder in folders for i in range(each)))


@pytest.mark.parametrize(
    ("folders", "streaming"),
    [
        (("train", "test"), False),
        (("train", "validation", "test"), True),
        (("Train", "Test"), True),
        (("x_train2017", "x_test2017"), False),
    ],
)
def test_folders_of_splits_with_bare_pictures_are_unlabelled(tmp_path, folders, streaming):
    root = pictures_in(tmp_path, *folders)
    assert named(root, "train", streaming=streaming) == named(root, "test", streaming=streaming) == ["unlabelled"] * 5


def test_a_single_class_in_train_is_a_class(tmp_path):
    root = pictures_in(tmp_path, "train/cat", "test/cat", "test/dog", each=2)
    assert named(root, "train") == ["cat"] * 2
    assert sorted(named(root, "test")) == ["cat", "cat", "dog", "dog"]


def test_folders_of_splits_without_train_are_not_taken_for_it(tmp_path):
    root = pictures_in(tmp_path, "Val/cat", "Test/cat")
    with pytest.raises(DataError, match=r"no split 'train'; it has \['validation', 'test'\]"):
        named(root, "test")


def test_folders_of_splits_in_capitals_are_said_and_kept_apart(tmp_path):
    root = pictures_in(tmp_path, "Train/cat", "Train/dog", "Val/cat", "Val/dog", each=2)
    with pytest.warns(DataWarning, match="folder 'Val' of .* is taken for its val split"):
        assert sorted(named(root, "val")) == ["cat", "cat", "dog", "dog"]
    assert sorted(named(root, "train")) == ["cat", "cat", "dog", "dog"]


def test_litter_is_no_class_and_other_files_are_counted(tmp_path):
    root = pictures_in(tmp_path, "cat", "dog", "@eaDir", each=2)
    for name in ("cat/1.HEIC", "dog/2", "dog/Thumbs.db", "dog/.DS_Store"):
        (root / name).write_bytes(b"x")
    with pytest.warns(
        DataWarning, match=r"2 are left out, as no pictures by their suffix: 1 without a suffix, 1 \.heic"
    ):
        assert sorted(named(root, "train", **ALONE)) == ["cat", "cat", "dog", "dog"]
