"""A full disk while training is one sentence, whoever was writing, and the same line goes on once there is room."""

import errno
import io
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_lightning import files
from sae_lightning.runs.run import is_finished
from sae_lightning.saes import artefact
from sae_lightning.training.checkpoints import FullDiskError, is_full, names_full_disk
from sae_lightning.training.fit import train
from tests.features.jobs import limit_files


def write_text(path: Path) -> None:
    with path.open("w", buffering=1) as file:
        file.write("x" * 100_000)


WRITERS = {
    "ours": lambda path: files.write_text(path, "x" * 100_000),
    "text": write_text,
    "safetensors": lambda path: save_file({"x": torch.zeros(100_000)}, path),
    "torch": lambda path: torch.save({"x": torch.zeros(100_000)}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_that_finds_no_room_is_understood(name, tmp_path):
    def write(cfg: None, folder: Path) -> None:
        WRITERS[name](folder / "half")

    limit_files(4096)
    try:
        with pytest.raises(
            FullDiskError, match=r"^Writing .* failed: the disk is full\. Free space there, or set paths"
        ):
            names_full_disk(write)(None, tmp_path)
    finally:
        limit_files()
    assert name != "ours" or not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file"), RuntimeError("shapes do not fit"), io.UnsupportedOperation()],
)
def test_other_errors_stay_what_they_are(error, tmp_path):
    def work(cfg: None, folder: Path) -> None:
        raise error

    assert not is_full(error)
    with pytest.raises(type(error)) as raised:
        names_full_disk(work)(None, tmp_path)
    assert raised.value is error


def test_a_training_goes_on_once_there_is_room(config, monkeypatch, capsys):
    cfg = config("sae=topk", "trainer.max_epochs=1")
    save = artefact.write_tensors

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artefact, "write_tensors", full)
    with pytest.raises(FullDiskError, match="the disk is full"):
        train(cfg)
    monkeypatch.setattr(artefact, "write_tensors", save)
    assert is_finished(train(cfg))
    assert "resuming from its last checkpoint" in capsys.readouterr().out
