"""The workspace of the grid is built without network, and its panels name what trainings and evaluations log."""

from __future__ import annotations

import json

import pytest

from sae_lightning.report.publish import GOALS

workspace = pytest.importorskip("experiments.wandb.workspace", reason="needs the package wandb-workspaces")


def test_the_workspace_has_all_panels_as_json():
    made = workspace.as_json(workspace.workspace("team", "project", "sweep 1"))
    assert (made["entity"], made["project"]) == ("team", "project")
    sections = made["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(workspace.sections())
    kinds = {panel["viewType"] for section in sections for panel in section["panels"]}
    assert {"Run History Line Plot", "Bar Chart", "Scatter Plot", "Parallel Coordinates Plot"} <= kinds
    text = json.dumps(made, ensure_ascii=False)
    for name in (*(f"test/M{i}" for i in range(1, 8)), "train/loss", "sweep 1", "latents"):
        assert name in text


def test_axes_of_which_less_is_better_are_turned():
    [plot] = [p for p in workspace.parallel() if hasattr(p, "columns")]
    turned = {c.display_name[:2] for c in plot.columns if c.inverted}
    assert turned == {name[-2:] for name, goal in GOALS.items() if name.startswith("test/M") and goal == "minimize"}


def test_the_report_has_a_grid_below_each_heading():
    made = workspace.report("team", "project")
    kinds = [type(block).__name__ for block in made.blocks]
    assert kinds == ["TableOfContents", *["H1", "PanelGrid"] * len(workspace.sections())]
