"""A piece of the grid through the commands, killed once on its way: four SAEs, M1–M7 and the page of analyses."""

import csv
import math

import pytest

from sae_lightning.runs.state import states
from tests.processes import Command, run, wait_for

TRAIN = [
    "train.py", "-m", "experiment=visaebench_grid", "backbone=dinov2,mae", "expansion=8", "k=8,16",
    "+data.limit=200", "trainer.max_epochs=2", "trainer.enable_progress_bar=false",
]  # fmt: skip
PARTS_LEFT_OUT = ("segmentation", "recovery", "histograms", "cknna")
EVALUATE = [
    "evaluate.py", "metrics=visaebench", "latents_shown=2", *(f"metrics.{part}=null" for part in PARTS_LEFT_OUT),
    "+metrics.cross_domain.sets.digits.limit=150",
]  # fmt: skip
REPORT = ["report.py", "grid='*'"]


@pytest.mark.slow
def test_four_saes_are_trained_scored_and_analysed(tmp_path):
    runs = tmp_path / "runs"
    with Command(*TRAIN, cwd=tmp_path) as job:
        wait_for(lambda: list(runs.glob("*/checkpoints/last.ckpt")) or not job.running)
        assert job.running
        job.kill()
    before = {run.name: run.state for run in states(runs)}
    assert len(before) == 4
    assert set(before.values()) == {"broken", "planned"}
    printed = run(*TRAIN, cwd=tmp_path).stdout
    assert "resuming from its last checkpoint" in printed
    assert [run.state for run in states(runs)] == ["finished"] * 4

    printed = run(*EVALUATE, cwd=tmp_path, COLUMNS="200").stdout
    assert "M7 absorption" in printed
    assert len({run.scores for run in states(runs)} - {0}) == 1

    run(*REPORT, cwd=tmp_path)
    page = (tmp_path / "reports" / "grid.html").read_text()
    for heading in ("Variance", "hypotheses", "probing", "(tiny)"):
        assert heading.lower() in page.lower()
    with (tmp_path / "reports" / "grid-tables" / "variance.csv").open() as file:
        table = list(csv.reader(file))
    assert sorted(row[0].split()[0] for row in table[1:]) == [f"M{i}" for i in range(1, 8)]
    for row in table[1:]:
        assert math.isclose(sum(map(float, row[1:4])), 1, abs_tol=1e-9), row  # η² of a whole grid
