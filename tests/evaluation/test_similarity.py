"""Judges chosen by config: another encoder, another kind of feature, a store by its folder."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from sae_lightning.evaluation.similarity import ImageEmbeddings, SimilarityEncoder, similarity_of
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.source import Source
from tests.configs import composed
from tests.conftest import fill_store


def chosen(*overrides: str) -> SimilarityEncoder:
    """What ``evaluate.py`` makes of command-line overrides."""
    return similarity_of(composed("evaluate", *overrides))


@pytest.fixture
def resolved(config):
    """A run's own config as its cfg.json keeps it, of deit on pictures."""
    return OmegaConf.to_container(config(), resolve=True)


def test_another_encoder_judges_in_the_run_s_own_setting(resolved):
    similarity = chosen("backbone@similarity=dinov2", "similarity.size=tiny")
    store = similarity.open(Source.of(resolved), "test")
    own = Source.of(resolved).store("test")
    assert (store.backbone, store.kind, store.n_patches) == ("dinov2 (tiny)", "pooled", 1)
    assert store.image_ids == own.image_ids
    judge = ImageEmbeddings(own, store, similarity.key(Source.of(resolved)))
    torch.testing.assert_close(judge.embeddings(slice(2, 5), None), store.features(slice(2, 5)).float()[:, 0])
    about = judge.about()
    assert about["title"] == "dinov2 (tiny) pooled"
    assert about["store"] == store.fingerprint


def test_interpolations_are_resolved_in_the_run_s_config(resolved):
    similarity = chosen("backbone@similarity=dinov2")  # size: ${data.backbones}
    assert similarity.backbone["size"] == "${data.backbones}"
    for size in ("tiny", "published"):
        source = Source.of(resolved | {"data": resolved["data"] | {"backbones": size}})
        assert similarity.of(source).backbone["size"] == size


def test_the_own_backbone_may_judge_by_another_feature(resolved):
    similarity = chosen("similarity_features=cls")
    store = similarity.open(Source.of(resolved), "test")
    assert (store.backbone, store.kind, store.layer) == ("deit (tiny)", "cls", 4)


def test_own_features_need_no_store(resolved):
    similarity = chosen()
    assert similarity.own
    assert similarity.open(Source.of(resolved), "test") is None
    own = Source.of(resolved).store("test")
    features = own.features(slice(0, 3))
    judge = ImageEmbeddings(own)
    torch.testing.assert_close(judge.embeddings(slice(0, 3), features), features.float().mean(1))
    assert judge.about()["title"] == "deit (tiny) patch L4 (mean of an image), the scored features"


def test_keys_tell_judges_apart(resolved):
    choices = [
        chosen(), chosen("backbone@similarity=dinov2", "similarity.size=tiny"), chosen("similarity_features=pooled"),
        chosen("backbone@similarity=clip", "similarity.size=tiny"),
        chosen("backbone@similarity=clip", "similarity.size=tiny", "similarity_features=embedding"),
        chosen("backbone@similarity=clip", "similarity.size=tiny", "similarity_features=patch"),
        chosen("backbone@similarity=clip", "similarity.size=tiny", "similarity_features=patch", "similarity.layer=2"),
    ]  # fmt: skip
    keys = [choice.key(Source.of(resolved)) for choice in choices]
    assert len(set(keys)) == len(keys)
    assert keys == [choice.key(Source.of(resolved)) for choice in choices]


def test_a_store_by_its_folder(resolved, tmp_path):
    own = Source.of(resolved).store("test")
    folder = tmp_path / "judge"
    fill_store(folder, torch.randn(len(own), 1, 5), kind="pooled", layer=None, grid=(1, 1))
    similarity = chosen(f"similarity_store={folder}")
    store = similarity.open(Source.of(resolved), "test")
    assert similarity.key(Source.of(resolved)) == f"store:{store.fingerprint}"
    with pytest.raises(StoreError, match="Similarities need features of the same images"):
        ImageEmbeddings(own, store)


def test_data_given_as_stores_cannot_be_read_by_another_encoder(resolved):
    data = {"source": "store", "train": "a", "val": None, "test": None, "held_out": 0.1, "seed": 1}
    similarity = chosen("backbone@similarity=dinov2", "similarity.size=tiny")
    with pytest.raises(StoreError, match=r"given as a store.*similarity_store="):
        similarity.open(Source.of(resolved | {"data": data}), "test")
