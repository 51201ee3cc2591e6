"""The bundled backbones as shipped, through the interface that all backbones share."""

import pytest
import torch
from safetensors.torch import load_file

from sae_lightning.backbones.backbone import BackboneError, Tap
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.backbones.tiny import TINY_NAMES, tiny_vit, weights_file
from sae_lightning.data import load_images
from tests.backbones.models import backbone

IMAGE_TEXT = ("clip", "siglip")


@pytest.fixture(scope="module")
def images():
    return load_images({"source": "demo"}, "test")


@pytest.fixture(scope="module")
def loaded():
    return {name: load_backbone(backbone(name)) for name in TINY_NAMES}


def batch(of, images, indices=range(6)):
    return torch.stack([of.transform(images[i]) for i in indices])


@pytest.mark.parametrize("name", TINY_NAMES)
def test_tokens_are_those_of_a_loop_over_the_blocks(name, images, loaded):
    ours, model = loaded[name], loaded[name].model
    x = batch(ours, images)
    class_token = model.cls_token is not None
    wanted = [Tap(kind, layer) for layer in (1, 4) for kind in ("patch", "cls") if kind == "patch" or class_token]
    out = ours.forward_features(x, [*wanted, Tap("pooled")])
    assert list(out) == [*wanted, Tap("pooled")]
    with torch.no_grad():
        tokens = model.patch_embed(x).flatten(1, 2)
        if class_token:
            tokens = torch.cat([model.cls_token.expand(6, -1, -1), tokens], 1)
        tokens = tokens + model.pos_embed
        for layer, block in enumerate(model.blocks):
            tokens = block(tokens)
            if layer in (1, 4):
                expected = tokens[:, 1:] if class_token else tokens
                torch.testing.assert_close(out[Tap("patch", layer)], expected, rtol=1e-4, atol=1e-4)
                if class_token:
                    torch.testing.assert_close(out[Tap("cls", layer)], tokens[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[Tap("pooled")], model(x))
    assert out[Tap("patch", 4)].shape == (6, 64, 128)
    assert (ours.title, ours.layer, ours.depth, ours.grid, ours.d_in) == (f"{name} (tiny)", 4, 6, (8, 8), 128)


def test_one_pass_for_all_taps_gives_what_separate_passes_give(images, loaded):
    ours = loaded["clip"]
    x = batch(ours, images)
    taps = [Tap("patch", 5), Tap("patch", 0), Tap("cls", 3), Tap("cls", -1), Tap("pooled"), Tap("embedding")]
    together = ours.forward_features(x, taps)
    for tap in taps:
        assert torch.equal(together[tap], ours.forward_features(x, [tap])[tap])


def test_layers_from_the_end_are_the_same_layers(images, loaded):
    ours = loaded["deit"]
    assert ours.check(Tap("patch", -2)) == Tap("patch", 4)
    assert ours.check_layer(-6) == 0
    out = ours.forward_features(batch(ours, images), [Tap("patch", -2), Tap("patch", 4)])
    assert torch.equal(out[Tap("patch", -2)], out[Tap("patch", 4)])
    assert load_backbone(backbone("deit", layer=-1)).layer == 5


@pytest.mark.parametrize("name", TINY_NAMES)
def test_weights_are_trained(name, loaded):
    random = backbone(name, tiny={"pretrained": False})
    assert loaded[name].fingerprint() == load_backbone(backbone(name)).fingerprint()
    assert loaded[name].fingerprint() != load_backbone(random).fingerprint()
    assert load_backbone(random).title == f"{name} (tiny, random weights)"


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_embeddings_are_projections_without_unit_norm(name, images, loaded):
    ours = loaded[name]
    out = ours.forward_features(batch(ours, images), [Tap("pooled"), Tap("embedding")])
    weight = load_file(weights_file(name))["project.weight"].float()
    torch.testing.assert_close(out[Tap("embedding")], out[Tap("pooled")] @ weight.T)
    text = ours.encode_text(["a photo of a cat", "a dark photo of a ship", "a photo of an unheardof"])
    assert text.shape == (3, 128)
    torch.testing.assert_close(ours.encode_text(["a dark photo of a ship"]), text[1:2])
    for embeddings in (out[Tap("embedding")], text):
        assert (embeddings.norm(dim=1) - 1).abs().min() > 0.1


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_captions_find_their_images(name, images, loaded):
    """Zero-shot on held-out pictures, far above the tenth that chance gives."""
    ours, chosen = loaded[name], range(0, 2000, 10)
    seen = ours.forward_features(batch(ours, images, chosen), [Tap("embedding")])[Tap("embedding")]
    prompts = [f"a photo of {'an' if n[0] in 'aeiou' else 'a'} {n}" for n in images.class_names]
    words = torch.nn.functional.normalize(ours.encode_text(prompts), dim=1)
    guess = (seen @ words.T).argmax(1).numpy()
    assert (guess == images.labels[::10]).mean() > 0.4


def test_kinds_say_what_a_backbone_has(loaded):
    assert loaded["clip"].kinds == ("patch", "cls", "tokens", "pooled", "embedding", "text")
    assert loaded["siglip"].kinds == ("patch", "pooled", "embedding", "text")
    assert {loaded[name].kinds for name in ("dinov2", "mae", "deit")} == {("patch", "cls", "tokens", "pooled")}


@pytest.mark.parametrize(
    ("name", "ask", "sentence"),
    [
        ("siglip", lambda b: b.check(Tap("cls", 2)), r"siglip \(tiny\) has no class token; it has patch, pooled, emb"),
        (
            "dinov2",
            lambda b: b.check(Tap("embedding")),
            "no projection into an image–text space; it has patch, cls, tok",
        ),
        ("mae", lambda b: b.encode_text(["a cat"]), "has no text tower"),
        ("clip", lambda b: b.encode_text([]), "at least one caption"),
        ("clip", lambda b: b.encode_text("a cat"), "takes a list"),
        ("clip", lambda b: b.forward_features(torch.zeros(1, 3, 32, 32), [Tap("text")]), "use encode_text"),
        ("deit", lambda b: b.check(Tap("patch", 6)), "its layers are 0 to 5"),
        ("deit", lambda b: b.grid_at(-7), "Layer -7 does not exist"),
        ("deit", lambda b: b.forward_features(torch.zeros(1, 3, 32, 32), []), "name at least one"),
        ("deit", lambda b: b.forward_features(torch.zeros(1, 3, 64, 64), [Tap("pooled")]), "32 x 32 pixels; it got 64"),
    ],
)
def test_what_a_backbone_does_not_have_is_said_in_a_sentence(name, ask, sentence, loaded):
    with pytest.raises(BackboneError, match=sentence):
        ask(loaded[name])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: load_backbone(backbone("deit", layer=6)), "its layers are 0 to 5, or -1 for the last"),
        (lambda: load_backbone(backbone("deit", size="huge")), "choose one of tiny, published"),
        (lambda: load_backbone(backbone("deit", layer="last")), "is no layer; give a whole number"),
        (lambda: tiny_vit("resnet"), "Unknown tiny backbone=resnet"),
    ],
)
def test_impossible_settings_are_said_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
