"""Two families or two layers are compared at matched settings, and what is left out is said."""

import numpy as np
import pandas as pd
import pytest

from sae_lightning.analysis.layers import layer_differences
from sae_lightning.analysis.rank_consistency import rank_consistency
from tests.analysis.making import BACKBONES, grid


def place(backbone, expansion, k, seed):
    """The better a backbone, the later it stands in BACKBONES; settings matter less."""
    return BACKBONES.index(backbone) + expansion / 100 + k / 1e4


def test_rankings_run_from_best_to_worst():
    both = pd.concat([grid(place), grid(lambda *c: -place(*c), variant="jumprelu")])
    rows = rank_consistency(both).metrics.set_index("metric")
    assert rows.loc["M1", "first"] == BACKBONES[::-1]
    assert rows.loc["M1", "second"] == BACKBONES
    assert rows.loc["M2", "first"] == BACKBONES  # less is better
    assert (rows["rho"] == -1).all()
    assert (rows["n"] == 5).all()


def test_runs_off_their_target_are_dropped_and_named():
    other = grid(place, variant="jumprelu", ks=(64, 128))
    off = (other["backbone"] == "mae") & (other["k"] == 128)
    other.loc[off, ["l0", "M1"]] = 120.0, 1e6
    found = rank_consistency(pd.concat([grid(place), other]))
    assert set(found.dropped["run"]) == set(other.loc[off, "run"])
    assert set(found.dropped["reason"]) == {"L0 120.0, aimed at 128"}
    assert found.metrics.set_index("metric").loc["M1", "rho"] == 1
    cells = found.differences.set_index(["metric", "backbone"])["cells"]
    assert (cells["M1", "mae"], cells["M1", "clip"], cells["M1", "all"]) == (3, 6, 27)
    everything = rank_consistency(pd.concat([grid(place), other]), tolerance=None)
    assert everything.dropped.empty


def test_the_tolerance_itself_is_kept_and_unknown_l0_is_not():
    table = pd.concat([grid(place), grid(place, variant="jumprelu", l0=66.0, ks=(64,))], ignore_index=True)
    assert rank_consistency(table).dropped.empty
    table.loc[table["backbone"] == "mae", "l0"] = np.nan
    assert set(rank_consistency(table).dropped["reason"]) == {"no L0"}
    table["k"] = np.nan
    assert "no k to aim at" in set(rank_consistency(table).dropped["reason"])


def test_differences_are_those_of_cells_that_both_have():
    more = grid(lambda *c: place(*c) + 0.5, variant="jumprelu", expansions=(16, 64), dead_share=0.3)
    found = rank_consistency(pd.concat([grid(place), more])).differences.set_index(["metric", "backbone"])
    assert found.loc[("M2", "all"), "difference"] == pytest.approx(0.5)
    assert found.loc[("dead_share", "clip"), "difference"] == pytest.approx(0.2)
    assert found.loc[("M1", "clip"), "cells"] == 2
    assert found["consistent"].all()


def test_seeds_of_a_cell_are_averaged_before_they_are_matched():
    seeds = grid(lambda b, x, k, s: s, variant="jumprelu", seeds=(0, 4), expansions=(8,), ks=(64,))
    found = rank_consistency(pd.concat([grid(lambda *_: 1), seeds])).differences.set_index(["metric", "backbone"])
    assert tuple(found.loc[("M1", "mae"), ["difference", "cells"]]) == (1, 1)


def test_a_family_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"no run of variant jumprelu in this grid \(it has batchtopk\)"):
        rank_consistency(grid())


def test_layers_are_compared_run_by_run():
    early = grid(lambda b, x, k, s: 0.1 * x, layer=3, backbones=("clip", "mae"))
    late = grid(lambda b, x, k, s: 0.1 * x + (0.2 if b == "clip" else x - 10), backbones=("clip", "mae", "deit"))
    rows = layer_differences(pd.concat([late, early])).set_index(["backbone", "metric"])
    assert {backbone for backbone, _ in rows.index} == {"clip", "mae"}
    clip, mae = rows.loc[("clip", "M3")], rows.loc[("mae", "M3")]
    assert (clip["early_layer"], clip["late_layer"], clip["cells"]) == (3, 11, 6)
    assert (clip["difference"], clip["consistent"]) == (pytest.approx(0.2), True)
    assert not mae["consistent"]
    assert mae["late"] - mae["early"] == pytest.approx(mae["difference"])


def test_layers_can_be_named_and_runs_without_a_partner_do_not_count():
    three = pd.concat([grid(lambda *_, at=at: at, layer=at) for at in (3, 7, 11)])
    rows = layer_differences(three, early=7)
    assert set(rows["difference"]) == {4.0}
    apart = pd.concat([grid(layer=3, expansions=(8,)), grid(layer=11, expansions=(16,))])
    assert layer_differences(apart).empty
    assert layer_differences(grid()).empty
    assert layer_differences(grid(layer=np.nan)).empty
