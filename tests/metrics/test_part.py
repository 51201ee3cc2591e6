"""Columns and tasks whose settings hold placeholders, and the parts that a config names."""

from types import SimpleNamespace

import pytest

from sae_lightning.metrics.part import Column, all_parts, downstream, headlines, parts_of, spelled_out

FOUND = [("auc", f"data={data},k={k}") for data in ("b", "a") for k in (16, 2)] + [
    ("raw", "data=b"),
    ("auc", "k=1,x=2"),
]


def test_a_placeholder_stands_for_each_value_and_columns_of_one_heading_stay_together():
    columns = [
        Column("raw", "raw", "data={data}", over="{data}"),
        Column("k {k}", "auc", "data={data},k={k}", over="{data}"),
        Column("plain", "fvu"),
    ]
    shown = [(column.over, column.title, column.setting) for column in spelled_out(columns, FOUND)]
    of_b = [("b", "raw", "data=b"), ("b", "k 2", "data=b,k=2"), ("b", "k 16", "data=b,k=16")]
    of_a = [("a", "raw", "data=a"), ("a", "k 2", "data=a,k=2"), ("a", "k 16", "data=a,k=16")]
    assert shown == [*of_b, *of_a, ("", "plain", "")]  # numbers ascend, other values keep their order


@pytest.mark.parametrize(
    ("metric", "setting", "column"),
    [
        ("retrieval_codes", "k=1", "retrieval/codes"), ("retrieval_codes", "k=5", None),
        ("retrieval_lift", "k=1", None), ("segmentation_miou", "data=x,input=raw", "segmentation:x/raw"),
        ("cross_domain_accuracy_reconstruction", "data=x", "accuracy:x/reconstruction"),
        ("cross_domain_sparse_probing_auc", "data=x,k=128", "probing:x/codes"),
        ("cross_domain_sparse_probing_auc", "data=x,k=64", None),
    ],
)  # fmt: skip
def test_rows_of_downstream_tasks_have_columns(metric, setting, column):
    found = [name for task in downstream() if (name := task.column(metric, setting))]
    assert found == ([] if column is None else [column])


def test_core_comes_first_and_the_headlines_by_their_ids():
    assert all_parts()[0].name == "core"
    assert [column.headline for column in headlines()] == [f"M{i}" for i in range(1, 8)]
    asked = parts_of({"retrieval": {"at": [1]}, "cknna": None, "stability": False, "core": True})
    assert [(part.name, part.options) for part in asked] == [("core", {}), ("retrieval", {"at": [1]})]


def test_a_part_on_data_sets_is_one_of_each():
    probe = {"C": 1.0, "max_iter": 9, "k": 8}
    one, two = parts_of({"cross_domain": {**probe, "sets": {"a": {"backbones": "tiny"}, "b": {"backbones": "tiny"}}}})
    sets = ("a/train", "a/test")
    assert (one.name, one.data, one.passes, one.reads) == ("cross_domain/a", "a", sets, sets)
    assert two.keyed == {**probe, "data": {"backbones": "tiny"}}


def test_an_option_that_is_not_given_is_named():
    (part,) = parts_of({"recovery": {"budgets": [1], "images": 2, "samples": 9}})
    with pytest.raises(ValueError, match=r"metrics\.recovery has no seed"):
        part.scores(SimpleNamespace(store=lambda: None, sae=None))


def test_a_protocol_has_parts_of_its_own_beside_those_that_all_share():
    given = {"core": True, "moran": {"min_active": 9}, "retrieval": {"at": [1]}}

    def names(protocol):
        return [part.name for part in parts_of({"protocol": protocol, **given})]

    assert names("paper") == ["core", "moran", "retrieval"]
    assert names("released") == ["core", "core@released", "moran@released", "retrieval"]
    assert names(["released", "paper"]) == ["core", "core@released", "moran", "moran@released", "retrieval"]
    ours, theirs = parts_of({"protocol": ["paper", "released"], "moran": given["moran"]})
    assert (ours.options, theirs.options["min_active"], theirs.base) == ({"min_active": 9}, 5, "moran")
    assert [column.headline for column in headlines("released")] == [f"M{i}" for i in range(1, 8)]
    with pytest.raises(ValueError, match=r"Unknown metrics\.protocol=other; choose one of paper, released"):
        names("other")


def test_each_protocol_has_its_data_sets():
    sets = {name: {"backbones": "published"} for name in ("inaturalist", "dtd", "eurosat")}
    asked = {"protocol": ["paper", "released"], "cross_domain": {"sets": sets}}
    assert [(part.name, part.reads) for part in parts_of(asked)] == [
        ("cross_domain/inaturalist", ("inaturalist/train", "inaturalist/test")),
        ("cross_domain/dtd", ("dtd/train", "dtd/test")),
        ("cross_domain/dtd@released", ("dtd/train",)), ("cross_domain/eurosat@released", ("eurosat/train",)),
    ]  # fmt: skip
