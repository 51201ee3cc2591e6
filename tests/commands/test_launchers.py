"""The launchers of ``train.py -m hydra/launcher=…``, and where their jobs find themselves."""

import pytest
from hydra import compose, initialize_config_dir
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from sae_lightning.commands import hydra
from sae_lightning.commands.hydra import OneGPU, take, visible_gpus
from sae_lightning.commands.main import main
from tests.configs import CONF
from tests.processes import ROOT, run

PRESETS = ("submitit_slurm", "slurm_cpu", "slurm_gpu", "slurm_ddp")


def launcher(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["hydra.sweep.dir=a/sweep", *overrides], return_hydra_config=True)
    return cfg.hydra


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_batch_file_for_one_task_a_node(name):
    preset = launcher(f"hydra/launcher={name}", "hydra.job.name=train", "trainer.devices=4", "trainer.num_nodes=2")
    settings = dict(preset.launcher)
    assert settings["_target_"].endswith("SlurmLauncher")
    assert settings["partition"] is settings["account"] is None
    assert settings["submitit_folder"] == "a/sweep/.submitit/%j"
    names = SlurmExecutor._equivalence_dict() or {}
    unknown = {"_target_", "submitit_folder", "max_num_timeout"}
    lines = _make_sbatch_string("run", "a/sweep", **{names.get(k, k): v for k, v in settings.items()
                                                      if k not in unknown and v is not None}, map_count=3)  # fmt: skip
    assert "#SBATCH --ntasks-per-node=1" in lines
    assert "#SBATCH --array=0-2%3" in lines
    assert f"#SBATCH --signal=USR2@{120 if name == 'submitit_slurm' else 180}" in lines
    assert f"#SBATCH --nodes={2 if name == 'slurm_ddp' else 1}\n" in lines
    wanted = {"slurm_gpu": 1, "slurm_ddp": 4}.get(name)
    assert ("#SBATCH --gpus-per-node" in lines) == (wanted is not None)
    if wanted:
        assert f"#SBATCH --gpus-per-node={wanted}\n" in lines
    if name != "submitit_slurm":
        assert settings["max_num_timeout"] > 0  # else submitit does not requeue a job at its time limit


def test_a_preset_follows_the_command_line():
    preset = launcher("hydra/launcher=slurm_gpu", "hydra.launcher.partition=a100", "hydra.launcher.cpus_per_task=3")
    assert preset.launcher.partition == "a100"
    assert preset.launcher.setup[0] == "export OMP_NUM_THREADS=3"


def test_presets_are_listed_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--hydra-help"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hydra/launcher:")]
    assert {*PRESETS, "gpus", "basic", "joblib"} <= set(
        line.removeprefix("hydra/launcher:").replace(" ", "").split(",")
    )


# --- one run a GPU ------------------------------------------------------------------------------------
def test_the_gpus_launcher_starts_as_many_processes_as_gpus(monkeypatch):
    monkeypatch.setenv(hydra.VISIBLE, "3, 5,GPU-1a")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["hydra/launcher=gpus"], return_hydra_config=True)
        fixed = compose("config", ["hydra/launcher=gpus", "hydra.launcher.n_jobs=2"], return_hydra_config=True)
    assert cfg.hydra.callbacks.one_gpu._target_.endswith("OneGPU")
    assert "closing_table" in cfg.hydra.callbacks
    for config, expected in ((cfg, 3), (fixed, 2)):
        OneGPU().on_multirun_start(config)
        assert config.hydra.launcher.n_jobs == expected
    monkeypatch.setenv(hydra.VISIBLE, "")
    assert visible_gpus() == []


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hydra, "_taken", mine := [])
    assert take(["4"], tmp_path) == take(["4"], tmp_path) == "4"
    monkeypatch.setattr(hydra, "_taken", [])
    with pytest.raises(RuntimeError, match=r"lower hydra.launcher.n_jobs"):
        take(["4"], tmp_path)
    assert len(mine) == 1


@pytest.mark.slow
def test_runs_at_one_time_see_different_gpus(tmp_path):
    """Each job waits until both processes have one, so that neither does all the jobs."""
    app = tmp_path / "app.py"
    app.write_text(
        "import os, sys, time, pathlib, hydra\n"
        f"@hydra.main(version_base='1.3', config_path={str(CONF)!r}, config_name='config')\n"
        "def main(cfg):\n"
        "    out = pathlib.Path('out')\n"
        "    (out / f'{cfg.seed}-{os.getpid()}').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "    end = time.monotonic() + 600\n"
        "    while len({p.name.split('-')[1] for p in out.iterdir()}) < 2 and time.monotonic() < end:\n"
        "        time.sleep(0.1)\n"
        "main()\n"
    )
    (tmp_path / "out").mkdir()
    sweep = ("-m", "hydra/launcher=gpus", "hydra/sweeper=basic", "seed=1,2,3,4", f"paths.runs={tmp_path / 'runs'}")
    run(str(app), *sweep, cwd=tmp_path, CUDA_VISIBLE_DEVICES="7,9", PYTHONPATH=str(ROOT))
    seen: dict[str, set[str]] = {}
    for path in (tmp_path / "out").iterdir():
        seen.setdefault(path.name.split("-")[1], set()).add(path.read_text())
    assert sorted(map(sorted, seen.values())) == [["7"], ["9"]]
