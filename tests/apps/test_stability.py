"""Stability over planted runs: copies are recovered, shared latents found and chance is not, starts are told apart."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy.sparse import csr_matrix

from sae_lightning.apps.app import results_of
from sae_lightning.apps.stability import page as stability_page
from sae_lightning.apps.stability.activations import Activations, activations, codes_of, labels_of, shared_images
from sae_lightning.apps.stability.pairs import interval, random_like
from sae_lightning.apps.stability.universal import (
    all_correlations,
    lowest,
    search,
    shuffled_maxima,
    threshold_of,
)
from sae_lightning.data import ImageData
from sae_lightning.runs.run import Run
from sae_lightning.saes.relu import ReLU
from tests.configs import CONF, composed
from tests.conftest import fill_store

D, SHARED, IMAGES = 24, 5, {"train": 300, "test": 200}


# --- a planted world ------------------------------------------------------------------------------
def concepts(split: str, seed: int) -> np.ndarray:
    """Activations [images, D] of a world's concepts, each on a fifth of the images, by pictures of two patches."""
    rng = np.random.default_rng([seed, len(split)])
    return (1 + rng.random((IMAGES[split], D))) * (rng.random((IMAGES[split], D)) < 0.2)


def encoder(root, name: str, own: int, data: str = "synthetic") -> dict[str, str]:
    """Stores of an encoder whose first ``SHARED`` concepts are those of all, the others its ``own``; by split.

    A concept's direction is an axis of a random rotation; half of its activation is on either patch.
    """
    rotation, _ = np.linalg.qr(np.random.default_rng(own).normal(size=(D, D)))
    folders = {}
    for split in IMAGES:
        world = concepts(split, own)
        world[:, :SHARED] = concepts(split, 0)[:, :SHARED]
        features = torch.from_numpy(np.repeat((world @ rotation)[:, None], 2, 1)).float()
        folders[split] = str(root / name / split)
        fill_store(
            root / name / split, features, fingerprint=f"{own:064x}", backbone=f"{name} (tiny)", layer=4, grid=(1, 2),
            split=split, data=data,
        )  # fmt: skip
    return folders


def a_run(root, backbone: str, own: int, stores, seed: int, order=None, rows=None, **made) -> Run:
    """A ReLU SAE whose latents are the concepts of ``encoder`` in an ``order``, or whose directions are ``rows``."""
    cfg = composed(
        "config", "data=store", f"data.train={stores['train']}", f"data.test={stores['test']}", f"backbone={backbone}",
        "backbone.size=tiny", "sae=relu", "expansion=1", f"seed={seed}",
    )  # fmt: skip
    if rows is None:
        rotation, _ = np.linalg.qr(np.random.default_rng(own).normal(size=(D, D)))
        rows = torch.from_numpy(rotation[np.arange(D) if order is None else order]).float()
    sae = ReLU(D, len(rows), seed=seed)
    with torch.no_grad():
        sae.W_dec.copy_(rows), sae.W_enc.copy_(rows), sae.b_enc.fill_(-0.1)
    expansion = len(rows) // D
    cfg.expansion = expansion
    name = f"relu-{backbone}-x{expansion}-s{seed}"
    about = {
        "name": name, "hash": "0", "k": 4, "expansion": expansion, "seed": seed, "backbone": f"{backbone} (tiny)",
        "layer": 4, "data": "synthetic", "features": "patch",
    } | made  # fmt: skip
    sae.save(root / "runs" / name, **about, config=OmegaConf.to_container(cfg, resolve=True))
    return Run(root / "runs" / name)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stability")


@pytest.fixture(scope="module")
def stores(root):
    return {name: encoder(root, name, own) for own, name in enumerate(("deit", "mae", "clip"), start=1)}


ORDERS = {seed: np.random.default_rng(seed).permutation(D) for seed in (1, 2, 3)}


@pytest.fixture(scope="module")
def runs(root, stores):
    """deit with two seeds, mae and clip: the concepts in other orders."""
    made = [("deit", 1, 1), ("deit", 1, 2), ("mae", 2, 3), ("clip", 3, 1)]
    return [a_run(root, name, own, stores[name], seed, ORDERS[seed]) for name, own, seed in made]


def asked(root, **app):
    defaults = OmegaConf.load(CONF / "app" / "stability.yaml")
    cfg = {"app": OmegaConf.merge(defaults, app), "split": "test", "seed": 1, "paths": {"runs": str(root / "runs")}}
    return OmegaConf.create(cfg)


# --- the application ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def result(root, runs):
    return results_of(runs, asked(root))[0]


@pytest.mark.slow
def test_a_shuffled_dictionary_is_recovered_latent_by_latent(result, runs):
    pairs = pd.read_parquet(result.folder / "pairs.parquet").query("relation == 'seed'").set_index("kind")
    assert set(pairs.index) == {"decoder", "encoder", "activation"}
    assert pairs["mean"].to_numpy() == pytest.approx([1, 1, 1], abs=1e-6)
    assert pairs.loc["decoder", "agree"] == 1
    assert pairs.loc["decoder", "null_mean"] < 0.8
    assert pairs.loc["activation", "held_out_mean"] == pytest.approx(1, abs=1e-6)
    matches = pd.read_parquet(result.folder / "matches.parquet").query("relation == 'seed'")
    for _, of in matches.groupby("kind"):
        assert (ORDERS[1][of["latent_a"]] == ORDERS[2][of["latent_b"]]).all()
        assert len(of) == D


def test_shared_latents_are_found_in_every_encoder_and_nothing_else(result, runs):
    table = pd.read_parquet(result.folder / "universal.parquet")
    found = set()
    for _, of in table.groupby("rank"):
        latent = of.set_index("run")["latent"]
        found.add(tuple(ORDERS[run.cfg["seed"]][latent[run.name]] for run in (runs[0], *runs[2:])))
    assert found == {(c, c, c) for c in range(SHARED)}
    assert (table["score"] > 0.99).all()
    assert (table["held_out"] > 0.99).all()
    record = json.loads((result.folder / "app.json").read_text())
    assert record["universal"][0]["by_chance"] == 0
    assert 0.1 < record["universal"][0]["threshold"] < 0.5
    across = pd.read_parquet(result.folder / "pairs.parquet").query("relation == 'backbone'")
    assert (across["kind"] == "activation").all()
    assert len(across) == 5
    assert across["held_out_mean"].to_numpy() == pytest.approx(SHARED / D, abs=0.05)


def test_page_and_headlines(result):
    html = result.page.read_text()
    assert not re.search(r"(src|href)=.(?!data:|#)", html)
    assert "5 universal latents above" in html
    assert html.count("<svg") == 4
    words = [line.what for line in result.headlines]
    assert [line.baseline is not None for line in result.headlines] == [True] * 4
    assert words[0] == "decoder cosine of matched latents, runs that differ by their seed (1 pair)"
    assert result.headlines[2].ours == SHARED


@pytest.mark.slow
def test_encoders_that_share_nothing_have_no_universal_latents(root, monkeypatch):
    monkeypatch.setattr("tests.apps.test_stability.SHARED", 0)
    runs = [
        a_run(root, n, own, encoder(root / "none", n, own), 1) for own, n in enumerate(("dinov2", "siglip"), start=7)
    ]
    (found,) = results_of(runs, asked(root / "none"))
    assert len(pd.read_parquet(found.folder / "universal.parquet")) == 0
    assert found.headlines[-1].ours == 0


@pytest.mark.slow
def test_what_runs_of_one_seed_share_is_told_from_their_start(root, stores):
    """An untrained dictionary and a larger one: all that the two have in common is their start."""
    small, large = (ReLU(D, d, seed=5).W_dec.detach() for d in (D, 2 * D))
    runs = [a_run(root, "deit", 1, stores["deit"], 5, rows=rows) for rows in (large, small)]
    other = a_run(root, "deit", 1, stores["deit"], 6, rows=ReLU(D, 2 * D, seed=6).W_dec.detach())
    (found,) = results_of([*runs, other], asked(root, min_images=1))
    pairs = pd.read_parquet(found.folder / "pairs.parquet").query("kind == 'decoder'")
    same = pairs[pairs["relation"] == "expansion, same start"].iloc[0]
    assert same[["mean", "start_mean"]].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert (same["latents_a"], same["latents_b"], same["matched"]) == (D, 2 * D, D)  # the smaller one first
    assert same["run_a"] == runs[1].name
    assert same["nearest_b"] < 1
    assert sorted(pairs["relation"]) == ["expansion", "expansion, same start", "seed"]
    (line,) = [line for line in found.headlines if "same seed" in line.what]
    assert line.against == "one's untrained start"
    assert line.baseline == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_pictures_are_those_that_the_members_fire_on_most(runs, monkeypatch, root):
    shown: list[list[int]] = []

    def images(self, split):
        store = self.store(split)
        picture = [Image.new("RGB", (8, 8), (i % 256, 0, 0)) for i in range(len(store))]
        return ImageData(
            "planted", split, store.class_names, store.labels.numpy(), store.image_ids, picture.__getitem__
        )

    monkeypatch.setattr(Run, "images", images)
    monkeypatch.setattr(stability_page, "strip", lambda images: shown.append([i.getpixel((0, 0))[0] for i in images]))
    (found,) = results_of(runs[1:], asked(root, universal={"shown": 2, "images": 3}))
    table = pd.read_parquet(found.folder / "universal.parquet").query("rank <= 2")
    expected = []
    for _, of in table.groupby("rank"):
        for run, latent in zip(
            runs[1:], of.set_index("run").loc[[run.name for run in runs[1:]], "latent"], strict=True
        ):
            expected.append(np.argsort(-run.codes("test").toarray()[:, latent])[:3].tolist())
    assert shown == expected


# --- sentences ------------------------------------------------------------------------------------
def test_refuses_what_cannot_be_compared(root, runs):
    with pytest.raises(ValueError, match="only relu-deit-x1-s1 was given"):
        results_of(runs[:1], asked(root))
    with pytest.raises(ValueError, match="and split are both test"):
        results_of(runs, asked(root, fit="test"))
    with pytest.raises(ValueError, match="fires on 301 of 285 images of train"):
        results_of(runs, asked(root, min_images=301))
    elsewhere = a_run(root, "dinov2", 4, encoder(root, "dinov2", 4, data="another"), 1)
    with pytest.raises(ValueError, match=r"deit-x1-s1 \(synthetic\) and relu-dinov2-x1-s1 \(another\) have no image"):
        results_of([*runs, elsewhere], asked(root))


# --- parts ----------------------------------------------------------------------------------------
def world(codes: list[np.ndarray]) -> list[Activations]:
    return [activations(csr_matrix(each)) for each in codes]


def random_runs(n: int, d: int, count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random((n, d)) * (rng.random((n, d)) < 0.4) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_search_gives_disjoint_tuples_with_their_true_scores(seed):
    codes = random_runs(40, 6, 3, seed)
    codes[1][:, 2] = codes[0][:, 4] + 0.05 * codes[1][:, 2]
    codes[2][:, 1] = codes[0][:, 4] + 0.05 * codes[2][:, 1]
    correlations = all_correlations(world(codes))
    tuples, scores = search(correlations, 3, 0.05)
    for members, score in zip(tuples, scores, strict=True):
        columns = np.stack([each[:, i] for each, i in zip(codes, members, strict=True)])
        r = np.corrcoef(columns)
        assert score == pytest.approx(r[~np.eye(3, dtype=bool)].min(), abs=1e-6)
        assert score > 0.05
    assert (np.diff(scores) <= 0).all()
    assert all(len(set(column)) == len(column) for column in tuples.T.tolist())
    assert tuples[0].tolist() == [4, 2, 1]
    everything = np.array(list(itertools.product(range(6), repeat=3)))
    assert scores[0] == pytest.approx(lowest(correlations, everything).max(), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_tuple_exceeds_what_the_null_says_of_its_images(seed, monkeypatch):
    runs = world(random_runs(30, 5, 3, seed))
    monkeypatch.setattr(Activations, "shuffled", lambda self, order: self)
    (bound,) = shuffled_maxima(runs, 1, np.random.default_rng(0))
    everything = np.array(list(itertools.product(range(5), repeat=3)))
    assert lowest(all_correlations(runs), everything).max() <= bound + 1e-6


def test_the_level_is_five_per_cent():
    assert threshold_of(np.arange(19.0)) == 18
    assert threshold_of(np.arange(39.0)[::-1]) == 37
    with pytest.raises(ValueError, match="needs 19 shuffles; got 18"):
        threshold_of(np.zeros(18))


def test_a_random_dictionary_has_the_mean_and_covariance_of_the_real_one():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)) + [1, -2, 0]).float()
    drawn = random_like(rows, 40000, rng).double().numpy()
    np.testing.assert_allclose(drawn.mean(0), rows.double().numpy().mean(0), atol=0.05)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(rows.double().numpy().T), rtol=0.1, atol=0.1)


def test_interval_is_that_of_the_t_distribution():
    assert interval(np.array([1.0, 2.0, 3.0])) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert np.isnan(interval(np.array([1.0]))).all()


def test_images_are_matched_by_their_ids(runs):
    store = runs[0].store("train")
    ids = shared_images(runs, "train", 50, np.random.default_rng(0))
    assert len(ids) == len(set(ids)) == 50
    backwards = codes_of(runs[0], "train", ids[::-1])
    places = [store.image_ids.index(image_id) for image_id in ids]
    np.testing.assert_allclose(backwards.toarray()[::-1], runs[0].codes("train").toarray()[places], atol=1e-5)


def test_labels_tell_all_runs_apart(runs):
    found = labels_of(runs)
    assert found[2:] == ["mae (tiny) · relu ×1", "clip (tiny) · relu ×1"]
    assert found[:2] == ["deit (tiny) · relu ×1 s1", "deit (tiny) · relu ×1 s2"]
