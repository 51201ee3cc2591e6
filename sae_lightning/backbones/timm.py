"""Any image model of timm: vision transformers by block, convolutional and hierarchical ones by stage."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from sae_lightning.backbones.backbone import Backbone, BackboneError, LayerTokens, Reading, backbone_library, reason
from sae_lightning.backbones.settings import Published, asked_layer, fixed_seed, fully_loaded, published


class Anatomy(NamedTuple):
    """What a model's architecture says without weights; ``sized`` where it is built for one image size."""

    depth: int
    image_size: int
    sized: bool


def load_timm(cfg: Mapping[str, Any]) -> Backbone:
    """The timm model ``cfg.published.model``; its layers are the entries of timm's ``feature_info``.

    Those are the blocks of a vision transformer and the stages of other models (a stem counts where timm
    counts it). BackboneError for a model that timm does not have, one without intermediate features, and
    weights that cannot be had.
    """
    wanted = published(cfg)
    anatomy = timm_anatomy(wanted.model, wanted.image_size)
    model = _build(wanted, anatomy)
    data = resolve_model_data_config(model) | {"input_size": (3, anatomy.image_size, anatomy.image_size)}
    data |= {} if wanted.resize is None else {"crop_pct": anatomy.image_size / wanted.resize, "crop_mode": "center"}
    return Backbone(
        model,
        partial(read_timm, model),
        name=cfg["name"],
        title=wanted.title,
        depth=anatomy.depth,
        layer=asked_layer(cfg, "published"),
        image_size=anatomy.image_size,
        transform=create_transform(**data, is_training=False),
        module_at=partial(timm_module, model),
    )


def timm_module(model: Any, layer: int) -> nn.Module:
    """The module of a timm model that gives ``layer``."""
    return model.get_submodule(model.feature_info[layer]["module"])


def read_timm(model: Any, images: Tensor, layers: Collection[int], pooled: bool) -> Reading:
    """One forward pass of a timm model through its ``forward_intermediates``, cut short where nothing is pooled.

    Tokens are as the layers give them, without the final norm. The first token in front of the patches is the class
    token if the model has one.
    """
    if not layers:
        return Reading({}, model(images))
    wanted = sorted(layers)
    takes = inspect.signature(model.forward_intermediates).parameters
    has_prefix = "return_prefix_tokens" in takes and model.num_prefix_tokens > 0
    given = model.forward_intermediates(
        images,
        indices=wanted,
        norm=False,
        stop_early=not pooled,
        intermediates_only=not pooled,
        output_fmt="NCHW",
        **({"return_prefix_tokens": True} if has_prefix else {}),
    )
    final, maps = given if pooled else (None, given)
    holders = (model, getattr(model, "embeds", None))  # the latter of NaFlex
    classes = int(has_prefix and any(getattr(holder, "cls_token", None) is not None for holder in holders))
    tokens = {}
    for layer, found in zip(wanted, maps, strict=True):
        patches = found[0] if has_prefix else found
        rows, columns = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)
        tokens[layer] = LayerTokens(patches, found[1] if has_prefix else patches[:, :0], classes, (rows, columns))
    return Reading(tokens, model.forward_head(final) if pooled else None)


@lru_cache(maxsize=64)
def timm_anatomy(name: str, image_size: int | None) -> Anatomy:
    """Depth and image size of the timm model ``name``, built without memory for weights.

    BackboneError for a model that timm does not have or that has no intermediate features.
    """
    try:
        model, sized = _skeleton(name, image_size)
    except Exception as error:
        raise BackboneError(
            f"timm cannot build '{name}': {reason(error)}. Check backbone.published.model and image_size; "
            "timm.list_models() names all models."
        ) from error
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise BackboneError(f"timm's '{name}' gives no intermediate features; choose another model.")
    height, width = model.pretrained_cfg["input_size"][-2:]
    if image_size is None and height != width:
        raise BackboneError(f"'{name}' is made for {height} x {width} pixels; set backbone.published.image_size.")
    return Anatomy(len(model.feature_info), image_size or height, sized)


def _skeleton(name: str, image_size: int | None) -> tuple[Any, bool]:
    """The model without memory behind its weights, and whether it was built for ``image_size``."""
    with torch.device("meta"):
        if image_size is None:
            return timm.create_model(name, num_classes=0), False
        try:
            return timm.create_model(name, num_classes=0, img_size=image_size), True
        except TypeError as error:  # convolutional models take images of any size
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, num_classes=0), False


def _build(wanted: Published, anatomy: Anatomy) -> Any:
    options: dict[str, Any] = {"num_classes": 0, "pretrained": wanted.pretrained}
    if anatomy.sized:
        options["img_size"] = anatomy.image_size
    if wanted.weights is not None:  # source empty: the file, even for a model whose id names a hub
        options["pretrained_cfg_overlay"] = _found_in(wanted.weights, wanted.model) | {"source": ""}
    build = partial(timm.create_model, wanted.model, **options)
    try:
        if wanted.weights is not None:
            return fully_loaded(build, wanted.weights)
        with fixed_seed():
            return build()
    except BackboneError:
        raise
    except Exception as error:
        source = wanted.weights or "the model hub"
        raise BackboneError(
            f"The weights of '{wanted.model}' cannot be loaded from {source}: {reason(error)}. Check the model's id "
            "and the connection, or give a local file as backbone.published.weights; data=demo works offline."
        ) from error


def _found_in(weights: Path, name: str) -> dict[str, Any]:
    """What timm's ``pretrained_cfg`` says of local weights: what a config.json beside them does, and where they are.

    A package's file, which is no timm's, has the same tensors in the same order under other names.
    """
    if weights.suffix != ".pth":
        beside = weights.with_name("config.json")
        about = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        return about.get("pretrained_cfg", {}) | {"file": str(weights)}
    with torch.device("meta"):
        ours = timm.create_model(name).state_dict()
    theirs = torch.load(weights, map_location="cpu", weights_only=True)
    if [x.shape for x in ours.values()] != [x.shape for x in theirs.values()]:
        raise BackboneError(f"{weights} does not hold the tensors of timm's '{name}'; set backbone.published.model.")
    return {"state_dict": dict(zip(ours, theirs.values(), strict=True))}


@backbone_library("timm")
class Timm:
    """timm as a library of backbones."""

    load = staticmethod(load_timm)

    @staticmethod
    def depth(wanted: Published) -> int:
        return timm_anatomy(wanted.model, wanted.image_size).depth
