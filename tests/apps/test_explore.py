"""From the command's config to applications: which runs, in which way, and what is printed."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from sae_lightning.apps import app as module
from sae_lightning.apps.app import app, explore, load_app, write_result
from sae_lightning.rendering.page import Section, headlines
from sae_lightning.report.page import applications
from sae_lightning.runs.results import Headline, Result, read_result
from sae_lightning.runs.run import chosen_runs
from tests.configs import CONF


def finished(folder):
    folder.mkdir(parents=True)
    (folder / "result.json").touch()
    return folder


@pytest.fixture
def runs(tmp_path):
    return [finished(tmp_path / "runs" / name) for name in ("msae-clip", "topk-clip", "topk-mae")]


def test_runs_are_named_by_folder_by_pattern_or_both(runs, tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "runs", finished(tmp_path / "other" / "run")
    assert chosen_runs("topk-*", folder) == runs[1:]
    assert chosen_runs(str(elsewhere), folder) == [elsewhere]
    several = OmegaConf.create([str(elsewhere), "*-clip", "topk-*"])
    assert chosen_runs(several, folder) == [elsewhere, *runs]
    monkeypatch.chdir(tmp_path)
    assert chosen_runs("runs/topk-*", tmp_path / "nowhere") == [Path("runs/topk-clip"), Path("runs/topk-mae")]
    (folder / "unfinished").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No finished run is .*unfinished"):
        chosen_runs(str(folder / "unfinished"), folder)
    with pytest.raises(FileNotFoundError, match=r"No finished run .* matches unfinished"):
        chosen_runs("unfinished", folder)


def config(app, tmp_path, run="topk-*"):
    paths = {"runs": str(tmp_path / "runs")}
    return OmegaConf.create({"app": {"name": app}, "run": run, "paths": paths, "split": "test", "seed": 1})


@pytest.fixture
def mine(monkeypatch):
    """Two applications of another package, of each run and of all together; what they were given."""
    given = []

    def opened(folder):
        return SimpleNamespace(name=folder.name, label="a run", results=lambda app: folder / "apps" / app)

    monkeypatch.setattr(module, "Run", opened)
    monkeypatch.setattr(module, "APPS", type(module.APPS)("app"))
    monkeypatch.setattr(module, "TOGETHER", set())

    @app("counting")
    def counting(runs, cfg):
        given.append([one.name for one in runs])
        table = pd.DataFrame({"latent": [0, 1]})
        return Result("Counting", [Headline("letters", len(runs[0].name))], tables={"latents.parquet": table},
                      sections=[Section("Names", f"Called {runs[0].name}.")], numbers={"more": 1})  # fmt: skip

    @app("all", together=True)
    def nothing(runs, cfg):
        given.append([one.name for one in runs])

    return given


def test_an_application_of_another_package_is_given_each_run_and_appears_in_the_report(mine, runs, tmp_path):
    found = explore(config("counting", tmp_path))
    assert mine == [["topk-clip"], ["topk-mae"]]
    folder = runs[1] / "apps" / "counting"
    assert found[0].folder == folder
    assert pd.read_parquet(folder / "latents.parquet")["latent"].tolist() == [0, 1]
    record = json.loads((folder / "app.json").read_text())
    assert (record["about"], record["settings"]["split"], record["more"]) == ("a run", "test", 1)
    for run in runs:
        (run / "sae.safetensors").touch()
        os.utime(run / "sae.safetensors", (0, 0))
    shown = applications(runs, tmp_path / "report.html")
    assert [(of.text, of.aside) for of in shown[::2]] == [("Counting", "topk-clip"), ("Counting", "topk-mae")]
    assert "Called topk-clip." in (tmp_path / shown[0].href).read_text()


def test_one_for_several_runs_is_called_once_and_may_leave_nothing(mine, runs, tmp_path):
    assert explore(config("all", tmp_path)) == []
    assert mine == [["topk-clip", "topk-mae"]]


def test_our_applications_are_their_folders():
    assert set(module.OURS) == {path.stem for path in (CONF / "app").glob("*.yaml")}
    for name, together in {"naming": False, "stability": True}.items():
        assert load_app(name).__module__ == f"sae_lightning.apps.{name}.app"
        assert (name in module.TOGETHER) == together


def test_an_unknown_application_is_named_with_those_that_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown app=nameing; choose one of agreement, .*, naming, .*steering\."):
        explore(config("nameing", tmp_path))


def test_what_is_left_is_read_back_and_printed_beside_its_baseline(tmp_path):
    lines = [Headline("right", 0.8126, 0.25, "chance", (0.75, 0.9)), Headline("found", 3.0)]
    opened = SimpleNamespace(label="a run", results=lambda app: tmp_path)
    result = write_result(Result("People", lines), [opened], config("naming", tmp_path))
    back = read_result(tmp_path)
    assert (back.app, back.title, back.headlines[0].ours) == ("naming", "People", 0.8126)
    console = Console(width=120, record=True)
    headlines(result.headlines, result.title).show(console)
    text = console.export_text()
    for word in ("right", "0.813", "0.75 to 0.9", "0.25", "chance", "found", "3"):
        assert word in text
    assert "0.813" in result.page.read_text()
