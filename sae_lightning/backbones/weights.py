"""Weights that do not come from a hub: drawn from a fixed seed, or read from local files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from sae_lightning.backbones.errors import BackboneError

TOLD_APART = (".safetensors", ".json", ".txt", ".model")  # a model folder's files that determine features


@contextmanager
def fixed_seed(seed: int = 0) -> Iterator[None]:
    """Random numbers on the CPU start from ``seed`` inside; the global generators go on as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def fully_loaded(build: Callable[[], nn.Module], source: Path) -> nn.Module:
    """``build()``'s model; BackboneError if ``source`` leaves some of its tensors as they were initialised.

    Libraries pass over missing tensors in silence. What a file does not hold differs between two seeds.
    """
    models = []
    for seed in (0, 1):
        with fixed_seed(seed):
            models.append(build())
    model, other = models[0], models[1].state_dict()
    missing = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, other[name])]
    if missing:
        raise BackboneError(
            f"{source} lacks {len(missing)} of the model's tensors, '{missing[0]}' among them; give the weights of "
            "backbone.published.model, or name the model that they belong to."
        )
    return model


def digest(path: Path) -> str:
    """SHA-256 of a weights file, or of a model folder's weights, configs and vocabularies."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in TOLD_APART)
    whole = hashlib.sha256()
    for file in files:
        name = "" if file is path else file.name  # a single file may be renamed
        about = file.stat()
        whole.update(f"{name}:{_file_digest(file, about.st_size, about.st_mtime_ns)}\n".encode())
    return whole.hexdigest()


@lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
