"""torchvision's convolutional models as encoders: a layer is a stage, a patch a cell of its map."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.transforms import functional as F

from sae_lightning.backbones.backbone import Backbone, LayerTokens, Reading, backbone_library
from sae_lightning.backbones.settings import Published, asked_layer, fixed_seed, published
from sae_lightning.backbones.taps import BackboneError, Place, recorded

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Transform:
    """A picture, scaled so that its shorter edge is ``size`` and cut to the centre, as torchvision's weights expect."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Any) -> Tensor:
        cut = F.center_crop(F.resize(picture, [self.size], antialias=True), [self.size])
        return F.normalize(F.to_tensor(cut), list(MEAN), list(DEVIATION))

    def __repr__(self) -> str:
        return f"Transform({self.size})"


def stages(model: nn.Module) -> list[nn.Module]:
    """The modules whose outputs are layers; BackboneError for a model that is not built of stages."""
    found = [part for name, part in model.named_children() if name.startswith("layer")]  # ResNets, RegNets
    found = found or list(getattr(model, "features", ()))  # EfficientNet, ConvNeXt, VGG
    if not found:
        raise BackboneError(f"{type(model).__name__} has no stages; choose another backbone.published.model.")
    return found


def build(wanted: Published) -> nn.Module:
    """The model with weights from a local file, torchvision's own or random ones, without its classifier."""
    try:
        with fixed_seed():
            own = get_model_weights(wanted.model).DEFAULT if wanted.pretrained and wanted.weights is None else None
            model = get_model(wanted.model, weights=own)
    except ValueError as error:
        raise BackboneError(f"torchvision has no model '{wanted.model}': {error}.") from error
    if wanted.weights is not None:
        model.load_state_dict(torch.load(wanted.weights, map_location="cpu", weights_only=True))
    last = next(name for name in ("fc", "classifier", "head") if hasattr(model, name))
    setattr(model, last, nn.Identity())
    return model


def read(model: nn.Module, images: Tensor, layers: Collection[int], pooled: bool) -> Reading:
    """One forward pass: the maps of the wanted stages, and the pooled output."""
    modules = stages(model)
    with recorded({layer: Place(modules[layer]) for layer in layers}) as seen:
        output = model(images)
    found = {}
    for layer, x in seen.items():
        cells = x.flatten(2).transpose(1, 2)
        found[layer] = LayerTokens(cells, cells[:, :0], 0, (x.shape[2], x.shape[3]))
    return Reading(found, output.flatten(1) if pooled else None)


@backbone_library("torchvision")
class Torchvision:
    """torchvision as a library of backbones: ``backbone=torchvision backbone.published.model=resnet50``."""

    @staticmethod
    def load(cfg: Mapping[str, Any]) -> Backbone:
        """The backbone of the config section ``cfg``."""
        wanted = published(cfg)
        model, size = build(wanted), wanted.image_size or 224
        return Backbone(
            model, lambda images, layers, pooled: read(model, images, layers, pooled), name=cfg["name"],
            title=wanted.title, depth=len(stages(model)), layer=asked_layer(cfg, "published"), image_size=size,
            transform=Transform(size), module_at=lambda layer: stages(model)[layer],
        )  # fmt: skip

    @staticmethod
    def depth(wanted: Published) -> int:
        """The number of stages, without memory for weights."""
        with torch.device("meta"):
            return len(stages(get_model(wanted.model)))
