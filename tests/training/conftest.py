"""A folder of generated pictures and configs that train on it with a bundled tiny backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """``train``, ``val`` and ``test`` with two classes of noisy stripes, 32 + 8 + 8 pictures."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in {"train": 32, "val": 8, "test": 8}.items():
        for label in ("rows", "columns"):
            (root / split / label).mkdir(parents=True)
            for i in range(count // 2):
                pixels = rng.integers(0, 256, (32, 32, 3))
                stripes = np.arange(32) // rng.integers(2, 6) % 2 * 120
                pixels = pixels // 2 + (stripes[:, None, None] if label == "rows" else stripes[None, :, None])
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{i}.png")
    return root


@pytest.fixture
def config(pictures, tmp_path, tmp_path_factory):
    """``config(*overrides)``: a composed config on the pictures; stores are shared, runs are the test's own."""
    stores = tmp_path_factory.getbasetemp() / "training-stores"

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(
                "config",
                [
                    "data=folder", f"data.path={pictures}", "backbone=deit", "backbone.size=tiny", "k=8", "expansion=2",
                    "batch_size=256", "trainer.accelerator=cpu", "trainer.max_epochs=3", "dead_after=1000",
                    "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=2",
                    f"paths.stores={stores}", f"paths.runs={tmp_path / 'runs'}", *overrides,
                ],
            )  # fmt: skip

    return make
