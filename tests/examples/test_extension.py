"""The package in ``examples/extension``, as pip would install it, beside ours: train, evaluate, report."""

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from sae_lightning.backbones.backbone import backbone_library
from sae_lightning.backbones.registry import load_backbone
from sae_lightning.commands.main import main
from sae_lightning.metrics.part import PARTS
from sae_lightning.runs.run import find_runs
from sae_lightning.runs.scores import read_rows, value_of
from sae_lightning.saes import VARIANTS

ROOT = Path(__file__).resolve().parents[2] / "examples" / "extension"
CONFIGS = "hydra.searchpath=[pkg://sae_extension.conf]"


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """The package on the path with its entry points, in an empty folder; what it registered is gone afterwards."""
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    about = tmp_path / "installed" / "sae_extension-0.1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sae-extension\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in points.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))
    for path in (about.parent, ROOT):
        monkeypatch.syspath_prepend(str(path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for plugin in entry_points(group="sae_lightning.plugins"):
        plugin.load()
    yield tmp_path / "here"
    for registry, name in ((VARIANTS, "mp"), (PARTS, "coherence"), (backbone_library, "torchvision")):
        registry.pop(name, None)
    for name in [name for name in sys.modules if name.split(".")[0] == "sae_extension"]:
        del sys.modules[name]


def command(monkeypatch, name: str, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sae-lightning"])
    assert main([name, *words]) == 0


@pytest.mark.slow
def test_it_trains_evaluates_and_reports(extension, monkeypatch, capsys):
    small = ("+data.limit=48", "expansion=2", "k=3", "batch_size=512", "trainer.max_epochs=2",
             "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")  # fmt: skip
    command(monkeypatch, "train", "-m", CONFIGS, "sae=mp,topk", *small)
    command(monkeypatch, "evaluate", CONFIGS, "metrics=extension", "split=val")
    assert "M8 coherence" in capsys.readouterr().out
    runs = find_runs("*", extension / "runs")
    assert sorted(json.loads((run / "cfg.json").read_text())["variant"] for run in runs) == ["mp", "topk"]
    for run in runs:
        weights = torch.nn.functional.normalize(_sae(run).W_dec.detach(), dim=1)
        cosines = (weights @ weights.T).abs().fill_diagonal_(0).amax(1)
        assert value_of(read_rows(run), "coherence") == pytest.approx(float(cosines.mean()), rel=1e-4)
    command(monkeypatch, "report")
    assert "M8 coherence" in (extension / "reports" / "report.html").read_text()


def _sae(run: Path):
    from sae_lightning.saes import SAE

    return SAE.load(run)


@pytest.mark.slow
def test_its_codes_are_those_of_overcomplete(extension, monkeypatch):
    if not hasattr(matplotlib.cm, "get_cmap"):  # which overcomplete asks for when it is imported
        monkeypatch.setattr(matplotlib.cm, "get_cmap", matplotlib.colormaps.__getitem__, raising=False)
    peer = pytest.importorskip("overcomplete.sae").MpSAE(12, 30, k=4)
    mine = VARIANTS["mp"](12, 30, k=4, seed=0)
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    rows = torch.nn.functional.normalize(mine.W_dec.detach(), dim=1)
    peer.get_dictionary = lambda: rows.requires_grad_()
    expected = peer.encode(x)[1]
    assert torch.allclose(mine.encode(x).to_dense(), expected, atol=1e-5)
    ((x - mine.decode(mine.encode(x))) ** 2).sum().backward()
    ((x - expected @ rows) ** 2).sum().backward()
    assert torch.allclose(mine.W_dec.grad, rows.grad, atol=1e-4)


def test_its_encoder_gives_the_maps_of_torchvision(extension):
    from torchvision.models import resnet18

    node = {"name": "resnet18", "size": "published", "layer": 2,
            "published": {"library": "torchvision", "model": "resnet18", "pretrained": False}}  # fmt: skip
    backbone = load_backbone(node)
    assert (backbone.depth, backbone.grid, backbone.d_in) == (4, (14, 14), 256)
    model = resnet18().eval()
    model.load_state_dict(backbone.model.state_dict(), strict=False)
    picture = np.random.default_rng(0).integers(0, 255, (300, 260, 3), dtype=np.uint8)
    from PIL import Image

    x = backbone.transform(Image.fromarray(picture))[None]
    expected = model.layer3(model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))))
    from sae_lightning.backbones.taps import Tap

    found = backbone.forward_features(x, [Tap("patch", 2)])[Tap("patch", 2)]
    assert torch.allclose(found, expected.flatten(2).transpose(1, 2), atol=1e-5)
