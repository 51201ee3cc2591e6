"""Bias end to end: a planted one is found and taken out, a control stays clean, and what a run leaves behind."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sae_lightning.apps.app import results_of
from sae_lightning.apps.bias.planted import Versions, check
from sae_lightning.apps.bias.study import Task, labelled, members, study, task_of
from sae_lightning.apps.edits import whole_images
from sae_lightning.data import DataError
from sae_lightning.features.source import Source
from sae_lightning.runs.run import Run
from sae_lightning.saes import ReLU
from sae_lightning.training.fit import train
from tests.configs import composed

D = 12
CLASS, ATTRIBUTE, IDLE = 0, 1, 2  # directions, and so latents, of the synthetic features


def identity_sae() -> ReLU:
    """Latent i fires on the positive part of dimension i, latent D + i on the negative part."""
    sae = ReLU(D, 2 * D, seed=0).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        sae.W_enc.copy_(sae.W_dec)
    return sae


def synthetic(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Features [n, 1, D] without and with the attribute, and the truth: weak class evidence, the rest noise."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2 == 0
    x = rng.normal(size=(n, D))
    x[:, CLASS] += np.where(truth, 0.8, -0.8)
    x[:, ATTRIBUTE] -= 1.5
    marked = x.copy()
    marked[:, ATTRIBUTE] += 3
    plain, marked = (torch.tensor(each, dtype=torch.float32)[:, None] for each in (x, marked))
    return plain, marked, truth


def synthetic_versions(n: int, seed: int) -> Versions:
    plain, marked, truth = synthetic(n, seed)
    return Versions(whole_images(identity_sae(), [plain]), whole_images(identity_sae(), [marked]), truth)


@pytest.fixture(scope="module")
def checked():
    parts = [synthetic_versions(n, seed) for seed, n in enumerate((600, 500, 400))]
    return check(*parts, identity_sae(), correlation=0.8, most=5)


def test_a_planted_bias_is_found_first_with_an_interval_off_zero(checked):
    attribute = {ATTRIBUTE, D + ATTRIBUTE}  # the latent that rises with it and the one that falls
    assert checked.best in attribute
    assert checked.detection(checked.best).lo > 0.9
    assert set(checked.biased.ranked[:2].tolist()) == attribute
    rises = checked.biased.table.iloc[ATTRIBUTE]
    assert rises["excess_lo"] > 0
    assert rises["excess_q"] < 1e-6
    assert rises["effect"] > 0
    assert checked.biased.table["errors_lo"][ATTRIBUTE] > 0.5


def test_the_control_is_clean_though_its_class_latent_is_associated(checked):
    control = checked.control
    assert len(control.found) == 0
    row = control.table.iloc[ATTRIBUTE]
    assert row["excess_lo"] < 0 < row["excess_hi"]
    evidence = control.table.iloc[CLASS]
    assert evidence["auc_q"] < 1e-6
    assert evidence["errors_q"] < 1e-6
    assert evidence["excess_q"] > 0.05


def test_neutralising_what_was_found_helps_where_the_attribute_misleads(checked):
    relief = checked.mitigation
    assert set(relief.latents.tolist()) <= {ATTRIBUTE, D + ATTRIBUTE}
    assert len(relief.latents)
    assert relief.before["conflicting"].hi < 0.6 < relief.found["conflicting"].lo
    assert relief.gain.lo > 0.15
    assert relief.over_random.lo > 0.15
    assert relief.over_random.value == pytest.approx(relief.gain.value - relief.random_gain.value)


def test_a_bias_the_other_way_round_is_found_with_the_other_sign():
    parts = [synthetic_versions(n, seed) for seed, n in enumerate((600, 500, 400))]
    found = check(*parts, identity_sae(), correlation=-0.8, most=5)
    assert found.biased.table["excess_hi"][ATTRIBUTE] < 0
    assert found.mitigation.gain.lo > 0.15


def test_effects_are_the_classifiers_weights_and_rare_latents_are_not_tested():
    plain, _, truth = synthetic(400, 3)
    plain[:, 0, IDLE] = -1
    plain[:5, 0, IDLE] = 1  # fires on five images
    sae = identity_sae()
    held = whole_images(sae, [plain])
    found = study(held.features, truth, held, truth, sae)
    np.testing.assert_allclose(found.effects, np.concatenate([found.classifier.weights, -found.classifier.weights]))
    assert found.table["images"][IDLE] == 5
    assert np.isnan(found.table["auc"][IDLE])
    assert IDLE not in found.tested
    assert found.associated(1).tolist() == [CLASS, D + CLASS]
    assert found.accuracy.lo < (found.predicted == truth).mean() < found.accuracy.hi


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A data set with two attributes as CelebA has them, saved to disk: 30 pictures a split."""
    folder = tmp_path_factory.mktemp("faces") / "saved"
    rng = np.random.default_rng(0)

    def part() -> datasets.Dataset:
        columns = {"image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(30)]}
        columns |= {name: (rng.random(30) < 0.4).tolist() for name in ("Male", "Eyeglasses")}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    datasets.DatasetDict({name: part() for name in ("train", "valid", "test")}).save_to_disk(str(folder))
    return folder


def opened_on(folder, *overrides: str):
    """What the labels need of a run on ``folder``, whose stores hold the images that the config chooses."""
    source = Source.of(composed("config", "data=celeba", f"data.id={folder}", "data.config=null", *overrides))

    def store(split: str):
        images = source.images(split)
        return SimpleNamespace(image_ids=images.image_ids, labels=torch.tensor(images.labels))

    return SimpleNamespace(source=source, name="a run", store=store)


@pytest.mark.parametrize("overrides", [(), ("data.limit=20",), ("data.splits.val=null", "data.splits.test=null")])
@pytest.mark.parametrize("split", ["train", "val"])
def test_another_attribute_labels_the_images_of_the_store_in_its_order(faces, overrides, split):
    saved = datasets.load_from_disk(str(faces))
    opened = opened_on(faces, *overrides)
    labels, classes, _ = labelled(opened, split, "Eyeglasses")
    assert classes == ["false", "true"]
    rows = [image_id.rsplit("-", 1) for image_id in opened.store(split).image_ids]
    assert labels.tolist() == [int(saved[name][int(row)]["Eyeglasses"]) for name, row in rows]
    assert task_of(classes, {}).positive == ["true"]


CLASSES, SIBLINGS = ["bird", "cat", "ship"], {"animals": ["bird", "cat"]}


@pytest.mark.parametrize(
    ("positive", "negative", "task"),
    [
        ("cat", "ship", Task(["cat"], ["ship"], ("cat", "ship"))),
        ("animals", None, Task(["bird", "cat"], ["ship"], ("animals", "not animals"))),
        (["ship", "bird"], "cat", Task(["ship", "bird"], ["cat"], ("ship or bird", "cat"))),
    ],
)
def test_the_sides_of_a_task(positive, negative, task):
    assert task_of(CLASSES, SIBLINGS, positive, negative) == task


def test_two_classes_are_a_task_and_members_are_its_images():
    task = task_of(["false", "true"], {})
    assert task.positive == ["true"]
    assert task.negative == ["false"]
    chosen = members(np.array([2, 0, 1, 0, 2, 1]), CLASSES, task_of(CLASSES, {}, "ship", "bird"))
    assert chosen.rows.tolist() == [0, 1, 3, 4]
    assert chosen.truth.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("positive", "negative", "words"),
    [
        (None, None, "has 3 classes"),
        ("dog", None, "no class 'dog'"),
        ("animals", "cat", "must be different classes"),
        (CLASSES, None, "must be different classes"),
    ],
)
def test_tasks_that_cannot_be_are_refused(positive, negative, words):
    with pytest.raises(ValueError, match=words):
        task_of(CLASSES, SIBLINGS, positive, negative)
    with pytest.raises(ValueError, match="There are 1 images of 'ship'"):
        members(np.array([0, 1, 2]), CLASSES, task_of(CLASSES, {}, "ship", "bird"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """A run on pooled features of 100 pictures a split of the demo."""
    root = tmp_path_factory.mktemp("bias")
    cfg = composed(
        "config",
        "data=demo", "+data.limit=100", "backbone=dinov2", "features=pooled", "sae=topk", "k=8", "expansion=2",
        "batch_size=64", "trainer.accelerator=cpu", "trainer.max_epochs=3", "trainer.enable_progress_bar=false",
        f"paths.stores={root / 'stores'}", f"paths.runs={root / 'runs'}",
    )  # fmt: skip
    return Run(train(cfg))


def options(*overrides: str):
    return composed("explore", "app=bias", "app.positive=animals", "app.negative=vehicles", *overrides)


@pytest.mark.slow
def test_a_run_gets_a_page_a_record_and_two_tables(finished):
    (result,) = results_of([finished], options())
    record = json.loads((result.folder / "app.json").read_text())
    table = pd.read_parquet(result.folder / "bias.parquet")
    assert len(table) == finished.sae.d_sae
    assert {"latent", "name", "effect", "auc", "auc_lo", "auc_hi", "auc_q", "excess", "excess_q"} <= set(table.columns)
    both = pd.read_parquet(result.folder / "planted.parquet")
    assert both.groupby("planted").size().tolist() == [len(table)] * 2
    assert both["detects"].max() > 0.8
    accuracy = result.headlines[0]
    assert accuracy.interval[0] > accuracy.baseline
    assert record["planted"]["found"] == len(both[both["planted"] & (both["excess_q"] < 0.05)])
    page = result.page.read_text()
    assert "animals against vehicles" in page
    assert "A bias that is known" in page
    assert not re.search(r"""(src|href)=["']?(http|//|file)""", page)


@pytest.mark.slow
def test_chosen_latents_and_no_check(finished):
    live = pd.read_parquet(finished.results("bias") / "bias.parquet").sort_values("images")["latent"].iloc[-1]
    (result,) = results_of(
        [finished], options(f"app.latents=[{live}]", "app.plant.attribute=null", "app.keep_error=false")
    )
    page = result.page.read_text()
    assert "app.plant.attribute=null" in page
    assert page.count("forced magnitude") == 1
    with pytest.raises(ValueError, match="silent on all images"):
        results_of([finished], options("app.latents=[999999]", "app.plant.attribute=null"))


def test_without_pictures_there_is_a_page_without_the_check(finished, monkeypatch):
    def images(self, split):
        raise DataError("There are no pictures.")

    monkeypatch.setattr(Run, "images", images)
    (result,) = results_of([finished], options("app.positive=[cat,dog]", "app.negative=[truck,ship]"))
    page = result.page.read_text()
    assert "It needs pictures and the encoder. There are no pictures." in page
    assert "data:image" not in page
    assert len(result.headlines) >= 2


def test_what_cannot_be_explained_is_refused(finished):
    with pytest.raises(ValueError, match="set split=test"):
        results_of([finished], options("split=train"))
    with pytest.raises(ValueError, match="column of a Hugging Face data set"):
        results_of([finished], options("app.attribute=Male"))
