"""From a training to the page: one whole way on generated pictures, through the public functions."""

import csv
import json

import pytest
import torch
from omegaconf import OmegaConf

from sae_lightning.evaluation.similarity import SimilarityEncoder
from sae_lightning.files import write_tensors
from sae_lightning.report.latents import common_ranks
from sae_lightning.report.monoloss import POINTS, profile
from sae_lightning.report.page import build
from sae_lightning.runs.run import BAND_IMAGES, LATENTS, SCORES, TOP_IMAGES
from sae_lightning.runs.scores import TABLE
from sae_lightning.saes.artefact import read_tensors
from sae_lightning.training.fit import train
from tests.scoring import evaluate_run


@pytest.mark.slow
def test_the_page_is_self_contained_and_names_every_run(config, tmp_path):
    runs = [train(config(f"sae={variant}")) for variant in ("batchtopk", "relu")]
    with pytest.raises(FileNotFoundError, match=r"Run evaluate\.py first"):
        build(runs, tmp_path / "page.html")
    scores = [evaluate_run(run) for run in runs]
    page = build(runs, tmp_path / "page.html").read_text()
    for score in scores:
        for name in ("explained_variance", "r2", "monoscore", "purity", "weighted_purity"):
            assert f"{score['metrics'][name]:.3f}" in page
        assert f"{score['similarity']['baseline']:.3f}" in page
    assert page.count('<div class="card">') > 20
    assert page.count("data:image/webp;base64,") == page.count('<div class="card">')
    assert page.index("Drawn at random") < page.index("fire on the most patches")
    screen = page[page.index("<h1>") : page.index('<section id="runs">')]
    assert "2 sparse autoencoders on deit (tiny) keep" in screen
    assert screen.count('<div class="card">') == 3  # one picture
    assert screen.count('<div class="panel"><b>') == 3  # numbers
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert all(source.startswith("data:") for source in sources)
    assert "href=" not in page.replace("xlink:href=", "").replace('href="#', "")
    assert "8 of 128" in page
    assert "deit (tiny)" in page
    assert "With and without MonoLoss" not in page
    assert not (tmp_path / "monoloss.csv").exists()
    few = build(runs, tmp_path / "few.html", detailed=1).read_text()
    assert few.count('<div class="card">') < page.count('<div class="card">')
    assert "Of 1 of the 2 runs" in few
    for name, damaged in ((TOP_IMAGES, "latents of these runs are damaged"), (SCORES, "is not valid JSON.*anew")):
        whole = (runs[0] / name).read_bytes()
        (runs[0] / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=damaged):
            build(runs, tmp_path / "page.html")
        (runs[0] / name).write_bytes(whole)
    (runs[0] / TABLE).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=rf"{TABLE} cannot be read .*evaluate\.py runs={runs[0].name}"):
        build(runs, tmp_path / "page.html")
    (runs[1] / LATENTS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"without MonoScore and purity: {runs[1].name}\. Evaluate them again"):
        build(runs, tmp_path / "page.html")


def as_if_with_monoloss(run, weight=0.5):
    """Let ``run`` say that it was trained with MonoLoss."""
    made = json.loads((run / "cfg.json").read_text())
    made["config"]["callbacks"] = {
        "monoloss": {"_target_": "sae_lightning.training.monoloss.MonoLoss", "weight": weight}
    }
    made["config"]["seed"] = made["seed"] = 42
    (run / "cfg.json").write_text(json.dumps(made))


@pytest.mark.slow
def test_runs_with_and_without_monoloss_are_compared(config, tmp_path):
    runs = [train(config(f"seed={seed}", "trainer.max_epochs=1")) for seed in (42, 7)]
    as_if_with_monoloss(runs[1])
    scores = [evaluate_run(run, band_ranks=8, band_images=3) for run in runs]
    page = build(runs, tmp_path / "page.html", detailed=0).read_text()
    assert "With and without MonoLoss: deit (tiny) · batchtopk ×2 k 8" in page
    assert page.count('<div class="card">') == 2 * page.count("<h3>Rank ")
    assert 1 <= page.count("<h3>Rank ") <= 6
    with (tmp_path / "monoloss.csv").open() as file:
        lines = {line["metric"]: line for line in csv.DictReader(file)}
    for side, score in zip(("without", "with"), scores, strict=True):
        assert float(lines["purity"][f"{side}_mean"]) == score["metrics"]["purity"]
    assert lines["r2"]["monoloss"] == "weight 0.5"
    assert "weight 0.5" in (tmp_path / "monoloss.md").read_text()
    bare = build(runs, tmp_path / "bare.html", detailed=0, grids=0).read_text()
    assert "With and without MonoLoss" in bare
    assert "<h3>Rank " not in bare
    evaluate_run(runs[0], similarity=SimilarityEncoder(features="pooled"))
    with pytest.raises(ValueError, match="cannot be compared"):
        build(runs, tmp_path / "page.html")
    again = OmegaConf.create(json.loads((runs[0] / "cfg.json").read_text())["config"])
    assert again.seed == 42  # the report changes no run


def test_ranks_at_which_a_latent_is_dead_are_not_shown(tmp_path):
    ranks, images = torch.arange(0, 100, 10), torch.zeros(10, 3, 2, dtype=torch.long)
    late = images.clone()
    late[6:] = -1
    a, b = {"ranks": ranks, "images": images}, {"ranks": ranks, "images": late}
    assert common_ranks(a, a, 4) == [0, 30, 60, 90]
    assert common_ranks(a, b, 4) == [0, 20, 30, 50]
    assert common_ranks(a, b, 9) == [0, 10, 20, 30, 40, 50]
    assert common_ranks(a, {"ranks": ranks + 1, "images": images}) == []
    write_tensors(tmp_path / BAND_IMAGES, b, {"image_ids": "{}"})
    assert common_ranks(read_tensors(tmp_path / BAND_IMAGES)[0], b, 1) == [0]


def test_profiles_are_sorted_and_end_at_the_extremes():
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0)).numpy()
    curve = profile(scores)
    assert len(curve) == POINTS
    assert (curve[:-1] >= curve[1:]).all()
    assert (curve[0], curve[-1]) == (scores.max(), scores.min())
    assert profile(scores[:3]).mean() == pytest.approx(
        sorted(scores[:3])[1] / 2 + (scores[:3].max() + scores[:3].min()) / 4, rel=1e-3
    )
