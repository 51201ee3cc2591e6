"""A piece of the grid through the commands, killed once on its way: six SAEs, M1–M7 and the page of analyses."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sae_lightning.training.plan import states

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [
    "train.py", "-m", "experiment=visaebench_grid", "backbone=dinov2,mae", "expansion=8", "k=8,16,24",
    "+data.limit=300", "trainer.max_epochs=2", "trainer.enable_progress_bar=false",
]  # fmt: skip
PARTS_LEFT_OUT = ("segmentation", "recovery", "histograms", "cknna")
EVALUATE = [
    "evaluate.py", "metrics=visaebench", "latents_shown=2", *(f"metrics.{part}=null" for part in PARTS_LEFT_OUT),
]  # fmt: skip
REPORT = ["report.py", "grid='*'"]


def command(arguments):
    return [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1", COLUMNS="200")


def run(arguments, folder):
    return subprocess.run(
        command(arguments), cwd=folder, env=environment(), capture_output=True, text=True, check=True
    ).stdout


def killed_once(arguments, folder, when):
    """Run a command until ``when()`` and kill it."""
    with subprocess.Popen(command(arguments), cwd=folder, env=environment(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 400
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "it should not have ended by itself"
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_six_saes_are_trained_scored_and_analysed(tmp_path):
    runs = tmp_path / "runs"
    killed_once(TRAIN, tmp_path, lambda: list(runs.glob("*/checkpoints/last.ckpt")))
    before = {run.name: run.state for run in states(runs)}
    assert len(before) == 6
    assert set(before.values()) == {"broken", "planned"}
    printed = run(TRAIN, tmp_path)
    assert "resuming from its last checkpoint" in printed
    assert [run.state for run in states(runs)] == ["finished"] * 6

    printed = run(EVALUATE, tmp_path)
    assert "M7 absorption" in printed
    assert len({run.scores for run in states(runs)} - {0}) == 1

    run(REPORT, tmp_path)
    page = (tmp_path / "reports" / "grid.html").read_text()
    for heading in ("Variance", "hypotheses", "probing", "(tiny)"):
        assert heading.lower() in page.lower()
    with (tmp_path / "reports" / "grid-tables" / "variance.csv").open() as file:
        table = list(csv.reader(file))
    assert sorted(row[0].split()[0] for row in table[1:]) == [f"M{i}" for i in range(1, 8)]
    for row in table[1:]:
        assert math.isclose(sum(map(float, row[1:4])), 1, abs_tol=1e-9), row  # η² of a whole grid
