"""Choosing latents, DiffMean, and what counts of a steered caption, against slow references."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from sae_lightning.apps.steering.latents import choose, diffmean, matched, round_robin
from sae_lightning.apps.steering.trials import (
    CaptionStyle,
    best_alphas,
    by_latent,
    concept_embedding,
    headlines,
    interval,
    judge,
    kept,
    paired,
    similarities,
    with_class_names,
)

CLASSES = ["ship", "automobile", "dog"]
STYLE = CaptionStyle(3, 8)


def test_chosen_latents_are_the_purest_by_their_strongest_images():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 120)
    dense = rng.random((120, 30)) * (rng.random((120, 30)) < 0.4)
    dense[:, :8] *= np.where(labels[:, None] == np.arange(8) // 2, 1.0, 0.3 + 0.05 * np.arange(8))  # two a class
    dense[:, 29] = 0
    found = choose(csr_matrix(dense.astype(np.float32)), labels, n=5, top=10, purity=0.6, seed=1)
    expected = {}
    for j in range(30):
        top = np.argsort(-dense[:, j].astype(np.float32), kind="stable")[:10]
        votes = np.bincount(labels[top], minlength=4)
        if (dense[:, j] > 0).sum() >= 10 and votes.max() >= 6:
            expected[j] = (int(votes.argmax()), votes.max() / 10, tuple(top.tolist()))
    assert len(expected) >= 5
    for t in found:
        assert (t.label, pytest.approx(t.purity), t.top) == expected[t.latent]
        assert t.peak == pytest.approx(dense[:, t.latent].max())
        assert t.images == (dense[:, t.latent] > 0).sum()
        assert t.random != t.latent
        assert dense[:, t.random].any()
    purest = {c: max(p for label, p, _ in expected.values() if label == c) for c in {e[0] for e in expected.values()}}
    firsts = found[: len(purest)]
    assert {t.label for t in firsts} == set(purest)
    assert all(t.purity == pytest.approx(purest[t.label]) for t in firsts)


def test_no_latent_pure_enough_is_an_error():
    codes = csr_matrix(np.ones((20, 3), dtype=np.float32))
    with pytest.raises(ValueError, match=r"No latent has 10 images or more with 90% .* lower app\.purity or app\.top"):
        choose(codes, np.arange(20) % 2, n=2, top=10, purity=0.9, seed=0)


def test_classes_take_turns():
    latents = np.array([10, 11, 12, 13, 14])
    labels, scores = np.array([0, 0, 0, 1, 2]), np.array([0.9, 1.0, 0.8, 0.5, 0.7])
    assert round_robin(latents, labels, scores).tolist() == [11, 14, 13, 10, 12]


def test_random_latents_fire_about_as_often():
    fired = np.array([0] * 50 + [5] * 50 + [500] * 50)
    drawn = matched(fired, [60, 120, 121], seed=3)
    assert 50 <= drawn[0] < 100
    assert min(drawn[1:]) >= 100
    assert drawn[0] != 60
    assert drawn == matched(fired, [60, 120, 121], seed=3)
    with pytest.raises(ValueError, match="none to compare with"):
        matched(np.array([0, 3, 0]), [1], seed=0)


def test_diffmean_is_the_difference_of_two_means():
    features = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    present = np.array([True, False, False, True, False, True, False])
    by_hand = (features[0] + features[3] + features[5]) / 3 - (
        features[1] + features[2] + features[4] + features[6]
    ) / 4
    np.testing.assert_allclose(diffmean(features, present).numpy(), by_hand, rtol=1e-5)
    with pytest.raises(ValueError, match="all are of one kind"):
        diffmean(features, np.ones(7, dtype=bool))


@pytest.mark.parametrize(
    ("caption", "goal", "reached", "passed"),
    [
        ("a boat at sea", "insert", True, True),  # by another name
        ("ships on blue water", "insert", True, True),
        ("a photo of a car", "insert", False, False),
        ("a ship and a dog", "insert", True, False),  # a second class
        ("a boat a boat a boat", "insert", True, False),  # a pair of words twice
        ("ship ship on water", "insert", True, False),
        ("ship", "insert", True, False),  # too short
        ("a ship " + "on the wide blue water of the sea", "insert", True, False),  # too long
        ("a starship in the sky", "insert", False, False),  # no whole word
        ("a photo of a dog", "suppress", True, True),
        ("a photo of blue water", "suppress", True, True),
        ("a dog beside a car", "suppress", True, False),
        ("a vessel at sea", "suppress", False, False),
        ("water water on the water", "suppress", True, False),
    ],
)
def test_two_criteria(caption, goal, reached, passed):
    assert judge(caption, "ship", goal, CLASSES, STYLE) == (reached, passed)


def test_style_is_that_of_unsteered_captions():
    assert CaptionStyle.of(["a dog", "a photo of a dog on grass"]) == CaptionStyle(2, 7)


def test_kept_is_the_share_of_other_words_that_remain():
    assert kept("a boat on blue water", "a plane on blue ground", CLASSES) == 3 / 4  # a, on, blue of a, on, blue, water
    assert np.isnan(kept("ship", "a dog", CLASSES))


def test_class_names_replace_other_names_of_a_class_as_whole_words():
    assert with_class_names("Boats beside a car in a carport", CLASSES) == "ship beside a automobile in a carport"


def test_similarities_are_cosines_of_each_text_which_is_encoded_once():
    table = {"a dog": [1.0, 2.0, 0.0], "a ship": [0.0, -1.0, 1.0], ".": [1.0, 1.0, 1.0]}
    asked = []

    def encode(texts):
        asked.extend(texts)
        return torch.tensor([table[text] for text in texts])

    concepts = torch.tensor([[1.0, 0.0, 0.0], [3.0, 4.0, 0.0]])
    found = similarities(["a ship", "a dog", "a ship", ""], encode, concepts).numpy()
    for row, text in zip(found, ("a ship", "a dog", "a ship", "."), strict=True):
        for value, concept in zip(row, concepts.numpy(), strict=True):
            v = np.array(table[text])
            assert value == pytest.approx(v @ concept / np.linalg.norm(v) / np.linalg.norm(concept), abs=1e-6)
    assert sorted(asked) == [".", "a dog", "a ship"]


def test_concept_embedding_is_the_mean_of_unit_vectors():
    embeddings = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])
    torch.testing.assert_close(concept_embedding(embeddings, (2, 0, 1), 2), torch.tensor([(1 + 0.6) / 2, 0.4]))


def test_interval_is_that_of_a_mean_and_leaves_out_what_is_missing():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    low, high = interval([*values, float("nan")])
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert interval([0.5, 0.7]) is None


def captions_table():
    rows = []
    for latent, method, alpha, passes in [
        (1, "sae", 1, [1, 0]), (1, "sae", 2, [1, 1]), (1, "sae", 3, [1, 1]), (2, "sae", 1, [0, 0]),
        (2, "sae", 2, [1, 0]), (2, "sae", 3, [0, 1]), (1, "diffmean", 1, [0, 0]), (2, "diffmean", 1, [1, 0]),
        (1, "diffmean", 2, [0, 0]), (2, "diffmean", 2, [0, 0]),
    ]:  # fmt: skip
        rows += [
            {"latent": latent, "concept": "ship", "goal": "insert", "method": method, "alpha": alpha,
             "value": 2.0 * alpha, "image": i, "before": "a dog", "caption": "a ship", "reached": True,
             "passed": bool(p), "kept": 0.5, "similarity_8": 0.5, "gain_8": 0.1 * p}
            for i, p in enumerate(passes)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def test_figures_of_a_latent_and_the_strength_with_most_passes():
    table = by_latent(captions_table())
    line = table[(table.latent == 2) & (table.method == "sae") & (table.alpha == 3)].iloc[0]
    assert (line["share"], line["passed"], line["kept"], line["images"], line["value"]) == (1.0, 0.5, 0.5, 2, 6.0)
    assert line["gain_8"] == pytest.approx(0.05)
    assert best_alphas(table) == {("insert", "sae"): [2.0], ("insert", "diffmean"): [1.0]}  # of equal ones the weakest


def test_headlines_hold_both_baselines_strengths_and_paired_differences():
    table = by_latent(captions_table())
    best = best_alphas(table)
    chosen = pd.concat([table[(table.method == m) & (table.alpha == a[0])] for (_, m), a in best.items()])
    assert paired(chosen, "insert", "passed", "diffmean").to_dict() == {1: 1.0, 2: 0.0}
    lines = headlines(chosen, best, [8])
    assert [line.against for line in lines[:-1]] == ["DiffMean at 1 peaks (SAE at 2)"] * 4
    assert (lines[1].ours, lines[1].baseline) == (0.75, 0.25)
    assert lines[-1].what == "both criteria, insert: SAE minus DiffMean"
    assert lines[-1].ours == 0.5
