"""A metric that another package brings, in one file and one entry of the config: evaluated, printed, in the report."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest

from sae_lightning import registry
from sae_lightning.evaluation.printed import print_scores
from sae_lightning.evaluation.suite import evaluate_runs
from sae_lightning.metrics.part import PARTS
from sae_lightning.report.benchmark import main_columns, scored_runs, table, topics
from sae_lightning.report.page import load_run
from sae_lightning.runs.scores import read_rows, value_of
from sae_lightning.saes import SAE
from tests.evaluation.test_suite import METRICS, folders, settings  # noqa: F401  a fixture

FILE = '''
"""Mean of all activations above a threshold."""

import torch

from sae_lightning.metrics.base import Score, SumMetric
from sae_lightning.metrics.part import Column, Part, register


class Loud(SumMetric):
    inputs = ("codes",)

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least
        self.add_sum("total")
        self.add_sum("count", dtype=torch.long)

    def update(self, codes) -> None:
        loud = codes.values[codes.values > self.least]
        self.total += loud.double().sum()
        self.count += len(loud)

    def compute(self):
        return {"loud": self.total / self.count}


def scores(run, options):
    return [Score("loud", float(run.metric("loud", Loud).compute()["loud"]), f"least={options['least']:g}")]


PART = register(Part(
    "loud", scores, lambda about, options: {"loud": Loud(options["least"])}, title="Loudness", about="Of activations.",
    columns=(
        Column("M8 loudness", "loud", "least=0.5", better=True, headline="M8", about="how loud latents are"),
        Column("above {least}", "loud", "least={least}"),
    ),
))
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that names its module as a plugin."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "loud_metric.py").write_text(FILE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "theirs"))
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("loud", "loud_metric", group)])
    yield
    PARTS.pop("loud", None)


def test_it_is_evaluated_printed_and_in_the_reports_tables(package, folders, stores, capsys):  # noqa: F811
    run = folders[0]
    made = json.loads((run / "cfg.json").read_text())
    (run / "cfg.json").write_text(json.dumps(made | {"expansion": 3, "seed": 1}))
    (run / "result.json").write_text(json.dumps({"seconds": 1.0, "steps": 1, "val": {}}))
    chosen = settings(metrics={"core": METRICS["core"], "loud": {"least": 0.5}})
    evaluate_runs([run], chosen)
    codes = SAE.load(run).encode(stores["test"].features(slice(None)).flatten(0, 1).float())
    expected = float(codes.values[codes.values > 0.5].double().mean())
    assert value_of(read_rows(run), "loud", "least=0.5") == pytest.approx(expected, rel=1e-6)

    capsys.readouterr()
    print_scores([run], chosen)
    printed = capsys.readouterr().out
    assert "M8 loudness" in printed
    assert f"{expected:.3f}" in printed

    saes = scored_runs([load_run(run)])
    main = main_columns()
    shown = table(saes, main, {}).markdown()
    assert [column.headline for column in main][7] == "M8"
    assert f"{expected:.3f}" in shown
    (topic,) = (topic for topic in topics(saes) if topic.title == "Loudness")
    assert ([column.title for column in topic.columns], topic.about) == (["above 0.5"], "Of activations.")
