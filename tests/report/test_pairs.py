"""Finding runs with and without MonoLoss from their configs, and the tables of what differs."""

import copy
import csv
import io
import statistics

import pytest

from sae_lightning.report.monoloss import as_csv, as_markdown, first_of_settings, groups_of, rows, shown
from sae_lightning.runs.identity import monoloss_of

CONFIG = {
    "data": {"name": "demo"}, "backbone": {"name": "dinov2"}, "sae": {"name": "batchtopk", "settings": {"k": 16}},
    "k": 16, "expansion": 8, "batch_size": 1024, "optimizer": {"lr": 1e-3}, "features": "patch",
    "trainer": {"max_epochs": 5, "devices": 1, "enable_progress_bar": True}, "paths": {"runs": "runs"}, "callbacks": {},
}  # fmt: skip


def run(seed=42, weight=None, mono=0.3, purity=0.2, judge="own", split="test", options=None, **changes):
    config = copy.deepcopy(CONFIG) | {"seed": seed} | changes
    config["sae"]["settings"]["k"] = config["k"]
    if weight is not None:
        config["callbacks"] = {
            "monoloss": {"_target_": "sae_lightning.training.monoloss.MonoLoss", "weight": weight, **(options or {})}
        }
    name = f"run-{seed}-{weight}-{'-'.join(map(str, changes))}"
    metrics = {"monoscore": mono, "r2": 0.9 - (weight or 0), "l0": 16.0, "monoscore_above_0.5": mono / 2}
    if purity is not None:
        metrics |= {"purity": purity, "weighted_purity": purity + 0.1}
    return {
        "name": name, "title": f"title of {name}", "split": split, "metrics": metrics,
        "cfg": {"seed": seed, "config": config, "data": "demo", "backbone": "dinov2 (tiny)", "features": "patch",
                "variant": "batchtopk", "expansion": 8, "k": 16},
        "similarity": {"key": judge, "title": f"by {judge}"},
    }  # fmt: skip


def test_the_weight_is_read_from_the_callbacks():
    assert monoloss_of({}) == (0.0, {})
    assert monoloss_of({"callbacks": None}) == (0.0, {})
    assert monoloss_of(run(weight=0.0)["cfg"]["config"]) == (0.0, {})
    assert monoloss_of({"callbacks": {"monoloss": None}}) == (0.0, {})
    assert monoloss_of({"callbacks": {"monoloss": {"weight": 0.3}}}) == (0.0, {})  # settings, but not switched on
    assert monoloss_of(run(weight=0.3, options={"pool": "max"})["cfg"]["config"]) == (0.3, {"pool": "max"})


def test_a_pair_differs_by_monoloss_alone():
    def paired(**changes):
        return groups_of([run(42), run(42, 0.3, **changes)])

    assert paired()
    assert paired(paths={"runs": "elsewhere"}, logger={"csv": {}}, trainer=CONFIG["trainer"] | {"devices": 2})
    for change in ({"optimizer": {"lr": 1e-4}}, {"trainer": CONFIG["trainer"] | {"max_epochs": 6}},
                   {"extract": {"dtype": "int8"}}, {"extract": {"precision": "bf16"}},
                   {"stream": {"unit": "images"}}, {"stream": {"damaged": "skip"}}):  # fmt: skip
        assert not paired(**change), change
    other = run(42, 0.3)
    other["cfg"]["config"]["callbacks"]["other"] = {"_target_": "y"}
    assert not groups_of([run(42), other])
    assert groups_of([run(42, 0.0), run(42, 0.3)])


def test_an_int8_run_does_not_displace_that_of_float16():
    without, fp16, int8 = run(42), run(42, 0.3, extract={"dtype": "float16"}), run(42, 0.3, extract={"dtype": "int8"})
    (group,) = groups_of([int8, without, fp16])
    assert [arm.runs[42]["name"] for arm in group.with_loss] == [fp16["name"]]


def test_runs_are_grouped_over_seeds_and_weights():
    runs = [
        run(42), run(43), run(42, 0.3), run(43, 0.3), run(44, 0.1), run(42, k=8), run(42, 0.1, expansion=16), run(44)
    ]  # fmt: skip
    (group,) = groups_of(runs)  # k = 8 has no run with it, expansion 16 none without
    assert sorted(group.without.runs) == [42, 43, 44]
    assert [(arm.weight, sorted(arm.runs)) for arm in group.with_loss] == [(0.1, [44]), (0.3, [42, 43])]
    assert group.title == runs[0]["title"]
    assert [group.label(arm) for arm in group.with_loss] == ["weight 0.1", "weight 0.3"]
    assert [r["name"] for r in group.first_pair(group.with_loss[0])] == [runs[7]["name"], runs[4]["name"]]
    assert groups_of([run(42), run(43), run(42, 0.0, k=8)]) == []


def test_options_are_named_where_the_weight_does_not_tell_them_apart():
    by_max, by_mean = {"pool": "max", "every": 1}, {"pool": "mean", "every": 1}
    runs = [run(), *(run(weight=w, options=o) for w, o in ((0.1, by_max), (0.1, by_mean), (0.2, by_max)))]
    (group,) = groups_of(runs)
    assert {group.label(arm) for arm in group.with_loss} == {
        "weight 0.1, pool max", "weight 0.1, pool mean", "weight 0.2"
    }  # fmt: skip


def test_the_table_has_means_deviations_and_paired_differences():
    without, with_loss = {42: 0.30, 43: 0.34, 44: 0.35}, {42: 0.50, 43: 0.52}
    (group,) = groups_of([run(s, None, m) for s, m in without.items()] + [run(s, 0.1, m) for s, m in with_loss.items()])
    table = {row["metric"]: row for row in rows(group, group.with_loss[0])}
    assert list(table) == ["monoscore", "r2", "l0", "purity", "weighted_purity", "monoscore_above_0.5"]
    row = table["monoscore"]
    assert row["without"] == pytest.approx((0.33, statistics.stdev(without.values()), 3))
    assert row["with"] == pytest.approx((0.51, statistics.stdev([0.50, 0.52]), 2))
    assert row["difference"] == pytest.approx((0.19, statistics.stdev([0.20, 0.18]), 2))  # over 42 and 43
    assert table["r2"]["difference"][0] == pytest.approx(-0.1)
    assert table["monoscore_above_0.5"]["title"] == "latents above 0.5"


def test_without_common_seeds_the_difference_is_that_of_the_means():
    (group,) = groups_of([run(42, None, 0.3), run(43, 0.1, 0.5)])
    row = rows(group, group.with_loss[0])[0]
    assert (row["without"], row["with"]) == ((0.3, None, 1), (0.5, None, 1))
    assert row["difference"] == (pytest.approx(0.2), None, 0)


def test_metrics_that_a_run_lacks_are_left_out():
    (group,) = groups_of([run(purity=None), run(weight=0.1, purity=None)])
    assert "purity" not in [row["metric"] for row in rows(group, group.with_loss[0])]
    assert "–" in as_markdown([group])


@pytest.mark.parametrize("change", [{"judge": "clip"}, {"split": "val"}])
def test_different_judges_or_splits_are_refused(change):
    with pytest.raises(ValueError, match=r"scored on the test split by by own.*cannot be compared.*one call"):
        groups_of([run(), run(weight=0.1, **change)])
    assert groups_of([run(), run(k=8, **change)]) == []  # no comparison, no objection


def test_csv_and_markdown():
    groups = groups_of([run(42, None, 0.3), run(43, None, 0.4), run(42, 0.1, 0.5)])
    lines = list(csv.DictReader(io.StringIO(as_csv(groups))))
    line = next(line for line in lines if line["metric"] == "monoscore")
    assert float(line["without_mean"]) == pytest.approx(0.35)
    assert float(line["without_sd"]) == pytest.approx(statistics.stdev([0.3, 0.4]))
    assert (line["without_seeds"], line["with_seeds"], line["with_sd"], line["monoloss"]) == (
        "2",
        "1",
        "",
        "weight 0.1",
    )
    assert float(line["difference_mean"]) == pytest.approx(0.2)
    assert (line["backbone"], line["similarity"]) == ("dinov2 (tiny)", "by own")
    table = as_markdown(groups).splitlines()
    assert len(table) == 3
    assert all(row.count("|") == table[0].count("|") for row in table)
    assert "0.350 ± 0.071 → 0.500 (+0.200)" in table[2]
    assert "2 / 1" in table[2]


def test_numbers_as_text():
    assert shown((0.12345, None, 1)) == "0.123"
    assert shown((0.12345, 0.01, 2), sign=True) == "+0.123 ± 0.010"
    assert shown((-0.2, None, 0), sign=True) == "-0.200"


def test_details_are_limited_to_the_first_runs_of_a_setting():
    runs = [run(s, w) for w in (None, 0.1) for s in (42, 43, 44)] + [run(42, k=8)]
    assert first_of_settings(runs, each=1, total=8) == [runs[0]["name"], runs[3]["name"], runs[6]["name"]]
    assert first_of_settings(runs, each=2, total=3) == [runs[0]["name"], runs[1]["name"], runs[3]["name"]]
    assert first_of_settings(runs, each=0, total=3) == []
