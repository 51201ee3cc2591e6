"""The contenders of the MonoScore benchmark compute the same scores, so that their times can be compared."""

import pytest
import torch

from experiments.bench import monoscore as bench
from experiments.bench.timing import Row


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in {"D": 16, "D_SAE": 96, "K": 8, "BATCH": 32}.items():
        monkeypatch.setattr(bench, name, value)


@pytest.mark.parametrize("n", [20, 32, 128, 256])
def test_all_forms_agree(n):
    made = bench.make_batches(n, "cpu")
    found = {name: build(made, n)().float() for name, build in bench.CONTENDERS.items()}
    for name, scores in found.items():
        torch.testing.assert_close(scores, found["ours"], rtol=1e-3, atol=1e-3, msg=name)
    bench.check({name: build(made, n) for name, build in bench.CONTENDERS.items()})


def test_a_contender_that_computes_something_else_is_refused():
    made = bench.make_batches(32, "cpu")
    with pytest.raises(RuntimeError, match="other differs from ours"):
        bench.check({"ours": bench.ours(made, 32), "other": lambda: torch.zeros(96)})


def test_the_plot_is_written(tmp_path):
    rows = [Row(f"score N{n}", name, n, n, n, 5.0) for n in (10, 100) for name in ("ours", "linear")]
    bench.plot([*rows, Row("step topk 32", "ours", 1, 1, 1)], str(tmp_path / "new" / "plot.png"))
    assert (tmp_path / "new" / "plot.png").stat().st_size > 1000
