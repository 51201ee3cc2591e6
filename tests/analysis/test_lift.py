"""Lifts over random rows, by values written here, and what tables show of them."""

import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_lightning.analysis.lift import lift, lift_table, lifts
from sae_lightning.files import write_json
from sae_lightning.runs.scores import SCHEMA, TABLE

NAN = float("nan")


def row(run, variant, l0, d_sae, purity, M1=NAN, title="dinov2 (tiny)", layer=4.0, data="demo", features="patch"):
    return {"run": run, "variant": variant, "l0": l0, "d_sae": d_sae, "purity": purity, "M1": M1, "title": title,
            "layer": layer, "data": data, "features": features}  # fmt: skip


DRAWN = [
    row("r16", "random", 16.0, 1024, 0.20, 0.30), row("r16 seed 1", "random", 16.1, 1024, 0.22, 0.32),
    row("r17 large", "random", 17.0, 2048, 0.90, 0.9), row("r32", "random", 32.0, 1024, 0.50, 0.5),
    row("r16 of random weights", "random", 16.0, 1024, 0.10, 0.1, title="dinov2 (tiny, random weights)"),
    row("r16 of layer 2", "random", 16.0, 1024, 0.70, 0.7, layer=2.0),
    row("r16 of cifar10", "random", 16.0, 1024, 0.80, 0.8, data="cifar10"),
    row("r, no layer", "random", 16.0, 1024, 0.15, layer=NAN, title="store"),
]  # fmt: skip

CASES = {  # name: (a run, its lift of purity, of M1)
    "the mean over seeds": (row("a", "batchtopk", 16.0, 1024, 0.30, 0.5), 0.09, 0.19),
    "no more than a tenth away": (row("a", "batchtopk", 17.7, 1024, 0.30), 0.09, NAN),
    "too far from 16 and 32": (row("a", "batchtopk", 24.0, 1024, 0.30, 0.5), NAN, NAN),
    "the nearest L0": (row("a", "relu", 31.0, 1024, 0.30, 0.5), -0.2, 0.0),
    "as many latents first": (row("a", "relu", 16.0, 2048, 0.30, 0.5), -0.6, -0.4),
    "the nearest where none has as many": (row("a", "pca", 16.0, 256, 0.30, 0.5), 0.09, 0.19),
    "the same weights": (row("a", "relu", 16.0, 1024, 0.3, 0.5, title="dinov2 (tiny, random weights)"), 0.2, 0.4),
    "the same layer": (row("a", "relu", 16.0, 1024, 0.3, 0.5, layer=2.0), -0.4, -0.2),
    "the same data": (row("a", "relu", 16.0, 1024, 0.3, 0.5, data="cifar10"), -0.5, -0.3),
    "no layer known": (row("a", "relu", 16.0, 1024, 0.3, layer=NAN, title="store"), 0.15, NAN),
    "no random row": (row("a", "relu", 16.0, 1024, 0.3, 0.5, features="cls"), NAN, NAN),
    "a random row itself": (row("a", "random", 16.0, 4096, 0.3, 0.5), NAN, NAN),
    "L0 unknown": (row("a", "relu", NAN, 1024, 0.3, 0.5), NAN, NAN),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lift_is_the_difference_to_the_random_row_of_the_same_features_and_l0(case):
    run, *expected = CASES[case]
    table = pd.DataFrame([run, *DRAWN])
    found = lift(table, ["purity", "M1"])
    assert list(found.index) == list(table.index)
    np.testing.assert_allclose(found.loc[0].to_numpy(float), expected, atol=1e-9)
    assert found.loc[1:].isna().all(axis=None)


def test_the_table_has_runs_with_a_random_row_alone_and_shows_signs():
    made = lifts(pd.DataFrame([*(run for run, *_ in (CASES["the mean over seeds"], CASES["no random row"])), *DRAWN]))
    assert [line[0] for line in made.rows] == ["a"]
    assert [head.title for head in made.heads][-2:] == ["purity", "M1 Moran's I"] or "M1" in made.heads[-1].title
    assert "+0.190" in made.texts()[0]
    assert "+0.090" in made.texts()[0]
    assert lifts(pd.DataFrame([row("a", "relu", 16.0, 1024, 0.3)])) is None


def write(folder, variant, values):
    """A run's folder with what a table of scores reads of it."""
    folder.mkdir(parents=True)
    config = {"backbone": {"name": "dinov2"}, "sae": {"name": variant, "settings": {"k": 16}}}
    write_json(folder / "cfg.json", {
        "schema": 3, "config": config, "data": "demo", "backbone": "dinov2 (tiny)", "features": "patch", "layer": 4,
        "variant": variant, "expansion": 8, "k": 16, "seed": 42, "d_in": 128, "d_sae": 1024,
        "identity": {"sae.name": variant},
    })  # fmt: skip
    rows = [{"run": folder.name, "metric": metric, "setting": "", "value": value, "part": "core", "split": "test",
             "key": "", "why": "", "data": "", "protocol": "paper"} for metric, value in values.items()]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / TABLE)
    return folder


def test_random_rows_in_the_same_folder_are_found(tmp_path):
    trained = write(
        tmp_path / "relu-1", "relu", {"l0": 16.2, "monoscore": 0.5, "purity": 0.3, "explained_variance": 0.9}
    )
    assert lift_table([trained], "test") is None
    write(tmp_path / "random-1", "random", {"l0": 16.0, "monoscore": 0.4, "purity": 0.2, "explained_variance": -0.1})
    made = lift_table([trained], "test")
    assert [line[0] for line in made.rows] == ["relu-1"]
    values = dict(zip([head.title for head in made.heads], made.rows[0], strict=True))
    assert values["MonoScore"] == pytest.approx(0.1)
    assert values["expl. var."] == pytest.approx(1.0)
    assert all(not math.isnan(value) for value in made.rows[0][2:])
    assert lift_table([trained], "val") is None
    assert lift_table([], "test") is None
