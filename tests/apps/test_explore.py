"""From the command's config to applications: which runs, in which way, and what is printed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from sae_lightning.apps import app as module
from sae_lightning.apps.app import explore, leave
from sae_lightning.rendering.page import headlines
from sae_lightning.runs.results import Headline, Result, read_result
from sae_lightning.runs.run import chosen_runs


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
    return OmegaConf.create({"app": {"name": app}, "run": run, "paths": {"runs": str(tmp_path / "runs")}})


@pytest.mark.parametrize("app", [*module.EACH, *module.TOGETHER])
def test_an_application_is_given_one_run_after_another_or_all_at_once(app, runs, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(module, "Opened", lambda folder: folder.name)
    monkeypatch.setattr(module, "import_module", lambda name: SimpleNamespace(run=lambda of, cfg: given.append(of)))
    left = explore(config(app, tmp_path))
    assert given == (["topk-clip", "topk-mae"] if app in module.EACH else [["topk-clip", "topk-mae"]])
    assert left == ([None, None] if app in module.EACH else [])  # one that serves a page leaves nothing


def test_an_unknown_application_is_named_with_those_that_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown app=nameing; choose one of naming, .* explorer\."):
        explore(config("nameing", tmp_path))


def test_what_is_left_is_read_back_and_printed_beside_its_baseline(tmp_path):
    lines = [Headline("right", 0.8126, 0.25, "chance", (0.75, 0.9)), Headline("found", 3.0)]
    result = leave(Result("agreement", "People", tmp_path, lines), "a run", {"k": 3}, {}, {"more": 1})
    back = read_result(tmp_path)
    assert (back.app, back.title, back.headlines[0].ours) == ("agreement", "People", 0.8126)
    console = Console(width=120, record=True)
    headlines(result.headlines, result.title).show(console)
    text = console.export_text()
    for word in ("right", "0.813", "0.75 to 0.9", "0.25", "chance", "found", "3"):
        assert word in text
    assert "0.813" in result.page.read_text()
