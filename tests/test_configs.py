"""Every file under conf/ composes, and says what the code expects."""

from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import sae_lightning.settings.resolvers  # noqa: F401  registers a resolver that configs use
from sae_lightning.apps.app import OURS
from sae_lightning.data import data_source
from sae_lightning.evaluation.similarity import SimilarityEncoder
from sae_lightning.metrics.part import parts_of
from sae_lightning.runs.identity import run_name
from sae_lightning.saes import VARIANTS
from sae_lightning.saes.losses import TERMS
from sae_lightning.settings import mistakes
from sae_lightning.training.loggers import KINDS
from tests.configs import composed

CONF = Path(__file__).resolve().parents[1] / "conf"
OTHER = ("metrics", "app", "vlm")  # groups of other roots, which have tests of their own
GROUPS = sorted(p.relative_to(CONF) for p in CONF.glob("*/*.yaml") if p.parent.name not in OTHER)
APPS = sorted(p.stem for p in CONF.glob("app/*.yaml"))
VLMS = sorted(p.stem for p in CONF.glob("vlm/*.yaml"))
METRICS = sorted(p.stem for p in CONF.glob("metrics/*.yaml"))
ROOTS = sorted(p.stem for p in CONF.glob("*.yaml"))


def load(*overrides: str, root: str = "config"):
    return composed(root, *overrides)


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_every_choice_composes_and_resolves(path):
    group, name = path.parent.as_posix(), path.stem
    needed = ["data.path=somewhere"] if name in ("cifar10", "folder", "imagenet", "openimages", "webdataset") else []
    needed += ["data.id=someone/something"] if name == "hf" else []
    needed += ["data.train=somewhere"] if name in ("store", "features") else []
    needed += ["data=features"] if path.as_posix() == "backbone/features.yaml" else []
    needed += ["backbone.published.model=some/model"] if name in ("timm", "transformers") else []
    root = "finetune" if group == "finetune_model" else "config"
    cfg = load(f"{'scale@data' if group == 'scale' else group}={name}", *needed, root=root)
    assert mistakes("finetune" if root == "finetune" else "train", cfg) == []  # settings/table.py knows every key
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert plain["data"]["source"] in (*data_source, "store")
    assert set(plain["logger"]) <= set(KINDS)
    if root == "config":
        assert plain["sae"]["name"] in VARIANTS
        assert set(plain["loss"]) <= set(TERMS)
        assert name == "features" or plain["backbone"]["size"] in ("tiny", "published")


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_composes(root):
    assert OmegaConf.to_container(load(root=root), resolve=True)


@pytest.mark.parametrize("name", METRICS)
def test_every_choice_of_metrics_names_parts_and_usable_data_sets(name):
    run = load()
    cfg = load(f"metrics={name}", root="evaluate")
    assert mistakes("evaluate", cfg) == []
    parts = parts_of(cfg.metrics)
    assert parts[0].name == "core"
    for part in parts:
        if "data" in part.options:
            run.data = part.options["data"]
            assert OmegaConf.to_container(run.data, resolve=True)["source"] in data_source
        if part.encoder is not None:
            assert not SimilarityEncoder(**part.encoder(run, part.options)).own


def test_every_application_has_its_options_and_its_code():
    assert sorted(OURS) == APPS
    for name in APPS:
        cfg = load(f"app={name}", root="explore")
        assert cfg.app.name == name
        assert mistakes("explore", cfg) == []
        assert callable(import_module(f"sae_lightning.apps.{name}.app").run)


@pytest.mark.parametrize("name", VLMS)
@pytest.mark.parametrize("app", ["steering", "explorer"])
def test_every_vision_language_model_fits_where_one_is_asked_for(app, name):
    cfg = load(f"app={app}", f"vlm@app.vlm={name}", root="explore")
    assert mistakes("explore", cfg) == []
    vlm = cfg.app.vlm
    assert OmegaConf.to_container(vlm, resolve=True, throw_on_missing=True)["name"] == name


def test_data_decides_the_backbones_size_and_k():
    demo, own = load("backbone=clip"), load("data=folder", "data.path=x", "backbone=clip")
    assert (demo.backbone.size, demo.k) == ("tiny", 16)
    assert (own.backbone.size, own.k, own.backbone.published.layer) == ("published", 64, 11)
    assert load("k=64").sae.settings.k == 64


# MSAE, App. B: the settings of its tables
MSAE = {
    "msae": ("msae", 1e-4, 64), "msae/relu": ("relu", 5e-5, None), "msae/topk": ("topk", 5e-4, 32),
    "msae/batchtopk": ("batchtopk", 5e-4, 16), "msae/low": ("msae", 1e-4, 128), "msae/softcap": ("msae", 1e-4, 64),
}  # fmt: skip


@pytest.mark.parametrize("name", MSAE)
@pytest.mark.parametrize(("expansion", "epochs"), [(8, 30), (16, 30), (32, 20)])
def test_the_settings_of_msae(name, expansion, epochs):
    sae, lr, k = MSAE[name]
    more = [f"k={k}"] if name in ("msae/topk", "msae/batchtopk") else []
    cfg = load(f"experiment={name}", "data=imagenet", "data.path=x", f"expansion={expansion}", *more)
    found = cfg.optimizer.name, cfg.optimizer.lr, cfg.batch_size, cfg.trainer.max_epochs, cfg.features, cfg.sae.name
    assert found == ("adam", lr, 4096, epochs, "embedding", sae)
    assert (cfg.sae.settings.encoder_norm, cfg.loss.aux, cfg.schedule.decay, cfg.schedule.warmup) == (0.1, 0, 0, 0)
    assert cfg.sae.settings.get("k") == k
    if name == "msae/relu":
        assert (cfg.sae.target_l0, cfg.loss.sparsity, cfg.loss_options.sparsity) == (
            None,
            0.03,
            {"decoder_norms": False},
        )
    if name == "msae/low":
        assert cfg.sae.settings.ks == [128, 256]


@pytest.mark.parametrize("name", ["ms_score", "ms_score/sparsity"])
def test_the_settings_of_ms_score(name):
    cfg = load(f"experiment={name}", "data=imagenet", "data.path=x")
    found = cfg.backbone.name, cfg.backbone.layer, cfg.k, cfg.batch_size, cfg.trainer.max_steps, cfg.optimizer.name
    assert found == ("clip_l14", 22, 20, 4096, 100_000, "adam")
    assert (cfg.loss.aux, cfg.schedule.decay, cfg.sae.settings.get("fractions")) == (0, 0, None)
    assert list(load("sae=matryoshka").sae.settings.fractions) == [0.0625, 0.1875, 0.4375, 1]


def test_a_missing_path_is_named():
    with pytest.raises(Exception, match=r"data\.path"):
        OmegaConf.to_container(load("data=folder"), throw_on_missing=True)


def test_unknown_keys_are_refused():
    with pytest.raises(Exception, match="exspansion"):
        load("exspansion=8")


# Appendix B of MonoLoss: λ on Open Images and on ImageNet, for CLIP, SigLIP2 and the supervised ViT
LAMBDAS = {
    "topk": ((0.5, 0.3, 0.9), (0.09, 0.14, 0.09)),
    "batchtopk": ((5e-4, 2e-4, 7e-4), (3e-4, 1e-4, 4e-4)),
    "vanilla": ((1e-4, 3e-5, 1e-4), (1e-4, 3e-5, 9e-5)),
    "jumprelu": ((5e-4, 1e-4, 5e-4), (5e-4, 1e-4, 7e-4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("sae", LAMBDAS)
@pytest.mark.parametrize(
    "encoders", [("clip_l14_datacomp", "siglip2_so400m", "vit_l16"), ("clip_l14", "siglip2", "vit_l16")]
)
def test_the_settings_of_monoloss(sae, encoders):
    for data, weights in zip(("openimages", "imagenet"), LAMBDAS[sae], strict=True):
        for backbone, weight in zip(encoders, weights, strict=True):
            choice = [f"experiment=monoloss/{sae}", f"data={data}", "data.path=x", f"backbone={backbone}"]
            cfg = load(*choice)
            assert (cfg.callbacks.monoloss.weight, cfg.callbacks.monoloss.memory) == (weight, 0)
            assert (cfg.d_sae, cfg.batch_size, cfg.trainer.max_epochs) == (8192, 2048, 50)
            assert (cfg.optimizer.lr, cfg.optimizer.eps) == (1e-4, 6.25e-10)
            assert cfg.sae.settings.input_norm == "unit"
            assert cfg.features == ("pooled" if backbone == "vit_l16" else "embedding")
        without, name = run_name(load(*choice, "callbacks=default"), {}), run_name(cfg, {})  # of the last encoder
        assert without.split("-")[3:] != name.split("-")[3:]
        assert "monoloss" not in without


@pytest.mark.parametrize("name", ["demo", "cifar10", "memory"])
def test_experiments_with_monoloss(name):
    cfg = load(f"experiment=monoloss/{name}", *(["data.path=x"] if name == "cifar10" else []))
    assert "_target_" in OmegaConf.to_container(cfg, resolve=True)["callbacks"]["monoloss"]
