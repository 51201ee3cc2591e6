"""Trainings that fail, stop before their end, or are only tried: what they leave, and what is said of them."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from sae_lightning.commands.hydra import ClosingTable
from sae_lightning.runs.identity import run_name
from sae_lightning.runs.state import in_words, note_plan, planned, state_of
from sae_lightning.training.failed import NotFiniteError, generators, in_part
from sae_lightning.training.fit import train
from sae_lightning.training.packed import PackError, train_packed

NAN = "+callbacks.nan={_target_: tests.training.crash.NotANumber, at: 3}"


def printed(folders):
    console = Console(record=True, width=200)
    ClosingTable("Runs", {"L0": "{scores[l0]:.1f}"}).show(folders, console)
    return console.export_text()


def test_a_loss_that_is_not_finite_stops_at_once_and_leaves_what_was_before_the_step(config, capsys):
    cfg = config(NAN, "checkpoint.every_steps=1")
    folder = Path(cfg.paths.runs) / run_name(cfg)
    with pytest.raises(NotFiniteError, match=r"The loss is nan at step 3; lower optimizer\.lr"):
        train(cfg)
    left = {path.stem: path for path in (folder / "failed").iterdir()}
    weights, batch = load_file(left["weights"]), load_file(folder / "failed" / "batch.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in weights.items() if name.startswith("sae.W_"))
    assert batch["batch"].shape == (256, 128)
    states = load_file(folder / "failed" / "generators.safetensors")
    torch.set_rng_state(states["torch"])
    assert len(states["numpy"]) == 625
    assert not (folder / "checkpoints").exists()
    assert not (folder / "sae.safetensors").exists()
    state = state_of(folder)
    assert (state.state, "The loss is nan at step 3" in state.about) == ("failed", True)
    assert "failed" in printed([folder])
    assert "The loss is nan at step 3" in printed([folder])
    assert train(config()) == folder  # the callback only looks on
    assert "failed before, trained anew" in capsys.readouterr().out
    assert state_of(folder).state == "finished"
    assert not (folder / "failed").exists()
    assert not (folder / "failed.json").exists()


def test_weights_or_scores_that_are_not_finite_are_no_finished_run(config, monkeypatch):
    cfg = config("trainer.max_epochs=1", "optimizer.lr=1e30")
    folder = Path(cfg.paths.runs) / run_name(cfg)
    for _ in range(2):
        with pytest.raises(NotFiniteError, match=r"optimizer\.lr"):
            train(cfg)
        assert not (folder / "result.json").exists()
        assert state_of(folder).state == "failed"


def test_a_failure_in_a_pack_leaves_the_others_alone(config):
    cfgs = [config("k=4", "trainer.max_epochs=1"), config(NAN, "trainer.max_epochs=2"), config("k=300")]
    names = [run_name(cfg) for cfg in cfgs]
    with pytest.raises(PackError, match="2 of 3 runs failed"):
        train_packed(cfgs)
    runs = Path(cfgs[0].paths.runs)
    assert [state_of(runs / name).state for name in names] == ["finished", "failed", "planned"]
    assert not (runs / names[2]).exists()


def test_generators_are_as_they_were(monkeypatch):
    states = generators()
    drawn = torch.rand(3), np.random.rand(3), random.random()
    torch.set_rng_state(states["torch"])
    name, *_, has_gauss, gauss = np.random.get_state()
    keys, position = states["numpy"][:-1].numpy(), int(states["numpy"][-1])
    np.random.set_state((name, keys, position, has_gauss, gauss))
    random.setstate(states["python"])
    assert torch.equal(torch.rand(3), drawn[0])
    assert (np.random.rand(3) == drawn[1]).all()
    assert random.random() == drawn[2]


# --- trained in part ------------------------------------------------------------------------------
def trainer(done, steps, epochs=3, an_epoch=8, max_steps=-1):
    return SimpleNamespace(
        fit_loop=SimpleNamespace(total_batch_idx=done - 1), max_epochs=epochs, num_training_batches=an_epoch,
        max_steps=max_steps, global_step=steps,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "made", "said"),
    [
        ({}, trainer(24, 24), ""),
        ({"limit_train_batches": None, "overfit_batches": 0.0}, trainer(24, 24), ""),
        ({"limit_train_batches": 1.0}, trainer(24, 24), ""),
        ({"limit_train_batches": 1}, trainer(3, 3, an_epoch=1), "in part: limit_train_batches=1"),
        ({"limit_train_batches": 0.5}, trainer(12, 12, an_epoch=4), "in part: limit_train_batches=0.5"),
        ({"overfit_batches": 1}, trainer(3, 3, an_epoch=1), "in part: overfit_batches=1"),
        ({"max_steps": 5}, trainer(5, 5, max_steps=5), "in part: max_steps=5"),
        ({"max_steps": 5}, trainer(5, 5, epochs=-1, max_steps=5), "in part: max_steps=5"),
        ({"max_steps": 99}, trainer(24, 24, max_steps=99), ""),
        ({"max_steps": 12}, trainer(24, 12, max_steps=12), ""),  # two batches a step: all of them
        ({"max_time": "00:00:00:01"}, trainer(9, 9), "in part: max_time=00:00:00:01"),
        ({"max_time": "09:00:00:00"}, trainer(24, 24), ""),
        ({}, trainer(16, 16), "in part: stopped after 16 of 24 batches"),
    ],
)
def test_what_keeps_a_training_from_its_end_is_named(settings, made, said):
    assert in_words(in_part(made, settings)) == said


def test_a_run_trained_in_part_says_so_and_is_another_run_than_the_whole(config):
    cfg = config("++trainer.limit_train_batches=1", "trainer.max_epochs=1", "++trainer.limit_val_batches=1")
    folder = train(cfg)
    assert json.loads((folder / "result.json").read_text())["in_part"] == {"limit_train_batches": 1}
    assert f"{folder.name}: in part: limit_train_batches=1" in printed([folder])
    assert "in part: limit_train_batches=1" in state_of(folder).about
    assert run_name(config("trainer.max_epochs=1")) != folder.name


@pytest.mark.parametrize("together", [False, True])
def test_a_try_leaves_nothing_behind(config, tmp_path, capsys, together):
    cfgs = [config("++trainer.fast_dev_run=true", f"k={k}", "logger=csv") for k in (4, 8)[: 1 + together]]
    note_plan(cfgs, [[]] * len(cfgs), Path("sweep"))
    train_packed(cfgs) if together else train(cfgs[0])
    assert "fast_dev_run went well; nothing of it is kept" in capsys.readouterr().out
    runs = Path(cfgs[0].paths.runs)
    assert not runs.exists() or [path for path in runs.iterdir() if path.is_dir()] == []
    assert planned(runs) == {}
