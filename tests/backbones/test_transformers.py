"""Vision transformers of transformers, against their own hidden states and outputs."""

import numpy as np
import pytest
import timm as timm_library
import torch
import transformers as library
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from sae_lightning.backbones.backbone import BackboneError, Tap
from sae_lightning.backbones.registry import load_backbone
from tests.backbones.models import CLIP, COMMON, SIGLIP, VISION, backbone, timm, transformers

# architecture and its tokens in front of the patches
SMALL = {
    "vit": (VISION | {"model_type": "vit"}, 1),
    "deit": (VISION | {"model_type": "deit"}, 2),
    "beit": (VISION | {"model_type": "beit", "use_relative_position_bias": True}, 1),
    "dinov2": (VISION | {"model_type": "dinov2"}, 1),
    "registers": (VISION | {"model_type": "dinov2_with_registers", "num_register_tokens": 4}, 5),
    "dinov3": (VISION | {"model_type": "dinov3_vit", "num_register_tokens": 4}, 5),
    "clip": (CLIP, 1),
    "siglip": (SIGLIP, 0),
}
SWIN = {"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4}
SWIN |= {"depths": [1, 1], "num_heads": [1, 1]}


def run(model, x, **kwargs):
    with torch.no_grad():
        return model(x, output_hidden_states=True, **kwargs)


@pytest.mark.parametrize("name", SMALL)
def test_tokens_are_the_hidden_states(name):
    architecture, prefix = SMALL[name]
    ours = load_backbone(transformers(architecture))
    x = torch.randn(2, 3, 32, 32)
    class_kinds = ("cls",) if prefix else ()
    taps = [Tap(kind, layer) for kind in ("patch", *class_kinds) for layer in range(3)]
    out = ours.forward_features(x, [*taps, Tap("pooled")])
    expected = run(ours.model, x)
    for layer in range(2):  # some models normalise the last one
        hidden = expected.hidden_states[layer + 1]
        assert hidden.shape[1] == prefix + 16
        torch.testing.assert_close(out[Tap("patch", layer)], hidden[:, prefix:])
        if prefix:
            torch.testing.assert_close(out[Tap("cls", layer)], hidden[:, 0])
    torch.testing.assert_close(out[Tap("pooled")], expected.pooler_output)
    assert set(ours.kinds) >= {"patch", "pooled", *class_kinds}
    assert ("cls" in ours.kinds) == (prefix > 0)
    assert (ours.depth, ours.layer, ours.d_in, ours.grid, ours.image_size) == (3, 2, 32, (4, 4), 32)


@pytest.mark.parametrize("name", SMALL)
def test_several_taps_and_shorter_passes_give_what_separate_passes_give(name):
    ours = load_backbone(transformers(SMALL[name][0]))
    x = torch.randn(2, 3, 32, 32)
    taps = [Tap("patch", 1), Tap("patch", 0), Tap("pooled")]
    together = ours.forward_features(x, taps)
    short = ours.forward_features(x, taps[:2])
    for tap in taps:
        assert torch.equal(together[tap], ours.forward_features(x, [tap])[tap])
    assert all(torch.equal(short[tap], together[tap]) for tap in taps[:2])


def test_the_pass_ends_after_the_last_wanted_block_and_leaves_no_hook():
    ours = load_backbone(transformers(SMALL["vit"][0]))
    blocks, ran = ours.model.layers, []
    watch = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    ours.forward_features(torch.randn(1, 3, 32, 32), [Tap("patch", 0), Tap("cls", 1)])
    assert ran in ([0, 1], [0])  # our hook on the last one may come before this one
    for handle in watch:
        handle.remove()
    with pytest.raises(ValueError, match="channel"):
        ours.forward_features(torch.randn(1, 5, 32, 32), [Tap("patch", 0)])
    assert not any(block._forward_hooks for block in blocks)


def test_mae_sees_all_patches_in_order():
    ours = load_backbone(transformers(VISION | {"model_type": "vit_mae", "mask_ratio": 0.75}))
    x, model = torch.randn(2, 3, 32, 32), ours.model
    taps = [Tap("patch", 0), Tap("patch", 2), Tap("cls", 2), Tap("pooled")]
    out = ours.forward_features(x, taps)
    with torch.no_grad():
        where = model.embeddings.position_embeddings
        tokens = model.embeddings.patch_embeddings(x) + where[:, 1:]
        tokens = torch.cat([(model.embeddings.cls_token + where[:, :1]).expand(2, -1, -1), tokens], 1)
        states = []
        for block in model.layers:
            tokens = block(tokens)
            states.append(tokens)
        pooled = model.layernorm(tokens)[:, 0]
    for tap, expected in zip(taps, [states[0][:, 1:], states[2][:, 1:], states[2][:, 0], pooled], strict=True):
        torch.testing.assert_close(out[tap], expected)


def test_siglip_2_gets_the_patches_that_its_processor_cuts():
    architecture = SIGLIP | {"model_type": "siglip2", "vision_config": VISION | {"num_patches": 16}}
    del architecture["vision_config"]["image_size"]
    ours = load_backbone(transformers(architecture))
    assert (ours.image_size, ours.grid) == (32, (4, 4))
    x = torch.randn(2, 3, 32, 32)
    patches = np.stack([convert_image_to_patches(image.numpy(), 8) for image in x])
    whole = {"pixel_attention_mask": torch.ones(2, 16), "spatial_shapes": torch.tensor([[4, 4], [4, 4]])}
    expected = run(ours.model, torch.from_numpy(patches), **whole)
    out = ours.forward_features(x, [Tap("patch", 1), Tap("embedding")])
    torch.testing.assert_close(out[Tap("patch", 1)], expected.hidden_states[2])
    torch.testing.assert_close(out[Tap("embedding")], expected.pooler_output)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "clip", "siglip"])
def test_another_image_size_gives_another_grid(name):
    ours = load_backbone(transformers(SMALL[name][0], image_size=48))
    assert ours.grid == (6, 6)
    x = torch.randn(1, 3, 48, 48)
    option = {} if name.startswith("dino") else {"interpolate_pos_encoding": True}
    expected = run(ours.model, x, **option).hidden_states[2]
    out = ours.forward_features(x, [Tap("patch", 1)])[Tap("patch", 1)]
    torch.testing.assert_close(out, expected[:, -36:])


def test_a_vision_transformer_is_the_same_through_timm_and_transformers():
    """Weights copied from one to the other give equal features."""
    theirs = load_backbone(timm("test_vit"))
    shape = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 192}
    shape |= {"image_size": 160, "patch_size": 16, "layer_norm_eps": 1e-6, "model_type": "vit"}
    ours = load_backbone(transformers(shape))
    weights = {}
    for name, tensor in theirs.model.state_dict().items():
        for old, new in [
            ("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("attn.proj", "attention.o_proj"),
            ("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("blocks", "layers"),
        ]:  # fmt: skip
            name = name.replace(old, new)
        name = "layernorm" + name.removeprefix("norm") if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("attn.qkv", f"attention.{part}_proj")] = piece
        else:
            weights[name] = tensor
    missing, unexpected = ours.model.load_state_dict(weights, strict=False)
    assert all(name.startswith("pooler") for name in missing)
    assert not unexpected
    x = torch.randn(2, 3, 160, 160)
    taps = [Tap("patch", 2), Tap("cls", 2), Tap("patch", -1)]
    a, b = ours.forward_features(x, taps), theirs.forward_features(x, taps)
    for tap in taps:
        torch.testing.assert_close(a[tap], b[tap], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kinds"), [("clip", {"patch", "cls", "tokens"}), ("siglip", {"patch"})])
def test_the_published_backbones_are_timms_architectures(name, kinds):
    """The config that stands in for the hub's has the tensors of the timm model of the same checkpoint."""
    with torch.device("meta"):
        ours = load_backbone(backbone(name, "published", published={"pretrained": False}))
    assert (ours.depth, ours.layer, ours.d_in, ours.grid, ours.image_size) == (12, 11, 768, (14, 14), 224)
    assert set(ours.kinds) == kinds | {"pooled", "embedding", "text"}
    assert ours.title == f"{name} (ViT-B/16, random weights)"
    same = {"clip": "vit_base_patch16_clip_224.openai", "siglip": "vit_base_patch16_siglip_224.webli"}
    with torch.device("meta"):  # timm's CLIP has the projection as its classifier, with a bias of 0
        theirs = timm_library.create_model(same[name])
    count = sum(p.numel() for part in (ours.model, ours.project) for p in part.parameters())
    assert count == sum(p.numel() for name, p in theirs.named_parameters() if name != "head.bias")


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        (SWIN, "after layer 0, not one token for each of 64 patches; it is no plain vision transformer"),
        ({"model_type": "resnet"}, "'org/small' .resnet. is no plain vision transformer.*try backbone=timm"),
        (COMMON | {"model_type": "bert"}, "no plain vision transformer"),
        ({"model_type": "nothing"}, "config of 'org/small' cannot be loaded"),
    ],
)
def test_other_architectures_are_refused_in_a_sentence(architecture, sentence):
    with pytest.raises(BackboneError, match=sentence):
        load_backbone(transformers(architecture))


def test_the_small_models_are_what_their_names_say():
    """Otherwise the tests above would test AutoModel's guess."""
    expected = {"clip": library.CLIPVisionModel, "siglip": library.SiglipVisionModel, "beit": library.BeitModel}
    for name, kind in expected.items():
        assert type(load_backbone(transformers(SMALL[name][0])).model) is kind


PACKED = VISION | {"model_type": "pixtral", "num_channels": 3}


def test_an_encoder_that_packs_a_batch_into_one_sequence_is_refused():
    ours = load_backbone(transformers(PACKED))
    for taps in ([Tap("patch", 1)], [Tap("patch", 2), Tap("patch", 0)]):
        with pytest.raises(BackboneError, match=r"gives \(1, 64, 32\) for 4 images after layer .* not supported"):
            ours.forward_features(torch.randn(4, 3, 32, 32), taps)


def test_every_kind_of_features_must_be_one_row_an_image(monkeypatch):
    ours, few = load_backbone(backbone("clip")), slice(0, 1)
    whole = ours._read

    def read(images, layers, pooled):
        reading = whole(images, layers, pooled)
        tokens = {n: t._replace(patch=t.patch[few], prefix=t.prefix[few]) for n, t in reading.layers.items()}
        return reading._replace(layers=tokens, pooled=reading.pooled if reading.pooled is None else reading.pooled[few])

    monkeypatch.setattr(ours, "_read", read)
    for tap in (Tap("patch", 1), Tap("cls", 1), Tap("pooled"), Tap("embedding")):
        with pytest.raises(BackboneError, match=rf"gives \(1, .*\) for 3 images at {tap}, not one row for each"):
            ours.forward_features(torch.randn(3, 3, 32, 32), [tap])
    ours.text_tower = torch.nn.Linear(1, 1)
    monkeypatch.setattr(ours.text_tower, "forward", lambda captions: torch.zeros(1, 8))
    with pytest.raises(BackboneError, match=r"gives \(1, 8\) for 3 captions at text, not one row for each"):
        ours.encode_text(["a", "b", "c"])


BOTH = {"vision_config": VISION, "text_config": CLIP["text_config"]}
UNSUPPORTED = {
    "metaclip_2": BOTH, "blip": BOTH, "blip-2": {"vision_config": VISION}, "altclip": BOTH, "owlvit": BOTH, "git": {},
    "yolos": COMMON | {"patch_size": 8, "image_size": [32, 48]}, "vjepa2": COMMON | {"patch_size": 8, "crop_size": 32},
    "videomae": VISION, "vivit": VISION, "qwen2_5_vl_vision": VISION, "qwen3_vl_vision": VISION,
    "gemma4_vision": VISION,
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_model_that_is_not_supported_says_so(kind):
    with pytest.raises(BackboneError, match=r"(?s)not supported.*try backbone=timm") as refusal:
        load_backbone(transformers(UNSUPPORTED[kind] | {"model_type": kind}))
    assert "connection" not in str(refusal.value)
    assert "image_size=" not in str(refusal.value)
