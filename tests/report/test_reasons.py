"""A figure that could not be computed reads – on every page and in every table, and the reason is at hand."""

import math

from sae_lightning.metrics.base import Score
from sae_lightning.rendering.page import Section, page
from sae_lightning.report.benchmark import Scored, main_columns, table
from sae_lightning.report.monoloss import shown
from sae_lightning.runs.scores import put_scores, read_rows

WHY = "no latent has 5 images"


def scored(folder) -> Scored:
    put_scores(folder, "moran", "test", "1", [Score("moran", math.nan, why=WHY)])
    put_scores(folder, "core", "test", "1", [Score("fvu", 0.25)])
    run = {"cfg": {"backbone": "clip (tiny)", "variant": "topk", "d_sae": 40}, "features": "L4", "weight": 0.0,
           "label": "clip · topk", "name": folder.name}  # fmt: skip
    return Scored(run, read_rows(folder))


def test_a_cell_reads_dash_with_the_reason(tmp_path):
    shown_table = table([scored(tmp_path)], main_columns(), {})
    (line,) = shown_table.view()["lines"]
    cells = {column.metric: cell for column, cell in zip(main_columns(), line[1:], strict=True)}
    assert (cells["moran"]["text"], cells["moran"]["why"]) == ("–", WHY)
    assert (cells["fvu"]["text"], cells["fvu"]["why"]) == ("0.250", "")
    assert (cells["preservation"]["text"], cells["preservation"]["why"]) == ("–", "not scored, or not of such features")
    html = page("t", [], [Section("s", shown_table)])
    assert f'<td title="{WHY}">–</td>' in html
    assert "<td>0.250</td>" in html


def test_means_over_seeds_of_nothing_read_dash():
    assert shown((math.nan, math.nan, 2)) == "–"
    assert shown((0.25, None, 1), sign=True) == "+0.250"
