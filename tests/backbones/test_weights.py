"""Random weights, local files, and what tells features apart."""

import json
import pickle
import shutil

import pytest
import timm as library
import torch
from safetensors.torch import load_file, save_file

from sae_lightning.backbones.backbone import BackboneError, Tap
from sae_lightning.backbones.registry import identity, load_backbone
from sae_lightning.backbones.settings import fixed_seed
from tests.backbones.models import SIGLIP, VISION, backbone, picture, timm, transformers


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with ``model.safetensors`` of a timm model, classifier included, as its hub keeps it."""
    folder = tmp_path_factory.mktemp("weights")
    with fixed_seed(5):
        model = library.create_model("test_vit")
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "cfg", [timm("test_resnet"), transformers(SIGLIP), backbone("clip", tiny={"pretrained": False})]
)
def test_random_weights_are_the_same_each_time_and_leave_the_generators_alone(cfg):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = load_backbone(cfg)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(8)
    assert load_backbone(cfg).fingerprint() == first.fingerprint()
    assert "random weights" in first.title
    assert "random" in identity(cfg)


def test_local_files_are_loaded(weights):
    from_file = load_backbone(timm("test_vit", pretrained=True, weights=str(weights / "model.safetensors")))
    from_folder = load_backbone(timm("test_vit", pretrained=True, weights=str(weights)))
    state = load_file(weights / "model.safetensors")
    for name, tensor in from_file.model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert from_file.fingerprint() == from_folder.fingerprint()
    assert from_file.title == "test_vit"


def test_a_folder_in_place_of_the_models_id_brings_name_weights_and_preprocessing(weights, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(weights, folder)
    about = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "num_classes": 1000}}
    (folder / "config.json").write_text(json.dumps(about))
    ours = load_backbone(timm(str(folder), pretrained=True))
    state = load_file(weights / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.model.state_dict().items())
    assert (ours.name, ours.title) == ("mine", "mine")
    assert "mean=tensor([0.1000, 0.2000, 0.3000])" in str(ours.transform)


def test_positions_are_resampled_for_another_image_size(weights):
    ours = load_backbone(timm("test_vit", pretrained=True, weights=str(weights), image_size=96))
    assert ours.grid == (6, 6)
    assert not torch.equal(ours.model.pos_embed, load_backbone(timm("test_vit", image_size=96)).model.pos_embed)


def test_a_file_that_lacks_tensors_is_refused(weights, tmp_path):
    state = load_file(weights / "model.safetensors")
    short = tmp_path / "short.safetensors"
    save_file({name: tensor for name, tensor in state.items() if "blocks.5.mlp.fc1" not in name}, short)
    with pytest.raises(BackboneError, match=r"lacks 1 of the model's tensors, 'blocks.5.mlp.fc1.weight'"):
        load_backbone(timm("test_vit", pretrained=True, weights=str(short)))
    with pytest.raises(BackboneError, match=r"cannot be loaded from .*short\.safetensors|lacks"):
        load_backbone(timm("test_vit2", pretrained=True, weights=str(short)))


def test_the_identity_is_that_of_what_determines_the_features(weights, tmp_path):
    def of(**section):
        return identity(timm("test_vit", **({"pretrained": True} | section)))

    moved = tmp_path / "renamed.safetensors"
    shutil.copy(weights / "model.safetensors", moved)
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    assert of(weights=str(moved)) == of(weights=str(weights))
    cases = [of(), of(image_size=96), of(pretrained=False), of(weights=str(moved)), of(weights=str(other))]
    assert len(set(cases)) == len(cases)
    save_file({"a": torch.ones(1)}, other)
    assert of(weights=str(other)) not in cases
    assert identity(backbone("dinov2", "published")) == "timm:vit_base_patch14_dinov2.lvd142m:224"
    small = VISION | {"model_type": "vit"}
    assert identity(transformers(small)) != identity(transformers(small | {"hidden_act": "relu"}))
    assert identity(transformers(small, pretrained=True)) == "transformers:org/small:None"


def test_a_folders_identity_covers_config_and_processor(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    cfg = transformers(None, pretrained=True, weights=str(tmp_path))
    seen = {identity(cfg)}
    for file in ("config.json", "preprocessor_config.json", "vocab.txt"):
        (tmp_path / file).write_text("{}")
        seen.add(identity(cfg))
    (tmp_path / "README.md").write_text("hello")
    assert len(seen | {identity(cfg)}) == 4


@pytest.mark.parametrize(
    "cfg",
    [backbone("clip"), timm("test_resnet"), transformers(VISION | {"model_type": "dinov2"})],
    ids=["tiny", "t", "h"],
)
def test_transforms_travel_to_worker_processes(cfg):
    transform = load_backbone(cfg).transform
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(picture()), transform(picture()))


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"weights": "nowhere.safetensors", "pretrained": True}, "does not exist; give a safetensors file"),
        ({"weights": "{folder}/model.bin", "pretrained": True}, "pickled weights are not loaded; convert it"),
        ({"weights": "{folder}", "pretrained": True}, "folder without safetensors, and pickled weights are not loaded"),
        ({"weights": "{folder}/model.bin"}, "pretrained=false contradict each other"),
        ({"library": "keras"}, "choose one of timm, transformers"),
        ({"model": None}, "set it to the id of a timm model"),
        ({"model": "local-dir:{folder}", "pretrained": True}, "names no architecture of timm; give the folder as"),
        ({"library": "transformers", "model": "{folder}", "pretrained": True}, "is a folder without safetensors"),
        ({"library": "transformers", "weights": "{file}", "pretrained": True}, "transformers needs the model's folder"),
    ],
)
def test_impossible_settings_are_said_in_a_sentence(section, sentence, tmp_path, weights):
    torch.save({}, tmp_path / "model.bin")
    places = {"folder": tmp_path, "file": weights / "model.safetensors"}
    section = {k: v.format(**places) if isinstance(v, str) else v for k, v in section.items()}
    with pytest.raises(BackboneError, match=sentence):
        load_backbone(timm(**({"model": "test_vit"} | section)))


def test_a_files_weights_give_the_features_of_the_same_weights_copied_by_hand(weights):
    ours = load_backbone(timm("test_vit", pretrained=True, weights=str(weights)))
    theirs = load_backbone(timm("test_vit"))
    state = {k: v for k, v in load_file(weights / "model.safetensors").items() if not k.startswith("head.")}
    theirs.model.load_state_dict(state)
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(*(b.forward_features(x, [Tap("patch", 2)])[Tap("patch", 2)] for b in (ours, theirs)))
