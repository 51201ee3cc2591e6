"""A run's settings, headlines and tasks are found in its files; what it lacks is NaN."""

import json

import numpy as np
import pytest

from sae_lightning.analysis.grid import METRICS, SETTINGS, read_grid, tasks
from sae_lightning.metrics.base import Score
from sae_lightning.runs.scores import put_scores
from sae_lightning.saes.artefact import ArtefactError


def write_run(folder, scores=(), split="test", monoloss=None, **changes):
    cfg = {
        "schema": 2, "variant": "batchtopk", "d_in": 12, "d_sae": 96, "k": 16, "expansion": 8, "seed": 42,
        "backbone": "clip (tiny)", "layer": 4, "data": "demo", "features": "patch",
        "config": {"backbone": {"name": "clip"}, "callbacks": {"monoloss": monoloss} if monoloss else {}},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))
    if scores:
        put_scores(folder, "part", split, "key", [Score(*each) for each in scores])
    return folder


SCORES = [
    ("moran", 0.3), ("fvu", 0.1), ("preservation", 0.9), ("sparse_probing_area", 0.8, "k=128"),
    ("sparse_probing_area", 0.7, "k=64"), ("monosemanticity", 0.2), ("cross_domain_preservation", 0.8, "data=digits"),
    ("cross_domain_preservation", 1.0, "data=dtd"), ("absorption", 0.4, "alpha=0.8,beta=0.5"),
    ("absorption", 0.6, "alpha=0.9,beta=0.5"), ("l0", 15.5), ("dead_share", 0.25),
    ("retrieval_raw", 0.35, "k=1"), ("retrieval_raw", 0.75, "k=5"), ("retrieval_codes", 0.4, "k=1"),
    ("retrieval_lift", 1.1, "k=1"),
    ("segmentation_miou", 0.15, "data=mosaic,input=raw"), ("segmentation_accuracy", 0.9, "data=mosaic,input=raw"),
    ("cross_domain_accuracy_reconstruction", 0.6, "data=digits"),
    ("cross_domain_sparse_probing_auc", 0.95, "data=digits,k=128"),
    ("cross_domain_sparse_probing_auc", 0.5, "data=digits,k=64"),
]  # fmt: skip


def test_each_score_has_its_column(tmp_path):
    table = read_grid([write_run(tmp_path / "a", SCORES)])
    row = table.iloc[0]
    assert tuple(table.columns[: len(SETTINGS)]) == SETTINGS
    assert (row["run"], row["backbone"], row["title"]) == ("a", "clip", "clip (tiny)")
    assert [row[m] for m in METRICS] == pytest.approx([0.3, 0.1, 0.9, 0.8, 0.2, 0.9, 0.4])
    assert (row["l0"], row["dead_share"], row["k"], row["expansion"], row["monoloss"]) == (15.5, 0.25, 16, 8, 0)
    assert dict(row.iloc[len(SETTINGS) + len(METRICS) :]) == {
        "accuracy:digits/reconstruction": 0.6, "probing:digits/codes": 0.95, "retrieval/codes": 0.4,
        "retrieval/raw": 0.35, "segmentation:mosaic/raw": 0.15,
    }  # fmt: skip
    assert tasks(table) == ["accuracy:digits", "probing:digits", "retrieval", "segmentation:mosaic"]
    assert [m for m, (_, better) in METRICS.items() if not better] == ["M2", "M7"]


def test_a_backbone_with_random_weights_is_another_one(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", backbone="clip (tiny, random weights)")]
    assert list(read_grid(runs)["backbone"]) == ["clip", "clip, random weights"]


def test_runs_without_a_score_or_setting_have_nan(tmp_path):
    full, other = write_run(tmp_path / "a", SCORES), write_run(tmp_path / "b", [("fvu", 0.2)])
    plain = write_run(tmp_path / "c", k=None, layer=None)
    table = read_grid([full, other, plain]).set_index("run")
    assert table.loc["b", "M2"] == 0.2
    assert np.isnan(table.loc["b", ["M1", "retrieval/raw", "l0"]].astype(float)).all()
    assert np.isnan(table.loc["c", ["k", "layer", "M2"]].astype(float)).all()


def test_only_the_split_counts(tmp_path):
    run = write_run(tmp_path / "a", [("fvu", 0.2)], split="val")
    assert np.isnan(read_grid([run])["M2"].item())
    assert read_grid([run], "val")["M2"].item() == 0.2


def test_monoloss_is_its_weight_where_it_is_on(tmp_path):
    on = write_run(tmp_path / "on", monoloss={"_target_": "MonoLoss", "weight": 0.03})
    off = write_run(tmp_path / "off", monoloss={"weight": 0.03})
    assert read_grid([on, off])["monoloss"].tolist() == [0.03, 0.0]


def test_no_runs_are_an_empty_table_and_a_strange_folder_an_error(tmp_path):
    assert list(read_grid([]).columns) == [*SETTINGS, *METRICS]
    with pytest.raises(ArtefactError, match=r"no cfg\.json"):
        read_grid([tmp_path])


def test_an_sae_that_was_not_trained_here_is_an_error(tmp_path):
    run = write_run(tmp_path / "foreign")
    cfg = json.loads((run / "cfg.json").read_text())
    del cfg["config"]
    (run / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ArtefactError, match="not trained here"):
        read_grid([run])
