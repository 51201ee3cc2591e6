"""Scores under metrics.protocol=released against the package visaebench's own metric classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from sae_lightning.evaluation.job import Settings
from sae_lightning.evaluation.suite import evaluate_runs
from sae_lightning.features.store import FeatureStore
from sae_lightning.runs.scores import read_rows, value_of
from sae_lightning.saes import SAE, VARIANTS, Normalizer
from tests.conftest import fill_store, sparse_features

pytestmark = pytest.mark.slow
CLASSES, PATCHES, D_IN, D_SAE = 7, 16, 12, 1100
GROUPS = {"some": [f"class {c}" for c in (0, 1, 2)], "others": [f"class {c}" for c in (2, 3, 4, 5)]}
ASKED = {
    "protocol": "released", "core": {}, "moran": {}, "preservation": {}, "sparse_probing": {}, "absorption": {},
    "monosemanticity": {}, "cross_domain": {},
}  # fmt: skip


def features(n: int, seed: int) -> torch.Tensor:
    """Patch tokens whose images' classes can be told, and whose neighbours are alike."""
    noise = sparse_features(n, seed, D_IN, PATCHES)
    means = torch.randn(CLASSES, D_IN, generator=torch.Generator().manual_seed(5))
    smooth = noise.unflatten(1, (4, 4))
    smooth = (smooth + smooth.roll(1, 1) + smooth.roll(1, 2)).flatten(1, 2) / 3
    return smooth + 0.3 * means[torch.arange(n) % CLASSES][:, None]


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, FeatureStore]:
    root, names = tmp_path_factory.mktemp("released"), [f"class {c}" for c in range(CLASSES)]
    return {
        name: fill_store(root / name, features(n, seed), fingerprint=f"{seed:064x}", split=split, class_names=names)
        for seed, (name, split, n) in enumerate(
            [("train", "train", 60), ("test", "test", 450), ("judge", "test", 450), ("ood", "train", 130)], start=1)
    }  # fmt: skip


@pytest.fixture(scope="module", params=["topk", "relu"])
def scored(request, stores, tmp_path_factory):
    """Rows of an untrained SAE of many latents, and the SAE."""
    run, train = tmp_path_factory.mktemp(request.param), stores["train"]
    (run / "groups.json").write_text(json.dumps(GROUPS))
    data = {"source": "store", "held_out": 0.1, "seed": 0, "siblings": str(run / "groups.json"),
            "train": str(train.folder), "val": str(train.folder), "test": str(stores["test"].folder)}  # fmt: skip
    backbone = {"name": "none", "size": "tiny", "layer": 0, "tiny": {"layer": 0}}
    sae = VARIANTS[request.param](
        D_IN, D_SAE, *(() if request.param == "relu" else (250,)), seed=3,
        normalizer=Normalizer(D_IN, train.mean, train.std),
    )  # fmt: skip
    config = {"data": data, "backbone": backbone, "features": "patch"}
    sae.save(run, name="run", backbone=train.backbone, features="patch", layer=0, k=250, config=config)
    other = {**data, "train": str(stores["ood"].folder), "backbones": "tiny"}
    asked = ASKED | {
        "monosemanticity": {"store": str(stores["judge"].folder), "judges": {"dinov2": None}},
        "cross_domain": {"sets": {"ood": other, "cub200": other}},
    }
    evaluate_runs([run], Settings(OmegaConf.create(asked), batch_tokens=700))
    return read_rows(run, protocol="released"), SAE.load(run)


@pytest.fixture
def package(stores, scored):
    """``package(metric, **options)``: what one of its classes gives of the same SAE and features."""
    pytest.importorskip("visaebench")
    store = stores["test"]
    given = {"mean": store.mean, "std": float(store.std), "device": "cpu"}

    def compute(metric, **options):
        sae = scored[1].dense(store.mean, store.std)
        return metric.compute(sae, store.features(slice(None)).float(), **given, **options)

    return compute


def test_the_first_images_decide_moran(scored, package):
    from visaebench.metrics.spatial_coherence.localization import FeatureLocalization

    found = package(FeatureLocalization(grid_size=(4, 4)))
    assert found.metadata["num_features_scored"] == value_of(scored[0], "moran_scored") == 500
    assert value_of(scored[0], "moran") == pytest.approx(found.value, abs=1e-5)
    assert value_of(scored[0], "moran_median") == pytest.approx(found.metadata["median_morans_i"], abs=1e-5)
    assert value_of(scored[0], "moran_evaluable") == pytest.approx(found.metadata["frac_evaluable"], abs=1e-9)


def test_fvu(scored, package, stores):
    from visaebench.metrics import METRIC_REGISTRY

    assert len(METRIC_REGISTRY) == 7
    store = stores["test"]
    sae, tokens = scored[1].dense(store.mean, store.std), store.features(slice(None)).float().flatten(0, 1)
    found = METRIC_REGISTRY["fvu"]().compute(sae, tokens, mean=store.mean, std=float(store.std), device="cpu")
    assert value_of(scored[0], "fvu") == pytest.approx(found.value, abs=1e-5, rel=1e-5)


def test_preservation_of_means(scored, package, stores):
    from visaebench.metrics.reconstruction.downstream import DownstreamPreservation

    found = package(DownstreamPreservation(), labels=stores["test"].labels.numpy())
    assert found.metadata["accuracy_original"] > 0.5
    assert value_of(scored[0], "preservation") == pytest.approx(found.value, abs=0.005)
    assert value_of(scored[0], "accuracy_raw") == pytest.approx(found.metadata["accuracy_original"], abs=0.005)


def test_the_area_under_the_accuracy_of_probes(scored, package, stores):
    from visaebench.metrics.concept_detection.sparse_probing import SparseProbing

    found = package(SparseProbing(), labels=stores["test"].labels.numpy())
    assert value_of(scored[0], "sparse_probing_area") == pytest.approx(found.value, abs=0.005)
    for k, accuracy in found.metadata["k_accuracies"].items():
        assert value_of(scored[0], "sparse_probing_accuracy", f"k={k}") == pytest.approx(accuracy, abs=0.02), k


def test_monosemanticity_without_a_floor(scored, package, stores):
    from visaebench.metrics.concept_detection.monosemanticity import MonosemanticityScore

    class Judge:
        def extract_activations(self, images, *, layer=-1):
            return stores["judge"].features(np.array(images)).float()

    found = package(MonosemanticityScore(), images=list(range(450)), evaluator_backbone=Judge())
    assert value_of(scored[0], "monosemanticity_scored") == found.metadata["num_features_scored"]
    assert value_of(scored[0], "monosemanticity") == pytest.approx(found.value, abs=1e-5)


def test_what_is_kept_on_other_data(scored, package, stores):
    from visaebench.metrics.concept_detection.cross_domain import CrossDomainGeneralization

    entry = {"activations": stores["ood"].features(slice(None)).float(), "labels": stores["ood"].labels.numpy()}
    found = package(CrossDomainGeneralization(), ood_datasets={"ood": entry})
    of = found.metadata["per_dataset"]["ood"]
    assert value_of(scored[0], "cross_domain_fvu", "data=ood") == pytest.approx(of["ood_fvu"], abs=1e-5, rel=1e-5)
    assert value_of(scored[0], "cross_domain_alive", "data=ood") == pytest.approx(of["domain_coverage"], abs=1e-9)
    assert value_of(scored[0], "cross_domain_overlap", "data=ood") == pytest.approx(of["jaccard_overlap"], abs=1e-9)
    assert value_of(scored[0], "cross_domain_probe", "data=ood") == pytest.approx(of["probe_accuracy_k10"], abs=0.005)
    assert value_of(scored[0], "cross_domain_generalization", "data=ood") == pytest.approx(found.value, abs=0.005)
    assert {row["setting"] for row in scored[0] if row["part"].startswith("cross_domain")} == {"data=ood"}  # cub200 no


def test_absorption_by_either_sign(scored, package, stores):
    from visaebench.metrics.disentanglement.absorption import FeatureAbsorption

    groups = {name: {"class_indices": [int(c[-1]) for c in of]} for name, of in GROUPS.items()}
    found = package(FeatureAbsorption(), labels=stores["test"].labels.numpy(), sibling_groups=groups)
    assert value_of(scored[0], "absorption_tasks") == found.metadata["num_tests"] == 7
    assert value_of(scored[0], "absorption") == pytest.approx(found.value, abs=0.005)
    assert value_of(scored[0], "absorption_overlap") == pytest.approx(found.metadata["mean_overlap"], abs=1e-5)
    assert value_of(scored[0], "absorption_f1", "k=4") == pytest.approx(found.metadata["mean_f1_k4"], abs=0.005)
