"""One training: from a resolved config to a finished run folder."""

from __future__ import annotations

import logging
import platform
import warnings
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_lightning.distributed.launch import (
    check_tasks,
    know_rank,
    launch_ranks,
    leading,
    node,
    wants_ranks,
)
from sae_lightning.distributed.ranks import rank, world_size
from sae_lightning.distributed.stopping import heeding
from sae_lightning.features.shared import Seat
from sae_lightning.features.source import Source, looking_once, plain
from sae_lightning.features.store import FeatureStore
from sae_lightning.files import held, lend_cache, set_damaged_aside, write_json
from sae_lightning.runs.identity import callbacks_on, identity, level_of, run_name, short_hash
from sae_lightning.runs.run import HISTORY, LOCK, PRODUCTS, RESULT, is_finished
from sae_lightning.runs.state import is_a_try, last_checkpoint
from sae_lightning.saes import VARIANTS, Normalizer
from sae_lightning.settings import check_settings
from sae_lightning.training.callbacks import History, Resample, StopWhenAsked, Throughput
from sae_lightning.training.checkpoints import (
    CheckpointFiles,
    OwnCheckpoint,
    mend_checkpoint,
    names_full_disk,
    remove_checkpoints,
)
from sae_lightning.training.data import FeatureDataModule, InOrder
from sae_lightning.training.failed import StopNotFinite, begin_anew, in_part, require_finite, worth_keeping
from sae_lightning.training.loggers import checkpoint_step, close_loggers, open_loggers, settle
from sae_lightning.training.module import SAEModule
from sae_lightning.training.start import dead_at_start, prepare, warnings_for


def environment() -> list[Any]:
    """Lightning's plugins that keep it from taking a SLURM job for its own: our ranks, or this process alone."""
    return [] if torch.distributed.is_torchelastic_launched() else [LightningEnvironment()]


VERSIONS = ("torch", "lightning", "timm", "transformers", "numpy")


def train(cfg: DictConfig) -> Path:
    """Train one SAE unless its run is finished; returns the run folder.

    Extracts missing stores first, resumes from the run's checkpoint, and spreads over processes when
    ``trainer.devices`` asks for it. Stops at a checkpoint when a signal asks for it (``preempt.py``). Raises
    ValueError for impossible settings, before any work.
    """
    check(cfg)
    check_tasks(cfg)
    lend_cache(Path(cfg.paths.runs))
    with looking_once():
        folder = Path(cfg.paths.runs) / run_name(cfg)
        with worth_keeping(folder, not is_a_try(cfg)), heeding(folder.name):
            _lead(cfg, folder) if node()[0] == 0 else launch_ranks(cfg, folder, fit)
    return folder


def _lead(cfg: DictConfig, folder: Path) -> None:
    """What the first or only node of a job does for one run."""
    with held(folder / LOCK, f"training {folder.name}"), leading(folder):
        if is_finished(folder):
            print(f"{folder.name}: finished before, skipped.", flush=True)
            return
        begin_anew(folder)
        set_damaged_aside([folder / name for name in PRODUCTS], f"{folder.name} is trained again")
        mend_checkpoint(folder)
        if wants_ranks(cfg):
            settle(cfg)
            for split in ("train", "val"):  # once, before every rank opens them
                Source.of(cfg).store(split)
            launch_ranks(cfg, folder, fit)
        else:
            fit(cfg, folder)


def check(cfg: DictConfig) -> None:
    """ValueError in a sentence for settings that cannot work (``settings/``), here or anywhere."""
    check_settings("train", cfg)
    check_gpus(cfg)
    build_callbacks(cfg, Path(cfg.paths.runs))


def check_gpus(cfg: DictConfig) -> None:
    """ValueError where ``trainer.devices`` asks for more GPUs than there are."""
    devices, available = cfg.trainer.devices, torch.cuda.device_count()
    wanted = str(cfg.trainer.accelerator) in ("gpu", "cuda")
    count = devices if isinstance(devices, int) else 0 if isinstance(devices, str) else len(devices)
    if wanted and (count > available or not available):
        raise ValueError(
            f"trainer.devices={devices} but {available} GPUs are visible; lower it or set trainer.accelerator=cpu."
        )


@names_full_disk
def fit(cfg: DictConfig, folder: Path, seat: Seat | None = None) -> None:
    """Train in this process (one of several ranks, or the only one) and write the artefact.

    With a ``seat``, which is taken, the features come from a stream that other runs share (``packed.py``).
    """
    quiet()
    know_rank()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    source = Source.of(cfg)
    stores = {split: source.store(split) for split in ("train", "val")}
    stores["train"] = stores["train"].subset(**plain(cfg.subset))
    stream = {key: value for key, value in plain(cfg.stream).items() if key not in ("damaged", "verify")}
    data = FeatureDataModule(stores["train"], stores["val"], cfg.batch_size, cfg.seed, seat, **stream)
    module = build_module(cfg, stores["train"], stores["val"].mean)
    throughput = Throughput(data)
    last = last_checkpoint(folder)
    callbacks = [StopNotFinite(folder), *checkpoints(cfg, folder), History(folder / HISTORY), throughput]
    callbacks += build_callbacks(cfg, folder)
    callbacks.append(StopWhenAsked(last))
    if cfg.resample.every:
        callbacks.insert(0, Resample(cfg.resample.every, cfg.dead_after, cfg.resample.until))
    settings: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    if settings["strategy"] == "auto" and wants_ranks(cfg):
        settings["strategy"] = "ddp"
    settings["enable_progress_bar"] &= seat is None  # a pack has one bar
    made = record(cfg, folder, stores)
    about = {"variant": module.sae.variant, "d_in": module.sae.d_in, "d_sae": module.sae.d_sae} | made
    loggers = [] if is_a_try(cfg) else open_loggers(cfg, folder, about, checkpoint_step(last))
    trainer = L.Trainer(
        **settings,
        logger=loggers or False,
        callbacks=callbacks,
        default_root_dir=folder,
        plugins=[*environment(), CheckpointFiles(last)],
        use_distributed_sampler=False,
    )
    start = data.clock()
    if last.is_file():
        print(f"{folder.name}: resuming from its last checkpoint.", flush=True)
    else:
        dead = dead_at_start(module.sae, stores["train"])  # by all ranks: it may compare activations over them
        for sentence in warnings_for(stores["train"], dead, cfg.normalize, cfg.init.b_pre):
            if trainer.is_global_zero:
                print(f"{folder.name}: warning: {sentence}", flush=True)
    trainer.fit(module, data, ckpt_path=last if last.is_file() else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    require_finite(folder, "the weights", dict(module.sae.named_parameters()), trainer.global_step)
    part = in_part(trainer, settings)
    calibrate(cfg, module, stores["val"], trainer.strategy.root_device)
    trainer.limit_val_batches = 1.0  # whatever was scored on the way, the result is of all
    trainer.validate(module, data, verbose=False)
    scores = {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    require_finite(folder, "the scores", scores, trainer.global_step)
    if is_a_try(cfg):
        if trainer.is_global_zero:
            print(f"{folder.name}: fast_dev_run went well; nothing of it is kept.", flush=True)
    elif trainer.is_global_zero:
        module.sae.save(folder, **made)
        seconds = throughput.seconds_before + data.clock() - start
        result = {
            "status": "finished", **({"in_part": part} if part else {}), "seconds": seconds,
            "steps": trainer.global_step, "samples_per_second": throughput.samples_per_second,
            "wait_share": throughput.wait_share, "devices": trainer.world_size,
            "side_by_side": 1 if seat is None else seat.stream.members, "val": scores,
        }  # fmt: skip
        write_json(folder / RESULT, result)
        close_loggers(loggers, cfg, folder, result)
        remove_checkpoints(folder)
    trainer.strategy.barrier()


def checkpoints(cfg: DictConfig, folder: Path) -> list[L.Callback]:
    """``checkpoints/last.ckpt`` at the end of every epoch, and within it as ``cfg.checkpoint`` says."""
    within: dict[str, Any] = {}
    if cfg.checkpoint.every_steps:
        within["every_n_train_steps"] = cfg.checkpoint.every_steps
    elif cfg.checkpoint.every_minutes:
        within["train_time_interval"] = timedelta(minutes=cfg.checkpoint.every_minutes)
    when: list[dict[str, Any]] = [{"save_on_train_epoch_end": True}, *([within] if within else [])]
    return [
        OwnCheckpoint(last_checkpoint(folder).parent, filename="last", enable_version_counter=False, **options)
        for options in when
    ]


def quiet() -> None:
    """Silence Lightning's advertising and its warnings about an iterable data set's length, which is exact here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # ranks are not srun's business
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # the datamodule is
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")  # a resumed run
    warnings.filterwarnings("ignore", message=".*sync_dist=True.* when logging on epoch level.*")  # metrics reduce


def build_module(cfg: DictConfig, store: FeatureStore, center: Tensor | None = None) -> SAEModule:
    """The module for ``cfg`` on the features of ``store``, scored about ``center``; ValueError for k beyond d_sae."""
    normalizer = Normalizer(store.d_in, store.mean, store.std) if cfg.normalize == "standard" else None
    settings: dict[str, Any] = OmegaConf.to_container(cfg.sae.settings, resolve=True)  # type: ignore[assignment]
    d_sae = int(cfg.expansion) * store.d_in if cfg.d_sae is None else int(cfg.d_sae)
    sae = VARIANTS[cfg.sae.name](store.d_in, d_sae, normalizer=normalizer, seed=cfg.seed, **settings)
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    prepare(sae, store, cfg.init.b_pre, cfg.sae.get("target_l0"))
    return SAEModule(
        sae, plain["loss"], plain["loss_options"], plain["optimizer"], plain["schedule"], plain["dead_after"],
        target_l0=cfg.sae.get("target_l0"), center=center,
    )  # fmt: skip


def build_callbacks(cfg: DictConfig, folder: Path) -> list[L.Callback]:
    """The callbacks of the config group that are switched on, each an entry with a ``_target_``.

    A ModelCheckpoint ``name`` without a folder of its own keeps its files in ``checkpoints/<name>`` of the run.
    """
    from hydra.utils import instantiate

    made = {name: instantiate(cfg.callbacks[name]) for name in callbacks_on(cfg)}
    for name, callback in made.items():
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(last_checkpoint(folder).parent / name)
    return list(made.values())


def calibrate(cfg: DictConfig, module: SAEModule, store: FeatureStore, device: torch.device) -> None:
    """Let the variant take what evaluation needs from the val split, in the way ``sae.threshold``.

    Each rank takes its share of the split, on the ``device`` that it trained on and from which ``fit`` took the module.
    """
    module.to(device)
    how = cfg.sae.get("threshold") or "calibrated"
    module.sae.finish(InOrder(store, 8192, rank(), world_size()), store.n_tokens, how)


def record(cfg: DictConfig, folder: Path, stores: dict[str, FeatureStore]) -> dict[str, Any]:
    """What ``cfg.json`` in ``folder`` says beside the SAE itself."""
    store = stores["train"]
    made = identity(cfg)
    return {
        "name": folder.name, "hash": short_hash(made), "identity": made, "k": level_of(cfg.sae),
        "expansion": cfg.expansion if cfg.d_sae is None else round(cfg.d_sae / store.d_in, 2),
        "seed": cfg.seed, "backbone": store.backbone, "layer": store.layer,
        "data": store.data, "features": store.kind, "severity": store.manifest.severity,
        "store": {split: s.fingerprint for split, s in stores.items()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS},
        "config": OmegaConf.to_container(cfg, resolve=True),
    }  # fmt: skip
