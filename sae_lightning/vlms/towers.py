"""Where the vision tower of a vision-language model is, and its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from sae_lightning.vlms.errors import VLMError


class Anatomy(NamedTuple):
    """The vision tower, its blocks in order, and the block (from 0) whose tokens the language model takes."""

    tower: Any
    blocks: Sequence[nn.Module]
    feature_layer: int


def anatomy(model: Any, tower: str | None = None, blocks: str | None = None) -> Anatomy:
    """The anatomy of ``model``; ``tower`` and ``blocks`` are dotted paths where the usual places do not hold.

    The tower is what transformers calls the encoder of images, its blocks the list of as many modules as its
    config names layers. VLMError when there is none.
    """
    found = _at(model, tower, "vlm.tower") if tower else model.get_encoder(modality="image")
    if not tower and found in (model, model.base_model):
        raise VLMError(f"{type(model).__name__} has no vision tower of a usual name; give its path as vlm.tower.")
    stack = list(_at(found, blocks, "vlm.blocks")) if blocks else _blocks(found)
    return Anatomy(found, stack, _feature_layer(model.config, len(stack)))


def _blocks(tower: nn.Module) -> list[nn.Module]:
    config: Any = getattr(tower, "config", None)
    depth = getattr(config, "num_hidden_layers", None) or getattr(config, "depth", None)
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise VLMError(
        f"{type(tower).__name__} has no list of {depth or 'as many'} blocks; give the list's path in the vision tower "
        "as vlm.blocks, for example encoder.layers."
    )


def _feature_layer(config: Any, depth: int) -> int:
    """``vision_feature_layer`` indexes the depth + 1 hidden states, of which the first is no block's."""
    named = getattr(config, "vision_feature_layer", None)
    if named is None:
        return depth - 1
    states = [named] if isinstance(named, int) else list(named)
    return max(state % (depth + 1) for state in states) - 1


def _at(module: Any, path: str, option: str) -> Any:
    for name in path.split("."):
        if not hasattr(module, name):
            raise VLMError(f"{option}={path} does not exist: {type(module).__name__} has no '{name}'.")
        module = getattr(module, name)
    return module
