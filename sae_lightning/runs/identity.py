"""A run's name: the hash of what determines its result.

Of the composed config every leaf counts but for those that ``RULES`` leave out; data and encoder count by what they
are (fingerprints), not by what they are called or where they lie.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sae_lightning.backbones.registry import identity as backbone_identity
from sae_lightning.features.source import Source, plain
from sae_lightning.saes.artefact import VARIANTS, read_cfg

OURS = ("sae_lightning.", "lightning.", "pytorch_lightning.")  # packages within which a class may move

WATCHERS = (  # Lightning's callbacks that look on
    "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint",
    "RichModelSummary", "RichProgressBar", "TQDMProgressBar", "ThroughputMonitor",
)  # fmt: skip

UNTOUCHED = ("callbacks.MonoLoss",)  # callbacks that count, but do nothing with what is logged

BATCHES = ("trainer.limit_", "trainer.overfit_batches", "trainer.val_check_interval")  # 1 is one batch, 1.0 are all

NORMS = {"rms": "unit", "unit": "unit norm"}  # as runs are named: "unit" was the name of "rms"

PRECISION = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}  # as Lightning reads them


@dataclass(frozen=True)
class Rules:
    """Which leaves do not count.

    ``left_out`` maps patterns of leaves to reasons, ``listened`` those that only a callback could bring into the
    result: they count where one is on. ``absent`` holds values that are as good as no leaf, which is what the code does
    without it. ``idle`` gives patterns, with reasons, that nothing reads in the config at hand.
    """

    left_out: Mapping[str, str]
    listened: Mapping[str, str]
    absent: Mapping[str, Any]
    idle: Callable[[Mapping[str, Any]], dict[str, str]]

    def counted(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves of a resolved config that count, by name: numbers by value, and none that equals its absence."""
        leaves = {leaf: by_value(leaf, value) for leaf, value in leaves_of(config)}
        patterns = self.not_counted(leaves)
        return {k: v for k, v in leaves.items() if not of_leaf(k, patterns) and not self._is_absent(k, v)}

    def reason(self, leaf: str, config: Mapping[str, Any]) -> str | None:
        """Why ``leaf`` does not count in a resolved config; None where it does."""
        return of_leaf(leaf, self.not_counted(dict(leaves_of(config))))

    def not_counted(self, leaves: Mapping[str, Any]) -> dict[str, str]:
        """The patterns of what does not count among ``leaves``, with reasons."""
        heard = any(leaf.startswith("callbacks.") and not leaf.startswith(UNTOUCHED) for leaf in leaves)
        return {**self.left_out, **({} if heard else self.listened), **self.idle(leaves)}

    def _is_absent(self, leaf: str, value: Any) -> bool:
        """Whether ``value`` is as good as no leaf; null is Lightning's own default for its Trainer."""
        return value == of_leaf(leaf, self.absent) or (value is None and leaf.startswith("trainer."))


def of_leaf(leaf: str, patterns: Mapping[str, Any]) -> Any:
    """What ``patterns`` hold for ``leaf``, by name or by the first start of it with a * behind; None for nothing."""
    if leaf in patterns:
        return patterns[leaf]
    return next((held for start, held in patterns.items() if start[-1] == "*" and leaf.startswith(start[:-1])), None)


def leaves_of(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of a resolved config by dotted name; lists are leaves. Callbacks go by class, if they are on."""
    rest = {key: value for key, value in config.items() if key != "callbacks"}
    yield from _leaves(rest)
    names: Counter[str] = Counter()
    for _, entry in sorted((config.get("callbacks") or {}).items()):
        if is_on(entry) and not _looks_on(entry["_target_"]):
            name = f"callbacks.{class_name(entry['_target_'])}"
            names[name] += 1
            name += f"-{names[name]}" if names[name] > 1 else ""
            yield name, True
            yield from _leaves({key: value for key, value in entry.items() if key != "_target_"}, f"{name}.")


def _leaves(node: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def by_value(leaf: str, value: Any) -> Any:
    """``value`` so that what means the same is equal: 8 and 8.0, 32 and 32-true, a class and where it has moved to."""
    if isinstance(value, list | tuple):
        return [by_value(leaf, each) for each in value]
    if isinstance(value, Mapping):
        return {key: by_value(f"{leaf}.{key}", each) for key, each in value.items()}
    if leaf.endswith("._target_"):
        return class_name(str(value))
    if leaf == "extract.precision":
        return str(value)
    if leaf == "trainer.gradient_clip_val":
        value = value or None  # 0 is none
    if leaf == "sae.settings.input_norm":
        return NORMS.get(value, value)
    if leaf == "trainer.precision":
        return PRECISION.get(str(value), str(value))
    if type(value) is float and value and leaf.startswith(BATCHES):
        return f"{value:g} of all" if value != 1 or leaf == "trainer.overfit_batches" else None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_on(entry: Mapping[str, Any] | None) -> bool:
    """Whether a callback's entry is switched on: it has a ``_target_``, and no weight of 0."""
    return entry is not None and "_target_" in entry and entry.get("weight") != 0


def class_name(target: str) -> str:
    """What ``target`` is called: without its module where that is ours or Lightning's, whose classes may move."""
    return target.rpartition(".")[2] if target.startswith(OURS) else target


def _looks_on(target: str) -> bool:
    """Whether a callback only looks on: Lightning's of this kind, and classes that say so by ``looks_on = True``."""
    from hydra.utils import get_class

    if target.startswith(OURS):
        return class_name(target) in WATCHERS
    try:
        return getattr(get_class(target), "looks_on", False) is True
    except Exception:  # whatever importing it raises is said when it is built
        return False


def short_hash(what: Any) -> str:
    """Eight hex digits of the SHA-256 of ``what`` as JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


SCHEMA = 1  # of what ``identity`` says. Raise it with a default in ABSENT, or a rule: old runs then are others

MONOLOSS = "monoloss"  # of the callbacks

WHERE = "where it is computed, not what; equal up to rounding"

SHOWN = "what is shown, kept or measured on the way"

PLACE = "where things lie"

READ = "how fast features are read and written, in the same order"

TRAINER_LEFT_OUT = {
    "trainer.accelerator": WHERE, "trainer.devices": WHERE, "trainer.num_nodes": WHERE, "trainer.strategy": WHERE,
    "trainer.deterministic": WHERE, "trainer.benchmark": WHERE, "trainer.enable_*": SHOWN, "trainer.profiler": SHOWN,
    "trainer.profiler.*": SHOWN, "trainer.detect_anomaly": SHOWN, "trainer.barebones": SHOWN,
    "trainer.model_registry": SHOWN, "trainer.inference_mode": "of the validation", "trainer.default_root_dir": PLACE,
    "trainer.limit_test_batches": "nothing is tested with the trainer",
    "trainer.limit_predict_batches": "nothing is predicted with the trainer",
}  # fmt: skip

LISTENED = dict.fromkeys(
    (
        "trainer.log_every_n_steps", "trainer.check_val_every_n_epoch", "trainer.val_check_interval",
        "trainer.limit_val_batches", "trainer.num_sanity_val_steps",
    ),
    "what is logged on the way, which no callback hears",
)  # fmt: skip

EXTRACT_LEFT_OUT = dict.fromkeys(
    ("batch_size", "num_workers", "images_per_shard", "device", "devices", "part"), READ
)  # of extract

LEFT_OUT = {
    "data.*": "counted by the fingerprints of the train and val images",
    "backbone.*": "counted by the encoder's own fingerprint, with the layer that it means",
    "k": "counted where it is used: sae.settings.k and sae.target_l0",
    **{f"extract.{name}": reason for name, reason in EXTRACT_LEFT_OUT.items()},
    "stream.readers": READ, "stream.verify": READ, "pack.*": WHERE, "checkpoint.*": SHOWN, "logger.*": SHOWN,
    "logger": SHOWN, "paths.*": PLACE, "grid.*": "values that a sweep takes in turn", **TRAINER_LEFT_OUT,
}  # fmt: skip

TRAINER_ABSENT = {  # Lightning's defaults
    "trainer.accumulate_grad_batches": 1, "trainer.fast_dev_run": False, "trainer.max_steps": -1,
    "trainer.overfit_batches": 0, "trainer.precision": "32-true", "trainer.reload_dataloaders_every_n_epochs": 0,
    "trainer.sync_batchnorm": False, "trainer.check_val_every_n_epoch": 1,
    "trainer.log_every_n_steps": 50, "trainer.gradient_clip_algorithm": "norm",
}  # fmt: skip

ABSENT = {  # a new setting whose value is what was done before it existed comes here, and renames nothing
    "loss.*": 0, "loss_options.aux.dead_after": 100_000, "loss_options.reconstruction.relative": False,
    "loss_options.aux.relative": True, "loss_options.nested.relative": False,
    "loss_options.sparsity.decoder_norms": True, "loss_options.sparsity.per_dimension": True,
    "optimizer.project": True,
    "optimizer.name": "adam", "optimizer.lr": 1e-3, "optimizer.betas": [0.9, 0.999], "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0, "optimizer.amsgrad": False, "optimizer.maximize": False,
    "schedule.warmup": 0, "schedule.decay": 0, "schedule.shape": "linear", "schedule.sparsity_warmup": 0,
    "schedule.k_share": 0, "resample.every": 0, "resample.until": 0.8, "normalize": "standard", "init.b_pre": "mean",
    "features": "patch", "site": "block",
    "extract.precision": "32", "extract.dtype": "float16", "extract.unreadable": "refuse",
    "stream.unit": "tokens", "stream.damaged": "refuse", "stream.lanes": 8, "stream.block_mb": 4,
    "stream.buffer_mb": 1024, "sae.threshold": "calibrated", "sae.settings.tied": False,
    "sae.settings.input_norm": "none", "sae.settings.encoder_norm": 1,
    "sae.settings.inference": "topk", "sae.settings.k_per": "sample",
    "sae.settings.fractions": [0.0625, 0.1875, 0.4375, 1], "sae.settings.sampled": 0,
    "sae.settings.weighting": "uniform", "sae.settings.bandwidth": 1e-3, "sae.settings.kernel_name": "rectangle",
    "sae.settings.threshold": 0.1, "callbacks.MonoLoss.warmup": 0, "callbacks.MonoLoss.every": 1,
    "callbacks.MonoLoss.center": False, "callbacks.MonoLoss.pool": "max", "callbacks.MonoLoss.memory": 0,
    **TRAINER_ABSENT,
}  # fmt: skip


TRAINING = (  # what says how to train
    "optimizer.*", "schedule.*", "loss.*", "loss_options.*", "resample.*", "stream.*", "trainer.*", "callbacks.*",
    "batch_size", "dead_after",
)  # fmt: skip


def idle(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Patterns of leaves that nothing reads beside the others, with reasons."""
    get = leaves.get
    terms = {leaf.split(".")[1] for leaf in leaves if leaf.startswith("loss_options.")}
    found = {f"loss_options.{term}.*": "its term has no weight" for term in terms if not get(f"loss.{term}")}
    if not get("resample.every"):
        found |= dict.fromkeys(("resample.until", "dead_after"), "nothing is resampled")
    if not get("schedule.decay"):
        found["schedule.shape"] = "nothing decays"
    if not get("schedule.k_share"):
        found["schedule.k_from"] = "k does not fall"
    if not get("loss.sparsity"):
        found["schedule.sparsity_warmup"] = "its term has no weight"
    if get("d_sae") is not None:
        found["expansion"] = "d_sae says it"
    if get("stream.unit", "tokens") == "tokens":
        found["callbacks.MonoLoss.pool"] = "tokens are not pooled"
    if get("data.source") == "store":
        found["extract.*"] = "the store is there"
    if (variant := VARIANTS.get(str(get("sae.name")))) is not None and variant.fitted:
        found |= dict.fromkeys(TRAINING, "nothing is trained")
    return found | clipping(leaves)


def clipping(leaves: Mapping[str, Any]) -> dict[str, str]:
    """What of clipping nothing reads."""
    return {} if leaves.get("trainer.gradient_clip_val") else {"trainer.gradient_clip_algorithm": "nothing is clipped"}


RULES = Rules(LEFT_OUT, LISTENED, ABSENT, idle)


def identity(cfg: DictConfig, seen: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What determines the SAE, by leaf: the settings that count, and ``data.train``, ``data.val``, ``backbone`` and
    ``layer`` as ``look`` finds them (or as ``seen`` says).

    Raises DataError, BackboneError or StoreError where data or encoder cannot be found.
    """
    return {"schema": SCHEMA} | RULES.counted(plain(cfg)) | dict(look(cfg) if seen is None else seen)


def look(cfg: DictConfig) -> dict[str, Any]:
    """The fingerprints of what a run is trained on: of train and val, and of the encoder, with the layer read."""
    source = Source.of(cfg)
    found: dict[str, Any] = {f"data.{split}": source.images_fingerprint(split) for split in ("train", "val")}
    if source.given:
        return found
    return found | {"backbone": backbone_identity(source.backbone), "layer": source.tap.layer}


def settings_of(made: Mapping[str, Any], *but: str) -> dict[str, Any]:
    """The identity that a run's ``cfg.json`` holds, without the leaves of the patterns ``but``."""
    whole = made.get("identity")
    if whole is None:  # of another hand: what is known of the data and the encoder
        named = {f"data.{split}": print_ for split, print_ in sorted((made.get("store") or {}).items())}
        whole = RULES.counted(made["config"]) | named | {"backbone": made.get("backbone"), "layer": made.get("layer")}
    return {leaf: value for leaf, value in whole.items() if not of_leaf(leaf, dict.fromkeys(but, True))}


def same_but(made: Mapping[str, Any], *but: str) -> str:
    """A hash that is equal for runs that differ by leaves of the patterns ``but`` alone, by default by their seed.

    ``made`` is a run's ``cfg.json``.
    """
    return short_hash(settings_of(made, *(but or ("seed",))))


def level_of(sae: Mapping[str, Any]) -> Any:
    """The k of the config section ``sae``: the variant's own setting, or the L0 it is steered to; None without."""
    return sae["settings"]["k"] if "k" in sae["settings"] else sae.get("target_l0")


def uses_k(sae: Mapping[str, Any]) -> bool:
    """Whether k matters to the config section ``sae``."""
    return level_of(sae) is not None


def callbacks_on(cfg: Mapping[str, Any] | DictConfig) -> list[str]:
    """The callbacks that are switched on, sorted: entries with a ``_target_`` whose weight, if any, is not 0."""
    return sorted(str(name) for name, entry in (cfg.get("callbacks") or {}).items() if is_on(entry))


def monoloss_of(config: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The weight of MonoLoss in a run's config and its other options; 0 and none for a run without it.

    An entry without ``_target_`` is one that was given settings but not switched on (``callbacks=default``).
    """
    entry = (config.get("callbacks") or {}).get(MONOLOSS)
    if not entry or "_target_" not in entry or not entry.get("weight"):
        return 0.0, {}
    return float(entry["weight"]), {k: v for k, v in entry.items() if k not in ("_target_", "weight")}


def run_name(cfg: DictConfig, seen: Mapping[str, Any] | None = None) -> str:
    """For example ``batchtopk-dinov2-x8-k16-s42-1a2b3c4d``, with features that are not patch tokens, and with callbacks
    that add to the loss. ``seen`` as for ``identity``, which says what is raised.
    """
    return named(cfg, identity(cfg, seen))


def run_hash(cfg: DictConfig, seen: Mapping[str, Any] | None = None) -> str:
    """Eight hex digits of the identity's SHA-256, which a run's name ends with."""
    return short_hash(identity(cfg, seen))


def named(cfg: DictConfig, made: Mapping[str, Any]) -> str:
    """The name of the run of ``cfg`` whose identity is ``made``."""
    config = plain(cfg)
    k = f"-k{_number(level_of(config['sae']))}" if uses_k(config["sae"]) else ""
    kind = "" if cfg.features == "patch" else f"-{cfg.features}"
    kind += "" if cfg.get("site", "block") == "block" else f"-{cfg.site}"
    adding = [leaf.split(".")[-2].lower() for leaf, _ in leaves_of(config) if leaf.startswith("callbacks.")
              and leaf.endswith(".weight")]  # fmt: skip
    extra = "".join(f"-{name}" for name in sorted(adding))
    size = f"x{_number(cfg.expansion)}" if cfg.get("d_sae") is None else f"d{_number(cfg.d_sae)}"
    return f"{cfg.sae.name}-{cfg.backbone.name}{kind}-{size}{k}{extra}-s{_number(cfg.seed)}-{short_hash(made)}"


def _number(value: Any) -> Any:
    """8 for 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def same_but_seed(runs: Sequence[Path]) -> list[list[Path]]:
    """Those of ``runs`` that have siblings of other seeds, together."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        groups.setdefault(same_but(read_cfg(run)), []).append(run)
    return [group for group in groups.values() if len(group) > 1]
