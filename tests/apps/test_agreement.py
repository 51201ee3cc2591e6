"""Agreement of scores with people's choices: pairs, the collecting page, its csv, and the analysis."""

import shutil
import subprocess
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats
from scipy.sparse import csr_matrix

from sae_lightning.apps.agreement.analysis import (
    agreement,
    by_difference,
    krippendorff,
    majority,
    on_one_side,
    raters,
    with_scores,
)
from sae_lightning.apps.agreement.study import (
    COLUMNS,
    collecting_page,
    draw_pairs,
    latent_scores,
    read_judgements,
    study_of,
)
from sae_lightning.apps.app import results_of
from sae_lightning.evaluation.by_latent import top_images
from sae_lightning.evaluation.similarity import SimilarityEncoder
from tests.configs import CONF
from tests.conftest import fill_store
from tests.processes import HANG

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def choices(*rows):
    """Judgements from (judge, left latent, right latent, choice) of one run."""
    return pd.DataFrame(
        [(judge, "a", left, "a", right, choice) for judge, left, right, choice in rows], columns=list(COLUMNS)
    )


# --- pairs ----------------------------------------------------------------------------------------
def test_pairs_are_spread_over_the_differences_and_on_random_sides():
    n = 200
    ms = np.random.default_rng(0).normal(0.4, 0.05, n)
    ms[:10] = 0.9  # few differ by much
    scores = pd.DataFrame({"run": "a", "latent": np.arange(n), "ms": ms, "images": 9})
    scores.loc[20, "ms"], scores.loc[21, "images"] = np.nan, 8
    pairs = draw_pairs(scores, 60, 4, 9, seed=3)
    top = pairs["difference"].max()
    spread = np.bincount(np.minimum(pairs["difference"] / top * 4, 3).astype(int), minlength=4)
    assert spread.min() >= 10  # at random the upper half would get about 6 of 60
    assert not {20, 21} & {*pairs["latent_left"], *pairs["latent_right"]}
    assert not pairs.duplicated(["latent_left", "latent_right"]).any()
    value = scores.set_index("latent")["ms"]
    gap = value[pairs["latent_left"]].to_numpy() - value[pairs["latent_right"]].to_numpy()
    np.testing.assert_allclose(abs(gap), pairs["difference"])
    assert 0.25 < (gap > 0).mean() < 0.75
    assert abs(stats.spearmanr(pairs["pair"], pairs["difference"]).statistic) < 0.35  # order tells nothing
    pd.testing.assert_frame_equal(pairs, draw_pairs(scores, 60, 4, 9, seed=3))
    assert not pairs.equals(draw_pairs(scores, 60, 4, 9, seed=4))
    with pytest.raises(ValueError, match=r"0 latents fire on at least 10 images .* Lower app\.images"):
        draw_pairs(scores, 60, 4, 10, seed=3)


# --- the csv --------------------------------------------------------------------------------------
GOOD = "pair,judge,run_left,latent_left,run_right,latent_right,choice,seconds\r\n0,Ann,a,1,b,2,left,1.5\r\n"


def written(tmp_path, text, name="j.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_judgements_are_read_as_spreadsheets_save_them_and_the_last_choice_counts(tmp_path):
    again = GOOD + '1,"Bo, jr",a,3,a,4,Unsure,2\r\n0,Ann,a,1,b,2,right,1.5\r\n'
    table = read_judgements([written(tmp_path, again)], {"a": 5, "b": 3})
    assert table[["judge", "latent_left", "choice"]].to_numpy().tolist() == [
        ["Bo, jr", 3, "unsure"],
        ["Ann", 1, "right"],
    ]
    semicolons = written(tmp_path, "\ufeff" + GOOD.replace(",", ";"), "s.csv")
    both = read_judgements([semicolons, written(tmp_path, again)], {"a": 5, "b": 3})
    assert len(both) == 2
    assert both["latent_right"].dtype.kind == "i"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((",choice", ",answer"), r"lacks the column choice; it has pair, judge.* Expected judge, run_left"),
        (("left,1.5", "both,1.5"), r"Line 2 of .*j\.csv has the choice 'both'; expected one of left, right, unsure"),
        (("a,1", "z,1"), r"Line 2 .* a latent of the run z, which was not given; opened were a, b"),
        (("b,2", "b,3"), r"Line 2 .* the latent '3' of b, which has 0 to 2"),
        (("a,1", "a,-1"), r"Line 2 .* the latent '-1' of a, which has 0 to 4"),
        (("0,Ann,a,1,b,2,left,1.5\r\n", ""), r"holds no judgement, only a header"),
        ((GOOD, ""), r"is empty; expected a header with judge, run_left"),
    ],
)
def test_what_is_wrong_with_a_csv_is_told(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_judgements([written(tmp_path, GOOD.replace(*change))], {"a": 5, "b": 3})
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_judgements([tmp_path / "none.csv"], {"a": 5})


# --- the analysis ---------------------------------------------------------------------------------
def scores_of(**columns):
    n = len(next(iter(columns.values())))
    return pd.DataFrame({"run": "a", "latent": np.arange(n), "constant": 1.0} | columns)


def test_agreement_counts_the_larger_side_and_ties_as_a_coin():
    table = choices(
        ("A", 0, 1, "left"), ("A", 1, 2, "left"), ("A", 2, 3, "right"), ("A", 3, 0, "unsure"), ("A", 1, 4, "left")
    )
    scored = with_scores(table, scores_of(ms=[0.9, 0.2, 0.5, 0.5, np.nan]), ["ms", "constant"])
    found = agreement(scored, "ms")  # agrees, disagrees, tie, unsure, no score
    assert (found["agreement"], found["n"], found["ties"]) == (0.5, 4, 2)
    constant = agreement(scored, "constant")
    assert (constant["agreement"], constant["ties"], constant["p"]) == (0.5, 4, 1.0)
    assert np.isnan(agreement(scored[scored["choice"] == "unsure"], "ms")["agreement"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 60))
def test_intervals_are_wilsons_and_the_test_is_the_binomial_one(seed, n):
    rng = np.random.default_rng(seed)
    rows = [("A", 0, 1, "left" if hit else "right") for hit in rng.random(n) < 0.7]
    found = agreement(with_scores(choices(*rows), scores_of(ms=[1.0, 0.0]), ["ms"]), "ms")
    hits = sum(row[3] == "left" for row in rows)
    p, z = hits / n, stats.norm.ppf(0.975)
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    np.testing.assert_allclose(
        [found["low"], found["high"]], np.array([middle - half, middle + half]) / (1 + z**2 / n), atol=1e-9
    )
    tails = [stats.binom.pmf(i, n, 0.5) for i in range(n + 1)]
    exact = sum(t for t in tails if t <= stats.binom.pmf(hits, n, 0.5) * (1 + 1e-7))
    assert found["p"] == pytest.approx(exact)


def test_ranges_of_the_difference_hold_their_lower_end():
    table = choices(("A", 0, 1, "left"), ("A", 0, 2, "right"), ("A", 0, 3, "left"), ("A", 0, 4, "unsure"))
    scored = with_scores(table, scores_of(ms=[1.0, 0.75, 0.5, 0.0, 0.9]), ["ms"])
    found = by_difference(scored, "ms", [0, 0.25, 0.5, 1])
    assert found[["from", "to", "n", "agreement"]].to_numpy().tolist() == [[0.25, 0.5, 1, 1], [0.5, 1, 2, 0.5]]


def test_the_majority_decides_whichever_side_a_latent_was_shown_on():
    table = choices(
        ("A", 0, 1, "left"), ("B", 1, 0, "right"), ("C", 0, 1, "right"), ("A", 2, 3, "left"), ("B", 3, 2, "left"),
        ("A", 4, 5, "unsure"),
    )  # fmt: skip
    assert on_one_side(table)["choice"].tolist() == ["left", "left", "right", "left", "right", "unsure"]
    found = majority(table)
    assert found[["latent_left", "latent_right", "choice"]].to_numpy().tolist() == [[0, 1, "left"]]  # 2, 3 is a tie
    assert len(majority(table[table["choice"] == "unsure"])) == 0


def slow_alpha(units):
    """Krippendorff's nominal alpha from the coincidences of all ordered pairs of values within a unit."""
    pairs = [(a, b, 1 / (len(u) - 1)) for u in units for i, a in enumerate(u) for j, b in enumerate(u) if i != j]
    observed = sum(w for a, b, w in pairs if a != b) / sum(w for _, _, w in pairs)
    values = [v for u in units for v in u]
    apart = [a != b for a, b in combinations(values, 2)]
    return 1 - observed / np.mean(apart)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=5), min_size=3, max_size=12))
def test_alpha_is_krippendorffs(units):
    counts = np.array([np.bincount(u, minlength=3) for u in units])
    if len({v for u in units for v in u}) == 1:
        assert np.isnan(krippendorff(counts))
    else:
        assert krippendorff(counts) == pytest.approx(slow_alpha(units))


def test_judges_are_compared_also_where_some_are_missing():
    rows = [(j, i, 9, c) for i, cs in enumerate(["lll", "lrl", "rrr", "ll"]) for j, c in zip("ABC", cs, strict=False)]
    table = choices(*[(j, a, b, {"l": "left", "r": "right"}[c]) for j, a, b, c in rows])
    found = raters(table)
    assert (found["judges"], found["pairs"], found["pairs_of_several"]) == (3, 4, 4)
    assert found["pairwise"] == pytest.approx((1 + 1 / 3 + 1 + 1) / 4)
    assert found["alpha"] == pytest.approx(slow_alpha(["lll", "lrl", "rrr", "ll"]))
    # Fleiss on the three pairs that all judged: P = (1 + 1/3 + 1)/3, P_e = (5/9)² + (4/9)²
    expected = (5 / 9) ** 2 + (4 / 9) ** 2
    assert found["fleiss"] == pytest.approx(((1 + 1 / 3 + 1) / 3 - expected) / (1 - expected))
    alone = raters(table[table["judge"] == "A"])
    assert alone["judges"] == 1
    assert np.isnan([alone["pairwise"], alone["alpha"], alone["fleiss"]]).all()


# --- scores, page and application -----------------------------------------------------------------
@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A stand-in run of 12 latents: 0 to 5 fire on one class each of two, 6 to 11 on images at random."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = torch.nn.functional.one_hot(torch.from_numpy(labels), 6).float() + 0.3 * torch.randn(
        60, 6, generator=torch.Generator().manual_seed(0)
    )
    store = fill_store(
        tmp_path_factory.mktemp("store") / "s", features[:, None], kind="pooled", layer=None, grid=(1, 1)
    )
    fires = np.concatenate([labels[:, None] == np.arange(6) % 3, rng.random((60, 6)) < 0.4], axis=1)
    codes = csr_matrix((fires * (0.5 + rng.random((60, 12)))).astype(np.float32))
    pixels = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)

    class Images(list):
        labels, class_names = np.arange(60) % 3, ["cat", "dog", "cow"]

    images = Images(Image.fromarray(p) for p in pixels)
    return SimpleNamespace(
        name="a", label="stand-in", sae=SimpleNamespace(d_sae=12), source=None, images=lambda split: images,
        codes=lambda split: codes, store=lambda split: store,
    )  # fmt: skip


def test_scores_are_the_weighted_similarities_of_the_definition(opened):
    scores = latent_scores(opened, "test", SimilarityEncoder(), 9)
    h = opened.store("test").features(slice(0, 60)).double().squeeze(1).numpy()
    cosine = (h @ h.T) / np.outer(np.linalg.norm(h, axis=1), np.linalg.norm(h, axis=1))
    for latent in (0, 7):
        a = opened.codes("test")[:, latent].toarray()[:, 0].astype(np.float64)
        weight = np.triu(np.outer(a, a), 1)
        assert scores.loc[latent, "ms"] == pytest.approx((weight * cosine).sum() / weight.sum(), abs=1e-5)
    assert (scores["ms"] == scores["monoscore"]).all()  # one judge of similarity here
    assert scores.loc[:5, "purity"].tolist() == [1] * 6
    assert (scores.loc[6:, "top_purity"] < 1).all()
    top = top_images(opened.codes("test"), 3)
    dense = opened.codes("test").toarray()
    assert (top == np.argsort(-dense, axis=0, kind="stable")[:3].T).all()


def asked(tmp_path, **app):
    defaults = OmegaConf.load(CONF / "app" / "agreement.yaml")
    cfg = {
        "app": OmegaConf.merge(defaults, {"judge": None, "pairs": 20, "images": 4, **app}),
        "split": "test",
        "seed": 1,
    }
    return OmegaConf.create(cfg | {"paths": {"runs": str(tmp_path)}})


def placed(opened, tmp_path):
    return SimpleNamespace(**vars(opened), folder=tmp_path / opened.name)


def test_without_judgements_the_collecting_page_is_written(opened, tmp_path):
    (result,) = results_of([placed(opened, tmp_path)], asked(tmp_path))
    assert result.headlines == []
    assert 'href="collect.html"' in result.page.read_text()
    page = (result.folder / "collect.html").read_text()
    assert "http" not in page
    assert "difference" not in page
    assert "cow" not in page
    assert len(pd.read_parquet(result.folder / "pairs.parquet")) == 20


def test_simulated_judges_prefer_pure_latents_and_are_called_simulated(opened, tmp_path):
    (result,) = results_of([placed(opened, tmp_path)], asked(tmp_path, simulated=3, pairs=60))
    page = result.page.read_text()
    assert "Simulated judges: these choices were made up" in page
    assert all("simulated judges" in line.what for line in result.headlines)
    ours = next(line for line in result.headlines if line.against == "a constant")
    assert ours.baseline == 0.5
    assert ours.interval[0] > 0.5
    read = read_judgements([result.folder / "judgements-simulated.csv"], {"a": 12})
    assert set(read["judge"]) == {"simulated 1", "simulated 2", "simulated 3"}
    people = tmp_path / "people.csv"
    read.assign(judge="Ann").to_csv(people, index=False)
    (other,) = results_of([placed(opened, tmp_path)], asked(tmp_path, judgements=str(people)))
    assert "made up" not in other.page.read_text()
    assert all("people" in line.what for line in other.headlines)
    with pytest.raises(ValueError, match="people and made-up judges are not mixed"):
        results_of([placed(opened, tmp_path)], asked(tmp_path, judgements=str(people), simulated=1))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_page_in_a_browser_exports_what_the_analysis_reads_and_goes_on_where_it_was_left(opened, tmp_path):
    scores = latent_scores(opened, "test", SimilarityEncoder(), 4)
    pairs = draw_pairs(scores, 6, 2, 4, seed=0)
    page = collecting_page(study_of(pairs, {"a": opened}, "test", 4))
    press = "for (const key of {keys}) document.dispatchEvent(new KeyboardEvent('keydown', {{ key, bubbles: true }}));"
    start = "at('judge').value = 'Ann \"A\", Oslo'; at('who').requestSubmit();"
    first = browse(
        page, tmp_path, start + press.format(keys="['ArrowLeft', 'x', 'ArrowRight', 'Backspace', 'ArrowDown']")
    )
    assert "2 of 6 judged" in first
    second = browse(page, tmp_path, start + press.format(keys="['ArrowRight', 'ArrowRight']") + "at('left').click();")
    table = read_judgements([written(tmp_path, exported(second))], {"a": 12})
    assert table["choice"].tolist() == ["left", "unsure", "right", "right", "left"]
    assert set(table["judge"]) == {'Ann "A", Oslo'}
    columns = ["run_left", "latent_left", "run_right", "latent_right"]
    pd.testing.assert_frame_equal(table[columns], pairs[columns][:5], check_dtype=False)
    last = browse(page, tmp_path, start + press.format(keys="['ArrowUp', 'ArrowLeft', 'ArrowLeft']"))
    assert '<div id="task" hidden' in last
    assert '<div id="done" class="panel">' in last
    assert exported(last).count("\n") == 7
    assert "0 of 6 judged by Bo" in browse(page, tmp_path, "at('judge').value = 'Bo'; at('who').requestSubmit();")


def browse(page, folder, script):
    """The page's DOM after ``script``, with what it would save in a last element; one browser profile a folder."""
    driven = folder / "driven.html"
    out = "const out = document.createElement('textarea'); out.id = 'out'; out.textContent = csv();"
    out += "document.body.append(out);"
    driven.write_text(page.replace("</body>", f"<script>{script} {out}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
               "--virtual-time-budget=2000", "--dump-dom", driven.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True).stdout


def exported(dom):
    return dom.split('<textarea id="out">')[1].split("</textarea>")[0].replace("&amp;", "&").replace("&quot;", '"')
