"""One fine-tuning: from a resolved config to a finished run folder."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from sae_lightning.damage import set_damaged_aside, whole
from sae_lightning.data import ImageData, load_images
from sae_lightning.features.ensure import plain
from sae_lightning.finetuning.artefact import WEIGHTS, load, save
from sae_lightning.finetuning.build import build, rebuilding
from sae_lightning.finetuning.clock import EpochClock
from sae_lightning.finetuning.datamodule import PictureDataModule, workers
from sae_lightning.finetuning.errors import FinetuneError
from sae_lightning.finetuning.identity import run_name
from sae_lightning.finetuning.module import FinetuneModule
from sae_lightning.finetuning.pictures import EpochBatches
from sae_lightning.finetuning.scores import predict, scores
from sae_lightning.finetuning.similarity import align, similarity_store
from sae_lightning.kernels.build import lend_cache
from sae_lightning.locks import held
from sae_lightning.saes.artefact import write_json
from sae_lightning.settings import check_settings
from sae_lightning.training.checkpoints import CheckpointFiles, last_checkpoint, mend_checkpoint, remove_checkpoints
from sae_lightning.training.failed import StopNotFinite, begin_anew, in_part, require_finite, worth_keeping
from sae_lightning.training.full_disk import names_full_disk
from sae_lightning.training.history import History
from sae_lightning.training.launch import environment, know_rank, launch_ranks, n_ranks, wants_ranks
from sae_lightning.training.loggers import checkpoint_step, close_loggers, open_loggers, settle
from sae_lightning.training.preempt import StopWhenAsked, heeding
from sae_lightning.training.run import build_callbacks, check_gpus, checkpoints, is_a_try, quiet

TRAINED = "trained.json"
PRODUCTS = ("result.json", WEIGHTS, "cfg.json")  # without which a run is not finished
VERSIONS = ("torch", "torchvision", "lightning", "timm", "transformers", "peft", "numpy")


def finetune(cfg: DictConfig) -> Path:
    """Fine-tune and score one classifier unless its run is finished; returns the run folder.

    Extracts missing similarity stores first, resumes from the run's checkpoint, and spreads over processes when
    ``trainer.devices`` asks for it. Stops at a checkpoint when a signal asks for it (``preempt.py``). Raises ValueError
    for impossible settings, before any work.
    """
    check(cfg)
    lend_cache(Path(cfg.paths.runs))
    folder = Path(cfg.paths.runs) / run_name(cfg)
    own = worth_keeping(folder, not is_a_try(cfg))
    with own, heeding(folder.name), held(folder / ".lock", f"fine-tuning {folder.name}"):
        if is_finished(folder):
            print(f"{folder.name}: finished before, skipped.", flush=True)
            return folder
        begin_anew(folder)
        train, held_out = load_split(cfg, "train"), load_split(cfg, cfg.held_out)
        check_splits(cfg, train, held_out)
        if not (folder / TRAINED).is_file():  # a layer that does not exist is found out before anything is extracted
            build(plain(cfg.model), len(train.class_names), cfg.layer, cfg.added_layer, cfg.seed)
        for images in (train, held_out):  # once, before every rank opens them
            align(similarity_store(cfg, images.split), images)
        damaged = [folder / name for name in (*PRODUCTS, TRAINED)]
        set_damaged_aside(damaged, f"{folder.name} is trained again from its last checkpoint, if there is one")
        if not (folder / TRAINED).is_file() or not (folder / WEIGHTS).is_file():
            mend_checkpoint(folder)
            settle(cfg)
            launch_ranks(cfg, folder, fit) if wants_ranks(cfg) else fit(cfg, folder)
        if not is_a_try(cfg):
            finish(cfg, folder, held_out)
    return folder


def is_finished(folder: Path) -> bool:
    """Whether ``folder`` holds a whole run; ``result.json`` is written last."""
    return all(whole(folder / name) for name in PRODUCTS)


def check(cfg: DictConfig) -> None:
    """ValueError in a sentence for settings that cannot work (``settings/``), here or anywhere."""
    check_settings("finetune", cfg)
    check_gpus(cfg)
    build_callbacks(cfg, Path(cfg.paths.runs))


def load_split(cfg: DictConfig, split: str) -> ImageData:
    """The pictures of ``split``; FinetuneError for a stream, which has no order to shuffle."""
    images = load_images(plain(cfg.data), split)
    if not isinstance(images, ImageData):
        raise FinetuneError("Fine-tuning shuffles pictures, which a stream cannot; set data.streaming=false.")
    return images


def check_splits(cfg: DictConfig, train: ImageData, held_out: ImageData) -> None:
    """FinetuneError unless there are classes to tell apart, the same in both splits, and a whole batch."""
    if len(train.class_names) < 2:
        raise FinetuneError(f"'{train.name}' has one class only ({train.class_names[0]}); there is nothing to learn.")
    if train.class_names != held_out.class_names:
        raise FinetuneError(
            f"The train and {held_out.split} splits of '{train.name}' name different classes "
            f"({len(train.class_names)} and {len(held_out.class_names)}); make their class folders or labels agree."
        )
    EpochBatches(len(train), cfg.batch_size, cfg.seed, world=n_ranks(cfg))


@names_full_disk
def fit(cfg: DictConfig, folder: Path) -> None:
    """Train in this process (one of several ranks, or the only one); writes the artefact and ``trained.json``."""
    quiet()
    know_rank()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    train = load_split(cfg, "train")
    val = load_split(cfg, cfg.validate) if cfg.validate else None
    store = similarity_store(cfg, "train")
    model: dict[str, Any] = plain(cfg.model)
    classifier, preprocess = build(model, len(train.class_names), cfg.layer, cfg.added_layer, cfg.seed)
    module = FinetuneModule(classifier, cfg.mono_weight, plain(cfg.optimizer), plain(cfg.schedule)).train()
    data = PictureDataModule(
        train, val, preprocess, cfg.batch_size, cfg.augment, align(store, train) if cfg.mono_weight > 0 else None,
        cfg.seed, cfg.num_workers,
    )  # fmt: skip
    clock = EpochClock()
    callbacks = [StopNotFinite(folder), *checkpoints(cfg, folder), History(folder / "history.csv"), clock]
    callbacks += build_callbacks(cfg, folder)
    last = last_checkpoint(folder)
    callbacks.append(StopWhenAsked(last))
    loggers = [] if is_a_try(cfg) else open_loggers(cfg, folder, start=checkpoint_step(last))
    trainer = L.Trainer(
        **trainer_settings(cfg),
        logger=loggers or False,
        callbacks=callbacks,
        default_root_dir=folder,
        plugins=[*environment(), CheckpointFiles(last)],
        use_distributed_sampler=False,
    )
    if last.is_file():
        print(f"{folder.name}: resuming from its last checkpoint.", flush=True)
    trainer.fit(module, data, ckpt_path=last if last.is_file() else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    require_finite(folder, "the weights", dict(classifier.named_parameters()), trainer.global_step)
    if is_a_try(cfg):
        if trainer.is_global_zero:
            print(f"{folder.name}: fast_dev_run went well; nothing of it is kept.", flush=True)
    elif trainer.is_global_zero:
        part = in_part(trainer, plain(cfg.trainer))
        save(classifier, preprocess, folder, rebuilding(model), train.class_names, record(cfg, store.backbone))
        done = {
            **({"in_part": part} if part else {}),
            "seconds": clock.seconds, "seconds_an_epoch": clock.seconds_an_epoch, "epochs": trainer.current_epoch,
            "steps": trainer.global_step, "devices": trainer.world_size,
            "trained_parameters": sum(p.numel() for p in classifier.parameters() if p.requires_grad),
        }  # fmt: skip
        write_json(folder / TRAINED, done)
        close_loggers(loggers, cfg, folder, done)
    trainer.strategy.barrier()


def trainer_settings(cfg: DictConfig) -> dict[str, Any]:
    """The Trainer's arguments: DDP for several ranks, on GPUs with batch statistics over all of them."""
    settings: dict[str, Any] = plain(cfg.trainer)
    if not cfg.validate:
        settings["limit_val_batches"] = 0
    if settings["strategy"] == "auto" and wants_ranks(cfg):
        settings["strategy"] = "ddp"
    if settings.get("sync_batchnorm") is None:
        on_gpus = torch.cuda.is_available() and str(settings["accelerator"]) in ("auto", "gpu", "cuda")
        settings["sync_batchnorm"] = on_gpus and wants_ranks(cfg)
    return settings


def finish(cfg: DictConfig, folder: Path, held_out: ImageData) -> None:
    """Score what ``fit`` saved on the held-out images, and write ``result.json``."""
    classifier, preprocess, _ = load(folder)
    on_gpu = torch.cuda.is_available() and str(cfg.trainer.accelerator) in ("auto", "gpu", "cuda")
    found = predict(
        classifier, held_out, preprocess.evaluation(cfg.augment), max(1, min(256, cfg.batch_size)),
        workers(preprocess.image_size, cfg.num_workers), "cuda" if on_gpu else "cpu",
    )  # fmt: skip
    embeddings = align(similarity_store(cfg, held_out.split), held_out)
    result = {"status": "finished", **json.loads((folder / TRAINED).read_text(encoding="utf-8"))}
    write_json(folder / "result.json", result | {held_out.split: scores(found, embeddings)})
    (folder / TRAINED).unlink()
    remove_checkpoints(folder)


def record(cfg: DictConfig, encoder: str) -> dict[str, Any]:
    """What ``cfg.json`` says beside the classifier itself; ``encoder`` tells which images are alike."""
    return {
        "name": run_name(cfg), "mono_weight": float(cfg.mono_weight), "seed": cfg.seed, "data": cfg.data.name,
        "similarity": encoder, "features": cfg.features,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS},
        "config": OmegaConf.to_container(cfg, resolve=True),
    }  # fmt: skip
