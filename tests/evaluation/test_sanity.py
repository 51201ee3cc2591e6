"""What the benchmark must say of what is known beforehand: no order, no meaning, no loss."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from sae_lightning.evaluation.job import Settings
from sae_lightning.evaluation.suite import evaluate_runs
from sae_lightning.runs.scores import read_rows, value_of
from sae_lightning.saes import ReLU, TopK
from tests.conftest import fill_store
from tests.evaluation.test_suite import FIT

IMAGES, GRID, D_IN = 120, (8, 8), 16

MORAN = {"contiguity": "queen", "row_standardized": True, "min_active": 5, "min_variance": 1e-8, "min_images": 20}

METRICS = {
    "core": {"above": [0.5], "bands": {"ranks": 4, "images": 4}}, "moran": MORAN,
    "raw_moran": {k: v for k, v in MORAN.items() if k != "min_active"}, "preservation": {"codes": True, **FIT},
    "cknna": {"k": 5, "samples": 100, "seed": 0},
}  # fmt: skip


def smooth_features(seed: int) -> torch.Tensor:
    """Patch tokens [n, 64, d] whose axes come and go over the grid in broad waves; each is stronger in one class."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    phase = 6.3 * torch.rand(IMAGES, D_IN, 1, 1, generator=generator)
    slope = torch.rand(IMAGES, D_IN, 2, generator=generator)[..., None, None]
    waves = torch.sin(0.8 * (slope[:, :, 0] * y + slope[:, :, 1] * x) + phase)
    strength = 1 + 2.0 * (torch.arange(IMAGES)[:, None] % 3 == torch.arange(D_IN) % 3)
    return (waves * strength[:, :, None, None]).flatten(2).transpose(1, 2) + 0.05 * torch.randn(
        IMAGES, 64, D_IN, generator=generator
    )


def scored(folder, features: torch.Tensor, sae, metrics=METRICS) -> list[dict]:
    """The rows of ``sae`` on a store of ``features``."""
    store = fill_store(folder / "store", features, split="test", grid=GRID)
    config = {
        "data": {"source": "store", "train": str(store.folder), "val": str(store.folder), "test": str(store.folder),
                 "held_out": 0.1, "seed": 0},
        "backbone": {"name": "none", "size": "tiny", "layer": 0, "tiny": {"layer": 0}}, "features": "patch",
    }  # fmt: skip
    run = folder / "run"
    sae.save(run, name="run", backbone=store.backbone, features="patch", layer=0, k=None, config=config)
    evaluate_runs([run], Settings(OmegaConf.create(metrics)))
    return read_rows(run)


def lossless() -> ReLU:
    """An SAE with a latent for each direction of each axis, whose reconstruction is its input."""
    sae = ReLU(D_IN, 2 * D_IN)
    axes = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    with torch.no_grad():
        sae.W_enc.copy_(axes)
        sae.W_dec.copy_(axes)
    return sae


def test_shuffled_patches_are_at_the_null_of_morans_i(tmp_path):
    features = smooth_features(0)
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(IMAGES, 64, generator=generator).argsort(1)
    shuffled = features.gather(1, order[:, :, None].expand(-1, -1, D_IN))
    ordered = scored(tmp_path / "ordered", features, lossless())
    rows = scored(tmp_path / "shuffled", shuffled, lossless())
    null = value_of(rows, "moran_null")
    assert null == pytest.approx(-1 / 63)
    for name in ("moran", "channel_moran"):
        assert value_of(ordered, name) > 0.4
        assert value_of(rows, name) == pytest.approx(null, abs=0.01)
    assert abs(value_of(rows, "moran_z")) < 4 < value_of(ordered, "moran_z")
    assert value_of(rows, "fvu") == pytest.approx(value_of(ordered, "fvu"), abs=1e-6)  # which sees no order


def test_a_lossless_reconstruction_preserves_everything(tmp_path):
    rows = scored(tmp_path, smooth_features(2), lossless())
    assert value_of(rows, "preservation") == 1
    assert value_of(rows, "lp_accuracy") == 1
    assert value_of(rows, "lp_kl") == pytest.approx(0, abs=1e-9)
    assert value_of(rows, "fvu") == pytest.approx(0, abs=1e-9)
    assert value_of(rows, "cknna_reconstruction") == pytest.approx(1, abs=1e-6)
    assert value_of(rows, "accuracy_raw") > 0.5


def test_an_sae_that_says_nothing_preserves_nothing(tmp_path):
    sae = lossless()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    only = {"core": METRICS["core"], "preservation": {"codes": True, **FIT}}
    rows = scored(tmp_path, smooth_features(2), sae, only)
    assert value_of(rows, "fvu") > 0.9
    assert value_of(rows, "accuracy_reconstruction") == pytest.approx(1 / 3, abs=0.1)
    assert value_of(rows, "dead_share") == 1


def judged_by(folder, embeddings: torch.Tensor) -> dict:
    """The metrics with M5 by ``embeddings`` [n, d] of the images."""
    about = {"kind": "pooled", "layer": None, "grid": (1, 1), "backbone": "judge", "split": "test"}
    store = fill_store(folder, embeddings[:, None], **about)
    m5 = {"images": 16, "latents": 2048, "groups": 1000, "seed": 42, "features": None, "store": str(store.folder),
          "pairing": {}, "other": "nobody", "judges": {}}  # fmt: skip
    return {"core": METRICS["core"], "monosemanticity": m5}


@pytest.mark.parametrize("seed", range(3))
def test_a_random_dictionary_is_at_the_floor_of_monosemanticity(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(IMAGES, 64, D_IN, generator=generator)
    metrics = judged_by(tmp_path / "judge", torch.randn(IMAGES, 24, generator=generator) + 0.3)
    rows = scored(tmp_path, features, TopK(D_IN, 200, 4, seed=seed), metrics)
    assert value_of(rows, "monosemanticity_scored") == 200
    assert value_of(rows, "monosemanticity_baseline") > 0.05  # the judge finds all images somewhat alike
    assert value_of(rows, "monosemanticity") == pytest.approx(0, abs=0.01)


def test_latents_of_a_class_are_monosemantic_to_a_judge_of_classes(tmp_path):
    generator = torch.Generator().manual_seed(7)
    classes = torch.nn.functional.one_hot(torch.arange(IMAGES) % 3, 24).float()
    metrics = judged_by(tmp_path / "judge", classes + 0.05 * torch.randn(IMAGES, 24, generator=generator))
    rows = scored(tmp_path, smooth_features(7), lossless(), metrics)
    assert value_of(rows, "monosemanticity") > 0.5
    assert value_of(rows, "monosemanticity_within_mass") > 0.9
