"""The page over a grid, from run folders written here: its sections, figures, tables, and what it says is missing."""

import csv
import importlib
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir

from sae_lightning.analysis import grid as grids
from sae_lightning.analysis.grid import METRICS, ORDER, colours, load
from sae_lightning.analysis.hypotheses import correlation_map, hypotheses
from sae_lightning.analysis.overview import means_table, normalised, what_was_run
from sae_lightning.analysis.paper import Paper, read_paper
from sae_lightning.analysis.rank_consistency import families
from sae_lightning.analysis.recommendations import Route, flowchart, guide
from sae_lightning.analysis.tables import cross_domain, raw_moran, thresholds
from sae_lightning.analysis.variance import decomposition, variance
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.part import headlines
from sae_lightning.registry import Registry
from sae_lightning.rendering import figures
from sae_lightning.rendering.figures import limits_of
from sae_lightning.rendering.page import plural, prose, some
from sae_lightning.rendering.table import Head, Table
from sae_lightning.report.grid import OURS, analyses, build_grid
from sae_lightning.runs.scores import TABLE, put_scores

BUDGETS, EXPANSIONS, KS = (1, 4, 128, 256), (8, 16), (16, 32)
SEVEN = {column.headline: column.metric for column in headlines()}
CONF = Path(__file__).parents[2] / "conf"
PLACES = {"dinov2": 4, "deit": 3, "clip": 2, "siglip": 1, "mae": 0}  # of M1; the raw tasks' order is the same


def write_run(
    folder, backbone, expansion, k, variant="batchtopk", layer=4, seed=42, split="test", tasks=True, **shifts
):
    """An evaluated run whose scores are a place of its backbone, plus effects of its expansion and k."""
    name = f"{variant}-{backbone}-x{expansion}-k{k}-L{layer}-s{seed}"
    run, place = folder / name, PLACES[backbone]
    run.mkdir(parents=True)
    (run / "cfg.json").write_text(json.dumps({
        "schema": 2, "variant": variant, "d_in": 128, "d_sae": 128 * expansion, "k": k, "expansion": expansion,
        "seed": seed, "backbone": f"{backbone} (tiny)", "layer": layer, "data": "demo", "features": "patch",
        "config": {"backbone": {"name": backbone}, "callbacks": {}},
    }))  # fmt: skip
    (run / "scores.json").write_text(json.dumps({"split": split}))
    m1 = 0.1 * place + 0.01 * (expansion == 16) + shifts.get("moran", 0.0)
    scores = [
        Score("moran", m1), Score("fvu", 0.3 - 0.02 * place - 0.003 * k), Score("preservation", 0.9 + 0.01 * place),
        Score("monosemanticity", 0.2 + 0.01 * ((3 * place) % 5)), Score("l0", k + shifts.get("l0", 0.1)),
        Score("dead_share", 0.05), Score("channel_moran", 0.5 + 0.1 * place), Score("channel_moran_null", -0.016),
        *(Score(f"sparse_probing_{name}", 0.6 + 0.02 * place + 0.01 * b**0.5, f"k={b}")
          for name in ("area", "accuracy") for b in BUDGETS),
        *(Score("absorption", 0.1 * abs(place - 3) + alpha / 10 + beta / 100, f"alpha={alpha},beta={beta}")
          for alpha, beta in product((0.7, 0.8, 0.9), (0.3, 0.5, 0.7))),
    ]  # fmt: skip
    if tasks:
        for inputs, gain in (("raw", 0.0), ("reconstruction", -0.01), ("codes", 0.01)):
            scores += [
                Score(f"retrieval_{inputs}", 0.3 + 0.05 * place + gain, "k=1"),
                Score("segmentation_miou", 0.2 + 0.02 * place + gain, f"data=mosaic,input={inputs}"),
                Score(f"cross_domain_accuracy_{inputs}", 0.7 + 0.02 * place + gain, "data=digits"),
            ]  # fmt: skip
        scores.append(Score("cross_domain_preservation", 0.95 + 0.001 * place, "data=digits"))
        scores.append(Score("cross_domain_sparse_probing_auc", 0.9 + 0.01 * place, "data=digits,k=128"))
    put_scores(run, "part", split, "key", scores)
    return run


def write_grid(folder, **changes):
    return [write_run(folder, b, e, k, **changes) for b, e, k in product(PLACES, EXPANSIONS, KS)]


@pytest.fixture
def _undrawn(monkeypatch):
    """Figures are made but not drawn, for tests of the tables and files beside them."""
    monkeypatch.setattr(figures, "svg", lambda figure: "<svg></svg>")


def tables_of(page):
    """Each csv beside the page by name, as rows of text."""
    folder = page.with_name(f"{page.stem}-tables")
    return {path.stem: list(csv.reader(path.open())) for path in folder.glob("*.csv")}


class Parsed(HTMLParser):
    """What is nested in what, and every attribute that could load something."""

    VOID = frozenset({"meta", "br", "img", "link", "hr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        of = dict(attrs)
        self.loads += [of[name] for name in ("src", "data", "srcset") if name in of]
        self.loads += [of["href"]] if tag in ("link", "image") and "href" in of else []
        self.links += [of["href"]] if tag == "a" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A complete grid with a second variant, a random dictionary, and an early layer of two backbones."""
    folder = tmp_path_factory.mktemp("grid")
    runs = write_grid(folder / "runs")
    runs += [write_run(folder / "runs", b, 8, 16, "jumprelu", moran=0.05, l0=5 if b == "mae" else 0) for b in PLACES]
    runs += [write_run(folder / "runs", b, 8, 16, layer=1, moran=-0.2) for b in ("dinov2", "clip")]
    runs.append(write_run(folder / "runs", "mae", 8, 16, "random", moran=-0.125))
    return build_grid(runs, folder / "out" / "grid.html")


def test_lifts_of_a_grid_are_over_its_random_dictionary(page):
    head, *lines = tables_of(page)["lift"]
    lifts = {line[0]: float(line[next(i for i, title in enumerate(head) if title.startswith("M1"))]) for line in lines}
    expected = {"batchtopk-mae-x8-k16-L4-s42": 0.125, "batchtopk-mae-x16-k16-L4-s42": 0.135}  # the second: M1 of x16
    assert lifts == pytest.approx(expected)


@pytest.mark.slow
def test_every_section_has_something_and_every_link_leads_somewhere(page):
    parsed = Parsed(page.read_text())
    assert parsed.open == []
    anchors = [link[1:] for link in parsed.links if link.startswith("#")]
    assert len(anchors) == len(OURS)
    assert all(f'<section id="{name}">' in page.read_text() for name in anchors)
    files = [link for link in parsed.links if not link.startswith("#")]
    assert len(files) == 2 * len(tables_of(page)) > 0
    assert all((page.parent / link).is_file() for link in files)
    assert 'class="lacks"' not in page.read_text()


@pytest.mark.slow
def test_the_page_opens_with_its_findings(page):
    opening = page.read_text().partition('<nav class="panel contents">')[0]
    assert "First by the mean over its SAEs: " in opening
    assert "M1 (" in opening
    assert "M5 (" not in opening  # of judges that differ
    assert re.search(r"Of hypotheses H1–H4: \d (supported|not)", opening)
    assert opening.count('<div class="panel"><b>') == 3


@pytest.mark.slow
def test_the_page_loads_nothing(page):
    text = page.read_text()
    assert Parsed(text).loads == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


@pytest.mark.slow
def test_all_figures_are_well_formed(page):
    figures = re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL)
    assert len(figures) >= 15
    for figure in figures:
        ElementTree.fromstring(figure)


@pytest.mark.slow
def test_shares_of_variance_are_those_of_the_scores(page):
    rows = {row[0]: row for row in tables_of(page)["variance"][1:]}
    values = np.array([[0.1 * p + 0.01 * (e == 16) for e, _ in product(EXPANSIONS, KS)] for p in PLACES.values()])
    total = ((values - values.mean()) ** 2).sum()
    between = 4 * ((values.mean(1) - values.mean()) ** 2).sum()
    assert [float(v) for v in rows["M1 Moran's I"][1:4]] == pytest.approx([between / total, 1 - between / total, 0])
    assert [float(v) for v in rows["M1 Moran's I"][4:]] == [0.996, 0.002, 0.002]


@pytest.mark.slow
def test_our_figures_and_the_papers_stand_under_different_headings(page):
    assert tables_of(page)["hypotheses"][0][4] == "here: tiny ViT, 128 wide, demo: ρ"
    assert "paper: ViT-B, ImageNet-1K: ρ" in tables_of(page)["hypotheses"][0]
    rows = {row[0]: row for row in tables_of(page)["hypotheses"][1:]}
    assert rows["H1"][2:9] == ["mosaic mIoU (stand-in)", "0.7", "1", str(2 / 120), "0", "5", "supported"]
    assert rows["H1"][9:] == ["ade20k mIoU", "0.9", "0.037", "supported"]


@pytest.mark.slow
def test_thresholds_name_the_backbone_that_absorbs_least(page):
    rows = tables_of(page)["thresholds"]
    assert len(rows) == 10
    assert {row[7] for row in rows[1:]} == {"deit (tiny)"}
    assert [row[-1] for row in rows[1:]] == ["DeiT"] * 7 + ["MAE"] * 2
    assert "deit (tiny) has the lowest absorption, ties included, in 9 of 9 settings" in page.read_text()


@pytest.mark.slow
def test_layers_and_families_compare_runs_that_differ_by_nothing_else(page):
    layers = {row[0]: [float(v) for v in row[1:] if v] for row in tables_of(page)["layers"][1:]}
    assert layers["M1 Moran's I"] == pytest.approx([0.2, 0.4, 0.2, 0.0, 0.2, 0.2])
    ranks = {row[0]: row for row in tables_of(page)["ranks-jumprelu"][1:]}
    assert ranks["M1 Moran's I"][1:3] == ["dinov2, deit, clip, siglip"] * 2  # mae's L0 is off its target
    assert "jumprelu-mae-x8-k16-L4-s42 (L0 21.0, aimed at 16)" in page.read_text()
    differences = {row[0]: row for row in tables_of(page)["differences-jumprelu"][1:]}
    assert float(differences["M1 Moran's I"][1]) == pytest.approx(0.05)


@pytest.mark.slow
def test_the_flowchart_takes_the_best_backbone_by_the_scores(page):
    rows = {row[0]: row for row in tables_of(page)["recommendations"][1:]}
    assert rows["dense spatial prediction"][2] == "dinov2 (tiny) 0.280, next deit (tiny) 0.260"
    assert rows["texture and material"][1:] == ["–", "–", "–", "–", "SigLIP", "SigLIP", "M4, ρ = 1.00"]
    assert "What is the SAE for?" in page.read_text()
    assert "every task: siglip (tiny), mae (tiny)" in page.read_text()


@pytest.mark.slow
def test_a_grid_says_which_cells_lack_and_what_makes_them(tmp_path):
    grid = load([run for run in write_grid(tmp_path) if run.name != "batchtopk-mae-x16-k32-L4-s42"])
    section = what_was_run(grid, Paper({}))
    says = " ".join(section.about)
    assert "19 runs of batchtopk: 5 backbones × 2 expansions × 2 values of k × 1 seed" in says
    assert "One cell lacks a run with scores: mae (tiny) x16 k32." in says
    assert "`python train.py -m experiment=visaebench_grid`" in says
    assert [row[-1] for row in section.tables[0].rows] == [0, 0, 0, 1, 0, 0]
    assert "cells lack a value" in " ".join(decomposition(grid, Paper({})).about)


def test_one_run_makes_a_page_that_says_what_is_missing(tmp_path):
    runs = [write_run(tmp_path / "runs", "clip", 8, 16, tasks=False)]
    text = build_grid(runs, tmp_path / "grid.html").read_text()
    for sentence in (
        "A profile compares backbones; here is one.", "No run has scores of a downstream task",
        "A decomposition needs several backbones", "No backbone has runs on two layers",
        "All runs are of batchtopk: train a second variant", "No run has probes on another data set",
        "All runs have one expansion and one k", "not testable: there are no scores of retrieval",
    ):  # fmt: skip
        assert sentence in text
    assert Parsed(text).open == []


@pytest.mark.parametrize("section", [means_table, raw_moran, hypotheses, thresholds, cross_domain, families, guide])
def test_without_the_papers_files_only_our_figures_are_shown(section, tmp_path):
    runs = [write_run(tmp_path, b, 8, 16, variant) for b in PLACES for variant in ("batchtopk", "jumprelu")]
    grid = load(runs)
    ours, both = (section(grid, paper) for paper in (Paper({}), Paper(read_paper())))
    texts = [str(table) for table in ours.tables]
    assert texts
    assert not [text for text in texts if "paper" in text]
    assert any("paper" in str(table) for table in both.tables)


def test_each_data_set_has_its_shares_of_variance_and_its_ranking(tmp_path):
    grid = load([write_run(tmp_path, b, e, 16) for b in PLACES for e in EXPANSIONS])
    (found,) = [table for table in cross_domain(grid, Paper({})).tables if table.name == "cross-domain-sets"]
    assert [row[0] for row in found.rows] == ["digits", "mean"]
    shares = variance(grid.main.assign(kept=[
        row["accuracy:digits/reconstruction"] / row["accuracy:digits/raw"] for _, row in grid.main.iterrows()
    ]), of=["kept"])  # fmt: skip
    assert found.rows[0][1] == found.rows[1][1] == pytest.approx(shares["eta_backbone"].item())
    assert sorted(found.rows[0][-1].split(", ")) == sorted(grid.titles)


@pytest.mark.usefixtures("_undrawn")
def test_runs_without_scores_are_left_out_and_counted(tmp_path):
    runs = [write_run(tmp_path / "runs", b, 8, 16) for b in ("clip", "mae")]
    (runs[0] / "scores.json").unlink()
    assert "Left out: 1 run without scores." in build_grid(runs, tmp_path / "grid.html").read_text()
    (runs[1] / "scores.json").unlink()
    with pytest.raises(FileNotFoundError, match="None of 2 runs has scores; make them with evaluate"):
        load(runs)


def test_runs_scored_on_different_splits_are_refused(tmp_path):
    runs = [write_run(tmp_path, "clip", 8, 16), write_run(tmp_path, "mae", 8, 16, split="val")]
    with pytest.raises(ValueError, match="different splits \\(test, val\\)"):
        load(runs)


@pytest.mark.slow
@pytest.mark.usefixtures("_undrawn")
def test_two_pages_keep_their_tables_apart_and_an_old_pages_tables_go(tmp_path):
    runs = [write_run(tmp_path / "runs", b, 8, 16) for b in ("clip", "mae")]
    build_grid(runs, tmp_path / "a.html", tmp_path / "no paper")
    build_grid(runs[:1], tmp_path / "b.html", tmp_path / "no paper")
    assert tables_of(tmp_path / "a.html").keys() - tables_of(tmp_path / "b.html").keys() >= {"profiles"}
    build_grid(runs[:1], tmp_path / "a.html", tmp_path / "no paper")
    assert tables_of(tmp_path / "a.html").keys() == tables_of(tmp_path / "b.html").keys()


@pytest.mark.slow
@pytest.mark.usefixtures("_undrawn")
def test_seeds_of_a_cell_are_averaged_and_their_spread_is_shown(tmp_path):
    grid = load(write_grid(tmp_path) + write_grid(tmp_path, seed=43, moran=0.02))
    spread = {row[0]: row for row in decomposition(grid, Paper({})).tables[-1].rows}
    assert spread["M1 Moran's I"][1] == pytest.approx(0.02 / 2**0.5)
    means = {row[0]: row for row in means_table(grid, Paper({})).tables[0].rows}
    assert means["mae (tiny)"][1].mean == pytest.approx(0.015)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["M2", "M4"])
@pytest.mark.usefixtures("_undrawn")
def test_a_metric_without_scores_leaves_a_page(name, tmp_path):
    """Whatever part of the evaluation is missing, every section has figures, tables or a sentence."""
    runs = [write_run(tmp_path, b, e, 16) for b in list(PLACES)[:3] for e in EXPANSIONS]
    for run in runs:
        table = pq.read_table(run / TABLE)
        kept = [metric != SEVEN[name] for metric in table["metric"].to_pylist()]
        pq.write_table(table.filter(kept), run / TABLE)
    grid = load(runs)
    for section in analyses(grid, tmp_path / "no paper"):
        assert section.pictures or section.tables or section.missing
    titles = [head.title for head in means_table(grid, Paper({})).tables[0].heads]
    assert [m for m in METRICS if METRICS[m].title not in titles] == [name]


@pytest.mark.usefixtures("_undrawn")
def test_an_analysis_of_another_package_follows_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "SECTIONS", Registry("section"))
    mine = grids.section("Mine")(lambda grid, paper: [f"{len(grid.main)} run", Table("mine", "", [Head("a")], [[1]])])
    grid = load([write_run(tmp_path, "clip", 8, 16)])
    assert (mine(grid, Paper({})).title, mine(grid, Paper({})).about) == ("Mine", ["1 run"])
    monkeypatch.undo()
    monkeypatch.setitem(grids.SECTIONS, "Mine", mine)
    assert [made.title for made in analyses(grid)] == [*OURS, "Mine"]


def test_normalised_scores_are_1_for_the_best_and_0_for_the_worst():
    means = pd.DataFrame({"M1": [0.1, 0.3, 0.2], "M2": [0.1, 0.3, 0.2], "M7": [0.5, 0.5, 0.5]}, index=list("abc"))
    scores = normalised(means, {m: METRICS[m].better for m in means})
    assert scores["M1"].tolist() == pytest.approx([0, 1, 0.5])
    assert scores["M2"].tolist() == pytest.approx([1, 0, 0.5])
    assert scores["M7"].isna().all()


def test_a_backbone_has_its_colour_whichever_others_there_are():
    frame = pd.DataFrame({"backbone": [*ORDER, "other"], "title": [*ORDER, "other (tiny)"]})
    of_all = colours(frame)
    assert len(set(of_all.values())) == 6
    assert colours(frame.iloc[[2]]) == {"siglip": of_all["siglip"]}


def test_the_map_of_correlations_writes_each_number_and_frames_what_is_named():
    rho = pd.DataFrame([[0.9, -0.3], [np.nan, 1.0]], index=["M1", "M2"], columns=["retrieval", "digits"])
    framed, plain = correlation_map(rho, [("M1", "retrieval"), ("M9", "retrieval")]), correlation_map(rho)
    for text in ("+0.90", "-0.30", "+1.00", "–", "retrieval", "M2"):
        assert f">{text}</text>" in plain
    assert framed.count("<path") == plain.count("<path") + 1


def test_the_flowchart_has_a_column_for_each_route():
    text = flowchart([Route("a task", "a backbone", "a metric", "a note"), Route("b task", "b", "c")], "start")
    for word in ("start", "a task", "a backbone", "a metric", "a note", "b task"):
        assert f">{word}</text>" in text


@pytest.mark.parametrize(
    ("values", "limits"),
    [([0.0, 1.0], (-0.04, 1.04)), ([np.nan], (0, 1)), ([2.0], (2 - 4e-5, 2 + 4e-5))],
)
def test_limits_leave_a_margin_around_finite_values(values, limits):
    assert limits_of(values) == pytest.approx(limits)


def test_the_paper_says_nothing_where_its_files_are_not_there():
    paper = Paper({})
    assert not any((paper.variance(), paper.hypotheses(), paper.thresholds(), paper.lifts(), paper.ranks(),
                    paper.correlations(), paper.means(), paper.raw_moran(), paper.cross_domain()))  # fmt: skip


def test_prose_escapes_and_shows_code():
    assert prose("a < b, `make grid` & `x`") == "a &lt; b, <code>make grid</code> &amp; <code>x</code>"
    assert [plural(1, "run"), plural(2, "run"), plural(3, "k", "values of k")] == ["1 run", "2 runs", "3 values of k"]
    assert some(list("abcd"), 2) == "a, b and 2 more"


@pytest.mark.slow
@pytest.mark.usefixtures("_undrawn")
def test_the_command_writes_the_grids_page_of_the_runs_that_match(tmp_path, monkeypatch):
    for backbone in ("clip", "mae"):
        (write_run(tmp_path / "runs", backbone, 8, 16) / "result.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module("report").main.__wrapped__
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for asked in ("*-clip-*", "[batchtopk-clip-*,batchtopk-mae-*]"):
            main(compose("report", [f"grid={asked}"]))
            backbones = [row[0] for row in tables_of(tmp_path / "reports" / "grid.html")["means"][1:]]
            assert backbones == ["clip (tiny)", "mae (tiny)"][: 1 + asked.startswith("[")]
        main(compose("report", ["grid=*", "out=elsewhere/page.html"]))
    assert (tmp_path / "elsewhere" / "page.html").is_file()
    assert not (tmp_path / "reports" / "report.html").exists()
