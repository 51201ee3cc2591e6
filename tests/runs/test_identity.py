"""What makes a run another run: every setting but those with a reason, the data, and the encoder."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from sae_lightning.features import source
from sae_lightning.features.source import looking_once
from sae_lightning.finetuning.fit import RULES as FINETUNING
from sae_lightning.runs.identity import ABSENT, RULES, by_value, identity, run_name, same_but
from sae_lightning.saes import VARIANTS
from sae_lightning.saes.losses import TERMS
from sae_lightning.training.module import Schedule
from sae_lightning.training.monoloss import MonoLoss
from sae_lightning.training.optimizer import UnitRowAdam, build_optimizer
from tests.configs import CONF, composed

MONOLOSS = ["+callbacks.monoloss={_target_: sae_lightning.training.monoloss.MonoLoss, weight: 0.3, memory: 0.9}"]

SEEN = {"data.train": "a", "data.val": "b", "backbone": "c", "layer": 4}

EXPERIMENTS = [
    path.relative_to(CONF / "experiment").with_suffix("") for path in sorted((CONF / "experiment").rglob("*.yaml"))
]

NEEDED = [
    ("data=hf", "data.id=x"), ("backbone=timm", "backbone.published.model=x"),
    ("backbone=transformers", "backbone.published.model=x"),
    *((f"experiment=monoloss/{name}", more) for name in ("batchtopk", "jumprelu", "topk", "vanilla")
      for more in ("data=imagenet", "backbone=clip_l14")),
]  # fmt: skip


def choices():
    """Overrides that compose every choice of every group and every experiment."""
    groups = {
        group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in ("data", "sae", "backbone")
    }
    for i, data in enumerate(groups["data"]):
        others = [f"{group}={groups[group][i % len(groups[group])]}" for group in ("sae", "backbone")]
        yield "config", f"data={data}", *others, "callbacks=monoloss", "logger=[csv,wandb]"
    for name in EXPERIMENTS:
        if name.name == "paper":
            continue  # what others of its folder have in common
        yield "finetune" if name.parts[0] == "finetune" else "config", f"experiment={name}"
    for path in sorted((CONF / "finetune_model").glob("*.yaml")):
        yield "finetune", f"finetune_model={path.stem}"


def made(*overrides, root="config"):
    cfg = composed(root, *overrides)
    return OmegaConf.to_container(cfg, resolve=True)


def leaves(node, above=()):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def changed(config, path, value):
    """The config with one leaf changed to something that is never a default."""
    if isinstance(value, bool):
        other = not value
    else:
        other = value + 1 if isinstance(value, int | float) else [*(value or []), 7] if isinstance(value, list) else "!"
    return replaced(config, path, other)


def replaced(config, path, value):
    head, *rest = path
    return config | {head: replaced(config[head], rest, value) if rest else value}


@pytest.mark.parametrize("choice", list(choices()), ids=" ".join)
def test_every_leaf_counts_or_is_left_out_with_a_reason(choice):
    root, *overrides = choice
    config = made(*overrides, *(more for name, more in NEEDED if name in overrides), root=root)
    rules = FINETUNING if root == "finetune" else RULES
    kept = rules.counted(config)
    for path, value in leaves(config):
        name = ".".join(path)
        if path[0] == "callbacks":
            continue
        other = changed(config, path, value)
        reason = rules.reason(name, config)
        assert (rules.counted(other) != kept) == (reason is None), (name, reason)
        assert reason is None or len(reason) > 10


SAME = [
    "data.name=other", "++data.path=/a", "backbone.published.title=other", "backbone.name=dinov2", "expansion=8.0",
    "k=16.0", "seed=42.0", "trainer.precision=32", "extract.precision=32", "optimizer.lr=0.001", "loss.aux=0.03125",
    "trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2", "pack.when=never",
    "stream.readers=1", "stream.verify=true", "checkpoint.every_steps=3", "extract.batch_size=1", "extract.device=cpu",
    "paths.runs=/a", "+logger.csv={}", "trainer.log_every_n_steps=1", "++trainer.profiler=simple",
    "trainer.enable_progress_bar=false", "++trainer.limit_val_batches=1", "trainer.check_val_every_n_epoch=2",
    "++trainer.accumulate_grad_batches=1", "++trainer.accumulate_grad_batches=1.0", "++trainer.limit_train_batches=1.0",
    "++trainer.limit_train_batches=null", "++trainer.overfit_batches=0", "++trainer.overfit_batches=0.0",
    "++trainer.max_time=null", "++trainer.fast_dev_run=false", "++trainer.gradient_clip_algorithm=norm",
    "+sae.settings.k_per=sample", "+sae.settings.tied=false", "+loss.cosine=0", "+loss_options.cosine.any=1",
    "+optimizer.betas=[0.9,0.999]", "resample.until=0.5", "schedule.k_from=9", "sae.settings.k=16",
    "++data.siblings=x.json", "+callbacks.lr={_target_: lightning.pytorch.callbacks.LearningRateMonitor}",
    "+callbacks.off={threshold: 3}", "+callbacks.mine={_target_: tests.training.crash.Crash, epoch: 2}",
]  # fmt: skip

SWA = "lightning.pytorch.callbacks.StochasticWeightAveraging"

OTHERS = [
    "expansion=16", "k=8", "seed=1", "batch_size=512", "d_sae=1024", "features=cls", "normalize=none",
    "init.b_pre=zero", "stream.damaged=skip", "stream.lanes=4", "stream.unit=images", "extract.dtype=int8",
    "extract.precision=bf16", "extract.unreadable=skip", "subset.images=9", "dead_after=1000", "resample.every=5",
    "schedule.decay=0", "schedule.shape=cosine", "loss.aux=0", "+loss.cosine=0.1", "+loss_options.aux.any=1",
    "optimizer.name=adamw", "+optimizer.weight_decay=0.1", "sae.threshold=running_minimum",
    "+sae.settings.input_norm=unit", "trainer.precision=bf16-mixed", "trainer.max_epochs=1", "trainer.max_steps=7",
    "trainer.gradient_clip_val=0.5", "++trainer.gradient_clip_algorithm=value", "++trainer.accumulate_grad_batches=2",
    "++trainer.limit_train_batches=1", "++trainer.limit_train_batches=3", "++trainer.limit_train_batches=0.5",
    "++trainer.max_time=00:00:00:09", "++trainer.overfit_batches=1", "++trainer.overfit_batches=1.0",
    "++trainer.fast_dev_run=true", "++trainer.min_epochs=2", "++trainer.plugins=x",
    "+callbacks.swa={_target_: " + SWA + ", swa_lrs: 0.1}", *MONOLOSS, "+callbacks.two={_target_: my.Thing}",
]  # fmt: skip


def made_by(*overrides):
    """The default config with ``overrides``, which name settings, not groups."""
    cfg = composed("config")
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))


def name_of(*overrides):
    return run_name(made_by(*overrides), SEEN)


@pytest.mark.slow
def test_what_cannot_change_the_weights_renames_nothing_and_what_can_renames():
    plain = name_of()
    assert plain.startswith("batchtopk-dinov2-x8-k16-s42-")
    assert {override: name_of(override) for override in SAME} == dict.fromkeys(SAME, plain)
    others = [name_of(override) for override in OTHERS]
    assert len({plain, *others}) == 1 + len(OTHERS)


def test_what_a_callback_may_hear_counts_where_one_is_on():
    stopping = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/fvu}"
    assert name_of(stopping) != name_of()
    assert name_of(stopping, "++trainer.limit_val_batches=1") != name_of(stopping)
    assert name_of(*MONOLOSS, "++trainer.limit_val_batches=1") == name_of(*MONOLOSS)


def test_a_callback_counts_by_its_class_and_settings_wherever_it_has_moved():
    swa = "+callbacks.{}={{_target_: {}, swa_lrs: {}}}".format
    base = name_of(swa("swa", SWA, 0.1))
    assert name_of(swa("other", SWA.replace("callbacks.", "callbacks.weight_avg."), 0.1)) == base
    assert name_of(swa("swa", SWA.replace("lightning.pytorch", "pytorch_lightning"), 0.1)) == base
    assert name_of(swa("swa", SWA, 0.2)) != base
    assert name_of(swa("swa", SWA, 0.1), swa("two", SWA, 0.1)) != base
    loss = name_of(*MONOLOSS)
    assert "-monoloss-" in loss
    assert name_of(*MONOLOSS, "callbacks.monoloss._target_=sae_lightning.losses.MonoLoss") == loss
    assert name_of(*MONOLOSS, "callbacks.monoloss.pool=mean") == loss  # of batches of images alone
    assert name_of(*MONOLOSS, "callbacks.monoloss.weight=0") == name_of()


def defaults(function):
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.default is not p.empty}


def test_what_is_as_good_as_absent_is_the_default_of_the_code():
    """Where this fails, a default has changed: raise SCHEMA with it, for the same config now trains something else."""
    coded = {f"trainer.{name}": value for name, value in defaults(L.Trainer.__init__).items() if value is not None}
    coded |= {f"schedule.{name}": value for name, value in defaults(Schedule).items()}
    coded |= {f"loss_options.{term}.{name}": v for term, f in TERMS.items() for name, v in defaults(f).items()}
    coded |= {f"callbacks.MonoLoss.{name}": value for name, value in defaults(MonoLoss).items()}
    coded |= {f"optimizer.{name}": value for name, value in (defaults(build_optimizer)).items()}
    adamw = defaults(torch.optim.AdamW.__init__) | {"weight_decay": 0.0}
    coded |= {f"optimizer.{name}": value for name, value in adamw.items() if f"optimizer.{name}" not in coded}
    for leaf, value in ABSENT.items():
        if leaf.startswith("sae.settings."):
            name = leaf.rpartition(".")[2]
            found = [defaults(cls)[name] for v in VARIANTS.values() for cls in v.__mro__ if name in own(cls)]
            assert found, leaf
            assert all(list(f) == value if isinstance(f, tuple) else f == value for f in found), leaf
        elif leaf.split(".")[0] in ("trainer", "schedule", "loss_options", "callbacks", "optimizer"):
            code = LIGHTNING.get(leaf, coded.get(leaf))
            assert (list(code) if isinstance(code, tuple) else code) == value, leaf
    assert UnitRowAdam([{"params": [torch.zeros(2)]}]).defaults["weight_decay"] == 0
    settings = made()
    assert RULES.counted({k: v for k, v in settings.items() if k != "resample"}) == RULES.counted(settings)


# what its Trainer makes of null
LIGHTNING = {
    "trainer.precision": "32-true",
    "trainer.check_val_every_n_epoch": 1,
    "trainer.log_every_n_steps": 50,
    "trainer.gradient_clip_algorithm": "norm",
}


def own(cls):
    return defaults(cls.__init__) if "__init__" in vars(cls) else {}


# --- data and encoder -----------------------------------------------------------------------------
def test_the_same_pictures_elsewhere_are_the_same_run_and_other_pictures_another(
    config, pictures, tmp_path, monkeypatch
):
    base = run_name(config())
    copied = Path(shutil.copytree(pictures, tmp_path / "one" / "imgs", copy_function=shutil.copyfile))
    shutil.copytree(pictures, tmp_path / "two" / "imgs")
    assert run_name(config(f"data.path={copied}", "data.name=mine")) == base
    monkeypatch.chdir(copied.parent)
    assert run_name(config("data.path=imgs")) == base
    added = copied / "train" / "rows" / "new.png"
    Image.new("RGB", (32, 32), "red").save(added)
    assert run_name(config("data.path=imgs")) != base
    monkeypatch.chdir(tmp_path / "two")
    assert run_name(config("data.path=imgs")) == base
    added.rename(copied / "test" / "rows" / "new.png")
    assert run_name(config(f"data.path={copied}")) == base  # which no weight has seen
    (copied / "val" / "rows" / "0.png").unlink()
    assert run_name(config(f"data.path={copied}")) != base  # the threshold has seen it
    assert run_name(config("data.seed=1")) != base
    assert run_name(config("backbone=mae")) != base


def test_a_data_set_is_looked_at_once_for_all_runs_of_a_sweep(config, monkeypatch):
    looked = []
    load = source.load_images
    monkeypatch.setattr(source, "load_images", lambda data, split: looked.append(split) or load(data, split))
    cfgs = [config(f"k={k}") for k in (2, 4, 8)]
    with looking_once():
        names = {run_name(cfg) for cfg in cfgs}
    assert (len(names), looked) == (3, ["train", "val"])
    assert {run_name(cfg) for cfg in cfgs} == names
    assert len(looked) == 8


def test_norms_of_samples_that_were_called_otherwise_keep_their_runs_apart():
    """What is ``rms`` now was ``unit``: such a run is found again, and never taken for one of norm 1."""
    hashed = {kind: by_value("sae.settings.input_norm", kind) for kind in ("none", "layer", "rms", "unit")}
    assert hashed == {"none": "none", "layer": "layer", "rms": "unit", "unit": "unit norm"}


def test_a_layer_counts_by_what_it_means(config):
    assert run_name(config("backbone.layer=4")) == run_name(config()) == run_name(config("backbone.layer=-2"))
    assert run_name(config("backbone.layer=3")) != run_name(config())


# --- the same but for something -------------------------------------------------------------------
def test_runs_are_the_same_but_for_what_is_named():
    def made(*overrides, seen=SEEN):
        return {"identity": identity(made_by(*overrides), seen)}

    base = same_but(made())
    assert same_but(made("seed=7", "paths.runs=elsewhere")) == base
    assert same_but(made("extract.dtype=int8")) != base
    assert same_but(made(seen=SEEN | {"data.train": "z"})) != base
    assert same_but(made(*MONOLOSS, "seed=3"), "seed", "callbacks.MonoLoss*") == base
    bare = {
        "config": OmegaConf.to_container(made_by("seed=9")),
        "store": {"train": "p"},
        "backbone": "deit (tiny)",
        "layer": 4,
    }
    assert same_but(bare) == same_but(bare | {"config": OmegaConf.to_container(made_by("seed=1"))})
    assert same_but(bare) != same_but(bare | {"layer": 3})
