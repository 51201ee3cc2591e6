"""Thumbnails, overlays, strips and curves of the report."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from sae_lightning.rendering.pictures import GAP, overlay, strip, thumbnail
from sae_lightning.report.figures import read_history, training_curves
from sae_lightning.report.page import build


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("size", "side"), [((32, 32), 32), ((50, 20), 20), ((300, 200), 96)])
def test_thumbnails_are_small_squares(size, side):
    assert thumbnail(noise(*size)).size == (side, side)


def test_overlay_lights_the_patch_that_fires_and_only_it():
    image = Image.new("RGB", (32, 32), (200, 120, 120))
    activation = np.zeros((8, 8))
    activation[2, 5] = 3.0
    activation[6, 1] = 1.0
    shown = np.asarray(overlay(image, activation, peak=3.0)).astype(int).mean(-1)
    strong, weak, rest = shown[8:12, 20:24], shown[24:28, 4:8], shown[:8]
    assert strong.min() > weak.max() > rest.max()
    assert rest.min() > 0.2 * np.asarray(image).mean()  # still recognisable
    assert len(np.unique(rest)) == 1


def test_strip_puts_images_side_by_side():
    images = [noise(8, 8).resize((32, 32), Image.Resampling.BICUBIC), Image.new("RGB", (32, 32), (1, 2, 200))]
    uri = strip(images)
    assert uri.startswith("data:image/webp;base64,")
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGBA")).astype(int)
    assert sheet.shape == (32, 2 * 32 + GAP, 4)
    for start, image in zip((0, 32 + GAP), images, strict=True):
        assert (
            np.abs(sheet[:, start : start + 32, :3] - np.asarray(image)).mean() < 10
        )  # colour noise is the worst case
    assert sheet[:, 32 : 32 + GAP, 3].max() < 128 < sheet[:, :32, 3].min()


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
