"""The closing table, and what Hydra finds by name."""

import json
import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.plugins import Plugins
from hydra.utils import instantiate
from rich.console import Console

from sae_lightning.commands.help import CONF


def cells(table, folder: Path) -> list[str]:
    console = Console(width=160, record=True)
    table.show([folder], console)
    line = next(line for line in console.export_text().splitlines() if folder.name in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.mark.parametrize(
    ("command", "made", "result", "shown"),
    [
        (
            "config",
            {"backbone": "clip (tiny)", "layer": None, "k": 8, "d_in": 12, "d_sae": 24, "config": {}},
            {"val": {"explained_variance": math.nan, "l0": 8.0, "dead_share": 0.5}, "seconds": 3.0},
            ["clip (tiny)", "–", "8 of 12", "24", "–", "8.0", "50.0%", "3 s"],
        ),
        (
            "finetune",
            {"mono_weight": 0.1, "config": {"held_out": "test"}},
            {
                "test": {"accuracy": 0.5, "monoscore": 0.25, "purity": math.nan, "weighted_purity": 1.0,
                         "positive_images": 7.0},
                "seconds_an_epoch": None,
            },
            ["0.1", "50.00%", "0.2500", "–", "1.000", "7", "–"],
        ),
    ],
)  # fmt: skip
def test_the_closing_table_shows_the_columns_of_conf(command, made, result, shown, tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        table = instantiate(compose(command, return_hydra_config=True).hydra.callbacks.closing_table)
    folder = tmp_path / "run-1"
    folder.mkdir()
    assert [cell for cell in cells(table, folder) if cell] == ["run-1", "not finished"]
    (folder / "failed.json").write_text(json.dumps({"about": "The loss is nan."}))
    assert [cell for cell in cells(table, folder) if cell] == ["run-1", "failed"]
    (folder / "cfg.json").write_text(json.dumps(made))
    (folder / "result.json").write_text(json.dumps(result))
    assert cells(table, folder) == ["run-1", *shown]


def test_sweepers_and_configs_are_found_by_name():
    known = Plugins.instance().class_name_to_class
    assert {f"hydra_plugins.packed_sweeper.{name}" for name in ("CheckedSweeper", "PackedSweeper")} <= set(known)
    with initialize_config_module("sae_lightning.conf", version_base="1.3"):
        assert compose("config", ["sae=topk"]).sae.name == "topk"


def test_the_folder_of_plugins_is_shared_with_other_packages():
    import hydra_plugins

    assert hydra_plugins.__file__ is None
    assert len(list(hydra_plugins.__path__)) > 1
