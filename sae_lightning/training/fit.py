"""One training: from a resolved config to a finished run folder."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_lightning.distributed.launch import as_first_node, check_tasks, launch_ranks, node, wants_ranks
from sae_lightning.distributed.ranks import rank, world_size
from sae_lightning.distributed.stopping import Preempted, stop_on_signals
from sae_lightning.features.shared import StreamMember
from sae_lightning.features.source import Source, looking_once, plain
from sae_lightning.features.store import FeatureStore
from sae_lightning.files import held, lend_cache, set_damaged_aside, write_json
from sae_lightning.runs.identity import callbacks_on, identity, monoloss_of, run_name
from sae_lightning.runs.record import FIGURES
from sae_lightning.runs.record import record as recorded
from sae_lightning.runs.run import HISTORY, LOCK, PRODUCTS, RESULT, is_finished
from sae_lightning.runs.state import is_a_try, last_checkpoint
from sae_lightning.saes import SAE, VARIANTS, Normalizer
from sae_lightning.settings import check_settings
from sae_lightning.settings.combinations import WIDEST, width
from sae_lightning.training.callbacks import History, Resample, StopOnSignal, Throughput
from sae_lightning.training.checkpoints import (
    CheckpointFiles,
    OwnCheckpoint,
    names_full_disk,
    remove_checkpoints,
    repair_checkpoint,
)
from sae_lightning.training.data import FeatureDataModule, InOrder
from sae_lightning.training.failed import StopNotFinite, begin_anew, in_part, require_finite, worth_keeping
from sae_lightning.training.loggers import checkpoint_step, close_loggers, open_loggers, write_sweep_options
from sae_lightning.training.module import SAEModule
from sae_lightning.training.start import dead_at_start, fit_dictionary, prepare, warnings_for

NOT_TRAINED = {
    "max_epochs": 0,
    "max_steps": -1,
    "limit_train_batches": None,
    "overfit_batches": 0,
    "fast_dev_run": False,
}


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
        with worth_keeping(folder, not is_a_try(cfg)), stop_on_signals(folder.name):
            _lead(cfg, folder) if node()[0] == 0 else launch_ranks(cfg, folder, fit)
    return folder


def _lead(cfg: DictConfig, folder: Path) -> None:
    """What the first or only node of a job does for one run."""
    with held(folder / LOCK, f"training {folder.name}"), as_first_node(folder):
        if is_finished(folder):
            print(f"{folder.name}: finished before, skipped.", flush=True)
            return
        begin_anew(folder)
        set_damaged_aside([folder / name for name in PRODUCTS], f"{folder.name} is trained again")
        repair_checkpoint(folder)
        if wants_ranks(cfg):
            write_sweep_options(cfg)
            for split in ("train", "val"):  # once, before every rank opens them
                Source.of(cfg).store(split)
            launch_ranks(cfg, folder, fit)
        else:
            fit(cfg, folder)


def check(cfg: DictConfig, command: str = "train") -> None:
    """ValueError in a sentence for settings that cannot work (``settings/``), here or anywhere."""
    check_settings(command, cfg)
    check_gpus(cfg)
    if command == "train":
        check_sae(cfg)
    build_callbacks(cfg, Path(cfg.paths.runs))


def check_sae(cfg: DictConfig) -> None:
    """ValueError where the variant's class refuses its settings, which is asked without memory for weights."""
    d_in = width(cfg.backbone, cfg.features) or cfg.d_sae or WIDEST
    normalizer = Normalizer(d_in)
    with suppress(RuntimeError), torch.device("meta"):  # one that looks at its weights is asked later
        make_sae(cfg, d_in, normalizer, None)
    kind, how = VARIANTS[cfg.sae.name], cfg.sae.get("threshold")
    if cfg.resample.every and not kind.restarts:
        raise ValueError(
            f"resample.every={cfg.resample.every} gives dead latents new rows, which sae.name={cfg.sae.name} does not "
            "allow; set resample.every=0."
        )
    if kind.fitted and (weight := monoloss_of(plain(cfg))[0]):
        raise ValueError(
            f"callbacks.monoloss.weight={weight:g} has nothing to act on, for sae.name={cfg.sae.name} is not trained; "
            "leave callbacks=monoloss out."
        )
    if kind.fitted and how not in (None, "calibrated"):
        raise ValueError(
            f"sae.threshold={how} is what training leaves, and sae.name={cfg.sae.name} is not trained; set "
            "sae.threshold=calibrated."
        )


def make_sae(cfg: DictConfig, d_in: int, normalizer: Normalizer | None, seed: int | None) -> SAE:
    """The SAE that ``cfg`` asks for on features of ``d_in`` dimensions; ValueError for settings that it cannot have."""
    settings: dict[str, Any] = OmegaConf.to_container(cfg.sae.settings, resolve=True)  # type: ignore[assignment]
    d_sae = int(cfg.expansion) * d_in if cfg.d_sae is None else int(cfg.d_sae)
    try:
        return VARIANTS[cfg.sae.name](d_in, d_sae, normalizer=normalizer, seed=seed, **settings)
    except TypeError as error:
        raise ValueError(f"sae.settings={settings} do not fit sae.name={cfg.sae.name}: {error}.") from error


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
def fit(cfg: DictConfig, folder: Path, member: StreamMember | None = None) -> None:
    """Train in this process (one of several ranks, or the only one) and write the artefact.

    As a ``member`` of a stream that other runs share (``packed.py``), whose turn it is, it takes its features there.
    """
    begin(cfg.seed)
    source, stream = Source.of(cfg), plain(cfg.stream)
    train, val = (source.store(split) for split in ("train", "val"))
    train = train.subset(**plain(cfg.subset))
    order = {name: value for name, value in stream.items() if not hasattr(source.reading, name)}
    data = FeatureDataModule(train, val, cfg.batch_size, cfg.seed, member, **order)
    module = build_module(cfg, train, val.mean)
    made = record(cfg, folder, {"train": train, "val": val})
    settings = trainer_settings(cfg)
    settings["enable_progress_bar"] &= member is None  # a pack has one bar
    if module.sae.fitted:
        settings |= NOT_TRAINED
    throughput = Throughput(data)
    first = [Resample(cfg.resample.every, cfg.dead_after, cfg.resample.until)] if cfg.resample.every else []
    about = {"variant": module.sae.variant, "d_in": module.sae.d_in, "d_sae": module.sae.d_sae} | made
    trainer = build_trainer(cfg, folder, settings, throughput, first=first, about=about)
    start = data.clock()
    if module.sae.fitted:
        fit_dictionary(module.sae, train, cfg.seed, cfg.trainer.enable_progress_bar and trainer.is_global_zero)
    elif not goes_on(folder):
        dead = dead_at_start(module.sae, train)  # by all ranks: it may compare activations over them
        for sentence in warnings_for(train, dead, cfg.normalize, cfg.init.b_pre):
            if trainer.is_global_zero:
                print(f"{folder.name}: warning: {sentence}", flush=True)
    run_trainer(trainer, module, data, folder)
    part = in_part(trainer, settings)
    calibrate(cfg, module, val, trainer.strategy.root_device)
    scores = validated(trainer, module, data)
    require_finite(folder, "the scores", scores, trainer.global_step)

    def write() -> dict[str, Any]:
        module.sae.save(folder, **made, figures={name: scores[name] for name in FIGURES if name in scores})
        result = {
            "status": "finished", **({"in_part": part} if part else {}),
            "seconds": throughput.seconds_before + data.clock() - start,
            "steps": trainer.global_step, "samples_per_second": throughput.samples_per_second,
            "wait_share": throughput.wait_share, "devices": trainer.world_size,
            "side_by_side": 1 if member is None else member.stream.members, "val": scores,
        }  # fmt: skip
        write_json(folder / RESULT, result)
        return result

    finish(cfg, folder, trainer, write)
    if trainer.is_global_zero and not is_a_try(cfg):
        remove_checkpoints(folder)
    trainer.strategy.barrier()


# --- steps that all trainings with Lightning take, fine-tuning too -----------------------------------------
def begin(seed: int) -> None:
    """Make Lightning quiet, tell it which rank this is, and seed the generators."""
    quiet()
    # that of ``launch_ranks``, else 0, whatever other variables say
    rank = int(os.environ["RANK"]) if torch.distributed.is_torchelastic_launched() else 0
    setattr(rank_zero_only, "rank", rank)  # noqa: B010  which mypy does not know
    L.seed_everything(seed, workers=True, verbose=False)


def trainer_settings(cfg: DictConfig) -> dict[str, Any]:
    """The Trainer's arguments that the config gives: DDP for several ranks."""
    settings = plain(cfg.trainer)
    if settings["strategy"] == "auto" and wants_ranks(cfg):
        settings["strategy"] = "ddp"
    return settings


def build_trainer(
    cfg: DictConfig, folder: Path, settings: dict[str, Any], *own: L.Callback, first: Sequence[L.Callback] = (),
    about: dict[str, Any] | None = None,
) -> L.Trainer:  # fmt: skip
    """A Trainer that keeps checkpoints and a history in ``folder``, stops where it should, and logs as ``cfg`` says.

    Its callbacks are ``first``, ours, the step's ``own``, and those of the config; ``about`` is for the loggers.
    """
    last = last_checkpoint(folder)
    callbacks = [*first, StopNotFinite(folder), *checkpoints(cfg, folder), History(folder / HISTORY), *own]
    callbacks += [*build_callbacks(cfg, folder), StopOnSignal(last)]
    loggers = [] if is_a_try(cfg) else open_loggers(cfg, folder, about, checkpoint_step(last))
    # our ranks, or this process alone: Lightning is not to take a SLURM job for its own
    places = [] if torch.distributed.is_torchelastic_launched() else [LightningEnvironment()]
    return L.Trainer(
        **settings, logger=loggers or False, callbacks=callbacks, default_root_dir=folder,
        plugins=[*places, CheckpointFiles(last)], use_distributed_sampler=False,
    )  # fmt: skip


def goes_on(folder: Path) -> bool:
    """Whether the run has a checkpoint to go on from, which is said."""
    if not last_checkpoint(folder).is_file():
        return False
    print(f"{folder.name}: resuming from its last checkpoint.", flush=True)
    return True


def run_trainer(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, folder: Path) -> None:
    """Train, from the checkpoint if there is one; NotFiniteError where the weights are not finite at the end."""
    last = last_checkpoint(folder)
    with lightnings_stop():
        trainer.fit(module, data, ckpt_path=last if last.is_file() else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    require_finite(folder, "the weights", dict(module.named_parameters()), trainer.global_step)


def validated(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
    """The scores ``val/…`` on the whole split, whatever part of it was used on the way."""
    trainer.limit_val_batches = 1.0
    with lightnings_stop():
        trainer.validate(module, data, verbose=False)
    return {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}


@contextmanager
def lightnings_stop() -> Iterator[None]:
    """Lightning's own exception for SIGTERM as ours."""
    try:
        yield
    except SIGTERMException as error:
        raise Preempted(signal.SIGTERM) from error


def finish(cfg: DictConfig, folder: Path, trainer: L.Trainer, write: Callable[[], dict[str, Any]]) -> None:
    """Let the first rank ``write`` the artefact, whose result goes to the loggers; a mere try is only said."""
    if trainer.is_global_zero and is_a_try(cfg):
        print(f"{folder.name}: fast_dev_run went well; nothing of it is kept.", flush=True)
    elif trainer.is_global_zero:
        close_loggers(trainer.loggers, cfg, folder, write())


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
    sae = make_sae(cfg, store.d_in, normalizer, cfg.seed)
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
    facts = {
        "backbone": store.backbone, "layer": store.layer, "data": store.data, "features": store.kind,
        "site": store.site, "severity": store.manifest.severity,
        "store": {split: s.fingerprint for split, s in stores.items()},
    }  # fmt: skip
    return recorded(cfg, folder.name, identity(cfg), store.d_in, facts)
