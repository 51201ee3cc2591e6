"""``sae-lightning``: its commands, a user's own configs, and plugins of other packages."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from sae_lightning.apps.app import APPS
from sae_lightning.commands import main as commands
from sae_lightning.commands.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, where commands are typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sae-lightning"])
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    return tmp_path


def job(capsys, *words: str):
    """The config that ``sae-lightning train`` composes from ``words``."""
    assert main(["train", *words, "--cfg", "job"]) == 0
    return OmegaConf.create(capsys.readouterr().out)


def test_the_commands_are_listed_and_misspelt_ones_named(capsys):
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(said.count(f"\n  {name} ") == 2 for name in commands.COMMANDS)
    assert main(["trian"]) == 2
    assert "There is no command trian; choose one of train, extract" in capsys.readouterr().err


def test_the_environment_in_ten_lines(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["check"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == ["package", "libraries", "processor", "memory", "kernels", "GPUs", "disk", "logins", "extras"]
    assert f"torch {torch.__version__.split('+')[0]}" in said["libraries"]
    assert said["logins"].startswith("model hub yes")
    assert "WANDB_MODE is set" in said["logins"]
    assert "hf_secret" not in str(said)


@pytest.mark.parametrize("name", commands.HYDRA)
def test_each_command_of_a_checkout_has_its_file(name, here, capsys):
    assert f"from sae_lightning.commands.{name} import main" in (ROOT / f"{name}.py").read_text()
    assert main([name, "--help"]) == 0
    assert f"Usage: sae-lightning {name} " in capsys.readouterr().out
    assert list(here.iterdir()) == []


def test_a_user_s_own_files_add_to_ours_and_come_before_them(here, capsys):
    for name, text in {
        "sae/mine": "defaults: [topk]\nsettings: {tied: true}\n",
        "data/demo": "name: own\nsource: demo\nk: 3\nbatch_size: 64\nmax_epochs: 1\nbackbones: tiny\n",
        "mine": "defaults: [config, {override sae: mine}, _self_]\nexpansion: 2\n",
    }.items():
        path = here / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    cfg = job(capsys, "--config-dir", "./conf", "sae=mine", "sae.settings.inference=relu")
    assert (cfg.sae.settings.tied, cfg.sae.settings.inference, cfg.data.name, cfg.expansion) == (True, "relu", "own", 8)
    cfg = job(capsys, "--config-dir=./conf", "--config-name", "mine")
    assert (cfg.sae.settings.tied, cfg.data.k, cfg.expansion) == (True, 3, 2)
    main(["train", "--config-dir", "./conf", "--help"])
    assert "matryoshka_topk, mine, msae" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--config-dir", "./conf", "sae=min"])
    assert "There is no sae=min; did you mean mine?" in capsys.readouterr().err


def test_a_user_s_file_that_would_hide_a_root_of_ours_is_refused(here, capsys):
    (here / "config.yaml").write_text("k: 3\n")
    with pytest.raises(SystemExit):
        main(["train", "--config-dir", ".", "--cfg", "job"])
    assert capsys.readouterr().err.startswith("./config.yaml is named like one of ours, which it would hide; ")


@pytest.fixture
def installed(here, monkeypatch):
    """``installed(module)``: a package ``mine`` with this text, a config, and an entry point, as pip would put it."""

    def install(text: str) -> None:
        (here / "mine" / "conf" / "sae").mkdir(parents=True)
        (here / "mine" / "__init__.py").write_text(text)
        (here / "mine" / "conf" / "__init__.py").touch()
        (here / "mine" / "conf" / "sae" / "mine.yaml").write_text("defaults: [topk]\nsettings: {tied: true}\n")
        about = here / "mine-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text("[sae_lightning.plugins]\nmine = mine\n")
        monkeypatch.syspath_prepend(str(here))
        for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
            monkeypatch.delitem(sys.modules, name)

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


def test_a_plugin_is_imported_before_a_config_is_composed_and_brings_its_own(installed, capsys):
    installed("import os\nos.environ['MINE'] = '5'\n")
    cfg = job(capsys, "hydra.searchpath=[pkg://mine.conf]", "sae=mine")
    assert (cfg.sae.settings.tied, os.environ.pop("MINE")) == (True, "5")


def test_a_plugin_that_cannot_be_imported_is_named(installed, capsys):
    installed("import nothing_of_this_name\n")
    with pytest.raises(SystemExit):
        main(["train", "--cfg", "job"])
    said = capsys.readouterr().err
    assert said.startswith("The plugin mine (mine) cannot be imported: ModuleNotFoundError: No module named 'nothing")


def test_a_plugin_s_application_is_known_by_its_name(installed, here, capsys):
    installed("from sae_lightning.apps.app import app\n\n@app('toy')\ndef run(runs, cfg):\n    return None\n")
    folder = here / "conf" / "app"
    folder.mkdir(parents=True)
    (folder / "toy.yaml").write_text("name: toy\nsome: 3\n")
    with pytest.raises(SystemExit):
        main(["explore", "--config-dir", "conf", "app=toy", "run=nothing"])
    assert "nothing" in capsys.readouterr().err  # there is no such run, which is asked for after all settings
    del APPS["toy"]
    with pytest.raises(SystemExit):
        main(["explore", "app.name=other"])
    assert "Unknown app.name=other; choose one of naming, search" in capsys.readouterr().err
