"""The contenders of the evaluation's benchmark find the same figures, so that their times can be compared."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from experiments.bench import dense_evaluation
from experiments.bench import evaluate as bench


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """45 images of a small world and an SAE, some of whose latents fire on few of them or on none."""
    sizes = {"D": 32, "K": 3, "GRID": (5, 4), "CLASSES": 6, "DIRECTIONS": 64, "THINGS": 6, "OWN": 4}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(bench, name, value)
        root = tmp_path_factory.mktemp("bench")
        found = bench.Task(str(root), 96, 45)
        bench.save_sae(found.run, bench.write_store(root / "store", 50, per_shard=20), found.d_sae)
        yield found


@pytest.mark.parametrize("name", [name for name in bench.CONTENDERS if name.startswith("dense")])
@pytest.mark.parametrize(("block", "waiting"), [(1, 1), (3 * 20 * 96, 13), (1 << 21, 64)])
def test_dense_contenders_agree_with_ours(task, tmp_path, monkeypatch, name, block, waiting):
    monkeypatch.setattr(dense_evaluation, "BLOCK", block)
    monkeypatch.setattr(dense_evaluation, "WAITING", waiting)
    found = {key: bench.CONTENDERS[key](task, tmp_path) for key in ("ours", name)}
    assert bench.check(found)["ours"] == 0
    figures = found["ours"].scores
    assert set(found[name].scores) == set(figures)
    assert 0 < figures["moran"] < 1
    assert 0 < figures["moran_evaluable"] < 1
    assert 0 < figures["fvu"] < 1
    assert figures["l0"] == pytest.approx(3, rel=0.1)
    assert 0 < figures["monosemanticity"] < 1
    if not name.endswith("bf16"):
        codes, expected = (each.codes().toarray() for each in (found[name], found["ours"]))
        np.testing.assert_allclose(codes, expected, atol=1e-5)


@pytest.mark.parametrize("figure", ["moran", "fvu", "l0", "monosemanticity"])
@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_another_figure_is_refused(task, tmp_path, figure, wrong):
    ours = bench.ours(task, tmp_path)
    other = ours._replace(scores=ours.scores | {figure: ours.scores[figure] * wrong})
    with pytest.raises(RuntimeError, match=f"other differs from ours by .* in {figure}"):
        bench.check({"ours": ours, "other": other})


@pytest.mark.parametrize("array", ["raw", "rebuilt", "codes"])
def test_another_pooled_array_is_refused(task, tmp_path, array):
    ours = bench.ours(task, tmp_path)
    changed = 1.01 * ours.codes() if array == "codes" else 1.01 * getattr(ours, array)
    other = ours._replace(**{array: (lambda: changed) if array == "codes" else changed})
    with pytest.raises(RuntimeError, match=f"other differs from ours by .* in {array}"):
        bench.check({"ours": ours, "other": other})


def test_two_saes_share_a_stream(task, tmp_path):
    first, second = bench.streamed(task, tmp_path / "two", 2)
    figures = bench.ours(task, tmp_path / "one").scores
    assert bench.scored(task, first).scores == bench.scored(task, second).scores == figures


def test_images_of_a_class_are_alike(task):
    judge = torch.nn.functional.normalize(task.judge(), dim=1)
    same = (torch.arange(45)[:, None] - torch.arange(45)) % bench.CLASSES == 0
    cosines = judge @ judge.T
    assert cosines[same].mean() > cosines[~same].mean() + 0.3


def test_peak_memory_is_printed(task, capsys):
    threads = torch.get_num_threads()
    bench.measure(json.dumps(["ours", asdict(replace(task, images=10)), threads]))
    assert json.loads(capsys.readouterr().out)["peak_mb"] >= 0
