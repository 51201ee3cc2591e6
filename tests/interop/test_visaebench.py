"""SAEs in the package visaebench, through ``sae.dense()``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_lightning.saes import VARIANTS, Normalizer
from tests.conftest import sparse_features
from tests.saes.test_variants import D_IN, build, perturbed

METRICS = [
    "fvu",
    "downstream_preservation",
    "sparse_probing",
    "cross_domain",
    "localization",
    "absorption",
]  # all without a judge


def trained(variant: str, **options):
    x = sparse_features(60, 1, D_IN).flatten(0, 1)
    normalizer = Normalizer(D_IN, x.mean(0), (x - x.mean(0)).square().mean().sqrt())
    return perturbed(build(variant, normalizer=normalizer, **options)).eval()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_is_scored(variant):
    package = pytest.importorskip("visaebench")
    sae, features, labels = trained(variant), sparse_features(60, 2, D_IN), np.arange(60) % 4
    dense = sae.dense()
    assert isinstance(dense, package.SAEInterface)
    found = package.evaluate(
        sae=dense, activations=features, labels=labels, mean=sae.normalizer.mean, std=float(sae.normalizer.std),
        metrics=METRICS, ood_datasets={"other": {"activations": features[:40], "labels": labels[:40]}},
        sibling_groups={"all": {"class_indices": [0, 1, 2, 3]}}, device="cpu", grid_size=(4, 4),
    )  # fmt: skip
    assert len(found) == len(METRICS)
    assert all(np.isfinite(result.value) for result in found)


@pytest.mark.parametrize("norm", ["none", "layer", "unit"])
def test_codes_and_reconstruction_are_the_saes_own_in_any_frame(norm):
    sae, x = trained("topk", input_norm=norm), sparse_features(5, 3, D_IN).flatten(0, 1)
    mean, std = torch.linspace(-1, 1, D_IN), 0.7
    dense = sae.dense(mean, std)
    z = dense.encode((x - mean) / std)
    images = dense.encode(((x - mean) / std).unflatten(0, (5, -1)))
    assert torch.equal(images.flatten(0, 1), z)
    torch.testing.assert_close(dense.decode(images).flatten(0, 1), dense.decode(z))
    torch.testing.assert_close(z, sae.encode(x).to_dense(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense.decode(z) * std + mean, sae(x), rtol=1e-4, atol=1e-4)
    if norm != "none":
        with pytest.raises(ValueError, match="decode what was encoded last"):
            dense.decode(z[:3])
