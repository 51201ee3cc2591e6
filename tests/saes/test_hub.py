"""Uploading and loading through the model hub, with a local directory in its place."""

import shutil

import huggingface_hub
import pytest
import torch

from sae_lightning.saes import SAE, ArtefactError, BatchTopK, Normalizer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A directory that takes uploads and serves downloads as the hub would."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return f"hub/{repo_id}"

    def download(repo_id, revision, allow_patterns):
        if not (root / repo_id).is_dir():
            raise FileNotFoundError(repo_id)
        copy = tmp_path / "cache" / repo_id
        copy.mkdir(parents=True)
        for name in allow_patterns:
            shutil.copy(root / repo_id / name, copy / name)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return root


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
