"""Uploading and loading through the model hub, with a local directory in its place."""

from functools import partial

import huggingface_hub
import pytest
import torch

from sae_lightning.saes import SAE, ArtefactError, BatchTopK, Normalizer
from sae_lightning.saes.artefact import HubError, upload
from tests.hub import stand_in


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A directory that takes uploads and serves downloads as the hub would."""
    return stand_in(tmp_path, monkeypatch)


def test_an_uploaded_sae_comes_back_equal_with_a_card(hub):
    x = torch.randn(40, 8)
    sae = BatchTopK(8, 32, k=3, normalizer=Normalizer(8, x.mean(0), 2.0), seed=0)
    sae.calibrate([x], 40)
    sae.push_to_hub("someone/tiny-sae", backbone="dinov2 (tiny)", layer=4)
    loaded = SAE.from_pretrained("someone/tiny-sae")
    assert torch.equal(loaded(x), sae.eval()(x))
    card = (hub / "someone/tiny-sae/README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: sae-lightning" in card
    assert "| backbone | dinov2 (tiny) |" in card
    assert 'SAE.from_pretrained("someone/tiny-sae")' in card


def test_a_folder_is_loaded_without_the_hub(tmp_path):
    sae = BatchTopK(8, 32, k=3, seed=0)
    sae.save(tmp_path)
    assert torch.equal(SAE.from_pretrained(str(tmp_path)).W_dec, sae.W_dec)


def test_an_unknown_name_fails_with_a_sentence(hub):
    with pytest.raises(ArtefactError, match="no folder here and cannot be had"):
        SAE.from_pretrained("someone/unheard-of")


@pytest.mark.parametrize("inside", ["one", "deep/two"])
def test_one_sae_of_several_in_a_repository_is_named_after_it(hub, tmp_path, inside):
    saes = {name: BatchTopK(8, 32, k=3, seed=seed) for seed, name in enumerate(("one", "deep/two"))}
    for name, sae in saes.items():
        sae.save(tmp_path / "release" / name)
    upload(tmp_path / "release", "someone/several", "two SAEs")
    loaded = SAE.from_pretrained(f"someone/several/{inside}")
    assert torch.equal(loaded.W_dec, saes[inside].W_dec)


@pytest.mark.parametrize("where", ["hub", "folder"])
@pytest.mark.parametrize("name", ["", "/three"])
def test_a_name_that_is_no_sae_of_the_release_fails_with_a_sentence(hub, tmp_path, where, name):
    BatchTopK(8, 32, k=3, seed=0).save(tmp_path / "release" / "one")
    upload(tmp_path / "release", "someone/several", "an SAE")
    (tmp_path / "release" / "three").mkdir()
    root = "someone/several" if where == "hub" else tmp_path / "release"
    with pytest.raises(ArtefactError, match=r"There is no SAE .* name one: '.*/<folder>'"):
        SAE.from_pretrained(f"{root}{name}")


def test_only_the_files_asked_for_are_uploaded(hub, tmp_path):
    for name in ("index.csv", "notes.txt"):
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_text(name)
    assert upload(tmp_path / "files", "someone/files", "files", only=["index.*"]) == "hub/someone/files"
    assert [path.name for path in (hub / "someone/files").iterdir()] == ["index.csv"]


def test_without_a_login_nothing_is_tried(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(
        HubError, match="No login at the model hub, so 'someone/files' cannot be written; call `hf auth"
    ):
        upload(tmp_path, "someone/files", "files")
    assert not hub.exists()


@pytest.mark.parametrize("name", ["someone/files", "no such name!"])
def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch, name):
    nobody_listens = partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", nobody_listens)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    with pytest.raises(HubError, match=f"'{name}' could not be written .*Check the name, the connection"):
        upload(tmp_path, name, "files")
