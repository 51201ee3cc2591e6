"""Linear segmentation probes: their scores against loops and torchmetrics, and toy stores end to end."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torchmetrics.classification import MulticlassJaccardIndex

from sae_lightning.backbones.backbone import Tap
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.data import DataError, load_images, load_masks
from sae_lightning.data.masks import IGNORE, Masks
from sae_lightning.features.manifest import StoreError
from sae_lightning.metrics.segmentation import Probing, Segmented, Sets, mean_iou, segment_raw, segmentation
from sae_lightning.saes import MSAE, BatchTopK, Normalizer, ReLU, SparseCodes, TopK
from tests.backbones.models import backbone
from tests.conftest import fill_store

D, CLASSES, GRID, SIDE = 6, 4, (4, 4), 10  # the grid does not divide the masks

QUICK = Probing(epochs=15, batch_tokens=256)

SHORT = Probing(epochs=3, batch_tokens=256)


def slow_segmented(truth: np.ndarray, predicted: np.ndarray) -> Segmented:
    """mIoU and accuracy by a loop over classes of pixels [n]; 255 is left out."""
    kept = truth != IGNORE
    truth, predicted = truth[kept], predicted[kept]
    ious = []
    for c in sorted(set(truth.tolist())):
        both = np.sum((truth == c) & (predicted == c))
        ious.append(both / np.sum((truth == c) | (predicted == c)))
    return Segmented(float(np.mean(ious)), float(np.mean(truth == predicted)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 200), classes=st.integers(1, 6), there=st.integers(1, 6))
def test_scores_equal_a_loop_and_torchmetrics(seed, n, classes, there):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, min(classes, there), n), rng.integers(0, classes, n)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    for t, p in zip(truth, predicted, strict=True):
        confusion[t, p] += 1
    found = mean_iou(confusion)
    assert tuple(found) == pytest.approx(tuple(slow_segmented(truth, predicted)))
    if classes > 1:
        index = MulticlassJaccardIndex(classes, average="none")
        each = index(torch.from_numpy(predicted), torch.from_numpy(truth))[np.unique(truth)]
        assert found.miou == pytest.approx(float(each.mean()), abs=1e-6)


def test_scores_by_hand():
    confusion = np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0]])  # class 2 is predicted twice but not there
    assert tuple(mean_iou(confusion)) == pytest.approx((np.mean([3 / 4, 2 / 5]), 5 / 8))
    assert np.isnan(mean_iou(np.zeros((3, 3), dtype=np.int64))).all()


def toy(folder, n: int, seed: int, noise: float = 0.3, hint: float = 1.0, ids=None, **about):
    """A store of ``n`` images whose tokens lie around a direction of their patch's class, and their masks.

    Masks [10, 10] are of blocks of classes, with one row without; ``hint`` 0 leaves only noise.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, (n, *GRID))
    where = np.arange(SIDE) * GRID[0] // SIDE
    pixels = labels[:, where[:, None], where].astype(np.uint8)
    pixels[:, 3] = IGNORE
    directions = np.random.default_rng(0).normal(size=(CLASSES, D))
    tokens = hint * directions[labels.reshape(n, -1)] + noise * rng.normal(size=(n, 16, D)) + 3
    store = fill_store(folder, torch.from_numpy(tokens).half(), grid=GRID, data="toy", **about)
    names = [f"class {c}" for c in range(CLASSES)]
    masks = Masks("toy", "train", names, ids or store.image_ids, lambda i: as_png(pixels[i]))
    return store, masks, pixels


def as_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    (train, train_masks, _), (test, test_masks, _) = toy(root / "train", 60, 1), toy(root / "test", 40, 2)
    return Sets(train, test, train_masks, test_masks)


def normalizer(sets) -> Normalizer:
    return Normalizer(D, sets.train.mean, sets.train.std)


def identity(sets) -> ReLU:
    """Codes are the positive and the negative part of each dimension, so that nothing is lost."""
    sae = ReLU(D, 2 * D, normalizer(sets))
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    sae.load_state_dict(sae.state_dict() | {"W_enc": both, "W_dec": both.clone()})
    return sae


def by_input(scores, metric="segmentation_miou"):
    return {s.setting.partition("input=")[2]: s.value for s in scores if s.metric == metric}


def test_an_sae_that_loses_nothing_keeps_the_scores(sets):
    scores = segmentation(identity(sets), sets, QUICK)
    assert [(s.metric, s.setting) for s in scores] == [
        *((f"segmentation_{m}", f"data=toy,input={i}") for i in ("raw", "reconstruction", "codes")
          for m in ("miou", "accuracy")),
        ("segmentation_lift", "data=toy"),
    ]  # fmt: skip
    miou = by_input(scores)
    assert miou["reconstruction"] == pytest.approx(miou["raw"], abs=2e-3)
    assert miou["raw"] > 0.9
    assert miou["codes"] > 0.9
    assert scores[-1].value == pytest.approx(miou["codes"] / miou["raw"])


@pytest.mark.slow
def test_scores_are_those_of_the_best_linear_classifier_pixel_by_pixel(tmp_path):
    (train, train_masks, _), (test, test_masks, pixels) = (
        toy(tmp_path / "train", 80, 1, noise=1.5), toy(tmp_path / "test", 60, 2, noise=1.5),
    )  # fmt: skip
    sets = Sets(train, test, train_masks, test_masks)
    norm = normalizer(sets)
    x, held = (norm.normalize(s.features(slice(None))).flatten(0, 1).numpy() for s in (train, test))
    model = LogisticRegression(C=1e3, max_iter=2000).fit(x, train_masks.patch_labels(GRID).ravel())
    where = np.arange(SIDE) * GRID[0] // SIDE
    predicted = model.predict(held).reshape(60, *GRID)
    expected = slow_segmented(pixels.ravel(), predicted[:, where[:, None], where].ravel())
    assert 0.3 < expected.miou < 0.9
    found = segment_raw(norm, sets, Probing(epochs=60, batch_tokens=128))
    assert tuple(found) == pytest.approx(tuple(expected), abs=0.01)
    labels = test_masks.patch_labels(GRID)
    expected = slow_segmented(labels.ravel(), predicted.ravel())
    found = segment_raw(norm, sets, Probing(epochs=60, batch_tokens=128, resolution="patch"))
    assert tuple(found) == pytest.approx(tuple(expected), abs=0.01)


@pytest.mark.parametrize("make", [BatchTopK, TopK, MSAE, ReLU], ids=lambda make: make.__name__)
def test_raw_scores_can_be_kept_and_all_are_the_same_each_time(sets, make):
    sae = make(D, 30, normalizer=normalizer(sets), seed=1, **({} if make is ReLU else {"k": 4}))
    once, again = segmentation(sae, sets, SHORT), segmentation(sae, sets, SHORT)
    assert once == again
    raw = segment_raw(sae.normalizer, sets, SHORT)
    assert segmentation(sae, sets, SHORT, raw=raw) == once
    made_up = by_input(segmentation(sae, sets, SHORT, raw=Segmented(0.5, 0.25)))
    assert made_up == by_input(once) | {"raw": 0.5}
    assert segmentation(sae, sets, Probing(epochs=3, batch_tokens=256, seed=7)) != once


def test_codes_are_read_as_by_the_best_linear_classifier_without_making_them_dense(sets, monkeypatch):
    sae = TopK(D, 30, 4, normalizer=normalizer(sets), seed=1)
    stores = (sets.train, sets.test)
    dense, held = (sae.encode(s.features(slice(None)).flatten(0, 1)).to_dense().detach().numpy() for s in stores)
    model = LogisticRegression(C=1e3, max_iter=2000).fit(dense, sets.train_masks.patch_labels(GRID).ravel())
    best = slow_segmented(sets.test_masks.patch_labels(GRID).ravel(), model.predict(held))
    monkeypatch.setattr(SparseCodes, "to_dense", None)
    trained = segmentation(sae, sets, Probing(epochs=40, batch_tokens=256, resolution="patch"))
    assert by_input(trained)["codes"] == pytest.approx(best.miou, abs=0.02)


def test_noise_is_read_no_better_than_by_chance(tmp_path):
    (train, train_masks, _), (test, test_masks, _) = (
        toy(tmp_path / "train", 80, 1, hint=0), toy(tmp_path / "test", 80, 2, hint=0),
    )  # fmt: skip
    sets = Sets(train, test, train_masks, test_masks)
    scores = segmentation(identity(sets), sets, QUICK)
    assert all(
        value == pytest.approx(1 / CLASSES, abs=0.05) for value in by_input(scores, "segmentation_accuracy").values()
    )
    assert max(by_input(scores).values()) < 1 / CLASSES


def test_stores_and_masks_are_aligned_by_image(sets, tmp_path):
    order = np.random.default_rng(0).permutation(40)
    ids = [sets.test.image_ids[i] for i in order]
    shuffled = sets._replace(test_masks=sets.test_masks.of(ids))
    norm = normalizer(sets)
    assert segment_raw(norm, shuffled, SHORT) == segment_raw(norm, sets, SHORT)
    part = sets._replace(test=sets.test.select(np.arange(5, 20)))
    alone = part._replace(test_masks=sets.test_masks.of(part.test.image_ids))
    assert segment_raw(norm, part, SHORT) == segment_raw(norm, alone, SHORT)
    wrong = sets._replace(test_masks=sets.test_masks.of(sets.test.image_ids[:10]))
    with pytest.raises(DataError, match="no mask of image 'image-10'"):
        segment_raw(norm, wrong, SHORT)


def test_patches_without_a_class_are_not_trained_on(sets, tmp_path):
    blank = sets.train_masks.of(sets.train.image_ids)
    labels = blank.patch_labels(GRID).copy()
    read = blank._read

    def half(i: int) -> bytes:
        return as_png(np.full((SIDE, SIDE), IGNORE, np.uint8)) if i % 2 else read(i)

    halved = Masks("toy", "train", blank.class_names, blank.image_ids, half)
    chosen = np.arange(0, 60, 2)
    assert (halved.patch_labels(GRID)[chosen] == labels[chosen]).all()
    of_half = sets._replace(train=sets.train.select(chosen), train_masks=sets.train_masks)
    probing = Probing(epochs=40, batch_tokens=10_000)  # the order does not matter
    norm = normalizer(sets)
    found, expected = segment_raw(norm, sets._replace(train_masks=halved), probing), segment_raw(norm, of_half, probing)
    assert tuple(found) == pytest.approx(tuple(expected), abs=1e-3)


def test_what_does_not_fit_is_told(sets, tmp_path):
    norm = normalizer(sets)
    pooled = fill_store(tmp_path / "pooled", torch.zeros(4, 1, D) + torch.rand(4, 1, D), kind="pooled", grid=(1, 1))
    with pytest.raises(StoreError, match=r"pooled features; segmentation needs patch tokens"):
        segment_raw(norm, sets._replace(test=pooled), QUICK)
    wide = fill_store(tmp_path / "wide", torch.rand(4, 16, D), grid=(2, 8))
    with pytest.raises(StoreError, match="with the same backbone"):
        segment_raw(norm, sets._replace(test=wide), QUICK)
    other = Masks("toy", "test", ["a"], sets.test.image_ids, sets.test_masks._read)
    with pytest.raises(ValueError, match="different classes"):
        segment_raw(norm, sets._replace(test_masks=other), QUICK)
    none = Masks("toy", "train", sets.train_masks.class_names, sets.train.image_ids,
                 lambda i: as_png(np.full((8, 8), IGNORE, np.uint8)))  # fmt: skip
    with pytest.raises(ValueError, match="no labelled pixel"):
        segment_raw(norm, sets._replace(train_masks=none), QUICK)
    with pytest.raises(ValueError, match="Unknown resolution=image"):
        Probing(resolution="image")
    with pytest.raises(ValueError, match="at least 1"):
        Probing(epochs=0)


@pytest.mark.slow
def test_classes_of_the_mosaic_are_read_off_a_tiny_backbone(tmp_path):
    data = {"source": "mosaic", "name": "mosaic", "sizes": {"train": 500, "test": 200}, "seed": 0}
    encoder = load_backbone(backbone("deit"))
    stores, masks = [], []
    for split in ("train", "test"):
        images = load_images(data, split)
        tokens = [
            encoder.forward_features(torch.stack([encoder.transform(images[i]) for i in batch]), [Tap("patch", 4)])
            for batch in np.split(np.arange(len(images)), len(images) // 50)
        ]
        features = torch.cat([found[Tap("patch", 4)] for found in tokens])
        stores.append(fill_store(tmp_path / split, features, grid=encoder.grid))
        masks.append(load_masks(data, split, encoder.transform))
        masks[-1].image_ids = stores[-1].image_ids
    sets = Sets(*stores, *masks)
    norm = Normalizer(encoder.d_in, stores[0].mean, stores[0].std)
    found = segment_raw(norm, sets)
    strangers = masks[1].of(np.roll(masks[1].image_ids, 1).tolist())
    strangers.image_ids = masks[1].image_ids
    by_chance = segment_raw(norm, sets._replace(test_masks=strangers))
    assert by_chance.accuracy == pytest.approx(0.1, abs=0.03)
    assert found.accuracy > 0.18
    assert found.miou > 1.6 * by_chance.miou
