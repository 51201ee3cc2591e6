"""Which runs an analysis compares, and how they are averaged."""

import numpy as np
import pandas as pd
import pytest

from sae_lightning.analysis.grid import (
    backbone_means,
    backbone_stds,
    configuration_names,
    main_family,
    missing_cells,
    shared_configurations,
)
from tests.analysis.making import grid


def test_main_family_is_the_largest_at_each_backbones_usual_layer():
    main = grid()
    others = [grid(variant="jumprelu", expansions=(16,)), grid(layer=3, ks=(64,)), grid(ks=(64,), monoloss=0.1)]
    assert sorted(main_family(pd.concat([*others, main]))["run"]) == sorted(main["run"])


def test_random_weights_are_compared_where_there_are_no_others_alone():
    untrained = grid(backbones=("clip, random weights",), title="clip (tiny, random weights)")
    main = grid(backbones=("clip",))
    assert sorted(main_family(pd.concat([untrained, main]))["run"]) == sorted(main["run"])
    assert len(main_family(untrained)) == len(untrained)


def test_of_two_layers_with_as_many_runs_the_deeper_is_the_main_one_and_pooled_features_have_none():
    both = pd.concat([grid(layer=3), grid(layer=11)])
    assert set(main_family(both)["layer"]) == {11.0}
    pooled = grid(layer=float("nan"), features="pooled")
    assert len(main_family(pooled)) == len(pooled)
    assert main_family(pooled.iloc[:0]).empty


def test_missing_cells_and_shared_configurations():
    table = grid(backbones=("clip", "mae"), expansions=(8, 16), ks=(64,))
    assert missing_cells(table) == []
    assert missing_cells(table.iloc[1:]) == [("clip", "x8 k64")]
    assert set(configuration_names(shared_configurations(table.iloc[1:]))) == {"x16 k64"}
    assert configuration_names(table.assign(k=np.nan)).tolist() == ["x8", "x16"] * 2


def test_means_count_configurations_once_however_many_seeds_they_have():
    table = grid(lambda b, x, k, s: x + s, backbones=("clip",), expansions=(8, 16), ks=(64,), seeds=(0, 2))
    three = table.iloc[[0, 1, 2]]  # x8 with seeds 0 and 2, x16 with seed 0
    assert backbone_means(three, ["M1"]).loc["clip", "M1"] == pytest.approx((9 + 16) / 2)
    assert backbone_stds(three, ["M1"]).loc["clip", "M1"] == pytest.approx(np.std([9, 16], ddof=1))
    assert np.isnan(backbone_means(three, ["retrieval/raw"]).loc["clip", "retrieval/raw"])


def test_configurations_without_a_k_count():
    table = grid(lambda b, x, k, s: x, ks=(64,)).assign(k=np.nan)
    assert backbone_means(table, ["M1"])["M1"].tolist() == pytest.approx([56 / 3] * 5)
