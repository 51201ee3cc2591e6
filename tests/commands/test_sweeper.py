"""A sweep trains what Hydra composed for it, wherever its jobs run, and closes with a table of its own runs."""

import os
from pathlib import Path

import pytest
import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from sae_lightning.commands.hydra import COMMAND, ClosingTable, point_to
from sae_lightning.commands.paths import RANKS, started
from sae_lightning.runs.identity import run_name
from sae_lightning.runs.packs import members_of, read_pack, write_pack
from sae_lightning.runs.state import planned
from tests.configs import CONF


def command(task, overrides, *folders, name="mine", many=True):
    """What ``train.py --config-name NAME [-m] OVERRIDES`` does, with ``task`` as its main function."""
    search = create_config_search_path(str(folders[0]))
    for folder in folders[1:]:
        search.prepend("main", f"file://{folder}")
    hydra, before = Hydra.create_main_hydra2("train", search), HydraConfig.instance().cfg
    try:
        (hydra.multirun if many else hydra.run)(name, task, list(overrides), with_log_configuration=False)
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = before


def test_packs_train_what_the_sweep_composed(tmp_path, monkeypatch):
    typed, extra = tmp_path / 'it\'s a "pack" = {a,b} \\ of [two]: #1', tmp_path / "extra"
    (extra / "sae").mkdir(parents=True)
    typed.mkdir()
    monkeypatch.chdir(typed)
    (extra / "sae" / "own.yaml").write_text("defaults: [topk]\nsettings: {input_norm: layer}\n")
    mine = {"defaults": ["config", "_self_", {"override sae": "own"}], "k": 4, "trainer": {"max_epochs": 1}}
    (extra / "mine.yaml").write_text(yaml.safe_dump(mine))
    jobs = []

    def task(cfg):
        assert Path.cwd().parent.parent == typed / "multirun"  # hydra.job.chdir
        jobs.append(members_of(started(cfg)))

    command(
        task, ["expansion=2,3", "hydra.job.chdir=true", "hydra.sweep.dir=multirun/now", "paths.runs=r"], CONF, extra
    )
    [members] = jobs
    assert [(m.k, m.expansion, m.sae.settings.input_norm, m.trainer.max_epochs) for m in members] == [
        (4, 2, "layer", 1), (4, 3, "layer", 1)
    ]  # fmt: skip
    assert {Path(m.paths.runs) for m in members} == {typed / "r"}
    assert {Path(m.paths.stores) for m in members} == {typed / "stores"}
    assert all(m.pack.file is None for m in members)
    assert [path.name for path in typed.iterdir() if path.name != "multirun"] == ["r"]
    assert list(planned(typed / "r")) == [run_name(m) for m in members]


def test_a_pack_s_configs_are_those_of_hydra_to_the_letter(config, tmp_path):
    cfgs = [config("k=4", "+note='8'", "+two={1: 1e-3, b: ${k}, c: ???}"), config("k=5")]
    found = read_pack(write_pack(cfgs, tmp_path / "packs"))
    assert [OmegaConf.to_yaml(cfg) for cfg in found] == [OmegaConf.to_yaml(cfg) for cfg in cfgs]
    assert OmegaConf.is_struct(found[0])
    found[0].k = 6
    assert (found[0].two.b, found[1].k) == (6, 5)


@pytest.mark.parametrize("many", [False, True])
def test_commands_in_one_folder_have_their_own_tables(many, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = {
        "callbacks": {
            "table": {"_target_": "sae_lightning.commands.hydra.ClosingTable", "title": "Runs", "columns": {}}
        }
    }
    hydra = {"run": {"dir": "same"}, "sweep": {"dir": "same"}} | table
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"seed": 0, "hydra": hydra}))
    shown = []
    monkeypatch.setattr(ClosingTable, "show", lambda self, folders: shown.append(folders))

    def task(cfg):
        output = Path(HydraConfig.get().runtime.output_dir)
        point_to(output, [Path(f"/mine/{cfg.seed}")])
        with monkeypatch.context() as other:  # which started in the same second
            other.setenv(COMMAND, "command-other")
            point_to(output, [Path(f"/other/{cfg.seed}")])

    command(task, ["seed=1,2" if many else "seed=1"], tmp_path, many=many)
    assert shown == [[Path("/mine/1"), Path("/mine/2")] if many else [Path("/mine/1")]]
    assert COMMAND not in os.environ


def test_a_command_is_no_rank_whatever_the_job_platform_says(config, monkeypatch):
    for name in RANKS:
        monkeypatch.setenv(name, "1")
    started(config())
    assert not set(RANKS) & set(os.environ)
