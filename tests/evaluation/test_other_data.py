"""Finished runs scored on other data sets and on the other modality than they were trained on."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from sae_lightning.evaluation import suite
from sae_lightning.evaluation.job import Settings
from sae_lightning.evaluation.suite import evaluate_runs, scored
from sae_lightning.features.store import FeatureStore
from sae_lightning.runs.run import FILES, RESULT
from sae_lightning.runs.scores import SCHEMA, TABLE, read_rows, value_of
from sae_lightning.saes import SAE, VARIANTS, BatchTopK, Normalizer, TopK
from sae_lightning.saes.artefact import read_cfg
from tests.configs import composed
from tests.conftest import fill_store, sparse_features

METRICS = {"core": {"above": [0.5], "bands": {"ranks": 4, "images": 4}}}


def given(folder, kind: str, seed: int, shift: float = 0.0, scale: float = 1.0, **changes) -> dict[str, str]:
    """A data set of stores of ``kind`` features, one vector an image, as a config section."""
    about = {
        "kind": kind,
        "layer": 0 if kind == "cls" else None,
        "grid": (1, 1),
        "backbone": "none (synthetic)",
    } | changes
    for n, split in enumerate(("train", "val", "test")):
        features = scale * sparse_features(60 - 10 * n, seed + n, n_patches=1) + shift
        fill_store(folder / split, features, 30, f"{seed + n:064x}", split=split, **about)
    return {"source": "store", "name": folder.name} | {s: str(folder / s) for s in ("train", "val", "test")}


@pytest.fixture
def run(tmp_path):
    """An SAE of image embeddings, scored on its own data."""
    data, folder = given(tmp_path / "pictures", "embedding", 1), tmp_path / "runs" / "topk"
    config = {
        "data": data | {"held_out": 0.1, "seed": 0}, "features": "embedding",
        "backbone": {"name": "none", "size": "tiny", "layer": 0, "tiny": {"layer": 0}},
    }  # fmt: skip
    train = FeatureStore.open(tmp_path / "pictures" / "train")
    sae = TopK(train.d_in, 40, 3, normalizer=Normalizer(train.d_in, train.mean, train.std), seed=1)
    sae.save(folder, name="topk", backbone=train.backbone, features="embedding", layer=None, k=3, expansion=2,
             config=config)  # fmt: skip
    score(folder)
    return folder


def score(run, **how) -> None:
    evaluate_runs([run], Settings(OmegaConf.create(METRICS), **how))


def by_hand(
    run, store: FeatureStore, statistics: FeatureStore | None = None, positive: bool = False
) -> dict[str, float]:
    """FVU, L0 and the mean cosine about the store's mean, in plain torch; with the normaliser of ``statistics``.

    Of the three largest pre-activations, or all that are ``positive``.
    """
    sae = SAE.load(run)
    frame = sae.normalizer if statistics is None else statistics
    mean, std = torch.as_tensor(frame.mean).double(), float(frame.std)
    x = store.features(slice(0, len(store)))[:, 0].double()
    z = (x - mean) / std
    pre = ((z - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()).relu()
    top = pre.topk(pre.shape[1] if positive else 3, dim=1)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    rebuilt = (codes @ sae.W_dec.double() + sae.b_pre.double()) * std + mean
    center = torch.as_tensor(store.mean).double()
    return {
        "fvu": float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()),
        "l0": float((codes > 0).sum(1).double().mean()),
        "cosine": float(torch.cosine_similarity(x - center, rebuilt - center).mean()),
    }


def assert_scores(run, data: str, expected: dict[str, float]) -> None:
    rows = read_rows(run, data=data)
    for name, value in expected.items():
        assert value_of(rows, name) == pytest.approx(value, rel=1e-4), name


def test_another_data_set_is_scored_with_the_runs_own_normaliser(run, tmp_path):
    other = given(tmp_path / "others", "embedding", 11, shift=0.3, scale=1.5)
    before = {name: (run / name).read_bytes() for name in FILES}
    rows = repr(read_rows(run))
    assert_scores(run, "", by_hand(run, FeatureStore.open(tmp_path / "pictures" / "test")))
    score(run, data=other)
    assert_scores(run, "others", by_hand(run, FeatureStore.open(tmp_path / "others" / "test")))
    assert repr(read_rows(run)) == rows
    assert {row["data"] for row in read_rows(run, data=None)} == {"", "others"}
    assert {name: (run / name).read_bytes() for name in FILES} == before
    score(run, again=True)
    assert {row["data"] for row in read_rows(run, data=None)} == {"", "others"}


@pytest.mark.parametrize("means", ["texts", "embeddings"])
def test_the_other_modality_is_scored_with_its_own_mean_and_scale(run, tmp_path, means):
    texts = given(tmp_path / "captions", "text", 21, shift=-2.0, scale=3.0)
    if means == "embeddings":  # the SAE of texts, scored on images
        made = SAE.load(run)
        config = {"data": texts | {"held_out": 0.1, "seed": 0}, "features": "text",
                  "backbone": {"name": "none", "size": "tiny", "layer": 0, "tiny": {"layer": 0}}}  # fmt: skip
        run = tmp_path / "runs" / "of-texts"
        made.save(run, name="of-texts", backbone="none (synthetic)", features="text", layer=None, k=3, expansion=2,
                  config=config)  # fmt: skip
        score(run, data=given(tmp_path / "pictures2", "embedding", 31, shift=1.0), features="embedding")
        folder, data = tmp_path / "pictures2", "pictures2 embedding"
    else:
        score(run, data=texts, features="text")
        folder, data = tmp_path / "captions", "captions text"
    test, train = (FeatureStore.open(folder / split) for split in ("test", "train"))
    assert_scores(run, data, by_hand(run, test, train))


def test_what_is_there_is_not_scored_again(run, tmp_path, monkeypatch):
    other, texts = given(tmp_path / "others", "embedding", 11), given(tmp_path / "captions", "text", 21)
    score(run, data=other)
    score(run, data=texts, features="text")
    monkeypatch.setattr(suite, "_score_part", None)
    score(run, data=other)
    score(run, data=texts, features="text")
    score(run, data={"source": "store"} | {s: str(tmp_path / "pictures" / s) for s in ("train", "val", "test")})
    score(run, features="embedding")


@pytest.mark.parametrize(
    ("kind", "changes", "features", "said"),
    [
        ("embedding", {"backbone": "other (synthetic)"}, None, "holds features of other"),
        ("cls", {}, None, "holds cls features of layer 0; the config asks for embedding"),
        ("cls", {}, "cls", "was trained on embedding features, so that it cannot be scored on features=cls"),
        ("text", {}, None, "holds text; the config asks for embedding"),
    ],
)
def test_another_backbone_or_place_is_refused(run, tmp_path, kind, changes, features, said):
    other = given(tmp_path / "others", kind, 11, **changes)
    with pytest.raises(ValueError, match=said):
        score(run, data=other, features=features)
    assert {row["data"] for row in read_rows(run, data=None)} == {""}


def test_another_width_is_refused(run, tmp_path):
    other = given(tmp_path / "others", "embedding", 11)
    for split in ("train", "val", "test"):
        fill_store(tmp_path / "wide" / split, torch.randn(30, 1, 7), 30, kind="embedding", layer=None, grid=(1, 1),
                   split=split, backbone="none (synthetic)")  # fmt: skip
        other[split] = str(tmp_path / "wide" / split)
    with pytest.raises(ValueError, match="Evaluate it on a store of its own backbone"):
        score(run, data=other)


@pytest.mark.parametrize("since", [5, 6])  # columns that came with protocols and intervals, and other data before
def test_tables_of_before_are_read(run, since):
    values = [row["value"] for row in read_rows(run)]
    old = pq.read_table(run / TABLE).drop_columns(SCHEMA.names[-since:])
    pq.write_table(old, run / TABLE)
    rows = read_rows(run)
    assert repr([row["value"] for row in rows]) == repr(values)
    assert {(row["data"], row["low"]) for row in rows} == {("", None)}


def test_the_closing_table_is_of_the_data_set_that_was_asked_for(run, tmp_path, capsys):
    from sae_lightning.evaluation.printed import print_scores

    texts = given(tmp_path / "captions", "text", 21)
    (run / RESULT).write_text("{}")
    asked = [f"paths.runs={run.parent}", "features=text", "data=store", "data.name=captions",
             *(f"data.{split}={texts[split]}" for split in ("train", "val", "test"))]  # fmt: skip
    cfg = composed("evaluate", *asked)
    assert scored(cfg) == {}
    suite.evaluate(cfg)
    assert scored(cfg) == {run: "captions text"}
    assert scored(composed("evaluate", f"paths.runs={run.parent}")) == {run: ""}
    print_scores([run], cfg, "captions text")
    assert "Scores on the test split of captions text" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
def test_a_run_is_scored_without_its_selection_beside_its_own_scores(run, tmp_path, variant):
    if variant == "batchtopk":
        made, cfg = SAE.load(run), read_cfg(run)
        run = tmp_path / "runs" / variant
        sae = BatchTopK(made.d_in, 40, 3, normalizer=made.normalizer, seed=1)
        sae.set_cuts(torch.full((40,), 0.7))
        sae.save(run, name=variant, backbone=cfg["backbone"], features="embedding", layer=None, k=3, expansion=2,
                 config=cfg["config"])  # fmt: skip
        score(run)
    before, own = repr(read_rows(run)), FeatureStore.open(tmp_path / "pictures" / "test")
    for _ in range(2):
        score(run, inference="relu")
    assert_scores(run, "pictures inference=relu", by_hand(run, own, positive=True))
    other = given(tmp_path / "others", "embedding", 11, shift=0.3)
    score(run, data=other, inference="relu")
    there = FeatureStore.open(tmp_path / "others" / "test")
    assert_scores(run, "others inference=relu", by_hand(run, there, positive=True))
    assert repr(read_rows(run)) == before
    assert {row["data"] for row in read_rows(run, data=None)} - {""} == {
        "pictures inference=relu", "others inference=relu"
    }  # fmt: skip


def test_other_activations_than_a_selection_stay():
    VARIANTS["relu"](6, 12).without_selection()
    with pytest.raises(ValueError, match=r"inference=relu drops the selection .* jumprelu .* leave inference out"):
        VARIANTS["jumprelu"](6, 12).without_selection()
