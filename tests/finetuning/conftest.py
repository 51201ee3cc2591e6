"""Configs that fine-tune a very small vision transformer on the small pictures."""

import pytest
from omegaconf import DictConfig

from tests.configs import composed


@pytest.fixture
def settings(pictures, tmp_path, tmp_path_factory):
    """``settings(*overrides)``: a composed config; similarity stores are shared, runs are the test's own."""
    stores = tmp_path_factory.getbasetemp() / "finetuning-stores"

    def make(*overrides: str) -> DictConfig:
        return composed(
            "finetune", "data=folder", f"data.path={pictures}", "similarity.size=tiny", "epochs=3", "batch_size=8",
            "model.name=vit", "model.library=timm", "model.model=test_vit", "model.image_size=32",
            "model.pretrained=false", "optimizer.lr=0.02", "trainer.accelerator=cpu",
            "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=2", f"paths.stores={stores}",
            f"paths.runs={tmp_path / 'runs'}", *overrides,
        )  # fmt: skip

    return make
