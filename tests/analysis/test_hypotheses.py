"""Hypotheses are tested on the paper's task where there is one, on a stand-in with its name where there is none."""

import numpy as np
import pytest

from sae_lightning.analysis.correlation import metric_tasks
from sae_lightning.analysis.hypotheses import (
    HYPOTHESES,
    NOT_SUPPORTED,
    NOT_TESTABLE,
    SUPPORTED,
    TOO_FEW,
    check_hypotheses,
)
from tests.analysis.making import grid, of_backbones, ranked

UP, SWAPPED = "clip dinov2 siglip mae deit", "dinov2 clip siglip mae deit"


def only(table, name="H1", check=False):
    rows = check_hypotheses(table)
    return rows[(rows["name"] == name) & (rows["check"] == check)].iloc[0]


def test_metrics_tasks_and_thresholds_are_those_of_section_4_5():
    assert [(h.name, h.metric, h.tasks[0], h.threshold) for h in HYPOTHESES] == [
        ("H1", "M1", "segmentation:ade20k", 0.7), ("H2", "M5", "accuracy:cub200", 0.6), ("H3", "M3", "retrieval", 0.6),
        ("H4", "M4", "probing:inaturalist", 0.7),
    ]  # fmt: skip


def test_a_threshold_that_is_met_supports():
    orders = {0.7: "dinov2 siglip clip mae deit", 0.6: "siglip dinov2 clip mae deit"}  # of ρ with UP
    for rho, order in orders.items():
        table = of_backbones({"M1": ranked(UP), "segmentation:ade20k/raw": ranked(order)})
        row = only(table)
        assert row["rho"] == pytest.approx(rho)
        assert row["verdict"] == (SUPPORTED if rho >= 0.7 else NOT_SUPPORTED)
        assert not row["stand_in"]


def test_p_is_exact_beside_that_of_students_t():
    row = only(of_backbones({"M1": ranked(UP), "segmentation:ade20k/raw": ranked(SWAPPED)}))
    assert (row["rho"], row["p"], row["p_t"], row["n"]) == pytest.approx((0.9, 10 / 120, 0.0374, 5), abs=1e-4)
    assert row["reason"] == "ρ = 0.90 ≥ 0.7"


def test_the_papers_task_comes_before_a_stand_in():
    columns = {"M1": ranked(UP), "segmentation:a/raw": ranked(UP)}
    alone = only(of_backbones(columns))
    both = only(of_backbones(columns | {"segmentation:ade20k/raw": ranked(SWAPPED)}))
    assert (alone["task"], alone["stand_in"], alone["rho"]) == ("segmentation:a", True, 1.0)
    assert (both["task"], both["stand_in"], both["rho"]) == ("segmentation:ade20k", False, 0.9)


def test_retrieval_stands_in_where_the_images_are_not_imagenets():
    columns = {"M3": ranked(UP), "retrieval/raw": ranked(UP)}
    assert not only(of_backbones(columns), "H3")["stand_in"]
    assert only(of_backbones(columns, data="demo"), "H3")["stand_in"]


def test_probing_is_that_of_codes_with_the_papers_further_checks():
    columns = {f"probing:{data}/codes": ranked(UP) for data in ("inaturalist", "cub200", "digits")}
    rows = check_hypotheses(of_backbones(columns | {"M4": ranked(SWAPPED)}))
    rows = rows[rows["name"] == "H4"]
    assert rows[["task", "given", "check", "stand_in"]].to_numpy().tolist() == [
        ["probing:inaturalist", "codes", False, False], ["probing:cub200", "codes", True, False],
    ]  # fmt: skip


def test_means_over_configurations_are_correlated():
    table = grid(lambda b, x, k, s: x * (b == "clip"), backbones=("clip", "mae", "deit"), expansions=(8, 16))
    table["segmentation:a/raw"] = table["backbone"].map({"clip": 1.0, "mae": 0.0, "deit": 0.0})
    assert only(table)["n"] == 3
    assert only(table)["rho"] == 1


@pytest.mark.parametrize(("n", "verdict"), [(3, TOO_FEW), (4, TOO_FEW), (5, SUPPORTED)])
def test_a_verdict_needs_five_backbones(n, verdict):
    means = {f"b{i}": float(i) for i in range(n)}
    row = only(of_backbones({"M1": means, "segmentation:a/raw": means}))
    assert (row["rho"], row["verdict"]) == (1, verdict)
    assert (f"{n} have both scores; a verdict needs 5" in row["reason"]) == (verdict == TOO_FEW)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"M1": ranked(UP)}, "no scores of segmentation:ade20k nor of a stand-in"),
        ({"M1": {"clip": 1.0, "mae": 2.0}, "segmentation:a/raw": {"clip": 1.0, "mae": 2.0}}, "2 backbones"),
        ({"M1": dict.fromkeys(ranked(UP), np.nan), "segmentation:a/raw": ranked(UP)}, "no M1"),
        ({"M1": dict.fromkeys(ranked(UP), 0.1), "segmentation:a/raw": ranked(UP)}, "the same for all backbones"),
    ],
)
def test_what_cannot_be_tested_says_why(columns, reason):
    row = only(of_backbones(columns))
    assert row["verdict"] == NOT_TESTABLE
    assert reason in row["reason"]


def test_the_matrix_turns_metrics_round_of_which_less_is_better():
    table = of_backbones({"M1": ranked(UP), "M2": ranked(UP), "retrieval/raw": ranked(UP),
                          "retrieval/codes": ranked(SWAPPED), "probing:a/codes": ranked(UP)})  # fmt: skip
    rows = metric_tasks(table).set_index(["metric", "task"])
    assert tuple(rows.loc[("M1", "retrieval"), ["rho", "oriented"]]) == (1, 1)
    assert tuple(rows.loc[("M2", "retrieval"), ["rho", "oriented"]]) == (1, -1)
    assert rows.loc[("M1", "probing:a"), "rho"] == 1
    assert len(rows) == 7 * 2
    assert metric_tasks(table, ["retrieval"], "codes").set_index("metric").loc["M1", "rho"] == pytest.approx(0.9)
