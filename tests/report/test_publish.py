"""Scores reach the loggers under the names that trainings use; what a logger has is not logged twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sae_lightning.metrics.base import Score
from sae_lightning.report.publish import GOALS, history_rows, publish, scores_of, sheet, wandb_options
from sae_lightning.runs.scores import put_scores
from sae_lightning.training.fit import train
from sae_lightning.training.loggers import TESTED
from tests.configs import composed
from tests.scoring import evaluate_run
from tests.training.test_loggers import csv_points, tensorboard_points
from tests.training.wandb_files import KEY, Service, offline_run, records


@pytest.fixture
def run(config, monkeypatch, tmp_path):
    """A trained and scored run with two of M1–M7, and no login to W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    folder = train(config("logger=[csv,tensorboard]"))
    evaluate_run(folder)
    put_scores(folder, "moran", "test", "key", [Score("moran", 0.25)])
    put_scores(folder, "cross", "test", "key", [Score("cross_domain_preservation", v, f"data={v}") for v in (0.5, 1.0)])
    return folder


def evaluation(*overrides: str):
    return composed("evaluate", *overrides)


@pytest.mark.slow
def test_every_logger_has_the_scores(run):
    before = {point for point in csv_points(run) if point[0].startswith(("train/", "val/", "loss/"))}
    found, steps = scores_of(run), json.loads((run / "result.json").read_text())["steps"]
    assert (found["test/M1"], found["test/M6"]) == (0.25, 0.75)
    assert found["test/fvu"] == json.loads((run / "scores.json").read_text())["metrics"]["fvu"]
    assert not {"test/M4", "test/M7"} & set(found)  # not computed
    assert {name for name in TESTED if not name.startswith("test/M")} <= set(found)

    cfg = evaluation("logger=[csv,tensorboard,wandb]", "logger.wandb.latents=6")
    publish([run], cfg)
    for points in (csv_points(run), tensorboard_points(run)):
        assert before <= points
        assert {(n, s): v for n, s, v in points if n.startswith("test/")} == {
            (name, steps): pytest.approx(value, rel=1e-6) for name, value in found.items()
        }
    [file] = run.glob("wandb/offline-run-*/*.wandb")
    logged = offline_run(file)
    assert logged["id"] == run.name
    assert found.items() <= logged["summary"].items()
    assert {"val/fvu", "seconds"} <= set(logged["summary"])  # complete, whatever was synced before
    history = {row["trainer/global_step"]: row["train/loss"] for row in logged["history"] if "train/loss" in row}
    assert history == {step: row["train/loss"] for step, row in history_rows(run) if "train/loss" in row}
    assert set(history.items()) == {(s, v) for n, s, v in before if n == "train/loss"}

    [table] = run.glob("wandb/offline-run-*/files/media/table/latents_*.json")
    table = json.loads(table.read_text())
    assert table["columns"][:4] == ["group", "latent", "top images", "where it fires"]
    assert {row[0] for row in table["data"]} == {"most used", "random"}  # none is pure: too few images
    entries = [e for r in records(file) if r.HasField("artifact") for e in r.artifact.manifest.contents]
    pictures = [Path(e.local_path) for e in entries if e.path.endswith(".png")]
    assert 0 < len(pictures) <= 2 * len(table["data"])  # one that two latents share is there once
    assert all(path.is_file() and run in path.parents for path in pictures)  # and not somewhere in the home folder
    assert "latents/most used" in EventAccumulator(str(run / "tensorboard")).Reload().Tags()["images"]


@pytest.mark.slow
def test_scores_join_the_run_of_the_training(run, monkeypatch):
    import wandb

    service = Service()
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", service.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    try:
        publish([run], evaluation("logger=wandb", "logger.wandb.latents=6"))
    finally:
        wandb.teardown()
    [(name, logged)] = service.runs.items()
    summary = json.loads(logged["summaryMetrics"])
    assert name == run.name
    assert (summary["test/M1"], summary["latents"]["_type"], summary["scores"]["_type"]) == (0.25, *["table-file"] * 2)
    assert sum("latents" in row for row in service.rows(name)) == 1


@pytest.mark.slow
def test_what_was_published_is_not_published_again_unless_it_changed(run):
    cfg = evaluation("logger=[csv,tensorboard]")
    publish([run], cfg)
    first = tensorboard_points(run)
    publish([run], cfg)
    with (run / "csv" / "metrics.csv").open() as file:
        assert sum(bool(row["test/fvu"]) for row in csv.DictReader(file)) == 1
    assert tensorboard_points(run) == first
    events = len(list((run / "tensorboard").glob("events*")))
    put_scores(run, "moran", "test", "key", [Score("moran", 0.5)])
    publish([run], cfg)
    assert len(list((run / "tensorboard").glob("events*"))) == events + 1
    assert {value for name, _, value in csv_points(run) if name == "test/M1"} == {0.5}
    with (run / "csv" / "metrics.csv").open() as file:
        assert sum(bool(row["test/fvu"]) for row in csv.DictReader(file)) == 1


def test_images_that_are_gone_cost_only_the_pictures(run, capsys):
    cfg = json.loads((run / "cfg.json").read_text())
    cfg["config"]["data"]["path"] = "/no/such/folder"
    (run / "cfg.json").write_text(json.dumps(cfg))
    publish([run], evaluation("logger=wandb"))
    assert "no pictures of latents: There is no folder" in capsys.readouterr().out
    [file] = run.glob("wandb/offline-run-*/*.wandb")
    assert "test/fvu" in offline_run(file)["summary"]


def test_scores_go_where_the_training_logged(tmp_path):
    there = {"project": "grid", "entity": "team", "group": "sweep 1", "suffix": "-b", "latents": 3}
    made = {"schema": 2, "config": {"logger": {"wandb": there}}}
    (tmp_path / "cfg.json").write_text(json.dumps(made))
    here = {"project": "sae-lightning", "entity": None, "group": None, "suffix": "", "latents": 24}
    assert wandb_options(tmp_path, here) == there | {"latents": 24}
    (tmp_path / "cfg.json").write_text(json.dumps(made | {"config": {"logger": {"kind": "none"}}}))  # an older run
    assert wandb_options(tmp_path, here) == here


def test_an_unknown_logger_is_refused():
    with pytest.raises(ValueError, match=r"Unknown logger\.paper"):
        publish([], evaluation("+logger.paper={}"))


def test_every_headline_has_a_goal():
    assert {GOALS[f"test/M{i}"] for i in (1, 3, 4, 5, 6)} == {"maximize"}
    assert {GOALS[f"test/M{i}"] for i in (2, 7)} == {"minimize"}


def test_a_sheet_has_strips_below_each_other():
    made = sheet([Image.new("RGBA", (8, 3), "red"), Image.new("RGBA", (5, 2), "blue")], gap=1)
    assert made.size == (8, 6)
    assert [made.getpixel((0, y)) for y in (0, 3, 4)] == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
    assert made.getpixel((7, 5)) == (255, 255, 255)
