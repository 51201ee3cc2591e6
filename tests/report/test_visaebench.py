"""The report's section on ViSAEBench, from rows and tensors written here: tables, figures, files and pictures."""

import base64
import csv
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sae_lightning.data import ImageData
from sae_lightning.evaluation.by_latent import BANDS
from sae_lightning.files import write_tensors
from sae_lightning.metrics.base import Score
from sae_lightning.metrics.part import Column
from sae_lightning.metrics.sparsity import HISTOGRAMS, ActivationHistogram
from sae_lightning.rendering.pictures import GAP, SILENT, heat
from sae_lightning.rendering.table import number
from sae_lightning.report import latents as report_latents
from sae_lightning.report import page as report_page
from sae_lightning.report.benchmark import (
    Scored,
    main_columns,
    raw_note,
    released_columns,
    scored_runs,
    scores_csv,
    table,
    topics,
)
from sae_lightning.report.figures import coarse, encoding, histograms, moran, probing, recovery
from sae_lightning.report.page import benchmark, build, files, load_runs, tell_apart
from sae_lightning.runs.run import BAND_IMAGES, LATENTS, TOP_IMAGES
from sae_lightning.runs.scores import put_scores, read_rows
from sae_lightning.saes import SparseCodes

NAN = float("nan")
BUDGETS = (1, 2, 4, 128, 256)
D_SAE, GRID, IMAGES = 40, 4, 12
GROUPS = ("most used", "high Moran", "mean Moran", "low Moran")
SEVEN = ("moran", "fvu", "preservation", "area", "monosemanticity", "cross_domain", "absorption")


def scores(values, l0=16.0, dead=0.1, datasets=("digits", "dtd")):
    """Scores by part whose seven headlines are ``values``; two data sets lie evenly around the sixth."""
    m1, m2, m3, m4, m5, m6, m7 = values
    return {
        "core": [Score("fvu", m2), Score("l0", l0), Score("dead_share", dead), Score("alive", D_SAE * (1 - dead)),
                 Score("explained_variance", 1 - m2), Score("decoder_orthogonality", 0.0123)],
        "moran": [Score("moran", m1), Score("moran_null", -1 / (GRID**2 - 1)), Score("moran_evaluable", 0.25)],
        "raw_moran": [Score("channel_moran", 0.5), Score("channel_moran_null", -1 / (GRID**2 - 1))],
        "preservation": [Score("preservation", m3), Score("accuracy_raw", 0.417)],
        "sparse_probing": [Score(f"sparse_probing_{name}", m4 - (k != 128) / (10 + k), f"k={k}")
                           for name in ("area", "accuracy") for k in BUDGETS],
        "monosemanticity": [Score("monosemanticity", m5), *(
            Score(f"monosemanticity_{name}", v) for name, v in zip(("baseline", "raw", "within", "between"),
                                                                  (0.3, 0.45, 0.6, 0.4), strict=True))],
        "cross_domain": [Score("cross_domain_preservation", m6 + d, f"data={name}")
                         for name, d in zip(datasets, (-0.25, 0.25), strict=False)],
        "absorption": [Score("absorption", m7 + (a - 0.8) - (b - 0.5), f"alpha={a},beta={b}")
                       for a in (0.7, 0.8, 0.9) for b in (0.3, 0.5, 0.7)],
        "recovery": [Score(name, 1 / n if n else 0.1, f"n={n or 'all'}")
                     for name in ("recovery_fvu", "recovery_cknna") for n in (1, 2, 16, 0)],
    }  # fmt: skip


def sae(backbone="dinov2 (tiny)", values=(0.3, 0.1, 0.9, 0.8, 0.2, 1.0, 0.5), expansion=8, k=16, variant="batchtopk",
        weight=0.0, folder=None, parts=None, **options):  # fmt: skip
    found = scores(values, **options)
    rows = [
        {"run": "r", "part": part, "split": "test", "key": "", **score._asdict()}
        for part in (parts or found) for score in found[part]
    ]  # fmt: skip
    cfg = {"backbone": backbone, "variant": variant, "expansion": expansion, "k": k, "seed": 42, "d_sae": D_SAE,
           "data": "demo", "features": "patch", "layer": 4}  # fmt: skip
    label = f"{backbone} · {variant} ×{expansion} k {k}"
    name = f"{variant}-{backbone}-{expansion}-{k}"
    return Scored(
        {"name": name, "folder": folder, "cfg": cfg, "features": "L4", "label": label, "weight": weight}, rows
    )


def marks(found):
    """Marks of a table's cells, [lines][columns]."""
    return [[cell["mark"] for cell in line[1:]] for line in found.view()["lines"]]


def texts(found):
    return [line[1:] for line in found.texts()]


def test_the_best_is_the_largest_where_more_is_better_and_the_smallest_elsewhere():
    high = sae(values=[0.9] * 7, dead=0.2)
    low = sae(values=[0.1] * 7, dead=0.1, expansion=16)
    titles = [column.title for column in main_columns()]
    assert [title[:2] for title in titles[:7]] == [f"M{i}" for i in range(1, 8)]
    found = marks(table([high, low], main_columns(), {}))
    wins_low = {title for title, mark in zip(titles, found[1], strict=True) if mark == "best"}
    wins_high = {title for title, mark in zip(titles, found[0], strict=True) if mark == "best"}
    assert wins_low == {"M2 FVU", "M7 absorption", "dead"}
    assert wins_high == set(titles) - wins_low - {"L0"}  # a sparser code is another one, not a better one
    arrows = {column.title: column.head.heading[-1] for column in main_columns()}
    assert {title for title, arrow in arrows.items() if arrow == "↓"} == wins_low
    assert {title for title, arrow in arrows.items() if arrow == "↑"} == wins_high


def test_what_reads_the_same_is_equally_good_and_nothing_is_best_among_equals():
    column = Column("M1", "moran", better=True)
    a, b, c = (sae(values=[value] + [0.5] * 6) for value in (0.70041, 0.70039, 0.2))
    assert marks(table([a, b, c], [column], {})) == [["best"], ["best"], [""]]
    for saes, of in (([a, b], column), ([c], column), ([a, c], Column("M1", "moran"))):
        assert not any(mark for (mark,) in marks(table(saes, [of], {})))


def test_the_best_of_a_backbone_is_marked_beside_the_best_of_all():
    saes = [
        sae(backbone, [value] * 7) for backbone, value in (("a", 0.9), ("a", 0.8), ("b", 0.2), ("b", 0.1), ("c", 0.5))
    ]
    assert [line[0] for line in marks(table(saes, main_columns(), {}))] == ["best", "", "own", "", ""]
    assert [line[1] for line in marks(table(saes, main_columns(), {}))] == ["", "own", "", "best", ""]
    assert [group.title for group in table(saes, main_columns(), {}).groups] == ["a L4", "b L4", "c L4"]


def test_numbers_that_are_not_finite_or_not_there_are_dashes_and_never_the_best():
    nothing = sae(values=[NAN] * 7, dead=0.0)
    something = sae(values=[0.4] * 7, dead=0.1)
    other = sae(values=[0.3] * 7, dead=0.2, expansion=32)
    bare = sae(parts=["core"])
    found = table([nothing, something, other, bare], main_columns(), {})
    assert texts(found)[0] == ["–"] * 7 + ["16.0", "0.0 %"]
    assert texts(found)[3] == ["–", "0.100", "–", "–", "–", "–", "–", "16.0", "10.0 %"]
    assert not any(mark for mark in marks(found)[0][:7])
    assert marks(found)[1][0] == "best"
    assert number(math.inf) == "–"
    assert number(1234.0, ",.0f") == "1,234"


def test_headlines_are_the_rows_of_the_settings_of_the_paper():
    values = (0.31, 0.12, 0.93, 0.84, 0.25, 1.06, 0.47)
    assert texts(table([sae(values=values)], main_columns(), {}))[0][:7] == [f"{value:.3f}" for value in values]


def test_csv_is_the_rows_and_markdown_the_headlines():
    saes = [sae(values=[0.1 + 0.2] * 7), sae("mae (tiny)", [NAN] * 7), sae("mae (tiny)", [0.7] * 7, variant="topk")]
    lines = list(csv.DictReader(io.StringIO(scores_csv(saes))))
    expected = [(one.run["name"], row) for one in saes for row in one.rows]
    assert len(lines) == len(expected)
    for line, (name, row) in zip(lines, expected, strict=True):
        assert (line["run"], line["metric"], line["setting"], line["part"], line["split"]) == (
            name, row["metric"], row["setting"], row["part"], row["split"]
        )  # fmt: skip
        assert line["value"] == "" if math.isnan(row["value"]) else float(line["value"]) == row["value"]
    assert (lines[0]["backbone"], lines[0]["expansion"], lines[0]["k"]) == ("dinov2 (tiny)", "8", "16")
    head, _, first, second, third = table(saes, main_columns(), {}).markdown().splitlines()
    assert head.count("|") == first.count("|") == second.count("|") == third.count("|") == len(main_columns()) + 3
    assert "| dinov2 (tiny) L4 | batchtopk ×8 k 16 | 0.300 | **0.300** |" in first
    assert "| – | – |" in second
    assert "| **0.700** | 0.700 |" in third
    assert files([]) == {}


def text(column, one):
    return number(one.of(column), column.form)


def test_details_have_a_column_for_every_setting_there_is():
    found = {topic.title[:2]: topic for topic in topics([sae(), sae(expansion=16)])}
    m7 = [(column.over, column.title) for column in found["M7"].columns]
    assert m7 == [(f"α = {a}", f"β = {b}") for a in (0.7, 0.8, 0.9) for b in (0.3, 0.5, 0.7)]
    m4 = [(column.over, column.title) for column in found["M4"].columns]
    assert m4 == [(over, str(k)) for over in ("accuracy at k", "area up to k") for k in BUDGETS]
    assert {column.over for column in found["M6"].columns} == {"digits", "dtd", "mean of all"}
    msae = {column.title: text(column, sae(dead=0.1)) for column in found["Me"].columns}
    assert msae["dead"] == "4"  # of 40 latents
    assert msae["EVR"] == "0.900"
    assert "Do" not in found  # no rows of downstream tasks


def test_details_take_what_is_there():
    one = sae(parts=["core", "preservation"])
    assert [topic.title for topic in topics([one])] == ["M3: preservation", "Metrics of MSAE"]
    more = [
        *({"metric": "segmentation_miou", "setting": f"data=mosaic,input={given}", "value": v, "part": "s"}
          for given, v in (("raw", 0.5), ("reconstruction", 0.4), ("codes", 0.3))),
        {"metric": "segmentation_lift", "setting": "data=mosaic", "value": 0.6, "part": "s"},
        {"metric": "retrieval_raw", "setting": "k=1", "value": 0.32, "part": "r"},
        {"metric": "retrieval_codes", "setting": "k=1", "value": 0.4, "part": "r"},
        {"metric": "retrieval_lift", "setting": "k=1", "value": 1.25, "part": "r"},
        {"metric": "stability", "setting": "", "value": 0.8, "part": "stability"},
    ]  # fmt: skip
    full = Scored(one.run, [*one.rows, *more])
    found = {topic.title: topic for topic in topics([one, full])}
    columns = {
        (c.over.split(",")[0], c.title): (text(c, full), text(c, one)) for c in found["Downstream tasks"].columns
    }
    assert columns == {
        ("image retrieval", "raw"): ("32.0 %", "–"), ("image retrieval", "codes"): ("40.0 %", "–"),
        ("image retrieval", "codes / raw"): ("1.250", "–"), ("segmentation of mosaic", "raw"): ("50.0 %", "–"),
        ("segmentation of mosaic", "reconstruction"): ("40.0 %", "–"),
        ("segmentation of mosaic", "codes"): ("30.0 %", "–"), ("segmentation of mosaic", "codes / raw"): ("0.600", "–"),
    }  # fmt: skip
    assert [text(column, full) for column in found["Stability over seeds"].columns] == ["0.800"]


def test_the_note_on_a_backbone_says_what_its_features_give():
    note = raw_note([sae(values=[0.2] + [0.5] * 6), sae(values=[0.4] + [0.5] * 6), sae(parts=["core"])])
    assert "Moran's I of the channels 0.500 (null -0.067)" in note
    assert "M1 is 0.40–0.80 of that" in note
    assert "linear probe 41.7 %" in note
    assert "R@1" not in note
    assert raw_note([sae(parts=["core"])]) == ""


def test_what_the_released_package_gives_is_a_table_of_its_own(tmp_path):
    one, values = sae(folder=tmp_path), [0.11, 0.22, 0.33, 0.44, 0.55, 0.66, 0.77]
    rows = [
        {"metric": column.metric, "setting": column.setting.replace("*", "x"), "value": value, "protocol": "released",
         "part": "p", "split": "test"}
        for column, value in zip(released_columns(), values, strict=True)
    ]  # fmt: skip
    both = Scored(one.run, one.rows, rows)
    assert texts(table([both], released_columns(), {}))[0] == [f"{value:.3f}" for value in values]
    assert texts(table([both], main_columns(), {})) == texts(table([one], main_columns(), {}))
    assert [line["protocol"] for line in csv.DictReader(io.StringIO(scores_csv([both])))][-8:] == [
        "paper", *["released"] * 7
    ]  # fmt: skip
    page = benchmark([both, one], 2, latents=False)
    tables = [block for block in page.tables if len(block.rows) == 1]
    assert any("0.110" in row for block in tables for row in block.texts())


def test_curves_are_sorted_by_budget_with_all_last():
    assert [k for k, _ in sae().curve("sparse_probing_accuracy")] == list(BUDGETS)
    assert sae().curve("recovery_fvu") == [(1, 1), (2, 0.5), (16, 1 / 16), (math.inf, 0.1)]
    assert sae().curve("moran") == []


def sixty(folder=None):
    return [
        sae(f"backbone {b}", expansion=e, k=k, folder=folder)
        for b in range(5) for e in (8, 16, 32) for k in (64, 128, 192, 256)
    ]  # fmt: skip


def test_sixty_runs_have_a_panel_a_backbone_and_a_short_legend():
    saes = sixty()
    of = encoding(saes)
    panels = probing(saes, of)
    assert len(panels) == 6
    for title, panel in zip(["means", *(f"backbone {b} L4" for b in range(5))], panels, strict=True):
        assert f">{title}<" in panel
    legend = of.legend()
    assert len(legend.colours) == len({colour for _, colour in legend.colours}) == 5
    assert [title for title, _ in legend.more] == ["×8", "×16", "×32"]
    assert len({dashes for _, dashes in legend.more}) == 3
    assert legend.words == ["from faint to deep: k 64, 128, 192, 256"]
    styles = [tuple(map(str, of.line(one).values())) for one in saes]
    assert len(set(styles)) == 60  # each line looks different


def test_kinds_are_marks_among_backbones_and_colours_on_one():
    kinds = {"kind": "batchtopk"}, {"kind": "topk"}
    several = [sae(b, variant=v["kind"]) for b in ("a", "b") for v in kinds]
    assert encoding(several).legend().words == ["● batchtopk", "■ topk"]
    assert list(encoding(several).colours) == ["a L4", "b L4"]
    one = [sae("a", variant="batchtopk"), sae("a", variant="topk"), sae("a", variant="topk", weight=0.1)]
    of = encoding(one)
    assert list(of.colours) == ["batchtopk", "topk", "topk + MonoLoss 0.1"]
    assert (of.legend().words, of.of_backbones()) == ([], {})
    assert len(probing(one, of)) == 4


def test_figures_without_their_rows_are_left_out(tmp_path):
    bare = [sae(parts=["core", "absorption"], folder=tmp_path)]
    assert benchmark(bare, 1, latents=False).pictures == []
    assert benchmark([], 1, latents=False) is None
    assert len(recovery([sae(), bare[0]], encoding([sae(), bare[0]]))) == 2


@pytest.mark.parametrize("moran_rows", [True, False])
def test_moran_is_drawn_of_the_evaluable_latents_alone(tmp_path, moran_rows):
    one = sae(folder=tmp_path, parts=None if moran_rows else ["core", "absorption"])
    of = encoding([one])
    write_tensors(tmp_path / LATENTS, {"moran": torch.full((5,), torch.nan, dtype=torch.float64)}, {})
    assert moran([one], of) == ""
    write_tensors(tmp_path / LATENTS, {"moran": torch.tensor([0.1, torch.nan, 0.4], dtype=torch.float64)}, {})
    drawn = moran([one], of)
    assert drawn.startswith("<svg")
    assert ("25 % evaluable" in drawn) == moran_rows
    write_tensors(tmp_path / LATENTS, {"monoscore": torch.zeros(3)}, {})
    assert moran([one], of) == ""


def test_joined_bins_hold_what_the_fine_ones_do():
    rng = np.random.default_rng(0)
    edges = 10 ** (np.arange(41) / 20 - 1)
    counts = rng.integers(1, 9, 42)
    counts[1:5], counts[-9:-1] = 0, 0  # one joined bin at the left, two at the right
    joined, shares = coarse(edges, counts, 5)
    assert np.allclose(joined, edges[4:33:4])
    for i, share in enumerate(shares):
        inside = [c for e, c in zip(edges, counts[1:-1], strict=False) if joined[i] <= e * 1.0001 < joined[i + 1]]
        assert share == pytest.approx(sum(inside) / counts.sum())
    assert sum(shares) == pytest.approx(counts[1:-1].sum() / counts.sum())
    same, fine = coarse(edges, counts, 7)  # does not divide 20
    assert len(fine) == len(same) - 1 == 40 - 4 - 8
    assert len(coarse(edges, np.zeros(42, int), 5)[1]) == 10


def test_histograms_are_drawn_where_a_run_has_them(tmp_path):
    with_them, without = tmp_path / "with", tmp_path / "without"
    with_them.mkdir()
    metric = ActivationHistogram(d_sae=4)
    metric.update(SparseCodes(torch.tensor([0, 1, 1]), torch.tensor([0.5, 2.0, 40.0]), torch.tensor([0, 2, 3]), 4))
    tensors = {f"{n}.{f}": t.clone() for n, h in metric.histograms().items() for f, t in h._asdict().items()}
    write_tensors(with_them / HISTOGRAMS, tensors, {})
    saes = [sae(folder=with_them), sae("b", folder=without)]
    assert [panel[:4] for panel in histograms(saes, encoding(saes))] == ["<svg"] * 3
    assert histograms(saes[1:], encoding(saes[1:])) == []


def test_heat_tints_the_patches_that_fire_by_their_strength():
    image = Image.new("RGB", (96, 96), (90, 160, 220))
    activation = np.zeros((8, 8), dtype=np.float32)
    activation[2, 2:5] = 1.0, 2.0, 4.0
    shown = np.asarray(heat(image, activation)).astype(int)
    fires = np.kron(activation > 0, np.ones((12, 12))).astype(bool)
    assert (shown[~fires] == [int(SILENT * c) for c in (90, 160, 220)]).all()  # their colours
    weak, middle, strong = (shown[24:36, 12 * i : 12 * i + 12].mean((0, 1)) for i in (2, 3, 4))
    assert weak[0] < middle[0] < strong[0]
    everywhere = np.linspace(5, 6, 64).reshape(8, 8)  # fires on all patches: its own range is what counts
    spread = np.asarray(heat(image, everywhere)).astype(int)[..., 0]
    assert spread[-1, -1] - spread[0, 0] > 60
    assert len(np.unique(np.asarray(heat(image, np.ones((8, 8)))).reshape(-1, 3), axis=0)) == 1


def pictures_of(run):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 255, (IMAGES, 32, 32, 3), dtype=np.uint8)
    labels, ids = [i % 2 for i in range(IMAGES)], [f"image {i}" for i in range(IMAGES)]
    return ImageData("made", "test", ["cat", "dog"], labels, ids, lambda i: Image.fromarray(arrays[i]))


def write_run(folder, backbone, expansion=8, bench=True):
    """A run's folder as evaluate.py leaves it, with made-up figures; its name is that of the folder."""
    folder.mkdir(parents=True)
    config = {"seed": 42, "data": {"source": "folder"}, "backbone": {"name": backbone}, "expansion": expansion}
    cfg = {
        "schema": 2, "d_in": 12, "d_sae": D_SAE, "k": 16, "backbone": backbone, "features": "patch", "layer": 4,
        "variant": "batchtopk", "expansion": expansion, "seed": 42, "data": "made", "config": config,
    }  # fmt: skip
    names = ("explained_variance", "r2", "fvu", "l0", "dead_share", "cosine", "decoder_cosine",
             "decoder_nearest_cosine", "monoscore", "top_purity", "scored_share", "monoscore_scored")  # fmt: skip
    scores_json = {
        "schema": 2, "split": "test", "store": "s", "n_images": IMAGES, "n_tokens": IMAGES * GRID**2,
        "similarity": {"key": "own", "title": "itself", "baseline": 0.2}, "metrics": dict.fromkeys(names, 0.5),
    }  # fmt: skip
    for name, what in (("cfg", cfg), ("scores", scores_json), ("result", {"seconds": 3.0})):
        (folder / f"{name}.json").write_text(json.dumps(what))
    groups = GROUPS if bench else GROUPS[:1]
    scattered, connected = torch.zeros(GRID, GRID), torch.zeros(GRID, GRID)
    scattered[::2, ::2], connected[:2, :2] = 1.0, 1.0
    moran_scores = torch.tensor([torch.nan, 0.61, 0.31, -0.04] + [0.3] * (D_SAE - 4), dtype=torch.float64)
    latents = {"monoscore": torch.linspace(0.9, 0, D_SAE, dtype=torch.float64)}
    write_tensors(folder / LATENTS, latents | ({"moran": moran_scores} if bench else {}), {})
    maps = torch.stack([connected if name == "high Moran" else scattered for name in groups]).flatten(1)
    top = {
        "latents": torch.arange(len(groups)), "group": torch.arange(len(groups)),
        "images": torch.arange(9).repeat(len(groups), 1), "maps": maps[:, None].repeat(1, 9, 1).half(),
        **{name: torch.full((len(groups),), 0.5) for name in ("firing_share", "peak", "purity")},
        **{name: torch.ones(len(groups), dtype=torch.long) for name in ("images_fired", "label")},
    }  # fmt: skip
    ids = json.dumps({str(i): f"image {i}" for i in range(9)})
    metadata = {"groups": "|".join(groups), "grid": f"{GRID}x{GRID}", "image_ids": ids}
    write_tensors(folder / TOP_IMAGES, top, metadata)
    write_tensors(folder / BAND_IMAGES, {"images": torch.full((1, len(BANDS), 2), -1)}, {"image_ids": "{}"})
    found = scores([0.1 * expansion / 8] * 7)
    for part, made in found.items():
        if bench or part == "core":
            put_scores(folder, part, "test", "key", made)
    return folder


@pytest.fixture
def shown(monkeypatch):
    for module in (report_page, report_latents):
        monkeypatch.setattr(module, "pictures", pictures_of)


def patches(uri, place):
    """Colours [GRID, GRID, 3] of image ``place`` of a sheet of three a line."""
    sheet = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB")
    y, x = (96 + GAP) * (place // 3), (96 + GAP) * (place % 3)
    side = 96 // GRID
    return np.asarray(sheet).astype(float)[y : y + 96, x : x + 96].reshape(GRID, side, GRID, side, 3).mean((1, 3))


def tinted(plain, uri, place):
    """Which patches [GRID, GRID] of image ``place`` are tinted in the sheet ``uri``."""
    return np.abs(patches(uri, place) - SILENT * patches(plain, place)).max(-1) > 25


def test_runs_of_core_scores_alone_give_the_page_without_the_section(tmp_path, shown):
    runs = [write_run(tmp_path / f"run-{i}", f"b{i} (tiny)", bench=False) for i in range(2)]
    assert "fvu" in [row["metric"] for row in read_rows(runs[0])]  # M2 alone is no ViSAEBench
    page = build(runs, tmp_path / "page.html").read_text()
    assert "<h2>Monosemanticity</h2>" in page
    assert "ViSAEBench</h2>" not in page
    assert "Moran" not in page
    assert not list(tmp_path.glob("visaebench*"))


@pytest.mark.slow
def test_the_page_has_tables_figures_files_and_latents_by_their_moran(tmp_path, shown):
    runs = [write_run(tmp_path / "runs" / f"{b}-x{e}", f"{b} (tiny)", e) for b in ("clip", "mae") for e in (8, 16)]
    runs.append(write_run(tmp_path / "runs" / "other", "deit (tiny)", bench=False))
    page = build(runs, tmp_path / "page.html", detailed=2).read_text()
    assert "<h2>ViSAEBench</h2>" in page
    assert "4 of the 5 runs have them" in page
    assert page.index('<section id="runs">') < page.index('<section id="visaebench">')
    assert "First by the mean of its SAEs" not in page  # all backbones have the same
    main = page[page.index("<h2>ViSAEBench</h2>") :].split("</table>")[0]
    assert main.count("<tbody>") == 2
    cells = re.findall(
        r"<tr><td class=\"words\">batchtopk ×16 k 16</td><td( class=\"(?:best|own)\")?>([^<]*)</td>", main
    )
    assert cells == [(' class="best"', "0.200")] * 2
    assert page.count('<th colspan="3"><span>α = 0.8</span></th>') == 1
    assert page.count('<th colspan="1"><span>digits</span></th>') == 1
    assert page.count('<th colspan="1"><span>dtd</span></th>') == 1
    assert main.index("clip (tiny) L4") < main.index("mae (tiny) L4")
    assert "M1 is 0.20–0.40 of that" in main

    for title in ("High Moran", "Mean Moran", "Low Moran"):
        assert page.count(f"<h3>{title}<") == 2
    for score in ("0.610", "0.310", "-0.040"):
        assert page.count(f"· Moran&#39;s I {score}</footer>") + page.count(f"· Moran's I {score}</footer>") == 2
    assert page.count("Moran's I –") == 0  # the most used latent has none, and its card says nothing

    audit = page[page.index("Latents of high, mean and low") :]
    cards = re.findall(r"<b>(high|mean|low): latent (\d+)</b></span><span>I = ([^<]*)</span>", audit)
    one = [("high", "1", "0.610"), ("mean", "2", "0.310"), ("low", "3", "-0.040")]
    assert cards == one * 2  # of one SAE a backbone
    sheets = re.findall(r'<img src="([^"]*)" alt="[^"]*" style="max-width:100', audit)
    high, _, low = (tinted(plain, uri, 3) for plain, uri in zip(sheets[:6:2], sheets[1:6:2], strict=True))
    assert high[:2, :2].all()
    assert high.sum() == 4  # one connected region
    assert low[::2, ::2].all()
    assert low.sum() == 4  # four patches apart

    lines = list(csv.DictReader((tmp_path / "visaebench.csv").open()))
    expected = [row for run in runs[:4] for row in read_rows(run)]
    key = ("run", "metric", "setting")
    assert {tuple(line[name] for name in key): float(line["value"]) for line in lines} == {
        tuple(row[name] for name in key): row["value"] for row in expected
    }
    assert (tmp_path / "visaebench.md").read_text().count("\n") == 6
    links = set(re.findall(r'href="([^#][^"]*)"', page.replace("xlink:href=", "")))
    assert links == {f"page-tables/{path.name}" for path in (tmp_path / "page-tables").iterdir()}
    assert "They make a grid, analysed from “What was run” on." in page
    assert '<section id="means-of-backbones">' in page
    assert '<section id="layers">' not in page  # of which nothing can be said
    assert all(part.startswith("data:") for part in page.split('src="')[1:])
    assert "Latents of high, mean and low" not in build(runs, tmp_path / "few.html", detailed=0).read_text()


def test_rows_of_another_split_are_not_shown(tmp_path):
    runs = [write_run(tmp_path / "a", "clip (tiny)"), write_run(tmp_path / "b", "mae (tiny)", bench=False)]
    put_scores(runs[1], "moran", "val", "key", [Score("moran", 0.77)])
    assert [one.run["name"] for one in scored_runs(load_runs(runs))] == ["a"]
    put_scores(runs[1], "moran", "test", "key", [Score("moran", 0.33)])
    found = scored_runs(load_runs(runs))
    assert [one.value("moran") for one in found] == [0.1, 0.33]


def test_labels_tell_runs_of_two_layers_and_seeds_apart():
    runs = [{"label": name, "cfg": {"layer": layer, "seed": seed}} for name, layer, seed in
            (("a", 5, 0), ("a", 11, 0), ("b", 5, 0), ("b", 5, 1), ("c", None, 0))]  # fmt: skip
    tell_apart(runs)
    assert [run["label"] for run in runs] == ["a, L5", "a, L11", "b, seed 0", "b, seed 1", "c"]
