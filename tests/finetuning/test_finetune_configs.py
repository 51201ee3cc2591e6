"""The presets of fine-tuning: the hyper-parameters of MonoLoss Table 4, and everything composes."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import sae_lightning.settings.resolvers  # noqa: F401  registers a resolver that configs use
from tests.configs import CONF

PRESETS = sorted(path.stem for path in (CONF / "experiment" / "finetune").glob("*.yaml"))
LAMBDAS = "0,0.03,0.05,0.07,0.1"


def load(*overrides: str, hydra: bool = False):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("finetune", list(overrides), return_hydra_config=hydra)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_with_every_model(preset):
    needed = ["data.path=somewhere"] if preset in ("cifar10", "imagenet") else []
    for name in ("resnet50", "clip_vit_b32", "tiny"):
        cfg = load(f"experiment=finetune/{preset}", f"finetune_model={name}", *needed)
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        assert plain["trainer"]["max_epochs"] == plain["epochs"]
        assert plain["optimizer"]["lr"] > 0


@pytest.mark.parametrize(
    ("model", "preset", "lr", "shape", "warmup", "decay"),
    [
        ("resnet50", "imagenet", 1e-3, "cosine", 5, 2e-5),
        ("resnet50", "cifar10", 1e-1, "cosine", 0, 2e-5),
        ("resnet50", "cifar100", 1e-1, "cosine", 0, 2e-5),
        ("clip_vit_b32", "imagenet", 1e-2, "constant", 0, 1e-4),
        ("clip_vit_b32", "cifar10", 1e-2, "constant", 0, 1e-4),
        ("clip_vit_b32", "cifar100", 1e-2, "constant", 0, 1e-4),
    ],
)
def test_table_4(model, preset, lr, shape, warmup, decay):
    cfg = load(f"experiment=finetune/{preset}", f"finetune_model={model}", hydra=True)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.optimizer.momentum) == (lr, decay, 0.9)
    assert (cfg.schedule.shape, cfg.schedule.warmup_epochs) == (shape, warmup)
    assert (cfg.epochs, cfg.batch_size, cfg.layer) == (90, 1024, "added")
    assert cfg.hydra.sweeper.params.mono_weight == LAMBDAS
    assert cfg.trainer.gradient_clip_val is None
    assert cfg.data.get("val_share", cfg.data.get("held_out")) == 0.0


def test_similarity_is_clip_b32_or_its_tiny_stand_in():
    assert (load().similarity.size, load().similarity.name) == ("tiny", "clip")
    published = load("data=folder", "data.path=x").similarity
    assert (published.size, published.published.model) == ("published", "openai/clip-vit-base-patch32")
    assert load("backbone@similarity=dinov2", "features=cls").similarity.name == "dinov2"


def test_lora_is_that_of_appendix_e():
    lora = load("finetune_model=clip_vit_b32").model.lora
    assert (lora.r, lora.alpha, list(lora.targets)) == (16, 32, ["q_proj", "v_proj"])
