"""The whole config group, on pictures, with the encoders and data sets that it names."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from sae_lightning.evaluation.job import Settings
from sae_lightning.evaluation.suite import evaluate_runs
from sae_lightning.features.source import Source
from sae_lightning.runs.scores import read_rows, value_of
from sae_lightning.saes import Normalizer, TopK
from sae_lightning.saes.artefact import read_cfg
from tests.configs import composed

SMALL = [
    "+metrics.cross_domain.sets.digits.limit=60", "metrics.cross_domain.k=8", "metrics.moran.min_images=2",
    "metrics.segmentation.sets.mosaic.sizes={train: 40, val: 10, test: 30}", "metrics.segmentation.epochs=2",
    "metrics.sparse_probing.budgets=[1, 8, 128]", "metrics.recovery.budgets=[1, 4]",
]  # fmt: skip


@pytest.fixture
def captioned(tmp_path):
    """A config for CLIP's embeddings of 200 of the demo's pictures."""
    return composed(
        "config", "backbone=clip", "features=embedding", "+data.limit=200", f"paths.stores={tmp_path / 'stores'}",
    )  # fmt: skip


def visaebench(*overrides: str) -> Settings:
    return Settings(composed("evaluate", "metrics=visaebench", *SMALL, *overrides).metrics)


def saved(folder, cfg):
    """An untrained SAE in ``folder``, of the config's own features."""
    store = Source.of(cfg).store("train")
    sae = TopK(store.d_in, 200, 8, normalizer=Normalizer(store.d_in, store.mean, store.std), seed=1)
    config = OmegaConf.to_container(cfg, resolve=True)
    sae.save(
        folder, name=folder.name, backbone=store.backbone, features=store.kind, layer=store.layer, k=8, config=config
    )
    return folder


@pytest.mark.slow
def test_patch_tokens_get_every_part(config, tmp_path):
    run = saved(tmp_path / "run", config("backbone=deit"))
    evaluate_runs([run], visaebench("metrics.preservation.retrain=true"))
    rows = read_rows(run)
    assert {row["part"] for row in rows} == {
        "core", "moran", "raw_moran", "histograms", "monosemanticity", "preservation", "sparse_probing", "absorption",
        "cknna", "retrieval", "recovery", "cross_domain/digits", "segmentation/mosaic",
    }  # fmt: skip
    assert 0 < value_of(rows, "cross_domain_accuracy_raw", "data=digits") <= 1
    assert 0 < value_of(rows, "segmentation_miou", "data=mosaic,input=codes") < 1
    assert value_of(rows, "recovery_fvu", "n=1") > value_of(rows, "recovery_fvu", "n=all")
    assert value_of(rows, "recovery_fvu", "n=all") == pytest.approx(value_of(rows, "fvu"), rel=1e-6)
    assert value_of(rows, "absorption_tasks") == 0  # two classes are no siblings
    assert value_of(rows, "preservation_retrained") > 0


@pytest.mark.slow
def test_embeddings_of_captioned_images_are_compared_with_their_texts(captioned, tmp_path):
    run = saved(tmp_path / "run", captioned)
    evaluate_runs([run], visaebench("metrics.cross_domain=null"))
    rows = read_rows(run)
    parts = {row["part"] for row in rows}
    assert "image_text" in parts
    assert not parts & {"moran", "raw_moran", "segmentation/mosaic"}
    pairs = value_of(rows, "image_text_pairs")
    assert pairs == 200
    assert 0.15 < value_of(rows, "image_to_text_raw", "k=1") <= 1  # ten classes in several wordings
    assert 0 <= value_of(rows, "image_to_text_codes", "k=1") <= 1
    assert value_of(rows, "absorption_tasks") == 10
    assert read_cfg(run)["features"] == "embedding"
