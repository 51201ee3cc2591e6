"""Whole checkpoints in local folders: both halves of image–text models, and what lies beside the weights."""

import json

import pytest
import torch
import transformers as library
from tokenizers import Tokenizer, models, pre_tokenizers

from sae_lightning.backbones.backbone import BackboneError, Tap
from sae_lightning.backbones.registry import load_backbone
from tests.backbones.models import CLIP, SIGLIP, VISION, picture, transformers

CLASSES = {"clip": (library.CLIPConfig, library.CLIPModel), "siglip": (library.SiglipConfig, library.SiglipModel)}
NORMALISE = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_normalize": True, "do_resize": True}
PROCESSORS = {
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 36}, "resample": 3}
    | {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2},
}
CAPTIONS = ["a cat", "a photo of a dog", "dog"]


def write_processor(folder, name):
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name] | NORMALISE))


def write_tokenizer(folder):
    """Words of which the last is always the end, as CLIP's and SigLIP's pooling expects."""
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "photo", "of", "cat", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    library.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def checkpoint(request, tmp_path_factory):
    """Name, folder and reference model of a whole image–text checkpoint, kept in half precision."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    config, model = CLASSES[name]
    torch.manual_seed(1)
    architecture = {key: value for key, value in (CLIP if name == "clip" else SIGLIP).items() if key != "model_type"}
    reference = model(config(**architecture)).half().eval()
    reference.save_pretrained(folder)
    write_processor(folder, name)
    write_tokenizer(folder)
    return name, folder, reference.float()


def folder_config(folder, **changes):
    return transformers(None, weights=str(folder), pretrained=True, **changes)


def test_both_halves_are_those_of_the_whole_model(checkpoint):
    name, folder, reference = checkpoint
    ours = load_backbone(folder_config(folder))
    x = torch.randn(2, 3, 32, 32)
    out = ours.forward_features(x, [Tap("embedding"), Tap("pooled"), Tap("patch", 1)])
    with torch.no_grad():
        torch.testing.assert_close(out[Tap("embedding")], reference.get_image_features(x).pooler_output)
        expected = reference.vision_model(x, output_hidden_states=True)
    torch.testing.assert_close(out[Tap("pooled")], expected.pooler_output)
    torch.testing.assert_close(out[Tap("patch", 1)], expected.hidden_states[2][:, -16:])

    assert ours.text_tower is None
    text = ours.encode_text(CAPTIONS)
    tokenizer = library.AutoTokenizer.from_pretrained(folder)
    padding = {"padding": True} if name == "clip" else {"padding": "max_length", "max_length": 12}
    with torch.no_grad():
        tokens = tokenizer(CAPTIONS, return_tensors="pt", **padding)
        torch.testing.assert_close(text, reference.get_text_features(**tokens).pooler_output)
    assert text.shape[1] == out[Tap("embedding")].shape[1] == (20 if name == "clip" else 32)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in ours.parameters())


def test_the_text_half_is_loaded_once_and_captions_may_be_long(checkpoint):
    ours = load_backbone(folder_config(checkpoint[1]))
    before = ours.fingerprint()
    long = ours.encode_text(["a photo of a cat " * 30])
    tower = ours.text_tower
    torch.testing.assert_close(long, ours.encode_text(["a photo of a cat " * 40]))
    assert ours.text_tower is tower
    assert ours.fingerprint() == before


def test_images_are_prepared_as_the_processor_does_it(checkpoint):
    name, folder, _ = checkpoint
    ours = load_backbone(folder_config(folder))
    kind = library.CLIPImageProcessorPil if name == "clip" else library.SiglipImageProcessorPil
    for height, width in [(40, 56), (90, 45)]:
        image = picture(height, width)
        expected = kind.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ours.transform(image), torch.as_tensor(expected), rtol=1e-4, atol=1e-4)
    larger = load_backbone(folder_config(folder, image_size=64))
    assert larger.transform(picture(90, 45)).shape == (3, 64, 64)


def test_without_a_tokenizer_or_processor_the_missing_file_is_named(checkpoint, tmp_path):
    _, folder, reference = checkpoint
    reference.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"put preprocessor_config\.json beside the weights"):
        load_backbone(folder_config(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    with pytest.raises(BackboneError, match="put the tokenizer's files into the folder"):
        load_backbone(folder_config(tmp_path)).encode_text(["a cat"])


def test_a_pooler_without_weights_is_left_out(tmp_path):
    reference = library.ViTForImageClassification(library.ViTConfig(**VISION)).eval()
    reference.save_pretrained(tmp_path)
    write_processor(tmp_path, "siglip")
    ours = load_backbone(folder_config(tmp_path))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        last = reference.vit(x).last_hidden_state
    torch.testing.assert_close(ours.forward_features(x, [Tap("pooled")])[Tap("pooled")], last[:, 0])


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    model = library.ViTModel(library.ViTConfig(**VISION))
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    write_processor(tmp_path, "siglip")
    with pytest.raises(BackboneError, match=r"lack 4 tensors of ViTModel, 'layers\.1\.mlp"):
        load_backbone(folder_config(tmp_path))


def test_a_prefix_before_every_name_is_taken_off_in_silence(checkpoint, tmp_path, capfd):
    """As torch.compile and data parallelism leave it; here in a checkpoint of several files."""
    name, folder, reference = checkpoint
    state = {f"module._orig_mod.{key}": tensor for key, tensor in reference.state_dict().items()}
    reference.save_pretrained(tmp_path, state_dict=state, max_shard_size="150KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    write_processor(tmp_path, name)
    write_tokenizer(tmp_path)
    capfd.readouterr()
    ours, whole = load_backbone(folder_config(tmp_path)), load_backbone(folder_config(folder))
    assert ours.fingerprint() == whole.fingerprint()
    assert torch.equal(ours.encode_text(CAPTIONS), whole.encode_text(CAPTIONS))
    assert capfd.readouterr() == ("", "")
