"""Matching, thresholds, chance and checks of names against slow references."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.metrics import cohen_kappa_score

from sae_lightning.apps.naming.match import (
    agreement,
    chance_counts,
    class_in,
    correlations,
    cosines,
    fit,
    like,
    match,
    named_at,
    of_concepts,
    of_latents,
    precision,
    standing,
)
from sae_lightning.apps.naming.vocabulary import embed, fill, moments, place, read_words
from sae_lightning.saes import TopK
from sae_lightning.saes.sae import Normalizer


def unit(n, d, seed):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- matching and thresholds ----------------------------------------------------------------------
def slow_nearest(row):
    """Index and value of the largest of a list, then of the second; of equals the first."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return order[0], row[order[0]], order[1], row[order[1]]


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 12), words=st.integers(2, 9), entries=st.integers(1, 60), seed=st.integers(0, 999),
    ties=st.booleans(),
)  # fmt: skip
def test_blocks_give_what_sorting_the_whole_table_gives(n, words, entries, seed, ties):
    table = torch.randn(n, words, generator=torch.Generator().manual_seed(seed))
    table = table.round() if ties else table
    found = match(lambda block: table[block], n, words, entries)
    for near, rows in ((found.latents, table.tolist()), (found.concepts, table.T.tolist())):
        for i, row in enumerate(rows):
            first, score, second, runner_up = slow_nearest(row)
            assert (near.index[i], near.second_index[i]) == (first, second)
            assert (near.score[i], near.second[i]) == (score, runner_up)


@pytest.mark.parametrize("seed", range(4))
def test_conditions_are_those_of_a_dense_table(seed):
    rows, texts = unit(60, 5, seed), unit(11, 5, seed + 100)
    table = (rows @ texts.T).double().numpy()
    found = match(cosines(3 * rows, texts), 60, 11)
    met = of_latents(found, 0.5, 1.3)
    for p in range(60):
        v, top, _, second = slow_nearest(table[p].tolist())
        best = table[:, v].argmax() == p
        unique = top > 0 and (second <= 0 or top / second > 1.3)
        expected = (top > 0.5, best, top > 0.5 and best, unique, top > 0.5 and best and unique)
        assert tuple(bool(met[name][p]) for name in met) == expected
    assert sum(met["all"]) <= sum(met["above_best"]) <= 11

    above = ratio = 0
    claims: dict[int, tuple[float, bool]] = {}
    for v in range(11):
        p, top, _, second = slow_nearest(table[:, v].tolist())
        unique = top > 0 and (second <= 0 or top / second > 1.3)
        above, ratio = above + (top > 0.5), ratio + unique
        if p not in claims or top > claims[p][0]:
            claims[p] = (top, unique)
    assert of_concepts(found, 0.5, 1.3) == {
        "above": above, "best": len(claims), "above_best": sum(t > 0.5 for t, _ in claims.values()), "ratio": ratio,
        "all": sum(t > 0.5 and u for t, u in claims.values()),
    }  # fmt: skip
    grid = named_at(found, [0.2, 0.5], [1.0, 1.3])
    assert grid[1][1] == (met["above"] & met["ratio"]).sum()
    assert grid[0][0] >= grid[0][1] >= grid[1][1]
    assert grid[0][0] >= grid[1][0]
    assert named_at(found, [0.5], [1.3], best=True) == [[met["all"].sum()]]


def test_the_ratio_where_similarities_are_not_positive():
    table = torch.tensor([[0.5, -0.1], [-0.2, -0.3], [0.4, 0.2]])
    found = match(lambda block: table[block], 3, 2)
    assert found.latents.ratio.tolist() == pytest.approx([np.inf, 0.0, 2.0])


def test_one_word_or_one_latent_cannot_be_compared():
    with pytest.raises(ValueError, match="two latents and two words to compare; there are 5 and 1"):
        match(lambda block: torch.zeros(5, 1)[block], 5, 1)


# --- where texts lie ------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", ["none", "layer", "rms", "unit"])
def test_texts_go_through_what_the_sae_does_to_its_inputs(norm):
    sae = TopK(6, 12, k=2, seed=0, input_norm=norm)
    with torch.no_grad():
        sae.b_pre.copy_(torch.randn(6))
    texts = 3 * torch.randn(9, 6) + 5
    mean, std = moments(texts)
    kept = place(texts, Normalizer(6, mean, std), sae)
    removed = place(texts, Normalizer(6, mean, std), sae, b_pre=False)
    x = (texts - texts.mean(0)) / (texts - texts.mean(0)).square().mean().sqrt()
    if norm == "layer":
        x = torch.stack([(row - row.mean()) / row.std(correction=0) for row in x])
    if norm in ("rms", "unit"):
        x = torch.stack([row / row.norm() * (6**0.5 if norm == "rms" else 1) for row in x])
    torch.testing.assert_close(kept, x / x.norm(dim=1, keepdim=True))
    y = x - sae.b_pre.detach()
    torch.testing.assert_close(removed, y / y.norm(dim=1, keepdim=True))


class Tower:
    """Every text of the same letters has one embedding, whose length is that of the text."""

    def encode_text(self, texts):
        torch.manual_seed(0)
        letters = torch.randn(256, 8)
        sums = torch.stack([letters[[ord(c) for c in sorted(text)]].sum(0) for text in texts])
        return torch.nn.functional.normalize(sums, dim=1) * torch.tensor([[float(len(t))] for t in texts])


def test_words_that_the_text_tower_cannot_tell_apart_are_kept_once(monkeypatch):
    monkeypatch.setattr("sae_lightning.apps.naming.vocabulary.BATCH", 2)
    found = embed(["live", "cat", "evil", "act", "dog"], ["{}"], Tower())
    assert (found.words, found.same) == (["live", "cat", "dog"], 2)
    torch.testing.assert_close(found.embeddings, Tower().encode_text(found.words))


def test_several_templates_are_averaged_as_directions():
    templates = ["{}", "a photo of {a}"]
    found = embed(["cat", "owl"], templates, Tower()).embeddings
    assert fill(templates[1], "owl") == "a photo of an owl"
    for i, word in enumerate(["cat", "owl"]):
        parts = [Tower().encode_text([fill(t, word)])[0] for t in templates]
        mean = sum(p / p.norm() for p in parts)
        torch.testing.assert_close(found[i] / found[i].norm(), mean / mean.norm())
        assert found[i].norm() == pytest.approx(sum(float(p.norm()) for p in parts) / 2, rel=1e-5)


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{}", "nothing"]])
def test_a_template_without_a_place_is_an_error(templates):
    with pytest.raises(ValueError, match=r"without a place for the word; write for example 'a photo of \{\}'"):
        embed(["cat", "dog"], templates, Tower())


# --- word lists -----------------------------------------------------------------------------------
def test_lists_are_joined_and_each_word_counts_once(tmp_path):
    own = tmp_path / "own.txt"
    own.write_bytes("\ufeff# birds\nship\n\n  Möwe \nblue whale\n".encode())
    words = read_words(["demo", str(own), "classes"], ["ship", "ice_cream"])
    assert words[:2] == ["airplane", "automobile"]
    assert words[-3:] == ["Möwe", "blue whale", "ice cream"]
    assert words.count("ship") == 1


def test_general_lists_are_there():
    assert {"goldfish", "tench"} <= set(read_words("imagenet1k"))
    assert len(read_words("imagenet22k")) > 15_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file.*one word a line, or one of classes, imagenet1k, .*demo"),
        (b"caf\xe9\nbar\n", r"not UTF-8 text \(byte 3\); save it as UTF-8"),
        (b"# nothing\nword\n", "gives 1 words; naming needs at least two"),
    ],
)
def test_lists_that_cannot_be_used_are_said_to_be(tmp_path, content, message):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_words(str(path))


# --- by activation --------------------------------------------------------------------------------
def test_correlations_are_numpys():
    rng = np.random.default_rng(0)
    dense = (rng.random((50, 7)) * (rng.random((50, 7)) < 0.3)).astype(np.float32)
    dense[:, 3], dense[:, 4] = 0, 2.0  # silent; always the same
    images, texts = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 2, unit(4, 6, 1)
    fits = fit(images, texts)
    table = (fits.images @ fits.texts.T).numpy()
    centred = images - images.mean(0)
    cosine = (centred / centred.norm(dim=1, keepdim=True) @ texts.T).numpy()
    np.testing.assert_allclose(table, (cosine - cosine.mean(0)) / cosine.std(0), atol=1e-4)
    found = correlations(csr_matrix(dense), fits)(slice(0, 7)).numpy()
    for latent, word in itertools.product(range(7), range(4)):
        slow = 0.0 if latent in (3, 4) else np.corrcoef(dense[:, latent], cosine[:, word])[0, 1]
        assert found[latent, word] == pytest.approx(slow, abs=1e-4)
    with pytest.raises(ValueError, match="codes of 50 images; got those of 49"):
        correlations(csr_matrix(dense[:49]), fits)


# --- chance ---------------------------------------------------------------------------------------
def test_random_vectors_have_the_mean_and_covariance_of_the_given_ones():
    scales = torch.tensor([3.0, 1.0, 0.0])
    given_ones = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * scales
    found = like(given_ones, 20_000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(20_000))
    assert found[:, 2].abs().max() < 1e-3
    ratio = (found[:, 0] / found[:, 1]).abs().median()  # of two centred normals: the ratio of their deviations
    assert float(ratio) == pytest.approx(3, rel=0.05)


def test_chance_counts_are_of_the_draws():
    tables = iter([torch.tensor([[0.9, 0.1], [0.2, 0.1]]), torch.tensor([[0.9, 0.8], [0.95, 0.1]])])

    def drawn(generator):
        table = next(tables)
        return match(lambda block: table[block], 2, 2)

    found = chance_counts(drawn, 2, 0.5, 2.0, 0)
    assert found["above"]["mean"] == 1.5
    assert found["ratio"]["mean"] == 1.0
    assert found["above"]["low"] == pytest.approx(1.025)


def test_precision_counts_the_named_class_and_chance_permutes_the_names():
    labels = np.array([0, 0, 1, 1, 2])
    top = np.array([[0, 1, 2], [2, 3, -1], [4, 0, 1], [-1, -1, -1]])
    named = np.array([0, 1, -1, 1])  # the third names no class, the last fires nowhere
    found = precision(top, named, labels, 0)
    assert found.latents == 2
    assert found.value == pytest.approx((2 / 3 + 1) / 2)
    permuted = [(2 / 3 + 1) / 2, (1 / 3 + 0) / 2]
    assert found.chance == pytest.approx(np.mean(permuted))
    assert found.interval[0] <= found.value <= found.interval[1]
    assert precision(top[3:], named[3:], labels, 0) is None


def test_standing_is_the_share_of_words_that_fit_worse():
    fits = fit(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), unit(7, 5, 1))
    table = (fits.images @ fits.texts.T).numpy()
    top, names = np.array([[0, 3, -1], [5, 6, 7]]), np.array([2, 4])
    share = np.zeros((2, 2))
    for i, images in enumerate(([0, 3], [5, 6, 7])):
        mean = table[images].mean(0)
        for j, name in enumerate(names):
            share[i, j] = np.mean([mean[name] > mean[w] for w in range(7) if w != name])
    found = standing(top, names, fits, 0)
    assert found.value == pytest.approx(np.trace(share) / 2)
    assert found.chance == pytest.approx(share.mean())


# --- words and labels -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ship", 0), ("a Ship on a blue background", 0), ("shipyard", -1), ("great white shark", 2), ("shark", 1),
        ("a ship, a shark", -1), ("blue", -1), ("ice_cream", 3), ("white shark", 1),
    ],
)  # fmt: skip
def test_the_class_in_a_name_is_the_longest_that_stands_in_it_as_words(name, expected):
    assert class_in(name, ["ship", "shark", "great white shark, man-eater", "ice_cream"]) == expected


def test_agreement_is_the_share_and_kappa_of_latents_with_both_names():
    rng = np.random.default_rng(0)
    text = rng.integers(-1, 4, 200)
    label = np.where(rng.random(200) < 0.6, text, rng.integers(-1, 4, 200))
    both = (text >= 0) & (label >= 0)
    found = agreement(text, label, 0)
    assert found.latents == both.sum()
    assert found.share == pytest.approx((text == label)[both].mean())
    assert found.kappa == pytest.approx(cohen_kappa_score(text[both], label[both]))
    assert found.kappa_interval[0] < found.kappa < found.kappa_interval[1]
    assert found.share_interval[0] < found.share < found.share_interval[1]
    permuted = [(text[both] == rng.permutation(label[both])).mean() for _ in range(400)]
    assert found.chance == pytest.approx(np.mean(permuted), abs=0.01)


def test_agreement_without_anything_to_agree_on():
    assert agreement(np.array([-1, 2]), np.array([1, -1]), 0) is None
    one = agreement(np.array([1, 1]), np.array([1, 1]), 0)
    assert (one.share, one.chance, one.kappa, one.kappa_interval) == (1, 1, None, None)
