"""Absorption of classes among siblings against a slow definition and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from sae_lightning.metrics import probes
from sae_lightning.metrics.absorption import Task, absorption, f1, members_of, summary
from tests.metrics.test_sparse_probing import best, exact_f, pooled_codes, values

NAMES = [f"class {i}" for i in range(8)]

GROUPS = {"first": NAMES[:4], "second": [NAMES[6], "unheard of", NAMES[4], NAMES[5]], "pair": NAMES[6:], "none": []}


def test_equals_the_definition():
    codes, labels = pooled_codes(400, 60, 7, seed=4)
    split = probes.split(labels)
    found = absorption(sparse.csr_array(codes), labels, GROUPS, NAMES)
    members = {"first": [0, 1, 2, 3], "second": [6, 4, 5]}
    assert [(t.group, t.label, t.name) for t in found.tasks] == [
        (group, c, NAMES[c]) for group, own in members.items() for c in own
    ]
    for task in found.tasks:
        train, test = ([i for i in part if labels[i] in members[task.group]] for part in split)
        order = best(exact_f(codes[train], labels[train] == task.label))
        for k, given in ((1, task.f1_1), (4, task.f1_4)):
            x = codes[:, order[:k]].astype(np.float64)
            model = LogisticRegression(max_iter=500).fit(x[train], labels[train] == task.label)
            expected = f1_score(labels[test] == task.label, model.predict(x[test]), zero_division=0)
            assert given == pytest.approx(expected, abs=1e-9)
    scores = values(found.scores)
    one, few = (np.array([t[i] for t in found.tasks]) for i in (3, 4))
    assert 0 < scores["absorption", "alpha=0.9,beta=0.3"] <= 1
    for alpha in (0.7, 0.8, 0.9):
        for beta in (0.3, 0.5, 0.7):
            share = np.mean((one < alpha) & (few > beta))
            assert scores.pop(("absorption", f"alpha={alpha},beta={beta}")) == pytest.approx(share)
    assert scores == pytest.approx(
        {
            ("absorption_f1", "k=1"): one.mean(), ("absorption_f1", "k=4"): few.mean(), ("absorption_tasks", ""): 7,
            ("absorption_converged", ""): 1,
        }
    )  # fmt: skip


def test_one_latent_tells_a_class_or_four_do_together():
    """Class 0 has a latent of its own; class 1 is split over latents 1 to 4; the others have none."""
    labels, place = np.repeat(np.arange(6), 100), np.arange(100)
    codes = np.zeros((600, 6))
    codes[:100, 0] = 3 + place % 3
    codes[100 + place, 1 + place % 4] = 3 + place % 5
    found = absorption(codes, labels, {"all": range(6)}, ["whole", "split", *"abcd"], betas=[0.5], alphas=[0.8])
    whole, parts, *others = found.tasks
    assert (whole.f1_1, whole.f1_4) == (1, 1)
    assert parts.f1_1 < 0.6
    assert parts.f1_4 == 1
    assert [task.f1_4 for task in others] == [0, 0, 0, 0]
    assert values(found.scores)["absorption", "alpha=0.8,beta=0.5"] == pytest.approx(1 / 6)


def test_thresholds_are_strict():
    tasks = [Task("g", "a", 0, 0.8, 0.9, True), Task("g", "b", 1, 0.5, 0.5, True), Task("g", "c", 2, 0.5, 0.6, False)]
    found = values(summary(tasks, [0.8], [0.5]))
    assert found["absorption", "alpha=0.8,beta=0.5"] == pytest.approx(1 / 3)
    assert found["absorption_converged", ""] == pytest.approx(2 / 3)
    empty = values(summary([], [0.8], [0.5]))
    assert empty.pop(("absorption_tasks", "")) == 0
    assert np.isnan(list(empty.values())).all()


def test_who_is_a_sibling():
    labels = np.array([0, 1, 2, 4, 5])
    names = ["a", "b", "c", "without images", "e", "c", "b"]
    assert members_of({"g": ["e", 0, "without images", "a", 1]}, names, labels) == {"g": [4, 0, 1]}
    assert members_of({"g": ["a", "e", "without images"]}, names, labels) == {}
    assert members_of({"g": ["a", "e"]}, names, labels, min_classes=2) == {"g": [0, 4]}
    with pytest.raises(ValueError, match=r"'g' names 'c', which is the name of classes \[2, 5\]; give their labels"):
        members_of({"g": ["a", "c", "e"]}, names, labels)
    assert members_of({"g": ["a", 2, 5]}, names, labels) == {"g": [0, 2, 5]}


def test_tasks_need_images_of_both_kinds_in_both_parts():
    codes, labels = pooled_codes(200, 20, 4)
    train, test = probes.split(labels)
    split = probes.Split(train[labels[train] != 1], test[labels[test] != 3])
    found = absorption(codes, labels, {"all": [0, 1, 2, 3]}, list("abcd"), split)
    assert [task.label for task in found.tasks] == [0, 2]


@pytest.mark.parametrize("predicted", ["0000", "1111", "0110", "1010"])
@pytest.mark.parametrize("actual", ["0000", "0011", "1111"])
def test_f1_is_scikit_learns(predicted, actual):
    a, b = (np.array(list(bits)) == "1" for bits in (predicted, actual))
    assert f1(a, b) == pytest.approx(f1_score(b, a, zero_division=0))
