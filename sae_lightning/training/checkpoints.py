"""A run's own checkpoint, which outlives kills, full disks and power cuts: ``checkpoints/last.ckpt``.

It is written beside its place and moved there; the one before stays until the next, and takes its place where a power
cut has left half of it.
"""

from __future__ import annotations

import errno
import io
import os
import re
import zipfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from sae_lightning.files import cause, set_aside, sync_folder, write_bytes
from sae_lightning.runs.run import BEFORE, LAST
from sae_lightning.runs.state import last_checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read."""


class OwnCheckpoint(ModelCheckpoint):
    """The package's own; its class keeps its state apart from that of a user's with the same settings."""


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's way to the disk, but staged beside the target, and with the one before ``own`` kept."""

    def __init__(self, own: Path) -> None:
        self.own = own

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``path``; CheckpointError where there is no room or no right to, with what was there left alone."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path, content = Path(path), io.BytesIO()
        torch.save(checkpoint, content)
        staged = path.with_name(f".{path.name}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(staged, content.getbuffer())
            if path == self.own and path.is_file():
                os.replace(path, path.with_name(BEFORE))
            os.replace(staged, path)
            sync_folder(path.parent)
        except OSError as error:
            raise CheckpointError(
                f"Writing {path} failed: {cause(error)}. Free space there, or set paths.runs to another disk; the same "
                "line goes on from the checkpoint before."
            ) from error


def repair_checkpoint(run: Path) -> None:
    """Leave ``run`` a whole last.ckpt or none: a damaged one is named and set aside, and the one before replaces it.

    Call it while holding the run. Raises CheckpointError where it cannot be read at all.
    """
    last = last_checkpoint(run)
    before = last.with_name(BEFORE)
    for path in (last, before):
        if not path.is_file():
            continue
        try:
            fault = damage(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {cause(error)}. Make it readable, or delete it to start {run.name} anew."
            ) from error
        if fault is None:
            os.replace(path, last)
            return
        more = path == last and before.is_file()
        set_aside(path, fault, "the one before it is used" if more else "training starts anew")
        if path.exists():
            raise CheckpointError(f"{path} is damaged ({fault}) and cannot be set aside; delete it.")


def damage(path: Path) -> str | None:
    """What is wrong with a file that PyTorch has saved, by its checksums; None for nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            names, broken = archive.namelist(), archive.testzip()
    except zipfile.BadZipFile:
        return f"its {path.stat().st_size:,} bytes are not a whole checkpoint"
    if broken is not None:
        return f"{broken} in it is broken"
    return None if any(name.endswith("data.pkl") for name in names) else "it is no checkpoint"


def remove_checkpoints(run: Path) -> None:
    """Remove what this module has made for a finished run; checkpoints of the user's own callbacks stay."""
    folder = last_checkpoint(run).parent
    for name in (LAST, BEFORE):
        for path in [*folder.glob(f"{name}*"), *folder.glob(f".*{name}.*")]:
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# libraries that say it in words alone: safetensors (with the number), PyTorch's writer of zip files
WORDS = re.compile(
    rf"\(os error ({'|'.join(map(str, NUMBERS))})\)|PytorchStreamWriter failed writing|unexpected pos \d+ vs"
)


class FullDiskError(ValueError):
    """There is no room for what a run writes."""


def is_full(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, says that a disk is full or a quota used up."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if (error.errno in NUMBERS) if isinstance(error, OSError) else WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def names_full_disk(work: Callable[..., Any]) -> Callable[..., Any]:
    """``work(cfg, folder, …)``, whose errors become a FullDiskError where a disk is full."""

    @wraps(work)
    def guarded(cfg: Any, folder: Path, *others: Any, **options: Any) -> Any:
        try:
            return work(cfg, folder, *others, **options)
        except Exception as error:
            if isinstance(error, ValueError) or not is_full(error):  # a ValueError is a sentence already
                raise
            where = getattr(error, "filename", None) or folder
            raise FullDiskError(
                f"Writing {where} failed: the disk is full. Free space there, or set paths.runs to another disk; "
                "the same line goes on from the last checkpoint."
            ) from error

    return guarded
