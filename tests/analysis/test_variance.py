"""Sums of squares equal those by hand in a balanced grid, and statsmodels' type II in any."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lightning.analysis.grid import METRICS, configuration_names
from sae_lightning.analysis.variance import FINE, TWO_WAY, anova, variance
from tests.analysis.making import BACKBONES, grid


def by_hand(table: pd.DataFrame, metric: str) -> dict[str, float]:
    """Shares of a complete grid's sum of squares from means of rows and columns."""
    cells = table.pivot(index="backbone", columns=["expansion", "k"], values=metric).to_numpy()
    total = ((cells - cells.mean()) ** 2).sum()
    backbone = cells.shape[1] * ((cells.mean(1) - cells.mean()) ** 2).sum()
    hp = cells.shape[0] * ((cells.mean(0) - cells.mean()) ** 2).sum()
    return {"backbone": backbone / total, "hp": hp / total, "residual": 1 - (backbone + hp) / total}


def type_two(table: pd.DataFrame, metric: str, formula: str, typ: int = 2) -> pd.DataFrame:
    data = table.assign(y=table[metric], configuration=configuration_names(table))
    return sm.stats.anova_lm(smf.ols(f"y ~ {formula}", data).fit(), typ=typ)


def test_a_balanced_grid_by_hand_and_by_statsmodels_of_either_type():
    table = grid()
    found, expected = anova(table, "M1"), by_hand(table, "M1")
    assert found.effects["backbone"].eta == pytest.approx(expected["backbone"])
    assert found.effects["hp"].eta == pytest.approx(expected["hp"])
    assert found.eta_residual == pytest.approx(expected["residual"])
    assert (found.balanced, found.missing, found.note, found.n) == (True, 0, "", 30)
    for typ in (1, 2):
        rows = type_two(table, "M1", "C(backbone) + C(configuration)", typ)
        for name, row in (("backbone", "C(backbone)"), ("hp", "C(configuration)")):
            effect = found.effects[name]
            assert (effect.ss, effect.df) == pytest.approx(tuple(rows.loc[row, ["sum_sq", "df"]]))
            assert (effect.F, effect.p) == pytest.approx(tuple(rows.loc[row, ["F", "PR(>F)"]]))


def test_the_finer_split_divides_the_configurations_share():
    table = grid()
    fine, coarse = anova(table, "M4", FINE), anova(table, "M4")
    rows = type_two(table, "M4", "C(backbone) + C(expansion) * C(k)")
    named = {"backbone": "C(backbone)", "expansion": "C(expansion)", "k": "C(k)", "interaction": "C(expansion):C(k)"}
    for name, row in named.items():
        assert fine.effects[name].ss == pytest.approx(rows.loc[row, "sum_sq"])
        assert fine.effects[name].p == pytest.approx(rows.loc[row, "PR(>F)"])
    of_hp = sum(fine.effects[name].ss for name in ("expansion", "k", "interaction"))
    assert of_hp == pytest.approx(coarse.effects["hp"].ss)
    assert sum(e.eta for e in fine.effects.values()) + fine.eta_residual == pytest.approx(1)


@settings(deadline=None, max_examples=8)
@given(st.sets(st.integers(0, 29), min_size=1, max_size=5), st.integers(0, 6))
def test_an_incomplete_grid_equals_statsmodels_type_two(lost, metric):
    table, name = grid().drop(index=list(lost)), list(METRICS)[metric]
    found, rows = anova(table, name), type_two(table, name, "C(backbone) + C(configuration)")
    hp = found.effects["hp"]
    assert found.effects["backbone"].ss == pytest.approx(rows.loc["C(backbone)", "sum_sq"])
    assert (hp.ss, hp.F) == pytest.approx(tuple(rows.loc["C(configuration)", ["sum_sq", "F"]]))
    whole = table["backbone"].nunique() * configuration_names(table).nunique()
    assert found.missing == whole - len(table)
    assert found.balanced == (found.missing == 0)


def test_a_run_without_the_metric_is_a_missing_cell():
    table = grid()
    without = table.drop(index=3)
    table.loc[3, "M1"] = np.nan
    found = anova(table, "M1")
    assert (found.missing, found.balanced, found.n) == (1, False, 29)
    assert found.effects == anova(without, "M1").effects
    assert anova(table, "M2").balanced


def test_a_configuration_that_no_backbone_has_leaves_the_other_interactions():
    table = grid()
    found = anova(table[~((table["expansion"] == 32) & (table["k"] == 128))], "M1", FINE)
    assert found.effects["interaction"].df == 1
    assert found.effects["interaction"].ss >= 0


def test_seeds_are_repetitions_and_go_into_the_residual():
    table = grid(seeds=(0, 1))
    found = anova(table, "M3")
    assert (found.balanced, found.df_residual) == (True, 60 - 1 - 4 - 5)
    assert not anova(table.iloc[1:], "M3").balanced
    assert anova(table.iloc[1:], "M3").missing == 0


@pytest.mark.parametrize(("scale", "origin"), [(1e-3, 0.0), (-7.0, 100.0)])
def test_shares_do_not_depend_on_scale_and_origin(scale, origin):
    table = grid(expansions=(8, 16), ks=(64,))
    moved = table.assign(M1=table["M1"] * scale + origin)
    given = anova(table, "M1").effects
    for name, effect in anova(moved, "M1").effects.items():
        assert (effect.eta, effect.p) == pytest.approx((given[name].eta, given[name].p))


def test_a_grid_that_only_backbones_change():
    found = anova(grid(lambda b, *_: BACKBONES.index(b)), "M1")
    assert found.effects["backbone"].eta == pytest.approx(1)
    assert (found.eta_residual, found.effects["backbone"].F, found.effects["backbone"].p) == (0, np.inf, 0)
    assert found.effects["hp"].eta == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("table", "note"),
    [
        (grid(lambda *_: 0.4), "constant"),
        (grid(M1=np.nan), "no value"),
        (grid().iloc[:0], "no value"),
        (grid().iloc[:1], "one value"),
        (grid().drop(columns="M1"), "no value"),
    ],
)
def test_metrics_without_variance_say_so(table, note):
    found = anova(table, "M1")
    assert found.note == note
    assert all(np.isnan(effect.eta) for effect in found.effects.values())
    assert np.isnan(found.eta_residual)


def test_a_factor_of_one_level_is_left_out():
    found = anova(grid(backbones=("clip",)), "M1")
    assert found.note == "one backbone only; no runs left for a residual"
    assert np.isnan(found.effects["backbone"].eta)
    assert found.effects["hp"].eta == pytest.approx(1)
    assert anova(grid(expansions=(8,), ks=(64,)), "M1").note.startswith("one configuration only")
    assert anova(grid(ks=(64,)), "M1", FINE).note == "one k only"


def test_backbones_with_configurations_of_their_own_cannot_be_told_from_them():
    table = pd.concat([grid(backbones=("clip",), expansions=(8,)), grid(backbones=("mae",), expansions=(16,))])
    found = anova(table, "M1")
    assert "backbone cannot be told apart" in found.note
    assert np.isnan(found.effects["backbone"].eta)


def test_the_table_has_a_row_a_metric_and_can_leave_backbones_out():
    table = grid()
    rows = variance(table).set_index("metric")
    assert list(rows.index) == list(METRICS)
    assert rows.loc["M5", "eta_hp"] == anova(table, "M5").effects["hp"].eta
    fewer = variance(table, ["M1"], without=["mae"]).iloc[0]
    assert fewer["n"] == 24
    assert fewer["eta_backbone"] == anova(table[table["backbone"] != "mae"], "M1", TWO_WAY).effects["backbone"].eta
