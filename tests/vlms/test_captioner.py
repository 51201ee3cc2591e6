"""The bundled captioner: its vision tower is the tiny CLIP backbone, and it says today what it said when stored."""

import hashlib
import json

import pytest
import torch
from PIL import Image

from experiments.tiny_captioner.model import captioner
from experiments.tiny_captioner.train import Speaker, encode
from sae_lightning.backbones.backbone import Tap
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.data import load_images
from sae_lightning.data.bundled import CIFAR10_CLASSES
from sae_lightning.vlms import VLM, VLMError, load_vlm
from sae_lightning.vlms.load import CAPTIONER
from sae_lightning.vlms.words import concepts_in
from tests.backbones.models import backbone
from tests.vlms.configs import noise, vlm
from tests.vlms.ties import assert_same_captions

STORED = json.loads((CAPTIONER / "captioner.json").read_text())


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return load_vlm(vlm("tiny"))


@pytest.fixture(scope="module")
def demo() -> list[Image.Image]:
    test = load_images({"source": "demo"}, "test")
    return [test[i] for i in range(64)]


def test_the_files_are_those_that_were_measured_and_small():
    weights = CAPTIONER / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == STORED["sha256"]
    assert sum(file.stat().st_size for file in CAPTIONER.iterdir()) < 6e6


def test_its_anatomy(tiny):
    assert (tiny.depth, tiny.feature_layer, tiny.special_tokens, tiny.grid) == (6, 4, 1, (8, 8))
    assert tiny.feature_layer == backbone("clip")["tiny"]["layer"]  # where the demo's dictionaries are trained


def test_its_vision_tower_is_the_tiny_clip_backbone(tiny, demo):
    clip = load_backbone(backbone("clip"))
    pixels = torch.stack([clip.transform(image) for image in demo[:16]])
    ours = tiny.processor(text=["<image>"] * 16, images=demo[:16], return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, pixels)
    for layer in (0, 4, 5):
        tap = Tap("patch", layer)
        expected = clip.forward_features(pixels, [tap])[tap]
        torch.testing.assert_close(tiny.patch_tokens(demo[:16], layer), expected, rtol=0, atol=1e-5)
    states = tiny.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-2][:, 1:], tiny.patch_tokens(demo[:16], 4), rtol=0, atol=1e-5)


def test_larger_pictures_are_prepared_as_the_backbone_prepares_them(tiny):
    clip, images = load_backbone(backbone("clip")), noise(3, height=50, width=70)
    ours = tiny.processor(text=["<image>"] * 3, images=images, return_tensors="pt").pixel_values
    expected = torch.stack([clip.transform(image) for image in images])
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.02)  # a grey level


def test_it_says_what_it_said(tiny, demo):
    pictures = demo[: len(STORED["captions"])]
    assert_same_captions(tiny, pictures, tiny.captions(pictures), STORED["captions"])


def test_captions_that_differ_by_more_than_rounding_are_told_apart(tiny, demo):
    said = tiny.captions(demo[:2])
    with pytest.raises(AssertionError):
        assert_same_captions(tiny, demo[:2], said, said[::-1])


def test_batches_say_what_single_pictures_say(tiny, demo):
    alone = [tiny.captions([image])[0] for image in demo[:6]]
    assert_same_captions(tiny, demo[:6], tiny.captions(demo[:6], batch_size=4), alone)


@pytest.mark.slow
def test_captions_name_the_classes_of_unseen_pictures(tiny, demo):
    labels = load_images({"source": "demo"}, "test").labels[:64]
    captions = tiny.captions(demo)
    right = sum(
        CIFAR10_CLASSES[y] in concepts_in(text, CIFAR10_CLASSES) for text, y in zip(captions, labels, strict=True)
    )
    assert right > 32  # a blind one names 6
    assert len(set(captions)) > 50
    assert all(tiny.captions(demo[:8], max_new_tokens=3)[i] == " ".join(captions[i].split()[:3]) for i in range(8))


def test_an_edit_changes_what_it_says(tiny, demo):
    with torch.no_grad():
        one = tiny.patch_tokens(demo[:1], 4)[0]
    with tiny.editing(4, lambda tokens: torch.cat([tokens[:, :1], one.expand(len(tokens), -1, -1)], dim=1)):
        assert set(tiny.captions(demo[:5])) == set(tiny.captions(demo[:1]))


def test_training_minimises_the_loss_that_transformers_computes():
    words = ["a", "dog", "on", "grass"]
    model, processor = captioner(words)
    tokenizer = processor.tokenizer
    sentences = encode([["a dog", "a dog on grass"]], tokenizer)[0]
    speaker = Speaker(model, tokenizer.bos_token_id, tokenizer.pad_token_id)
    images = noise(2, height=32, width=32)
    inputs = processor(text=["<image> a dog </s>", "<image> a dog on grass </s>"], images=images, return_tensors="pt",
                       padding=True, padding_side="right")  # fmt: skip
    labels = inputs["input_ids"].clone()
    labels[:, :65] = -100
    labels[inputs["attention_mask"] == 0] = -100
    with torch.no_grad():
        tokens = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(speaker(tokens, sentences), model(**inputs, labels=labels).loss)
        assert speaker(tokens, sentences, keep=8).isfinite()


def test_lost_weights_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_lightning.vlms.load.CAPTIONER", tmp_path)
    with pytest.raises(VLMError, match=r"weights of the bundled captioner are missing .*experiments/tiny_captioner\.$"):
        load_vlm(vlm("tiny"))
