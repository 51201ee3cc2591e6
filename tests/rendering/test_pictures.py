"""Thumbnails, overlays, strips and curves of the report."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from sae_lightning.rendering.pictures import DARK, GAP, LARGEST, SILENT, WARM, overlay, strip, thumbnail
from sae_lightning.report.figures import read_history, training_curves
from sae_lightning.report.page import build


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("size", "side"), [((32, 32), 32), ((50, 20), 20), ((300, 200), LARGEST)])
def test_thumbnails_are_small_squares(size, side):
    assert thumbnail(noise(*size)).size == (side, side)


def test_overlay_keeps_colours_and_outlines_the_patches_that_fire():
    image = Image.new("RGB", (32, 32), (200, 120, 60))
    activation = np.zeros((8, 8))
    activation[2, 5] = activation[3, 5] = 3.0  # one region of two patches
    activation[6, 1] = 1e-3
    shown = np.asarray(overlay(image, activation)).astype(int)  # three times as large: 12 pixels a patch
    assert shown.shape == (96, 96, 3)
    assert shown[30, 66].tolist() == shown[36, 66].tolist() == [200, 120, 60]  # inside, and between its patches
    for y, x in ((24, 66), (47, 66), (30, 60), (30, 71), (72, 17)):
        assert tuple(shown[y, x]) == WARM
    for y, x in ((23, 66), (48, 66), (30, 59), (30, 72), (71, 17)):
        assert tuple(shown[y, x]) == DARK
    assert shown[5, 5].tolist() == [int(SILENT * c) for c in (200, 120, 60)]
    assert not (np.asarray(overlay(image, np.zeros((8, 8)))) == WARM).all(-1).any()


def test_overlay_of_all_patches_is_the_picture_in_a_frame():
    shown = np.asarray(overlay(noise(100, 100), np.ones((7, 7))))
    assert (shown[1:-1, 1:-1] == np.asarray(noise(100, 100))[1:-1, 1:-1]).all()
    assert (shown[0] == WARM).all()


@pytest.mark.parametrize(("columns", "places", "size"), [
    (0, [(0, 0), (0, 96 + GAP), (0, 2 * (96 + GAP))], (96, 3 * 96 + 2 * GAP)),
    (2, [(0, 0), (0, 96 + GAP), (96 + GAP, 0)], (2 * 96 + GAP, 2 * 96 + GAP)),
])  # fmt: skip
def test_strip_puts_images_side_by_side_and_in_lines(columns, places, size):
    colours = [(200, 30, 30), (1, 2, 200), (20, 160, 30)]
    uri = strip([Image.new("RGB", (32, 32), colour) for colour in colours], columns)
    assert uri.startswith("data:image/webp;base64,")
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGBA")).astype(int)
    assert sheet.shape == (*size, 4)
    for (y, x), colour in zip(places, colours, strict=True):
        assert np.abs(sheet[y + 4 : y + 92, x + 4 : x + 92, :3] - colour).mean() < 5
    assert sheet[8:88, 96 : 96 + GAP, 3].max() < 128 < sheet[8:88, 4:92, 3].min()


def test_history_skips_empty_cells(tmp_path):
    (tmp_path / "history.csv").write_text("step,epoch,train/l0,val/fvu\n25,0,16.0,\n50,0,,0.25\n75,1,15.5,\n")
    found = {name: column.dropna().to_dict() for name, column in read_history(tmp_path).items()}
    assert found == {"train/l0": {25: 16.0, 75: 15.5}, "val/fvu": {50: 0.25}}
    assert list(read_history(tmp_path / "none")) == []
    assert training_curves([{"folder": tmp_path, "label": "a run"}]).startswith("<svg")


def test_runs_without_scores_or_top_images_are_named(tmp_path):
    bare, half = tmp_path / "bare", tmp_path / "half"
    bare.mkdir()
    half.mkdir()
    (half / "scores.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no scores yet: bare, half\. Run evaluate\.py"):
        build([bare, half], tmp_path / "report.html")
