"""Layers and names that a config means, known before weights are loaded."""

import pytest

from sae_lightning.backbones import timm as library
from sae_lightning.backbones.backbone import BackboneError, backbone_library
from sae_lightning.backbones.registry import default_layer, load_backbone
from sae_lightning.settings.resolvers import folder_name
from tests.backbones.models import CLIP, VISION, backbone, timm, transformers

VIT = VISION | {"model_type": "vit"}


def test_a_named_backbone_has_a_default_layer_for_each_size():
    assert default_layer(backbone("mae")) == 4
    assert default_layer(backbone("mae", "published")) == 11
    assert default_layer(backbone("mae"), "published") == 11
    assert default_layer(backbone("mae", "published", layer=3)) == 3
    assert default_layer(backbone("mae", layer=-1)) == 5


@pytest.mark.parametrize(
    ("make", "depth"),
    [
        (lambda layer: timm("test_vit", layer), 6),
        (lambda layer: timm("test_resnet", layer), 5),
        (lambda layer: timm("test_convnext", layer, image_size=96), 4),
        (lambda layer: transformers(VIT, layer), 3),
        (lambda layer: transformers(CLIP, layer), 3),
        (lambda layer: backbone("deit", layer=layer, tiny={"layer": None}), 6),
    ],
)
@pytest.mark.parametrize("layer", [None, -1, -2, 1])
def test_the_layer_is_the_one_that_the_loaded_backbone_takes(make, depth, layer):
    expected = {None: depth - 1, -1: depth - 1, -2: depth - 2, 1: 1}[layer]
    assert default_layer(make(layer)) == expected
    assert load_backbone(make(layer)).layer == expected


def test_finding_a_large_models_last_layer_takes_no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were built")

    monkeypatch.setattr(library, "_build", refuse)
    cfg = timm("vit_giant_patch14_dinov2.lvd142m", pretrained=True)  # 1.1 billion weights
    assert default_layer(cfg) == 39
    before = library.timm_anatomy.cache_info().hits
    assert default_layer(cfg) == 39
    assert library.timm_anatomy.cache_info().hits == before + 1


def test_a_library_of_another_package_is_found_by_its_name(monkeypatch):
    class Mine:
        load, depth = staticmethod(lambda cfg: cfg["name"]), staticmethod(lambda wanted: len(wanted.model))

    monkeypatch.setitem(backbone_library, "mine", Mine)
    cfg = backbone("deit", "published", layer=-2)
    cfg["published"] = cfg["published"] | {"library": "mine", "model": "seven77"}
    assert (load_backbone(cfg), default_layer(cfg)) == ("deit", 5)
    cfg["published"]["library"] = "keras"
    with pytest.raises(BackboneError, match=r"backbone\.published\.library=keras; choose one of timm, .*mine"):
        load_backbone(cfg)


def test_layers_beyond_the_first_are_refused():
    with pytest.raises(BackboneError, match="has 6 layers, so -6 is its first"):
        default_layer(timm("test_vit", -7))
    with pytest.raises(BackboneError, match="choose one of tiny, published"):
        default_layer(backbone("mae", "huge"))


def test_generic_backbones_are_named_by_their_models():
    ids = ["facebook/dinov2-base", "facebook/dinov2-large", "resnet50", "vit_base_patch16_224.mae", "hf-hub:a/b"]
    names = [timm(model)["name"] for model in ids]
    assert names[0] == "facebook--dinov2-base"
    assert names[2:4] == ids[2:4]
    assert len(set(names)) == len(ids)
    assert not any(set("/:\\ ") & set(name) for name in names)
    assert folder_name("../up") == "up"
    assert transformers(VIT)["name"] == "org--small"
    assert load_backbone(transformers(VIT, title="Small")).title == "org--small (Small, random weights)"
    assert load_backbone(transformers(VIT)).title == "org/small (random weights)"
