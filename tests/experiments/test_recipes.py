"""The recipes' plan and the rule of their table; nothing is trained."""

import math

import pandas as pd
import pytest

from experiments.recipes.plan import SETS, places, planned
from experiments.recipes.table import CLAIMS, METRICS, Claim, claims, judged, means, verdict
from sae_lightning.runs.packs import stream_key
from sae_lightning.settings.check import check_settings
from tests.configs import composed

ONE = next(iter(SETS))
BASE, OURS = ("MonoLoss", "topk", "without"), ("MonoLoss", "topk", "with")


@pytest.mark.parametrize(("features", "starts"), [*((name, False) for name in SETS), (ONE, True)])
def test_every_planned_run_is_a_whole_config_and_no_two_are_one(tmp_path, features, starts):
    where = places(*(tmp_path / name for name in ("data", "encoders", "stores", "runs")), features)
    found = []
    for run in planned((0,), (features,), starts):
        cfg = composed("config", *where, *run.overrides)
        check_settings("train", cfg)
        assert str(tmp_path / "encoders") in str(cfg.backbone.published)
        found.append(cfg)
    assert len({str(cfg) for cfg in found}) == len(found)
    assert len({stream_key(cfg) for cfg in found}) == (1 if starts else 2)  # packs: MonoLoss, and the rest


def test_all_of_a_seed_come_before_the_next_and_every_claim_has_its_arms():
    plan = planned()
    assert [run.seed for run in plan] == sorted(run.seed for run in plan)
    arms = {(run.recipe, run.variant, run.arm) for run in plan}
    assert {arm for claim in CLAIMS for arm in (claim.other, claim.ours, claim.second or claim.ours)} <= arms


@pytest.mark.parametrize(
    ("differences", "sign", "expected"),
    [
        ([0.1, 0.11, 0.09], 1, "reproduced"),
        ([-0.1, -0.11, -0.09], -1, "reproduced"),
        ([-0.1, -0.11, -0.09], 1, "the opposite"),
        ([0.1, 0.11, -0.001], 1, "not reproduced"),  # one seed of another sign
        ([0.01, 0.2, 0.02], 1, "not reproduced"),  # of one sign, but less than two standard errors from 0
        ([0.001, 0.001, 0.001], 1, "not reproduced"),  # too small to matter
        ([0.1, 0.11], 1, "not testable (2 of 3 seeds)"),
    ],
)
def test_a_claim_counts_when_every_seed_and_their_mean_say_so(differences, sign, expected):
    assert verdict(differences, sign) == expected


def runs(*arms):
    """Runs on one set, three seeds an arm, each with the same metrics but for those given."""
    usual = dict.fromkeys(METRICS, 0.5) | {"l0": 32.0, "dead_share": 0.0}
    return pd.DataFrame(
        {
            "features": ONE,
            "recipe": arm[0],
            "variant": arm[1],
            "arm": arm[2],
            "seed": seed,
            **usual,
            **given,
            "run": "x",
        }
        for arm, given in arms
        for seed in range(3)
    )


def test_arms_must_be_equally_sparse_and_an_ingredient_must_have_something_to_do():
    claim = Claim("", "purity", 1, BASE, OURS, "")
    spread, said = judged(runs((BASE, {}), (OURS, {"purity": 0.7})), claim, ONE)
    assert spread == pytest.approx((0.2, 0.0))
    assert said == "reproduced"
    apart = runs((BASE, {}), (OURS, {"purity": 0.7, "l0": 20.0}))
    assert judged(apart, claim, ONE)[1] == "not testable (L0 32.0 → 20.0)"
    dying = Claim("", "purity", 1, BASE, OURS, "", needs_dead=True)
    assert judged(runs((BASE, {}), (OURS, {"purity": 0.7})), dying, ONE)[1] == "not testable (0.0 % dead without)"
    some = runs((BASE, {"dead_share": 0.3}), (OURS, {"purity": 0.7}))
    assert judged(some, dying, ONE)[1] == "reproduced"
    nothing, said = judged(runs((BASE, {})), claim, ONE)
    assert math.isnan(nothing.mean)
    assert said == ""


def test_where_l0_differs_an_arm_is_judged_at_its_own_against_a_line_through_two():
    ends = [{"explained_variance": 0.6, "l0": 100.0}, {"explained_variance": 0.8, "l0": 200.0}]
    second = ("MonoLoss", "topk", "second")
    ours = {"explained_variance": 0.91, "l0": 400.0}  # where the line has 0.9
    found = runs((BASE, ends[0]), (second, ends[1]), (OURS, ours))
    claim = Claim("", "explained_variance", 1, BASE, OURS, "", equal_l0=False, second=second)
    spread, said = judged(found, claim, ONE)
    assert spread.mean == pytest.approx(0.01)
    assert said == "reproduced"
    ends = [{"purity": 0.4, "l0": 100.0}, {"purity": 0.3, "l0": 200.0}]
    found = runs((BASE, ends[0]), (second, ends[1]), (OURS, {"purity": 0.45, "l0": 50.0}))
    claim = Claim("", "purity", 1, BASE, OURS, "", equal_l0=False, second=second)
    assert judged(found, claim, ONE)[0].mean == pytest.approx(-0.05)  # where the line has 0.5


def test_the_tables_have_a_row_a_claim_and_an_arm():
    found = runs((BASE, {}), (OURS, {"purity": 0.7, "monoscore": 0.4}))
    rows = {(row[0], row[1]): row[2] for row in claims(found).rows}
    assert rows == {
        ("MonoLoss on topk", "MonoScore ↑"): "-0.100 ± 0.000 the opposite",
        ("MonoLoss on topk", "of scored ↑"): "0.000 ± 0.000 not reproduced",
        ("MonoLoss on topk", "purity ↑"): "+0.200 ± 0.000 reproduced",
    }
    assert [row[3:5] for row in means(found).rows] == [["without", 3], ["with", 3]]
