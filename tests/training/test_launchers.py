"""The launchers of ``train.py -m hydra/launcher=…``, and where their jobs find themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from sae_lightning.commands import hydra
from sae_lightning.commands.hydra import OneGPU, take, visible_gpus
from sae_lightning.distributed.launch import call_meeting, check_tasks, find_meeting, leading
from tests.configs import CONF

ROOT = Path(__file__).resolve().parents[2]
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


def test_presets_are_listed_in_the_help():
    shown = subprocess.run(
        [sys.executable, "train.py", "--hydra-help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("hydra/launcher:")]
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
    command = [
        sys.executable,
        str(app),
        "-m",
        "hydra/launcher=gpus",
        "hydra/sweeper=basic",
        "seed=1,2,3,4",
        f"paths.runs={tmp_path / 'runs'}",
    ]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="7,9", PYTHONPATH=str(ROOT))
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    seen: dict[str, set[str]] = {}
    for path in (tmp_path / "out").iterdir():
        seen.setdefault(path.name.split("-")[1], set()).add(path.read_text())
    assert sorted(map(sorted, seen.values())) == [["7"], ["9"]]


# --- where a SLURM job finds itself --------------------------------------------------------------------
def slurm(monkeypatch, node: int, nodes: int, tasks: int) -> None:
    values = {"NODEID": node, "STEP_NUM_NODES": nodes, "STEP_NUM_TASKS": tasks, "JOB_ID": 5, "STEP_ID": 0}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_a_job_with_other_tasks_or_nodes_than_the_config_is_refused(config, monkeypatch):
    check_tasks(config())
    with pytest.raises(ValueError, match=r"trainer.num_nodes=2, but this job runs on 1"):
        check_tasks(config("trainer.num_nodes=2"))
    slurm(monkeypatch, 0, 1, 4)
    with pytest.raises(ValueError, match=r"4 tasks on 1 node.*tasks_per_node=1"):
        check_tasks(config("trainer.devices=4"))
    slurm(monkeypatch, 0, 2, 2)
    check_tasks(config("trainer.num_nodes=2"))
    with pytest.raises(ValueError, match="hydra/launcher=slurm_ddp"):
        check_tasks(config())


def test_nodes_meet_where_the_first_one_says(tmp_path, monkeypatch):
    slurm(monkeypatch, 0, 2, 2)
    with leading(tmp_path):
        store, address = call_meeting(tmp_path)
        assert find_meeting(tmp_path) == (address, store.port)
    assert find_meeting(tmp_path) is None  # over: finished, skipped or failed
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # what an earlier start said is no news
    with leading(tmp_path):
        store, address = call_meeting(tmp_path)
        assert find_meeting(tmp_path) == (address, store.port)
