"""DDP on two CPU processes: equal to one process, inside a multirun too, and a crash ends the job."""

import json
from pathlib import Path

import pytest
import torch

from sae_lightning.distributed.launch import n_ranks
from sae_lightning.saes import SAE
from sae_lightning.training.fit import train
from tests.processes import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu"])
def test_two_ranks_equal_one(variant, config, tmp_path):
    """In float64, where Adam does not turn the last digit of a small gradient into a whole step."""
    choice = [f"sae={variant}", "trainer.precision=64-true", "trainer.max_epochs=2",
              "+callbacks.same={_target_: tests.training.crash.SameWeights}"]  # fmt: skip
    folders = {n: train(config(*choice, f"trainer.devices={n}", f"paths.runs={tmp_path / str(n)}")) for n in (1, 2)}
    assert folders[1].name == folders[2].name
    one, two = SAE.load(folders[1]).state_dict(), SAE.load(folders[2]).state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    results = [json.loads((folders[n] / "result.json").read_text()) for n in (1, 2)]
    assert results[1]["devices"] == 2
    assert results[0]["steps"] == results[1]["steps"]
    for name, value in results[0]["val"].items():
        assert results[1]["val"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_crash_of_one_rank_ends_the_job(config):
    crash = "+callbacks.crash={_target_: tests.training.crash.Crash, epoch: 1, rank: 1}"
    with pytest.raises(RuntimeError, match=r"one of its 2 ranks failed .*rank 1: RuntimeError: the power went out"):
        train(config("trainer.devices=2", crash))
    folder = train(config())  # the same run goes on, with one rank
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"


def test_a_multirun_of_two_jobs_with_two_ranks_each(config, pictures, tmp_path):
    """Ranks must not start the sweep again, and the closing table shows both jobs; then both are skipped."""
    cfg = config()
    command = [
        "train.py", "-m", "data=folder", f"data.path={pictures}", "backbone=deit", "backbone.size=tiny",
        "k=8", "expansion=2,4", "batch_size=256", "trainer.accelerator=cpu", "trainer.devices=2",
        "trainer.max_epochs=1", f"paths.stores={cfg.paths.stores}", f"paths.runs={cfg.paths.runs}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}", "pack.when=never",
    ]  # fmt: skip
    first = run(*command, cwd=tmp_path, COLUMNS="160")
    runs = sorted(p.parent for p in Path(cfg.paths.runs).glob("*/cfg.json"))
    assert [json.loads((r / "result.json").read_text())["devices"] for r in runs] == [2, 2]
    assert all(r.name in first.stdout for r in runs)
    assert (first.stdout + first.stderr).count("Launching 2 jobs") == 1
    one_rank = [part for part in command if part != "trainer.devices=2"]
    second = run(*one_rank, cwd=tmp_path, COLUMNS="160")
    assert second.stdout.count("finished before, skipped") == 2
    assert "8 of 128" in second.stdout


def test_ranks_follow_devices(config):
    assert n_ranks(config("trainer.devices=3")) == 3
    assert n_ranks(config("trainer.devices=[0,1]")) == 2
    assert n_ranks(config("trainer.devices=auto")) == 1
