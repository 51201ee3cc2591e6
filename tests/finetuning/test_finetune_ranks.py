"""DDP on two CPU processes: equal to one process, inside a multirun too."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_lightning.finetuning.fit import finetune
from tests.processes import run

pytestmark = pytest.mark.slow


def test_two_ranks_equal_one(settings, tmp_path):
    """MonoLoss and its gradient are those of the global batch; in float64, so that sums' order does not matter."""
    choice = ["trainer.precision=64-true", "mono_weight=1.0", "epochs=2"]
    folders = {
        n: finetune(settings(*choice, f"trainer.devices={n}", f"paths.runs={tmp_path / str(n)}")) for n in (1, 2)
    }
    assert folders[1].name == folders[2].name
    one, two = (load_file(folders[n] / "model.safetensors") for n in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    results = [json.loads((folders[n] / "result.json").read_text()) for n in (1, 2)]
    assert [r["devices"] for r in results] == [1, 2]
    for name, value in results[0]["test"].items():
        assert results[1]["test"][name] == pytest.approx(value, rel=1e-6), name
    rows = [(folders[n] / "history.csv").read_text().splitlines() for n in (1, 2)]
    assert rows[0][0] == rows[1][0]
    for a, b in zip(rows[0][1:], rows[1][1:], strict=True):
        for x, y in zip(a.split(","), b.split(","), strict=True):
            assert (not x and not y) or float(x) == pytest.approx(float(y), rel=1e-5)


def test_a_multirun_of_two_jobs_with_two_ranks_each(settings, pictures, tmp_path):
    cfg = settings()
    command = [
        "finetune.py", "-m", "data=folder", f"data.path={pictures}", "similarity.size=tiny",
        "mono_weight=0,0.1", "epochs=1", "batch_size=8", "model.pretrained=false", "trainer.accelerator=cpu",
        "model.library=timm", "model.model=test_vit", "model.image_size=32",
        "trainer.devices=2", f"paths.stores={cfg.paths.stores}", f"paths.runs={cfg.paths.runs}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    first = run(*command, cwd=tmp_path, COLUMNS="160")
    runs = sorted(Path(cfg.paths.runs).iterdir())
    assert [json.loads((r / "result.json").read_text())["devices"] for r in runs] == [2, 2]
    assert all(r.name in first.stdout for r in runs)
    assert "MonoScore" in first.stdout
    assert (first.stdout + first.stderr).count("Launching 2 jobs") == 1
