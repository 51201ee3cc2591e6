"""Models of all libraries as classifiers: layers, adapters, what is trained, saving and errors."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sae_lightning.finetuning.classifier import build, load, rebuilding, save
from sae_lightning.finetuning.data import FinetuneError
from tests.backbones.models import CLIP
from tests.configs import CONF


def model(name: str = "tiny", **changes) -> dict:
    """The section ``model`` of ``finetune_model=<name>`` with random weights and ``changes``."""
    node = OmegaConf.merge(OmegaConf.load(CONF / "finetune_model" / f"{name}.yaml"), {"pretrained": False}, changes)
    return OmegaConf.to_container(node, resolve=True)


def small_clip(**changes) -> dict:
    return model("clip_vit_b32", architecture=CLIP, **changes)


def small_resnet(**changes) -> dict:
    return model("resnet50", model="resnet10t", image_size=32, **changes)


@pytest.mark.parametrize("section", [model(), small_clip(), small_resnet()], ids=["tiny", "clip", "resnet"])
def test_the_added_layer_is_as_wide_as_the_embedding_and_gives_the_activations(section):
    classifier, preprocess = build(section, 5)
    images = torch.randn(3, 3, preprocess.image_size, preprocess.image_size)
    classifier.eval()
    logits, activations = classifier(images)
    assert logits.shape == (3, 5)
    assert classifier.added.weight.shape == (classifier.n_units,) * 2
    torch.testing.assert_close(classifier.head(activations), logits)


def test_clip_is_classified_by_its_pooled_output_before_the_projection():
    classifier, _ = build(small_clip(), 5)
    assert classifier.n_units == 32  # the tower's width; the projection has 20


@pytest.mark.parametrize(
    ("section", "layer", "units"),
    [
        (model(), "embedding", 128),
        (model(), "encoder.blocks.3", 128),
        (model(), "encoder.blocks.3.mlp.fc1", 512),
        (small_clip(), "encoder.encoder.layers.1.self_attn", 32),
        (small_resnet(), "encoder.layer2", 128),
        (model("resnet50", model="test_convnext", image_size=32), "encoder.stages.1", 32),
    ],
)
def test_any_module_can_be_the_layer(section, layer, units):
    classifier, preprocess = build(section, 5, layer)
    assert classifier.n_units == units
    assert classifier(torch.randn(2, 3, preprocess.image_size, preprocess.image_size)).activations.shape == (2, units)


def test_positions_of_maps_and_tokens_are_averaged():
    classifier, _ = build(small_resnet(), 5, "encoder.layer2")
    classifier.eval()
    seen = []
    classifier.encoder.layer2.register_forward_hook(lambda module, args, output: seen.append(output))
    found = classifier(torch.randn(2, 3, 32, 32)).activations
    torch.testing.assert_close(found, seen[0].mean((2, 3)))
    classifier.encoder.output_fmt = "NHWC"  # as timm's Swin says
    torch.testing.assert_close(classifier._pooled(seen[0].permute(0, 2, 3, 1)), found)
    tokens = seen[0].flatten(2).transpose(1, 2)
    torch.testing.assert_close(classifier._pooled(tokens), found)


def test_an_unknown_layer_lists_what_there_is():
    with pytest.raises(FinetuneError, match=r"no layer=encoder\.block\.3; choose one of .*encoder\.blocks\.3.*added"):
        build(model(), 5, "encoder.block.3")


def test_without_the_added_layer_the_head_reads_the_embedding():
    classifier, _ = build(model(), 5, "embedding", added_layer=False)
    assert not list(classifier.added.parameters())
    images = torch.randn(2, 3, 32, 32)
    logits, activations = classifier.eval()(images)
    torch.testing.assert_close(classifier.head(activations), logits)


def test_lora_trains_adapters_added_layer_and_head_only():
    classifier, _ = build(small_clip(), 5)
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    outside = {"added.weight", "added.bias", "head.weight", "head.bias"}
    assert outside < trained
    adapters = trained - outside
    assert all("lora_A" in name or "lora_B" in name for name in adapters)
    layers = [m for m in classifier.encoder.modules() if hasattr(m, "lora_A")]
    assert len(layers) == 2 * 3  # q_proj and v_proj of three blocks
    assert len(adapters) == 2 * len(layers)
    names = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in adapters if "lora_A" in name}
    assert names == {"q_proj", "v_proj"}
    assert {(m.r["default"], m.lora_alpha["default"], m.scaling["default"]) for m in layers} == {(16, 32, 2.0)}
    assert {m.lora_A["default"].weight.shape for m in layers} == {(16, 32)}


def test_rank_and_alpha_are_as_configured():
    classifier, _ = build(model(lora={"r": 4, "alpha": 2}), 5)
    layers = [m for m in classifier.encoder.modules() if hasattr(m, "lora_A")]
    assert len(layers) == 6
    assert {(m.r["default"], m.scaling["default"]) for m in layers} == {(4, 0.5)}


def test_fresh_adapters_do_not_change_what_the_model_says():
    plain, _ = build(small_clip(lora={"r": None}), 5, seed=3)
    adapted, _ = build(small_clip(), 5, seed=3)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(adapted.eval().encoder(images).pooler_output, plain.eval().encoder(images).pooler_output)


def test_without_lora_everything_is_trained_and_in_training_mode():
    classifier, _ = build(small_resnet(), 5)
    assert all(p.requires_grad for p in classifier.parameters())
    assert all(m.training for m in classifier.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("section", [model(), small_clip(), small_resnet()], ids=["tiny", "clip", "resnet"])
def test_an_artefact_gives_the_same_outputs_without_hub_or_files(section, tmp_path, monkeypatch):
    classifier, preprocess = build(section, 3, seed=5)
    with torch.no_grad():
        for p in classifier.parameters():
            p.add_(0.02 * torch.randn_like(p))
    save(classifier, preprocess, tmp_path, rebuilding(section), ["a", "b", "c"], {"seed": 5})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = load(tmp_path)
    images = torch.randn(2, 3, preprocess.image_size, preprocess.image_size)
    for one, two in zip(classifier.eval()(images), loaded.classifier(images), strict=True):
        assert torch.equal(one, two)
    assert loaded.preprocess == preprocess
    assert loaded.cfg["class_names"] == ["a", "b", "c"]
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(FinetuneError, match="no whole fine-tuned model"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (model(library="keras"), "Unknown model.library=keras"),
        (model(weights="x.safetensors"), "take neither model.weights"),
        (model(model="vgg"), "vgg"),
        (model("resnet50", pretrained=True, weights="/no/such"), r"model\.weights=/no/such does not exist"),
        (model("resnet50", weights="x"), "model.weights=x and pretrained=false contradict"),
        (model("resnet50", model="resnet51"), "Check model.model"),
        (model(lora={"r": 4, "targets": ["q_proj"]}), r"no linear layer called q_proj; it has .*qkv"),
        (model(lora={"r": 0}), "model.lora.r=0"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_had_fail_with_a_sentence(section, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(section, 5)
