"""The figures printed in ViSAEBench agree with each other as far as they do, and our analyses recompute them."""

import math
from itertools import permutations

import numpy as np
import pytest

from sae_lightning.analysis.correlation import metric_tasks, spearman
from sae_lightning.analysis.grid import METRICS
from sae_lightning.analysis.hypotheses import HYPOTHESES, check_hypotheses
from sae_lightning.analysis.paper import read_paper
from sae_lightning.analysis.rank_consistency import compare
from tests.analysis.making import BACKBONES, of_backbones, ranked

PAPER = read_paper()
TABLE9 = PAPER["table9_rank_consistency"].set_index("metric")
# completed from the printed scores by the printed ρ, see test_missing_ranks_are_determined
RETRIEVAL, SEGMENTATION = "deit dinov2 siglip clip mae", "dinov2 clip deit siglip mae"


def rankings(family: str) -> dict[str, dict[str, float]]:
    """Values that rank the backbones as Table 9 does; of metrics of which less is better, less for the first."""
    found = {m: ranked(TABLE9.loc[m, family]) for m in METRICS}
    return {m: {b: v if METRICS[m].better else -v for b, v in of.items()} for m, of in found.items()}


def paper_grid():
    """Table 9's BatchTopK rankings and the raw scores of Table 6."""
    raw = PAPER["table6_cross_domain"]
    tasks = {f"accuracy:{d}/raw": dict(zip(of["backbone"], of["raw"], strict=True)) for d, of in raw.groupby("data")}
    return of_backbones({**rankings("batchtopk"), **tasks, "retrieval/raw": ranked(RETRIEVAL),
                         "segmentation:ade20k/raw": ranked(SEGMENTATION)})  # fmt: skip


def every_p():
    """Each (ρ, p, kind) that the paper prints, and where."""
    for name in ("hypotheses", "correlations", "table8_codes_lift", "table9_rank_consistency"):
        for row in PAPER[name].dropna(subset="p").to_dict("records"):
            yield pytest.param(row["rho"], row["p"], row["p_kind"], id=f"{name} {row['rho']:g}")


def of_rho(rho: float):
    """The correlation of five pairs without ties whose ρ is the given one."""
    rng = np.random.default_rng(0)
    orders = (spearman(np.arange(5), rng.permutation(5)) for _ in range(5000))
    return next(found for found in orders if math.isclose(found.rho, rho, abs_tol=1e-9))


@pytest.mark.parametrize(("rho", "p", "kind"), every_p())
def test_every_printed_p_is_of_the_kind_we_say(rho, p, kind):
    found = of_rho(rho)
    of_kind, other = (found.p, found.p_t) if kind == "exact" else (found.p_t, found.p)
    assert round(of_kind, 3) == p
    assert round(other, 3) != p


def test_one_printed_p_is_exact():
    kinds = [param.values[2] for param in every_p()]
    assert (kinds.count("exact"), kinds.count("t")) == (1, len(kinds) - 1)


@pytest.mark.parametrize("metric", METRICS)
def test_table_9_from_its_rankings(metric):
    first, second = (rankings(family)[metric] for family in ("batchtopk", "jumprelu"))
    order = list(BACKBONES)
    series = PAPER["table4_raw_moran"].set_index("backbone")["z"]
    found = compare(series.index.to_series().map(first), series.index.to_series().map(second), METRICS[metric].better)
    assert found["rho"] == pytest.approx(TABLE9.loc[metric, "rho"])
    assert round(found["p_t"], 3) == TABLE9.loc[metric, "p"]
    assert (found["p"] < 0.05) == (metric in ("M2", "M5"))  # six of seven by Student's t
    assert " ".join(found["first"]) == TABLE9.loc[metric, "batchtopk"]
    assert sorted(found["second"]) == sorted(order)


def test_every_printed_correlation_of_a_task_follows_from_rankings_and_raw_scores():
    found = metric_tasks(paper_grid()).set_index(["metric", "task"])["rho"]
    printed = PAPER["correlations"].query("task in @tasks", local_dict={"tasks": found.index.get_level_values(1)})
    assert len(printed) == 13
    for row in printed.to_dict("records"):
        assert found[row["metric"], row["task"]] == pytest.approx(row["rho"], abs=1e-9), row


@pytest.mark.parametrize(
    ("task", "order", "known"),
    [("retrieval", RETRIEVAL, "deit dinov2 siglip mae"), ("segmentation:ade20k", SEGMENTATION, "dinov2 clip")],
)
def test_missing_ranks_are_determined(task, order, known):
    """R@1 of CLIP and mIoU of three backbones are not printed: one order fits what is, and has all printed ρ."""
    means = PAPER["backbone_means"].query(f"quantity == '{task}/raw'").sort_values("value", ascending=False)
    assert " ".join(means["backbone"]) == known
    printed = PAPER["correlations"].query("task == @task", local_dict={"task": task}).set_index("metric")["rho"]
    of = rankings("batchtopk")

    def fits(names):
        places = [names.index(b) for b in known.split()]
        ends = names[:2] == ("dinov2", "clip") if task != "retrieval" else names[-1] == "mae"
        rhos = [spearman([of[m][b] for b in names], range(5, 0, -1)).rho for m in printed.index]
        return places == sorted(places) and ends and rhos == pytest.approx(list(printed))

    assert [" ".join(names) for names in permutations(BACKBONES) if fits(names)] == [order]
    assert len(printed) == 3


def test_the_hypotheses_come_out_as_printed():
    table = paper_grid()
    table["probing:inaturalist/codes"] = table["accuracy:inaturalist/raw"]  # not printed; has the ρ of the accuracy
    rows, printed = check_hypotheses(table).set_index("name"), PAPER["hypotheses"].set_index("name")
    for h in HYPOTHESES:
        assert (h.metric, h.tasks[0], h.threshold) == tuple(printed.loc[h.name, ["metric", "task", "threshold"]])
        assert rows.loc[h.name, "rho"] == pytest.approx(printed.loc[h.name, "rho"])
        assert round(rows.loc[h.name, "p_t"], 3) == printed.loc[h.name, "p"]
        assert rows.loc[h.name, "verdict"] == printed.loc[h.name, "verdict"]
        assert not rows.loc[h.name, "stand_in"]


def test_fvu_and_preservation_of_table_9_do_not_have_the_abstracts_correlation():
    ours = rankings("batchtopk")
    x, y = ([ours[m][b] for b in BACKBONES] for m in ("M2", "M3"))
    assert spearman(x, y).rho == pytest.approx(0.6)
    printed = PAPER["correlations"].set_index(["metric", "task"]).loc[("M2", "M3"), "rho"]
    assert printed == -0.7


def test_where_the_paper_disagrees_with_itself():
    means = PAPER["backbone_means"].set_index(["quantity", "backbone"])["value"]
    six = PAPER["table6_cross_domain"].set_index(["data", "backbone"])["preservation"]["inaturalist"]
    assert " ".join(six.sort_values(ascending=False).index) == "dinov2 mae siglip clip deit"
    assert TABLE9.loc["M6", "batchtopk"] == "siglip dinov2 clip mae deit"
    assert " ".join(means["M7"].sort_values().index) == "deit mae dinov2 clip siglip"
    assert TABLE9.loc["M7", "batchtopk"] == "deit dinov2 mae siglip clip"
    assert TABLE9.loc["M4", "batchtopk"].split()[-2:] == [
        "deit",
        "mae",
    ]  # P.1: DeiT is the worst, with an AUC below 0.5
    assert means["M4", "deit"] < 0.5


def test_the_shares_of_table_3_add_up():
    rows = PAPER["table3_variance"].query("without.isna()")
    sums = rows[["eta_backbone", "eta_hp", "eta_residual"]].sum(axis=1)
    assert sums.to_numpy() == pytest.approx(1, abs=0.0015)
    assert sorted(rows["metric"]) == list(METRICS)


def test_means_and_tables_say_the_same():
    means = PAPER["backbone_means"].set_index(["quantity", "backbone"])["value"]
    seven = PAPER["table7_absorption"].set_index(["alpha", "beta"])
    assert means["M7"].to_dict() == seven.loc[(0.8, 0.5)].to_dict()
    assert (seven.idxmin(axis=1) == "deit").sum() == 7
    raw = PAPER["table6_cross_domain"].set_index(["data", "backbone"])["raw"]
    for data, backbone in (("cub200", "dinov2"), ("cub200", "siglip"), ("dtd", "siglip"), ("dtd", "dinov2")):
        assert means[f"accuracy:{data}/raw", backbone] == raw[data, backbone]
    channels = PAPER["table4_raw_moran"].set_index("backbone")["raw_moran"]
    assert (means["M1"] / channels).drop("mae").mean() == pytest.approx(0.64, abs=0.005)


def test_lifts_are_codes_over_raw():
    means = PAPER["backbone_means"].set_index(["quantity", "backbone"])["value"]
    lifts = PAPER["lifts"].set_index(["task", "backbone"])["lift"]
    pairs = [
        ("retrieval", "deit", 0.001),
        ("accuracy:cub200", "dinov2", 0.001),
        ("segmentation:ade20k", "dinov2", 0.01),
    ]
    for task, backbone, within in pairs:
        found = means[f"{task}/codes", backbone] / means[f"{task}/raw", backbone]
        assert found == pytest.approx(lifts[task, backbone], abs=within)
    for row in PAPER["table8_codes_lift"].to_dict("records"):
        for side in ("lowest", "highest"):
            if (row["task"], row[side]) in lifts.index:
                assert round(lifts[row["task"], row[side]], 2) == row[f"{side}_lift"]


def test_names_are_those_of_the_grid():
    for name, table in PAPER.items():
        for column in {"backbone", "lowest", "highest"} & set(table if name == "table8_codes_lift" else ["backbone"]):
            if column in table:
                assert set(table[column].dropna()) <= {*BACKBONES, "all"}, name
        if "metric" in table:
            assert set(table["metric"]) <= set(METRICS), name


def test_a_folder_that_is_not_there_is_none(tmp_path):
    assert read_paper(tmp_path / "nowhere") is None
