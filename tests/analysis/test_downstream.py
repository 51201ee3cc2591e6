"""Lifts of codes, dissociation, spread over seeds, and the guide, on small grids that one can work out."""

import numpy as np
import pandas as pd
import pytest

from sae_lightning.analysis.codes_lift import codes_lift
from sae_lightning.analysis.dissociation import dissociation
from sae_lightning.analysis.recommendations import Choice, kind_of, recommend
from sae_lightning.analysis.variance import spread
from tests.analysis.making import BACKBONES, grid, of_backbones, ranked

RAW = dict(zip(BACKBONES, (0.8, 0.6, 0.5, 0.4, 0.2), strict=True))


def with_task(table: pd.DataFrame, task: str, codes) -> pd.DataFrame:
    raw = table["backbone"].map(RAW)
    return table.assign(**{f"{task}/raw": raw, f"{task}/codes": raw * codes})


def test_lift_is_the_mean_of_the_configurations_ratios():
    table = grid()
    table = with_task(table, "retrieval", 1.5 - table["backbone"].map(RAW) / 2 + (table["k"] == 64) * 0.1)
    found = codes_lift(table)
    row = found.tasks.iloc[0]
    assert (row["task"], row["rho"], row["n"], row["above"]) == ("retrieval", -1, 5, 5)
    assert (row["lowest"], row["highest"]) == ("dinov2", "mae")
    assert (row["lowest_lift"], row["highest_lift"]) == pytest.approx((1.15, 1.45))
    mae = found.backbones.set_index("backbone").loc["mae"]
    assert (mae["raw"], mae["lift"]) == pytest.approx((0.2, 1.45))
    assert mae["lift_std"] == pytest.approx(np.std([0.1, 0.0] * 3, ddof=1))


def test_lift_needs_raw_and_codes_and_no_raw_score_of_zero():
    assert codes_lift(grid(**{"probing:a/codes": 0.9})).tasks.empty
    table = with_task(grid(), "retrieval", 1.0)
    table.loc[table["backbone"] == "mae", ["retrieval/raw", "retrieval/codes"]] = 0.0
    found = codes_lift(table)
    assert list(found.backbones["backbone"]) == ["clip", "deit", "dinov2", "siglip"]
    assert np.isnan(found.tasks["rho"].item())  # the same lift everywhere


def test_within_and_across_backbones_may_disagree():
    table = grid(lambda b, x, k, s: x / 100 + BACKBONES.index(b))
    table["M3"] = -table["expansion"] / 100 + table["backbone"].map(BACKBONES.index)
    rows = dissociation(table).set_index("backbone")
    assert (rows.loc[list(BACKBONES), "rho"] == -1).all()
    assert (rows.loc["all", "rho"], rows.loc["all", "n"]) == (1, 5)
    assert rows.loc["clip", "n"] == 6
    assert rows.loc["clip", "x"] == pytest.approx(1 + np.mean([0.08, 0.16, 0.32]))


def test_spread_over_seeds_is_pooled_over_the_cells_that_have_several():
    table = grid(lambda b, x, k, s: s + 10 * x, seeds=(0, 1, 5), ks=(64,))
    lone = (table["expansion"] == 32) & (table["seed"] > 0)
    row = spread(table[~lone]).set_index("metric").loc["M1"]
    assert row["seeds"] == pytest.approx(np.std([0, 1, 5], ddof=1))
    assert row["configurations"] == pytest.approx(np.std([82, 162, 320], ddof=1))
    assert (row["backbones"], row["repeated"]) == (0, 10)
    assert np.isnan(spread(grid())["seeds"]).all()


def test_the_guide_routes_each_task_to_its_best_backbones_and_metric():
    table = with_task(grid(lambda b, *_: RAW[b]), "segmentation:ade20k", 1.0)
    table["retrieval/raw"] = table["backbone"].map({**RAW, "clip": 0.9})
    guide = recommend(table)
    dense, retrieval = guide.routes
    assert (dense.kind, dense.task, dense.stand_in) == ("dense spatial prediction", "segmentation:ade20k", False)
    assert dense.raw == Choice("dinov2", pytest.approx(0.8), "clip", pytest.approx(0.6))
    assert dense.raw == dense.codes
    assert dense.metrics == ("M1", "M3", "M4", "M5", "M6")
    assert (dense.oriented, dense.p, dense.n) == (1, pytest.approx(2 / 120), 5)
    assert (retrieval.raw.backbone, retrieval.codes) == ("clip", None)
    assert retrieval.oriented == pytest.approx(0.9)
    assert guide.avoid == ("M2", "M7")
    worst = guide.metrics.set_index("metric").loc["M2"]
    assert (worst["oriented"], worst["picks"]) == (pytest.approx(-0.95), "mae")
    assert worst["loss"] == pytest.approx(np.mean([1 - 0.2 / 0.8, 1 - 0.2 / 0.9]))
    assert guide.not_recommended == ("deit", "mae")


def test_a_backbone_that_does_one_task_well_is_not_advised_against():
    columns = {"retrieval/raw": ranked("clip siglip deit mae"), "accuracy:dtd/raw": ranked("mae siglip clip deit")}
    assert recommend(of_backbones(columns)).not_recommended == ("deit",)


def test_stand_ins_follow_the_papers_tasks():
    columns = dict.fromkeys(("segmentation:a/raw", "segmentation:ade20k/raw", "accuracy:digits/raw"), RAW)
    found = [(r.task, r.stand_in) for r in recommend(of_backbones(columns)).routes]
    assert found == [("segmentation:ade20k", False), ("segmentation:a", True), ("accuracy:digits", True)]
    assert [kind_of(t) for t in ("accuracy:dtd", "accuracy:cub200")] == [
        "texture and material",
        "fine-grained concepts",
    ]
    with pytest.raises(ValueError, match="speed is of no kind"):
        kind_of("speed")


def test_a_grid_without_tasks_has_an_empty_guide():
    guide = recommend(grid())
    assert (guide.routes, guide.avoid, guide.not_recommended) == ([], (), ())
    assert guide.metrics.empty
