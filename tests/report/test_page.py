"""From a training to the page: one whole way on generated pictures, through the public functions."""

import pytest

from sae_lightning.benchmark.evaluate import evaluate_run
from sae_lightning.report.page import build
from sae_lightning.training.run import train


def test_the_page_is_self_contained_and_names_every_run(config, tmp_path):
    runs = [train(config(f"sae={variant}")) for variant in ("batchtopk", "relu")]
    with pytest.raises(FileNotFoundError, match=r"Run evaluate\.py first"):
        build(runs, tmp_path / "page.html")
    scores = [evaluate_run(run) for run in runs]
    page = build(runs, tmp_path / "page.html").read_text()
    for score in scores:
        assert f"{score['metrics']['explained_variance']:.3f}" in page
    assert page.count('<div class="card">') > 20
    assert page.count("data:image/png;base64,") == 2 * page.count('<div class="card">')
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert all(source.startswith("data:") for source in sources)
    assert "href=" not in page.replace("xlink:href=", "").replace('href="#', "")
    assert "8 of 128" in page
    assert "deit (tiny)" in page
