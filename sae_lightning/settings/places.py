"""Whether the folders and devices that a command needs can be had, found out before it does any work."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from omegaconf import DictConfig, OmegaConf

WRITTEN = {"train": ("paths.runs",), "finetune": ("paths.runs",), "extract": ("paths.stores",)}


def check_folder(folder: Path, name: str, shown: Path | None = None) -> None:
    """Make ``folder`` where it is missing; ValueError with a sentence about the setting ``name``, whose value is
    ``shown`` (by default the folder), if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
        what = f"cannot be written ({reason})" if file is None else f"cannot be written, since {file} is a file"
        raise ValueError(f"{name}={shown or folder} {what}; name another place.") from error


def check_file(path: Path, name: str) -> None:
    """ValueError with a sentence unless a file can be written at ``path``, whose folder is made where it is missing."""
    if path.is_dir():
        raise ValueError(f"{name}={path} is a folder; name a file in it, such as {path / 'report.html'}.")
    check_folder(path.parent, name, path)


def check_devices(cfg: DictConfig) -> None:
    """ValueError with a sentence where a setting asks for a GPU that is not there."""
    for name in ("device", "extract.device"):
        wanted = str(OmegaConf.select(cfg, name))
        if wanted.startswith("cuda"):
            import torch

            there = torch.cuda.device_count()
            if int(wanted.partition(":")[2] or 0) >= there:
                raise ValueError(f"{name}={wanted} but {there} GPUs are visible; set {name}=cpu, or auto.")


def check_places(command: str, cfg: DictConfig) -> None:
    """ValueError with a sentence where a folder that ``command`` writes to cannot be written."""
    for name in WRITTEN.get(command, ()):
        section, _, key = name.partition(".")
        check_folder(Path(str(cfg[section][key])), name)
