"""``sae-lightning runs rm``, ``diff`` and ``clean``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_lightning.commands.main import main
from sae_lightning.runs.identity import identity, run_name
from sae_lightning.runs.state import note_plan, states

SEEN = {"data.train": "a", "data.val": "b", "backbone": "c", "layer": 4}


@pytest.fixture
def runs(config):
    """A folder with finished runs of k 4 and 8, a failed, a broken and a planned one."""
    from omegaconf import OmegaConf

    cfgs = {k: config(f"k={k}", "extract.batch_size=7") if k == 8 else config(f"k={k}") for k in (4, 8)}
    folder = Path(cfgs[4].paths.runs)
    for name, cfg in {f"k{k}": cfg for k, cfg in cfgs.items()}.items():
        (folder / name / "checkpoints").mkdir(parents=True)
        (folder / name / "resolved.yaml").touch()
        made = {"schema": 2, "config": OmegaConf.to_container(cfg, resolve=True), "identity": identity(cfg, SEEN)}
        (folder / name / "cfg.json").write_text(json.dumps(made))
        (folder / name / "result.json").write_text(json.dumps({"seconds": 1.0, "val": {"explained_variance": 0.5}}))
        save_file({"b": torch.zeros(1)}, folder / name / "sae.safetensors")
    for name in ("nan", "begun"):
        (folder / name).mkdir()
        (folder / name / ".lock").touch()
    (folder / "nan" / "failed.json").write_text(json.dumps({"about": "The loss is nan at step 3"}))
    note_plan([config("k=2")], [["k=2"]], Path("sweep"))
    return folder, run_name(config("k=2"))


def names(folder):
    return {state.name: state.state for state in states(folder)}


def test_runs_are_removed_when_the_answer_is_yes(runs, monkeypatch, capsys):
    folder, plan = runs
    whole = {plan: "planned", "begun": "broken", "k4": "finished", "k8": "finished", "nan": "failed"}
    assert names(folder) == whole
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["runs", "rm", "k4", "--folder", str(folder)]) == 1
    assert "Nothing was removed" in capsys.readouterr().out
    assert names(folder) == whole
    assert main(["runs", "rm", "unheard", "--folder", str(folder)]) == 1
    assert "No run in" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(["runs", "rm", "k*", plan, "--folder", str(folder)]) == 0
    assert names(folder) == {"begun": "broken", "nan": "failed"}


def test_tidying_removes_what_nothing_goes_on_from(runs, capsys):
    folder, plan = runs
    (folder / "begun" / "checkpoints").mkdir()
    assert main(["runs", "clean", str(folder), "--yes"]) == 0
    assert names(folder) == {plan: "planned", "k4": "finished", "k8": "finished"}
    assert not (folder / "k4" / "resolved.yaml").exists()
    assert (folder / "k4" / "checkpoints").exists()  # may be the user's own
    assert main(["runs", "clean", str(folder)]) == 0
    assert "nothing to tidy" in capsys.readouterr().out


def test_a_comparison_tells_what_makes_them_two_runs_from_what_does_not(runs, capsys):
    folder, _ = runs
    assert main(["runs", "diff", "k4", str(folder / "k8"), "--folder", str(folder)]) == 0
    said = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in said.splitlines() if line.startswith("│")}
    assert "another run" in lines["sae.settings.k"]
    assert "another run" not in lines["extract.batch_size"]
    assert "expansion" not in lines
    assert "They differ in 3 settings, of which 1 can change the result." in said  # k itself is used in settings.k
    assert main(["runs", "diff", "k4", "nan", "--folder", str(folder)]) == 1
    assert "cfg.json" in capsys.readouterr().err
