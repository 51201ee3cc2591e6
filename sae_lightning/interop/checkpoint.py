"""A checkpoint as another package left it: its tensors, and what is said of them, read without running anything."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from sae_lightning.files import read_json
from sae_lightning.saes.artefact import CONFIGS, SUFFIXES, WEIGHTS, unwrapped

HOLDERS = ("state_dict", "model_state_dict", "model")  # what holds the weights where a file holds more


class Named:
    """Stands for an object of whatever class a file names: it keeps what the file says of it, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class Checkpoint(NamedTuple):
    """The file ``path``: its ``tensors`` without wrappers' prefixes, and ``config``: what it says beside them, and what
    a config beside it says; ``headed`` where a line of JSON stands before the weights."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    headed: bool = False

    def has(self, *names: str) -> bool:
        """Whether all these tensors are there."""
        return self.tensors.keys() >= set(names)

    def entry(self, *keys: str) -> Any:
        """The first of ``keys`` that the config has; ValueError where it has none of them."""
        for key in keys:
            if self.config.get(key) is not None:
                return self.config[key]
        raise ValueError(f"{self.path} does not say its {keys[0]}, nor does a config beside it.")


def weights_at(path: Path) -> Path:
    """The file of weights at ``path``, a file or a folder; FileNotFoundError or ValueError where there is not one."""
    if path.is_file():
        return path
    found = [file for file in sorted(path.glob("*")) if file.suffix in SUFFIXES]
    named = [file for name in WEIGHTS for file in found if file.name == name]
    if not found:
        raise FileNotFoundError(f"There are no weights (.safetensors, .pt or .pth) in {path}; name an SAE's folder.")
    if len(found) > 1 and not named:
        raise ValueError(f"{path} holds several files of weights; name one: {', '.join(f.name for f in found)}.")
    return (named or found)[0]


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, a file or a folder; FileNotFoundError or ValueError in a sentence."""
    path = weights_at(path)
    header, content = contents(path)
    held = next((content[key] for key in HOLDERS if isinstance(content.get(key), Mapping)), content)
    said = (
        {key: value for key, value in content.items() if not isinstance(value, Mapping)} if held is not content else {}
    )
    config = _beside(path) | header | said | {key: v for key, v in held.items() if not isinstance(v, Tensor)}
    for key in ("cfg", "config"):
        inner = config.get(key) or content.get(key)
        config |= dict(inner) if isinstance(inner, Mapping) else {}
    tensors = unwrapped({key: value for key, value in held.items() if isinstance(value, Tensor)})
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name; give the file with an SAE's weights.")
    return Checkpoint(path, tensors, config, bool(header))


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What stands before the weights as a line of JSON, and the dictionary that the file holds.

    Nothing pickled is run: objects of any class that is not PyTorch's come as dictionaries of their attributes.
    ValueError for a damaged file, and for one that holds no dictionary.
    """
    header: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            return header, dict(load_file(path))
        source: Any = path
        with path.open("rb") as file:
            if file.read(1) == b"{":
                file.seek(0)
                header = json.loads(file.readline())
                source = BytesIO(file.read())
        with safe_globals([(Named, name) for name in _classes(source)]):
            content = torch.load(source, map_location="cpu", weights_only=True)
        if isinstance(content, Named):
            raise pickle.UnpicklingError("an object of another package's class")
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be read as plain tensors ({reason}); it is damaged, or holds a pickled module: save "
            "sae.state_dict() instead of the module."
        ) from error
    content = _plain(content)
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a state dict; save sae.state_dict() there.")
    return header, content


def _classes(source: Any) -> list[str]:
    """The classes and functions that a file names and PyTorch does not know."""
    try:
        names = get_unsafe_globals_in_checkpoint(source)
    except (ValueError, RuntimeError):  # of PyTorch's format before zip files
        names = []
    if isinstance(source, BytesIO):
        source.seek(0)
    return names


def _plain(value: Any) -> Any:
    if isinstance(value, Named):
        return {key: _plain(inner) for key, inner in vars(value).items()}
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _beside(path: Path) -> dict[str, Any]:
    """What the config in the file's folder says, else one in the folder above (of a folder of checkpoints)."""
    above = [path.parent, *([path.parent.parent] if path.parent.name == "checkpoints" else [])]
    for file in (folder / name for folder in above for name in CONFIGS):
        if file.is_file() and file.suffix == ".json":
            return read_json(file, "save the SAE again")
        if file.is_file():
            return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    return {}
