"""Extraction: once for all who want it, resumable after a kill, and bound to what made it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from sae_lightning.backbones import load_backbone
from sae_lightning.data import load_images
from sae_lightning.features.ensure import ensure_store, plain
from sae_lightning.features.store import StoreError

ROOT = Path(__file__).resolve().parents[2]

ENSURE = """
import sys
from omegaconf import OmegaConf
from sae_lightning.features import extract
cfg = OmegaConf.load(sys.argv[1])
inner = extract.extract
def counted(*args, **kwargs):
    print("EXTRACTING", flush=True)
    inner(*args, **kwargs)
extract.extract = counted
print(len(extract.ensure_store(cfg, "train")), flush=True)
"""


def pictures(folder: Path, n: int) -> Path:
    rng = np.random.default_rng(0)
    for i in range(n):
        for split in ("train", "val", "test"):
            target = folder / split / ("even", "odd")[i % 2] / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(target)
    return folder


def config(folder: Path, root: Path, *overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(
            "config",
            [
                "data=folder", f"data.path={folder}", "backbone=mae", "backbone.size=tiny",
                "extract.batch_size=4", "extract.images_per_shard=4", f"paths.stores={root / 'stores'}", *overrides,
            ],
        )  # fmt: skip


def test_the_store_holds_what_the_backbone_gives(tmp_path):
    cfg = config(pictures(tmp_path / "p", 10), tmp_path)
    store = ensure_store(cfg, "train")
    images, backbone = load_images(plain(cfg.data), "train"), load_backbone(plain(cfg.backbone))
    x = torch.stack([backbone.transform(images[i]) for i in range(len(images))])
    expected = backbone.forward_features(x)
    torch.testing.assert_close(store.features(slice(None)).float(), expected["patch"], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(store.pooled(slice(None)).float(), expected["pooled"], rtol=2e-3, atol=2e-3)
    assert store.image_ids == images.image_ids
    assert (store.backbone, store.layer, store.grid) == ("mae (tiny)", 4, (8, 8))
    assert len(store.manifest.shards) == 3
    store.verify()


def test_another_layer_other_pictures_or_split_are_another_store(tmp_path):
    folder = pictures(tmp_path / "p", 6)
    base = ensure_store(config(folder, tmp_path), "train")
    assert ensure_store(config(folder, tmp_path), "train").folder == base.folder
    layer = ensure_store(config(folder, tmp_path, "backbone.layer=2"), "train")
    val = ensure_store(config(folder, tmp_path), "val")
    Image.new("RGB", (32, 32)).save(folder / "train" / "even" / "0.png")
    changed = ensure_store(config(folder, tmp_path), "train")
    assert len({base.folder, layer.folder, val.folder, changed.folder}) == 4
    assert len({base.fingerprint, layer.fingerprint, val.fingerprint, changed.fingerprint}) == 4


def test_a_store_under_a_wrong_name_is_refused(tmp_path):
    folder = pictures(tmp_path / "p", 6)
    base, val = (ensure_store(config(folder, tmp_path), s) for s in ("train", "val"))
    for path in base.folder.iterdir():
        path.write_bytes((val.folder / path.name).read_bytes())
    with pytest.raises(StoreError, match="made from other images"):
        ensure_store(config(folder, tmp_path), "train")


def start(cfg, tmp_path, *prefix):
    from omegaconf import OmegaConf

    path = tmp_path / "cfg.yaml"
    OmegaConf.save(cfg, path, resolve=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", ENSURE, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_a_killed_extraction_leaves_nothing_that_looks_whole_and_resumes(tmp_path):
    cfg = config(pictures(tmp_path / "p", 600), tmp_path)
    process = start(cfg, tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("stores/**/shard-00003.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the extraction ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("stores/**/manifest.json"))
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("stores/**/shard-0000[0-3].safetensors")}
    assert len(kept) == 4
    store = ensure_store(cfg, "train")
    store.verify()
    assert len(store) == 600
    assert [(store.folder / p.name).stat().st_mtime_ns for p in kept] == list(kept.values())


@pytest.mark.slow
def test_two_jobs_extract_once(tmp_path):
    cfg = config(pictures(tmp_path / "p", 100), tmp_path)
    jobs = [start(cfg, tmp_path) for _ in range(2)]
    outputs = [job.communicate(timeout=200)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert "".join(outputs).count("EXTRACTING") == 1
    assert all(o.strip().endswith("100") for o in outputs)


def test_unknown_precision_is_refused(tmp_path):
    cfg = config(pictures(tmp_path / "p", 2), tmp_path, "extract.precision=8")
    with pytest.raises(StoreError, match=r"extract\.precision=8"):
        ensure_store(cfg, "train")
