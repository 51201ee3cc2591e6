"""Runs trained side by side are the runs trained alone: same weights, files and manners."""

import csv
import json
import re
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import open_dict
from safetensors.torch import load_file

from sae_lightning.runs.packs import members_of
from sae_lightning.training.fit import train
from sae_lightning.training.packed import PackError, train_packed
from tests.processes import Command, run, wait_for

CRASH = "+callbacks.crash={_target_: tests.training.crash.Crash, epoch: 1}"
MEMBERS = [
    ["sae=batchtopk", "loss.aux=0.03125"],
    ["sae=batchtopk", "expansion=4", "resample.every=3", "optimizer.lr=0.003"],
    ["sae=topk", "schedule.k_from=20", "schedule.k_share=0.5"],
    ["sae=jumprelu", "init.b_pre=geometric_median"],
    ["sae=matryoshka", "callbacks=monoloss"],
    ["sae=relu", "normalize=none", "trainer.max_epochs=2"],
]


@pytest.fixture(autouse=True)
def _one_thread():
    """Rounding of products may depend on the number of threads; a member of a pack has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(folder):
    return load_file(folder / "sae.safetensors")


def assert_equal(one, other):
    assert one.name == other.name
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), f"{one.name}: {name}"
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert results[0]["val"] == results[1]["val"]
    assert results[0]["steps"] == results[1]["steps"]


def history(folder):
    with (folder / "history.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_a_pack_of_many_kinds_equals_its_runs_alone(config, alone, workers):
    packed = train_packed([config(*choice, f"pack.workers={workers}") for choice in MEMBERS])
    for one, choice in zip(packed, MEMBERS, strict=True):
        other = alone(*choice)
        assert_equal(one, other)
        assert history(one) == history(other)
        assert not (one / "checkpoints").exists()
    result = json.loads((packed[0] / "result.json").read_text())
    assert result["side_by_side"] == len(MEMBERS)


@pytest.mark.slow
def test_rounds_that_fit_the_memory_give_the_same(config, alone, monkeypatch):
    seen = []
    from sae_lightning.training import packed

    together = packed.fit_together
    monkeypatch.setattr(packed, "fit_together", lambda members: (seen.append(len(members)), together(members))[1])
    small = [config(f"k={k}", "pack.memory_gb=0.004") for k in (2, 4, 8)]
    folders = train_packed(small)
    assert sum(seen) == 3
    assert len(seen) > 1
    for k, folder in zip((2, 4, 8), folders, strict=True):
        assert_equal(folder, alone(f"k={k}"))


def test_finished_ones_are_skipped_and_bad_ones_named(config, capsys):
    done = train(config("k=4"))
    with pytest.raises(PackError, match=r"2 of 4 runs failed.*k-3.*k400"):
        train_packed([config(f"k={k}") for k in (4, 8, -3, 400)])
    said = capsys.readouterr()
    assert f"{done.name}: finished before, skipped" in said.out
    assert "k=-3 must be a number above 0" in said.err
    assert "k=400 must not be above the number of latents" in said.err
    assert "Traceback" not in said.err
    assert len(list(done.parent.glob("*-k8-*/result.json"))) == 1


@pytest.mark.slow
def test_a_crash_leaves_the_others_alone_and_all_go_on(config, alone, capsys):
    cfgs = [config("k=4"), config("k=8", CRASH), config("k=12")]
    with pytest.raises(PackError, match="1 of 3"):
        train_packed(cfgs)
    assert "the power went out" in capsys.readouterr().err
    fresh = [config(f"k={k}") for k in (4, 8, 12, 16)]  # a new one, one that is half done, and two finished ones
    packed = train_packed(fresh)
    for k, folder in zip((4, 8, 12, 16), packed, strict=True):
        assert_equal(folder, alone(f"k={k}"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_stops_all_at_checkpoints_and_they_go_on_to_the_same_weights(config, alone, capsys, workers):
    kill = "+callbacks.signal={_target_: tests.training.crash.Signal, at: 11, name: SIGTERM}"
    with pytest.raises(SystemExit) as stopped:
        train_packed([config(f"k={k}", f"pack.workers={workers}", *([kill] if k == 8 else [])) for k in (4, 8, 12)])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert re.search("3 runs side by side: stopped at step .* by SIGTERM", capsys.readouterr().out)
    packed = train_packed([config(f"k={k}") for k in (4, 8, 12)])
    assert capsys.readouterr().out.count("resuming from its last checkpoint") == 3
    for k, folder in zip((4, 8, 12), packed, strict=True):
        assert_equal(folder, alone(f"k={k}"))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_with_the_same_weights(config, pictures, alone, tmp_path):
    cfg = config()
    command = [
        "train.py", "-m", "data=folder", f"data.path={pictures}", "backbone=deit",
        "backbone.size=tiny", "k=4,8,12", "expansion=2", "batch_size=256", "trainer.accelerator=cpu",
        "trainer.max_epochs=8", "checkpoint.every_steps=4", "trainer.log_every_n_steps=2", "dead_after=1000",
        f"paths.stores={cfg.paths.stores}", f"paths.runs={cfg.paths.runs}", f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    folder = Path(cfg.paths.runs)
    with Command(*command, cwd=tmp_path) as job:
        wait_for(lambda: len(list(folder.glob("*/checkpoints/last.ckpt"))) == 3 or not job.running)
        assert job.running
        job.kill()
    assert not list(folder.glob("*/result.json"))
    again = run(*command, cwd=tmp_path)
    assert again.stdout.count("resuming from its last checkpoint") == 3
    for k in (4, 8, 12):
        other = alone(f"k={k}", "trainer.max_epochs=8", "checkpoint.every_steps=4")
        assert_equal(folder / other.name, other)


@pytest.mark.slow
def test_two_ranks_with_a_pack_equal_two_ranks_alone(config, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    choices = [["k=4", "callbacks=monoloss"], ["sae=jumprelu"]]
    packed = train_packed([config(*choice, "trainer.devices=2") for choice in choices])
    assert_equal(packed[0], train(config(*choices[0], "trainer.devices=2", f"paths.runs={tmp_path / 'alone'}")))
    assert [json.loads((folder / "result.json").read_text())["devices"] for folder in packed] == [2, 2]


@pytest.mark.slow
def test_a_failing_rank_ends_the_pack_which_then_goes_on_with_one(config, tmp_path, monkeypatch):
    crash = "+callbacks.crash={_target_: tests.training.crash.Crash, epoch: 1, rank: 1}"
    with pytest.raises(RuntimeError, match="the power went out"):
        train_packed([config("k=4", "trainer.devices=2"), config("k=8", "trainer.devices=2", crash)])
    for folder in train_packed([config("k=4"), config("k=8")]):
        assert json.loads((folder / "result.json").read_text())["status"] == "finished"


def test_a_job_without_a_pack_is_one_run_of_its_own_config(config):
    cfg = config()
    assert members_of(cfg) == [cfg]
    with open_dict(cfg):
        cfg.pack.file = None
    assert members_of(cfg) == [cfg]
