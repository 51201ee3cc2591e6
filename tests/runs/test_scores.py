"""Rows of scores in a parquet file, and rows of numbers in a plain one."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae_lightning.evaluation.image_codes import RowFile
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.part import headlines
from sae_lightning.runs.scores import TABLE, put_scores, read_rows, scores_of, value_of


def test_parts_replace_themselves_and_leave_others(tmp_path):
    put_scores(tmp_path, "a", "test", "1", [Score("x", 1), Score("y", math.nan, "k=2", "there is none")])
    put_scores(tmp_path, "b", "test", "1", [Score("z", 3)])
    put_scores(tmp_path, "a", "val", "1", [Score("x", 5)])
    put_scores(tmp_path, "a", "test", "2", [Score("x", 2)])
    assert scores_of(tmp_path, "a", "test", "1") is None
    assert scores_of(tmp_path, "a", "test", "2") == [Score("x", 2.0)]
    assert scores_of(tmp_path, "b", "test", "1") == [Score("z", 3.0)]
    rows = read_rows(tmp_path)
    assert len(rows) == 3
    assert value_of(rows, "x", split="val") == 5
    assert math.isnan(value_of(rows, "nothing"))
    assert pq.read_table(tmp_path / TABLE).column_names == [
        "run", "metric", "setting", "value", "part", "split", "key", "why", "data", "n", "unit", "low", "high",
        "protocol",
    ]  # fmt: skip


def test_two_rows_of_one_name_are_refused(tmp_path):
    put_scores(tmp_path, "a", "test", "1", [Score("x", 1)])
    with pytest.raises(ValueError, match=r"Two scores of .* are called \('x', '', 'test', '', 'paper'\)"):
        put_scores(tmp_path, "b", "test", "1", [Score("x", 1)])
    assert len(read_rows(tmp_path)) == 1


def test_a_table_that_cannot_be_read_counts_as_none(tmp_path):
    put_scores(tmp_path, "a", "test", "1", [Score("x", 1)])
    whole = (tmp_path / TABLE).read_bytes()
    (tmp_path / TABLE).write_bytes(whole[: len(whole) // 2])
    assert read_rows(tmp_path) == []
    put_scores(tmp_path, "a", "test", "1", [Score("x", 1)])
    assert len(read_rows(tmp_path)) == 1


def test_headlines_average_data_sets_and_take_their_own_setting():
    rows = [
        {"metric": "cross_domain_preservation", "setting": "data=a", "value": 0.5},
        {"metric": "cross_domain_preservation", "setting": "data=b", "value": 1.0},
        {"metric": "sparse_probing_area", "setting": "k=128", "value": 0.9},
        {"metric": "sparse_probing_area", "setting": "k=64", "value": 0.8},
        {"metric": "sparse_probing_area", "setting": "", "value": 0.7, "protocol": "released"},
    ]
    found = {column.headline: column.of(rows) for column in headlines()}
    assert (found["M6"], found["M4"]) == (0.75, 0.9)
    assert math.isnan(found["M1"])
    rows.append({"metric": "cross_domain_preservation", "setting": "data=inaturalist", "value": 0.9})
    assert {column.headline: column.of(rows) for column in headlines()}["M6"] == 0.9  # where it is there, alone
    assert {column.headline: column.of(rows) for column in headlines("released")}["M4"] == 0.7


def test_protocols_have_rows_of_their_own(tmp_path):
    put_scores(tmp_path, "a", "test", "1", [Score("x", 1)])
    put_scores(tmp_path, "a", "test", "1", [Score("x", 2)], protocol="released")
    assert scores_of(tmp_path, "a", "test", "1") == [Score("x", 1)]
    assert scores_of(tmp_path, "a", "test", "1", protocol="released") == [Score("x", 2)]
    assert [row["value"] for row in read_rows(tmp_path)] == [1]
    assert [row["value"] for row in read_rows(tmp_path, protocol=None)] == [1, 2]
    whole = pq.read_table(tmp_path / TABLE)
    intervals = ["n", "unit", "low", "high"]
    for older in (["protocol"], ["protocol", *intervals], ["protocol", *intervals, "data"]):  # of earlier versions
        pq.write_table(whole.slice(0, 1).drop_columns(older), tmp_path / TABLE)
        assert [(r["protocol"], r["data"]) for r in read_rows(tmp_path)] == [("paper", "")]


@pytest.mark.parametrize("width", [None, 3])
def test_rows_come_back_and_what_is_beyond_the_checkpoint_goes(tmp_path, width):
    shape = (5,) if width is None else (5, width)
    rows = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    file = RowFile(tmp_path / "rows", np.float32, width)
    file.append(rows[:2])
    np.testing.assert_array_equal(file.mapped(), rows[:2])
    file.append(rows[2:])
    file.sync()
    np.testing.assert_array_equal(file.mapped(), rows)
    file.close()
    again = RowFile(tmp_path / "rows", np.float32, width, rows=3)
    np.testing.assert_array_equal(again.mapped(), rows[:3])
    again.append(rows[4:])
    np.testing.assert_array_equal(again.mapped(), rows[[0, 1, 2, 4]])
    again.close()
    with pytest.raises(ValueError, match="holds 4 rows; expected 6"):
        RowFile(tmp_path / "rows", np.float32, width, rows=6)
    anew = RowFile(tmp_path / "rows", np.float32, width)
    assert len(anew) == len(anew.mapped()) == 0
    with pytest.raises(ValueError, match="takes rows of shape"):
        anew.append(np.zeros((2, 7), np.float32))
    anew.close()
