"""An SAE on disk: ``sae.safetensors`` and ``cfg.json`` in one folder, complete without anything else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from sae_lightning.saes.base import SAE

SCHEMA = 2  # 1 had W_enc as [d_in, d_sae]
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class ArtefactError(ValueError):
    """A folder that does not hold a complete SAE artefact."""


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` without what torch.compile, FSDP and data parallelism put before the names of a module's weights."""
    named = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    while named and all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): tensor for name, tensor in named.items()}
    return named


def write_text(path: Path, text: str) -> None:
    """A file, so that a reader, also after a power cut, sees the old one or the whole new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same with bytes; the file has the mode that the umask gives."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file written in the same way, which colleagues can read: safetensors' own are the user's alone."""
    write_bytes(path, serialized({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; ArtefactError says what is wrong, and the ``remedy``."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({(error.strerror or str(error)).lower()}); {remedy}.") from error
    except ValueError as error:
        raise ArtefactError(f"{path} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds no object; {remedy}.")
    return content


def save(sae: SAE, folder: Path, record: dict[str, Any]) -> None:
    """Write the weights, then ``cfg.json`` with what rebuilds the SAE and with ``record``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(sae.state_dict())
    if sae.tied:
        del tensors["W_enc"]
    write_tensors(folder / "sae.safetensors", tensors, {"variant": sae.variant})
    made = {"schema": SCHEMA, "variant": sae.variant, "d_in": sae.d_in, "d_sae": sae.d_sae, "sae": sae.settings()}
    write_json(folder / "cfg.json", made | record)


def read_cfg(folder: Path) -> dict[str, Any]:
    """``cfg.json`` of an artefact or run folder."""
    path = folder / "cfg.json"
    if not path.is_file():
        raise ArtefactError(f"There is no cfg.json in {folder}; expected a run folder with a finished SAE.")
    cfg = read_json(path, "train the run again")
    if cfg.get("schema") not in (1, SCHEMA):
        raise ArtefactError(f"{path} has schema {cfg.get('schema')}; this version reads schemas 1 and {SCHEMA}.")
    return cfg


def load(folder: Path) -> SAE:
    """Rebuild the SAE saved in ``folder``, on the CPU, in evaluation mode."""
    from sae_lightning.saes import VARIANTS

    cfg = read_cfg(folder)
    lacking = {"variant", "d_in", "d_sae", "sae"} - set(cfg)
    if lacking:
        raise ArtefactError(f"{folder / 'cfg.json'} lacks {', '.join(sorted(lacking))}; it is no SAE of this package.")
    if cfg["variant"] not in VARIANTS:
        raise ArtefactError(f"{folder} holds a '{cfg['variant']}' SAE; known variants: {', '.join(sorted(VARIANTS))}.")
    weights = folder / "sae.safetensors"
    if not weights.is_file():
        raise ArtefactError(f"There is no sae.safetensors in {folder}; the run did not finish.")
    try:
        tensors = unwrapped(load_file(weights))
    except SafetensorError as error:
        raise ArtefactError(f"{weights} cannot be read ({error}); it is truncated or not safetensors.") from error
    sae = VARIANTS[cfg["variant"]](cfg["d_in"], cfg["d_sae"], **cfg["sae"])
    if cfg["schema"] == 1:
        if "W_enc" not in tensors:
            raise ArtefactError(f"{weights} does not fit its cfg.json: it has no W_enc.")
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    tensors = {name: torch.tensor(value) for name, value in sae.later_buffers.items()} | tensors
    if sae.tied and "W_dec" in tensors:
        tensors["W_enc"] = tensors["W_dec"]
    try:
        sae.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtefactError(f"{weights} does not fit its cfg.json: {error}") from error
    return sae.eval()
