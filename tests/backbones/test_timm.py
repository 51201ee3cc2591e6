"""timm's models: blocks of transformers, stages of everything else, against timm's own features."""

import re

import pytest
import timm as library
import torch
from torchvision import transforms

from sae_lightning.backbones.backbone import BackboneError, Tap
from sae_lightning.backbones.registry import identity, load_backbone
from tests.backbones.models import backbone, picture, timm


@pytest.fixture(scope="module")
def vit():
    return load_backbone(timm("test_vit"))


def test_a_transformers_tokens_are_those_of_a_loop_over_its_blocks(vit):
    model, x = vit.model, torch.randn(2, 3, 160, 160)
    taps = [Tap(kind, layer) for kind in ("patch", "cls") for layer in range(6)]
    out = vit.forward_features(x, [*taps, Tap("pooled")])
    with torch.no_grad():
        tokens = model.patch_embed(x).flatten(1, 2)
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], 1) + model.pos_embed
        for layer, block in enumerate(model.blocks):
            tokens = block(tokens)
            torch.testing.assert_close(out[Tap("patch", layer)], tokens[:, 1:])
            torch.testing.assert_close(out[Tap("cls", layer)], tokens[:, 0])
        torch.testing.assert_close(out[Tap("pooled")], model(x))
    assert (vit.depth, vit.layer, vit.d_in, vit.grid) == (6, 5, 64, (10, 10))


def test_the_pass_ends_after_the_last_wanted_block(vit):
    x, ran = torch.randn(1, 3, 160, 160), []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(vit.model.blocks)]
    try:
        short = vit.forward_features(x, [Tap("patch", 2), Tap("cls", 0)])
        assert ran == [0, 1, 2]
        whole = vit.forward_features(x, [Tap("patch", 2), Tap("cls", 0), Tap("pooled")])
        assert ran == [0, 1, 2, *range(6)]
    finally:
        for handle in handles:
            handle.remove()
    assert all(torch.equal(short[tap], whole[tap]) for tap in short)


def test_register_tokens_are_neither_patches_nor_class_token():
    ours = load_backbone(timm("vit_wee_patch16_reg1_gap_256", image_size=64, layer=0))
    assert ours.kinds == ("patch", "registers", "tokens", "pooled")
    assert (ours.grid, ours.image_size) == ((4, 4), 64)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = ours.model.blocks[0](ours.model.norm_pre(ours.model._pos_embed(ours.model.patch_embed(x))))
    assert tokens.shape[1] == 17
    out = ours.forward_features(x, [Tap("patch", 0), Tap("registers", 0)])
    torch.testing.assert_close(out[Tap("patch", 0)], tokens[:, 1:])
    torch.testing.assert_close(out[Tap("registers", 0)], tokens[:, :1])


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_stages_of_convolutional_models_are_timms_features(model):
    ours = load_backbone(timm(model))
    reference = library.create_model(model, features_only=True).eval()
    weights = {re.sub(r"^(stem|stages)\.", r"\1_", name): tensor for name, tensor in ours.model.state_dict().items()}
    assert not reference.load_state_dict(weights, strict=False).missing_keys
    x = torch.randn(2, 3, ours.image_size, ours.image_size)
    with torch.no_grad():
        maps, pooled = reference(x), ours.model(x)
    taps = [Tap("patch", layer) for layer in range(ours.depth)]
    out = ours.forward_features(x, [*taps, Tap("pooled")])
    assert len(maps) == ours.depth
    for tap, expected in zip(taps, maps, strict=True):
        torch.testing.assert_close(out[tap], expected.flatten(2).mT)
        assert ours.grid_at(tap.layer) == tuple(expected.shape[2:])
        assert ours.width_at(tap.layer) == expected.shape[1]
    torch.testing.assert_close(out[Tap("pooled")], pooled)
    assert (ours.layer, ours.d_in, ours.grid) == (ours.depth - 1, *maps[-1].shape[1:2], tuple(maps[-1].shape[2:]))
    assert ours.kinds == ("patch", "pooled")
    short = ours.forward_features(x, taps[:1])
    assert torch.equal(short[taps[0]], out[taps[0]])


def test_stages_of_a_hierarchical_transformer_are_in_reading_order():
    ours = load_backbone(timm("swin_tiny_patch4_window7_224", image_size=56))
    x = torch.randn(1, 3, 56, 56)
    out = ours.forward_features(x, [Tap("patch", layer) for layer in range(4)])
    with torch.no_grad():
        map_ = ours.model.patch_embed(x)  # [B, rows, columns, d]
        for layer, stage in enumerate(ours.model.layers):
            map_ = stage(map_)
            torch.testing.assert_close(out[Tap("patch", layer)], map_.flatten(1, 2))
            assert ours.grid_at(layer) == tuple(map_.shape[1:3])
    assert (ours.d_in, ours.grid, ours.kinds) == (768, (2, 2), ("patch", "pooled"))


def test_image_size_is_the_models_own_or_the_wanted_one():
    for model, wanted, grid in [("test_vit", None, 10), ("test_vit", 48, 3), ("test_resnet", 96, 3)]:
        ours = load_backbone(timm(model, image_size=wanted))
        assert ours.grid == (grid, grid)
        assert ours.transform(picture()).shape == (3, wanted or 160, wanted or 160)
        out = ours.forward_features(ours.transform(picture())[None], [Tap("patch", -1)])
        assert out[Tap("patch", -1)].shape == (1, grid * grid, ours.d_in)


def test_pictures_are_resized_before_the_middle_is_cut_out():
    ours = load_backbone(timm("test_vit", image_size=224, resize=256))
    config = library.get_pretrained_cfg("test_vit").to_dict()
    theirs = transforms.Compose([
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"]),
    ])  # fmt: skip
    torch.testing.assert_close(ours.transform(picture(300, 400)), theirs(picture(300, 400)))
    assert identity(timm("test_vit", image_size=224, resize=256)) == "timm:test_vit:224:resize 256:random"
    assert identity(timm("test_vit", image_size=224)) == "timm:test_vit:224:random"


@pytest.mark.parametrize(("name", "grid"), [("dinov2", 16), ("mae", 14), ("deit", 14)])
def test_the_published_backbones_have_twelve_blocks_at_224_pixels(name, grid):
    with torch.device("meta"):
        ours = load_backbone(backbone(name, "published", published={"pretrained": False}))
    assert (ours.depth, ours.layer, ours.d_in, ours.grid, ours.image_size) == (12, 11, 768, (grid, grid), 224)
    assert ours.title == f"{name} (ViT-B/{14 if name == 'dinov2' else 16}, random weights)"


@pytest.mark.slow
def test_all_patches_of_the_published_mae_are_there_in_order():
    ours = load_backbone(backbone("mae", "published", published={"pretrained": False}))
    x = torch.randn(1, 3, 224, 224)
    out = ours.forward_features(x, [Tap("patch", 11), Tap("cls", 11), Tap("pooled")])
    with torch.no_grad():
        tokens = ours.model.norm_pre(ours.model._pos_embed(ours.model.patch_embed(x)))
        tokens = ours.model.blocks(tokens)
        torch.testing.assert_close(out[Tap("pooled")], ours.model(x))
    torch.testing.assert_close(out[Tap("patch", 11)], tokens[:, -14 * 14 :])
    torch.testing.assert_close(out[Tap("cls", 11)], tokens[:, 0])


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (timm("nothing"), "timm cannot build 'nothing'.*Check backbone.published.model"),
        (timm("test_vit", layer=6), "its layers are 0 to 5"),
        (timm("test_vit", image_size=50), "cannot encode images of 50 x 50 pixels.*Set backbone.published.image_size"),
        (timm("test_resnet", image_size=-3), "is no number of pixels"),
        (timm("test_vit", image_size=48, resize=40), "resize=40 is no edge of pictures from which image_size=48"),
        (timm("test_vit", resize=40), "resize=40 is no edge of pictures"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_sentence(cfg, sentence):
    with pytest.raises(BackboneError, match=sentence):
        load_backbone(cfg)
