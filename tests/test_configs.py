"""Every file under conf/ composes, and says what the code expects."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import sae_lightning.backbones  # noqa: F401  registers a resolver that configs use
from sae_lightning.data import SOURCES
from sae_lightning.saes import VARIANTS
from sae_lightning.saes.losses import TERMS
from sae_lightning.training.loggers import KINDS

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = sorted(p.relative_to(CONF) for p in CONF.glob("*/*.yaml"))
ROOTS = sorted(p.stem for p in CONF.glob("*.yaml"))


def load(*overrides: str, root: str = "config"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(root, list(overrides))


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_every_choice_composes_and_resolves(path):
    group, name = path.parent.as_posix(), path.stem
    prefix = "+" if group == "experiment" else ""
    needed = ["data.path=somewhere"] if name in ("cifar10", "folder", "imagenet", "webdataset") else []
    needed += ["data.id=someone/something"] if name == "hf" else []
    needed += ["data.train=somewhere"] if name == "store" else []
    needed += ["backbone.published.model=some/model"] if name in ("timm", "transformers") else []
    root = "finetune" if group == "finetune_model" else "config"
    cfg = load(f"{prefix}{group}={name}", *needed, root=root)
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert plain["data"]["source"] in (*SOURCES, "store")
    assert plain["logger"]["kind"] in KINDS
    if root == "config":
        assert plain["sae"]["name"] in VARIANTS
        assert set(plain["loss"]) <= set(TERMS)
        assert plain["backbone"]["size"] in ("tiny", "published")


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_composes(root):
    assert OmegaConf.to_container(load(root=root), resolve=True)


def test_data_decides_the_backbones_size_and_k():
    demo, own = load("backbone=clip"), load("data=folder", "data.path=x", "backbone=clip")
    assert (demo.backbone.size, demo.k) == ("tiny", 16)
    assert (own.backbone.size, own.k, own.backbone.published.layer) == ("published", 64, 11)
    assert load("k=64").sae.settings.k == 64


def test_a_missing_path_is_named():
    with pytest.raises(Exception, match=r"data\.path"):
        OmegaConf.to_container(load("data=folder"), throw_on_missing=True)


def test_unknown_keys_are_refused():
    with pytest.raises(Exception, match="exspansion"):
        load("exspansion=8")
