"""A run's state on the disk outlives kills, full disks and power cuts."""

import csv
import errno
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae_lightning.evaluation.scoring_pass import ScoringPass
from sae_lightning.runs import state
from sae_lightning.runs.run import PRODUCTS, is_finished
from sae_lightning.runs.state import last_checkpoint
from sae_lightning.saes import SAE
from sae_lightning.training import checkpoints
from sae_lightning.training.callbacks import History
from sae_lightning.training.checkpoints import CheckpointError, CheckpointFiles, repair_checkpoint
from sae_lightning.training.fit import train
from sae_lightning.training.loggers import _csv as open_csv

STEPS = 8  # an epoch: 32 pictures of 64 tokens in batches of 256
CRASH = "+callbacks.crash={_target_: tests.training.crash.Crash, epoch: 2}"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeros_within(path: Path) -> None:
    """As some file systems leave blocks that were allotted and not written."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


DAMAGES = {
    "cut": cut,
    "empty": lambda path: os.truncate(path, 0),
    "zeros within": zeros_within,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),  # killed between the two moves
}


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(config, tmp_path, capsys, monkeypatch):
    """To the same weights and history. TMPDIR may be small, full or another file system: nothing is staged there."""
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    whole = train(config(f"paths.runs={tmp_path / 'whole'}"))
    with pytest.raises(RuntimeError, match="power went out"):
        train(config(CRASH))
    begun = tmp_path / "runs" / whole.name
    last, before = begun / "checkpoints" / "last.ckpt", begun / "checkpoints" / "before.ckpt"
    assert (step_of(last), step_of(before)) == (2 * STEPS, STEPS)
    shutil.copytree(begun, tmp_path / "begun")
    for name, damage in DAMAGES.items():
        shutil.rmtree(begun)
        shutil.copytree(tmp_path / "begun", begun)
        damage(last)
        repair_checkpoint(begun)
        assert (step_of(last), before.exists()) == (STEPS, False), name
        said = capsys.readouterr().err
        assert name == "missing" or (f"{last} is damaged" in said and "last.ckpt.damaged" in said), name
    cut(last)
    repair_checkpoint(begun)
    assert not last.exists()
    assert "training starts anew" in capsys.readouterr().err
    shutil.rmtree(begun)
    shutil.copytree(tmp_path / "begun", begun)
    cut(last)
    folder = train(config())
    assert "resuming from its last checkpoint" in capsys.readouterr().out
    trained, expected = SAE.load(folder).state_dict(), SAE.load(whole).state_dict()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    rows = [list(csv.DictReader((f / "history.csv").open())) for f in (whole, folder)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert not (folder / "checkpoints").exists()
    for name in PRODUCTS:
        path, content = folder / name, (folder / name).read_bytes()
        cut(path)
        assert not is_finished(folder), name
        path.write_bytes(content if name != "result.json" else b"")
    capsys.readouterr()
    assert train(config("trainer.max_epochs=3")) == folder
    assert f"{folder / 'result.json'} is damaged" in capsys.readouterr().err
    assert is_finished(folder)


def test_damaged_rows_of_a_logger_are_named_and_gone_round(tmp_path, capsys):
    path = tmp_path / "csv" / "metrics.csv"
    path.parent.mkdir()
    path.write_text("epoch,step\n0,2\n0,")
    open_csv(tmp_path, {}, 4)
    assert f"{path} is damaged" in capsys.readouterr().err


def test_damaged_sums_of_an_evaluation_are_named_and_gone_round(tmp_path, capsys):
    (tmp_path / "state.safetensors").write_bytes(bytes(100))
    assert ScoringPass._load(SimpleNamespace(folder=tmp_path, metrics={}, run=Path("a-run"))) == 0
    assert "a-run is scored anew" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"step,epoch\nx,0\n", b"epoch\n0\n", b"\xff\xfe"])
def test_a_damaged_history_is_named_and_gone_round(content, tmp_path, capsys):
    history = tmp_path / "history.csv"
    history.write_bytes(content)
    callback = History(history)
    callback.on_train_start(SimpleNamespace(is_global_zero=True, global_step=8), None)
    assert callback.rows == []
    assert not content or f"{history} is damaged" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint_and_gives_a_sentence(tmp_path, monkeypatch):
    last = tmp_path / "checkpoints" / "last.ckpt"
    files = CheckpointFiles(last)
    files.save_checkpoint({"global_step": 1}, last)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_bytes", full)
    with pytest.raises(CheckpointError, match=r"last\.ckpt failed: the disk is full\. Free space"):
        files.save_checkpoint({"global_step": 2}, last)
    repair_checkpoint(tmp_path)
    assert step_of(last) == 1


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(moves, tmp_path, monkeypatch):
    last = last_checkpoint(tmp_path)
    files = CheckpointFiles(last)
    for step in (1, 2):
        files.save_checkpoint({"global_step": step}, last)
    left, replace = [moves], os.replace

    def dying(*names):
        if left[0] == 0:
            raise SystemExit
        left[0] -= 1
        replace(*names)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(SystemExit):
        files.save_checkpoint({"global_step": 3}, last)
    left[0] = 9
    repair_checkpoint(tmp_path)
    assert step_of(last) == 2


def test_only_its_own_checkpoints_are_removed(tmp_path):
    last = last_checkpoint(tmp_path)
    for path in (last, last, last.with_name("best.ckpt")):
        CheckpointFiles(last).save_checkpoint({"global_step": 1}, path)
    checkpoints.remove_checkpoints(tmp_path)
    assert [path.name for path in last.parent.iterdir()] == ["best.ckpt"]
    last.with_name("best.ckpt").unlink()
    checkpoints.remove_checkpoints(tmp_path)
    assert not last.parent.exists()


@pytest.mark.parametrize("content", [b"", b'{"a": {"over', b"[]", b"\xff\xfe\x00", b"\x00" * 64])
def test_a_damaged_plan_is_named_and_begun_anew(content, config, tmp_path, capsys):
    cfg = config()
    runs = Path(cfg.paths.runs)
    runs.mkdir()
    (runs / "planned.json").write_bytes(content)
    state.note_plan([cfg], [["k=8"]], tmp_path)
    assert f"{runs / 'planned.json'} is damaged" in capsys.readouterr().err
    assert (runs / "planned.json.damaged").read_bytes() == content
    assert [state.state for state in state.states(runs)] == ["planned"]
