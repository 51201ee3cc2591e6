"""Naming end to end, on dictionaries whose rows are planted at the embeddings of words."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from sae_lightning.apps.app import results_of
from sae_lightning.apps.names import names_of
from sae_lightning.apps.naming.vocabulary import chosen_method, moments, place
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.features.source import Source
from sae_lightning.runs.results import read_result
from sae_lightning.runs.run import Run
from sae_lightning.saes import Normalizer, TopK
from sae_lightning.training.fit import record
from tests.configs import composed

WORDS = ["airplane", "cat", "ship", "blue", "dark"]
OPTIONS = ["app.vocabulary={words}", "app.labels.images=2", "app.baseline.draws=3", "app.cards=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("naming")
    (folder / "words.txt").write_text("\n".join(WORDS))
    return folder


def planted(root, pictures, backbone: str, features: str) -> Run:
    """A run of d_sae = d_in; where there are words, row i of the decoder is word i's embedding."""
    folder = root / f"{backbone}-{features}"
    if folder.is_dir():
        return Run(folder)
    cfg = composed(
        "config",
        "data=folder", f"data.path={pictures}", f"backbone={backbone}", "backbone.size=tiny", "sae=topk", "k=4",
        "expansion=1", f"features={features}", f"paths.stores={root / 'stores'}",
    )  # fmt: skip
    store = Source.of(cfg).store("train")
    sae = TopK(store.d_in, store.d_in, k=4, normalizer=Normalizer(store.d_in, store.mean, store.std), seed=0)
    if features == "embedding":
        texts = load_backbone(Source.of(cfg).backbone).encode_text(WORDS).float()
        with torch.no_grad():
            sae.W_dec[: len(WORDS)] = place(texts, Normalizer(store.d_in, *moments(texts)), sae)
            sae.W_enc.copy_(sae.W_dec)
    sae.save(folder, **record(cfg, folder, {"train": store}))
    return Run(folder)


def options(root, *more: str):
    return composed("explore", "app=naming", *(o.format(words=root / "words.txt") for o in OPTIONS), *more)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["clip", "siglip"])
def test_rows_at_the_embeddings_of_words_are_named_by_them(root, pictures, backbone):
    opened = planted(root, pictures, backbone, "embedding")
    (result,) = results_of([opened], options(root, "app.alive=false"))
    table = pd.read_parquet(result.folder / "naming.parquet")
    named = table.head(len(WORDS))
    assert named["name"].tolist() == WORDS
    np.testing.assert_allclose(named["score"], 1, atol=1e-5)
    assert named[["above", "best", "above_best"]].to_numpy().all()
    assert (table["ratio_above"] == (table["ratio"] > 2)).all()
    assert names_of(opened)[: len(WORDS)] == WORDS
    assert len(table) == opened.sae.d_sae
    app = json.loads((result.folder / "app.json").read_text())
    assert app["of_concepts"]["above_best"] == len(WORDS)
    assert app["of_latents"]["above"] == table["above"].sum()
    assert app["centre"] == "vocabulary"  # the folder has no captions
    assert read_result(result.folder).headlines[0].baseline < 1
    page = result.page.read_text()
    assert "random latents" in page
    assert "Table 3" in page
    assert "airplane" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", "").replace("http://creativecommons.org", "")  # fmt: skip


def test_latents_that_never_fire_have_no_name(root, pictures):
    opened = planted(root, pictures, "clip", "embedding")
    table = pd.read_parquet(results_of([opened], options(root))[0].folder / "naming.parquet")
    silent = table[~table["alive"]]
    assert len(silent) > 0
    assert (silent["shown"] == "").all()
    assert (silent["name"] == "").all()
    assert not silent["above"].any()
    alive = table[table["alive"]]
    assert (alive["name"] != "").all()
    assert ((alive["shown"] == alive["name"]) == alive["above"]).all()


@pytest.mark.slow
def test_removing_b_pre_moves_the_texts(root, pictures):
    opened = planted(root, pictures, "clip", "embedding")
    with torch.no_grad():
        opened.sae.b_pre.normal_(generator=torch.Generator().manual_seed(0))
    scores = {}
    for kind in ("keep", "remove"):
        folder = results_of([opened], options(root, "app.alive=false", f"app.b_pre={kind}"))[0].folder
        scores[kind] = pd.read_parquet(folder / "naming.parquet")["score"].to_numpy()
    np.testing.assert_allclose(scores["keep"][: len(WORDS)], 1, atol=1e-5)
    assert (scores["remove"][: len(WORDS)] < 0.999).all()


@pytest.mark.slow
def test_patch_tokens_of_a_text_aligned_encoder_are_named_by_activation(root, pictures):
    opened = planted(root, pictures, "clip", "patch")
    (result,) = results_of([opened], options(root, "app.top=4"))
    table = pd.read_parquet(result.folder / "naming.parquet")
    assert set(table["method"]) == {"activation"}
    assert table["score"].abs().max() <= 1 + 1e-5
    page = result.page.read_text()
    assert "correlation" in page
    assert "Table 3" not in page


def test_encoders_without_text_are_named_by_labels(root, pictures):
    opened = planted(root, pictures, "deit", "patch")
    (result,) = results_of([opened], options(root))
    table = pd.read_parquet(result.folder / "naming.parquet")
    assert "name" not in table
    assert set(table["shown"]) <= {"", "rows", "columns"}
    pure = (table["purity"] >= 0.5) & (table["images"] >= 2)
    assert ((table["shown"] != "") == pure).all()


@pytest.mark.parametrize(
    ("backbone", "features", "more", "message"),
    [
        ("deit", "patch", "app.method=decoder", r"needs an encoder with a text tower, and deit \(tiny\) has none"),
        ("clip", "patch", "app.method=decoder", "trained on patch features, whose space has no texts; train with feat"),
        ("clip", "embedding", "app.method=guess", "Unknown app.method=guess; choose one of auto, decoder"),
        ("clip", "embedding", "app.b_pre=maybe", "Unknown app.b_pre=maybe; choose keep"),
        ("clip", "embedding", "app.centre=middle", "Unknown app.centre=middle; choose one of auto"),
        ("clip", "embedding", "app.centre=captions", "has no captions; set app.centre=vocabulary"),
        ("clip", "embedding", "app.named=nicely", "Unknown app.named=nicely; choose one of above"),
        ("clip", "embedding", "app.vocabulary=classes", "takes all 2 words of app.vocabulary=classes for one and the"),
    ],
)
def test_what_does_not_fit_a_run_is_said_in_a_sentence(root, pictures, backbone, features, more, message):
    opened = planted(root, pictures, backbone, features)
    with pytest.raises(ValueError, match=message):
        results_of([opened], options(root, more))


def test_any_method_of_a_text_aligned_embedding_can_be_asked_for(root, pictures):
    opened = planted(root, pictures, "clip", "embedding")
    assert chosen_method(opened, "auto") == "decoder"
    for method in ("decoder", "activation", "labels"):
        assert chosen_method(opened, method) == method
