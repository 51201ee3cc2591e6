"""The module's loss, its schedule, and the scores at the end."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sae_lightning.finetuning.classifier import build
from sae_lightning.finetuning.data import FinetuneError
from sae_lightning.finetuning.fit import Predictions, scores
from sae_lightning.finetuning.module import FinetuneModule, schedule_of
from sae_lightning.saes.monoloss import dense_mono_loss
from tests.finetuning.test_classifier import model

PLAN = {"shape": "cosine", "warmup_epochs": 0}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 32, 32, generator=generator)
    return pixels, torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 9, generator=generator)


def test_the_loss_is_cross_entropy_and_monoloss_of_the_chosen_layer(batch):
    pixels, labels, embeddings = batch
    for layer in ("added", "encoder.blocks.2"):
        classifier, _ = build(model(), 3, layer)
        terms, logits = FinetuneModule(classifier, 0.1, {"lr": 0.1}, PLAN).losses(pixels, labels, embeddings)
        expected, activations = classifier(pixels)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(terms["cross_entropy"], F.cross_entropy(expected, labels))
        torch.testing.assert_close(terms["mono"], dense_mono_loss(activations, embeddings))


def test_without_weight_there_is_no_second_term_and_no_embedding_is_needed(batch):
    classifier, _ = build(model(), 3)
    terms, _ = FinetuneModule(classifier, 0.0, {"lr": 0.1}, PLAN).losses(batch[0], batch[1], None)
    assert set(terms) == {"cross_entropy"}


def test_monoloss_is_computed_in_float32_under_autocast(batch):
    classifier, _ = build(model(), 3)
    module = FinetuneModule(classifier, 0.1, {"lr": 0.1}, PLAN)
    with torch.autocast("cpu", torch.bfloat16):
        terms, _ = module.losses(*batch)
        activations = classifier(batch[0]).activations
    assert activations.dtype == torch.bfloat16
    torch.testing.assert_close(terms["mono"], dense_mono_loss(activations.float(), batch[2]))


def test_a_step_against_monoloss_lowers_it(batch):
    classifier, _ = build(model(), 3)
    module = FinetuneModule(classifier.eval(), 1.0, {"lr": 0.1}, PLAN)
    before = module.losses(*batch)[0]["mono"]
    before.backward()
    with torch.no_grad():
        for p in classifier.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad
    assert module.losses(*batch)[0]["mono"] < before


def test_the_schedules_of_table_4():
    cosine = schedule_of({"shape": "cosine", "warmup_epochs": 5}, 90)
    assert [cosine.lr_factor(step, 900) for step in (0, 49, 475)] == pytest.approx([0.02, 1.0, 0.5], abs=1e-2)
    assert cosine.lr_factor(899, 900) < 1e-4
    constant = schedule_of({"shape": "constant", "warmup_epochs": 0}, 90)
    assert {constant.lr_factor(step, 900) for step in (0, 450, 899)} == {1.0}


def test_impossible_schedules_are_refused():
    classifier, _ = build(model(), 3)
    for plan, sentence in ((PLAN | {"shape": "square"}, "shape=square"), (PLAN | {"warmup_epochs": -1}, "negative")):
        with pytest.raises(FinetuneError, match=sentence):
            FinetuneModule(classifier, 0.1, {"lr": 0.1}, plan)


def by_pairs(activations: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """MonoScore of each unit by its definition, over all pairs of images."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    least = activations.min(0)
    scaled = (activations - least) / (activations.max(0) - least)
    numerator = denominator = 0
    for n in range(len(unit)):
        for m in range(n + 1, len(unit)):
            relevance = scaled[n] * scaled[m]
            numerator = numerator + relevance * (unit[n] @ unit[m])
            denominator = denominator + relevance
    return numerator / denominator


def test_scores_follow_their_definitions():
    rng = np.random.default_rng(0)
    activations, embeddings = rng.normal(size=(12, 4)), rng.normal(size=(12, 5))
    activations[:, 3] = -np.abs(activations[:, 3])  # a unit that is never positive
    labels = rng.integers(0, 3, 12)
    logits = rng.normal(size=(12, 3))
    tensors = [torch.from_numpy(x) for x in (logits, activations, labels)]
    found = scores(Predictions(*tensors), torch.from_numpy(embeddings))
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert found["monoscore"] == pytest.approx(by_pairs(activations, embeddings).mean(), abs=1e-9)
    shares, weighted = [], []
    for unit in activations.T[:3]:
        on = unit > 0
        counts = np.bincount(labels[on], minlength=3)
        best = counts.argmax()
        shares.append(counts[best] / on.sum())
        weighted.append(unit[on & (labels == best)].sum() / unit[on].sum())
    assert found["purity"] == pytest.approx(np.mean(shares))
    assert found["weighted_purity"] == pytest.approx(np.mean(weighted))
    assert found["positive_images"] == pytest.approx((activations > 0).sum(0).mean())
    assert (found["positive_units"], found["units"], found["images"]) == (3, 4, 12)
