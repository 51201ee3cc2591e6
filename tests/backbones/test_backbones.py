"""Backbones: the bundled ones as shipped, the published architectures with random weights."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from sae_lightning.backbones import TextTower, default_layer, load_backbone
from sae_lightning.backbones.published import load_timm, load_transformers
from sae_lightning.backbones.tiny import TINY_NAMES, tiny_vit
from sae_lightning.data import load_images

CONF = Path(__file__).resolve().parents[2] / "conf" / "backbone"


def cfg(name, **changes):
    return OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=False) | changes


@pytest.fixture(scope="module")
def pictures():
    images = load_images({"source": "demo"}, "test")
    return [images[i] for i in range(6)]


@pytest.mark.parametrize("name", TINY_NAMES)
def test_tiny_backbones_give_the_hooked_blocks_patch_tokens(name, pictures):
    backbone = load_backbone(cfg(name, size="tiny"))
    x = torch.stack([backbone.transform(p) for p in pictures])
    out = backbone.forward_features(x)
    assert out["patch"].shape == (6, 64, 128)
    assert out["pooled"].shape == (6, 128)
    assert backbone.title == f"{name} (tiny)"
    model = backbone.model
    with torch.no_grad():
        tokens = model.patch_embed(x).flatten(1, 2)
        if model.cls_token is not None:
            tokens = torch.cat([model.cls_token.expand(6, -1, -1), tokens], 1)
        tokens = tokens + model.pos_embed
        for block in model.blocks[: backbone.layer + 1]:
            tokens = block(tokens)
    torch.testing.assert_close(out["patch"], tokens[:, model.num_prefix_tokens :], rtol=1e-4, atol=1e-4)
    other = backbone.forward_features(x, layer=1)["patch"]
    assert not torch.allclose(other, out["patch"])


@pytest.mark.parametrize("name", TINY_NAMES)
def test_tiny_backbones_are_trained(name, pictures):
    trained, random = (load_backbone(cfg(name, size="tiny"), pretrained=p) for p in (True, False))
    assert trained.fingerprint() != random.fingerprint()
    assert trained.fingerprint() == load_backbone(cfg(name, size="tiny")).fingerprint()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_text_towers_match_images_to_their_captions(name):
    """Zero-shot on held-out pictures, far above the tenth that chance gives."""
    images = load_images({"source": "demo"}, "test")
    backbone, tower = load_backbone(cfg(name, size="tiny")), TextTower(name)
    articles = ["an" if n[0] in "aeiou" else "a" for n in images.class_names]
    words = tower.encode([f"a photo of {a} {n}" for a, n in zip(articles, images.class_names, strict=True)])
    torch.testing.assert_close(words.norm(dim=1), torch.ones(10))
    x = torch.stack([backbone.transform(images[i]) for i in range(0, 2000, 10)])
    seen = tower.encode_images(backbone.forward_features(x)["pooled"])
    guess = (seen @ words.T).argmax(1).numpy()
    assert (guess == images.labels[::10]).mean() > 0.4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "grid"), [("dinov2", 16), ("clip", 14), ("siglip", 14), ("mae", 14), ("deit", 14)])
def test_published_architectures_give_layer_11_patch_tokens(name, grid):
    backbone = load_backbone(cfg(name, size="published"), pretrained=False)
    assert backbone.depth == 12
    assert backbone.layer == 11
    assert backbone.d_in == 768
    out = backbone.forward_features(torch.randn(1, 3, 224, 224))
    assert out["patch"].shape == (1, grid * grid, 768)
    assert out["pooled"].shape == (1, 768)


def tiny_configs():
    import transformers as t

    common = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return {
        "clip": t.CLIPVisionConfig(**common, intermediate_size=64),
        "siglip": t.SiglipVisionConfig(**common, intermediate_size=64),
        "dinov2": t.Dinov2Config(**common),
        "mae": t.ViTMAEConfig(**common, intermediate_size=64),
        "vit": t.ViTConfig(**common, intermediate_size=64),
    }


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "mae", "vit"])
def test_transformers_encoders_give_the_same_tokens_as_their_hidden_states(name):
    torch.manual_seed(0)
    wanted = {"name": name, "published": {"model": name, "title": "t", "image_size": 32, "layer": 2}}
    backbone = load_transformers(wanted, pretrained=False, config=tiny_configs()[name])
    x = torch.randn(2, 3, 32, 32)
    got = backbone.forward_features(x, layer=1)["patch"]
    assert got.shape == (2, 16, 32)
    model = backbone.model.model
    kwargs = {"noise": torch.arange(16.0).expand(2, -1)} if name == "mae" else {}
    with torch.no_grad():
        hidden = model(x, output_hidden_states=True, **kwargs).hidden_states
    prefix = 0 if name == "siglip" else 1
    torch.testing.assert_close(got, hidden[2][:, prefix:])
    torch.testing.assert_close(got, backbone.forward_features(x, layer=1)["patch"])  # no random masking


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: load_backbone(cfg("deit", size="tiny", layer=6)), "blocks are 0 to 5"),
        (lambda: load_backbone(cfg("deit", size="huge")), "choose tiny or published"),
        (lambda: load_backbone(cfg("deit", size="tiny")).forward_features(torch.zeros(1, 3, 64, 64)), "32 x 32"),
        (lambda: tiny_vit("resnet"), "no tiny backbone 'resnet'"),
        (lambda: TextTower("mae"), "no text tower"),
        (
            lambda: load_timm({"name": "x", "published": {"model": "nothing", "image_size": 8}}),
            "Check the model's id",
        ),
        (
            lambda: load_timm({"name": "x", "published": {"model": "resnet18", "image_size": 224}}, False),
            "cannot be loaded|no vision transformer",
        ),
    ],
)
def test_what_cannot_be_had_is_said_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_default_layers():
    assert default_layer(cfg("mae", size="tiny")) == 4
    assert default_layer(cfg("mae", size="published")) == 11
    assert default_layer(cfg("mae", size="published", layer=3)) == 3
