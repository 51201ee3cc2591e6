"""One fine-tuning: from a resolved config to a finished run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sae_lightning.backbones.registry import identity as backbone_identity
from sae_lightning.data import ImageData
from sae_lightning.data.loader import PictureLoader
from sae_lightning.distributed.launch import launch_ranks, n_ranks, on_gpu, wants_ranks
from sae_lightning.distributed.stopping import stop_on_signals
from sae_lightning.features.source import Source, plain
from sae_lightning.features.store import FeatureStore
from sae_lightning.files import held, lend_cache, read_json, set_damaged_aside, write_json
from sae_lightning.finetuning.classifier import WEIGHTS, Classifier, build, load, model_identity, rebuilding, save
from sae_lightning.finetuning.data import (
    EpochBatches,
    FinetuneError,
    PictureDataModule,
    Pictures,
    Transform,
    align,
    similarity_store,
    workers,
)
from sae_lightning.finetuning.module import EpochClock, FinetuneModule, correct
from sae_lightning.metrics.monoscore import monoscore
from sae_lightning.metrics.purity import Purity
from sae_lightning.runs.identity import (
    EXTRACT_LEFT_OUT,
    LISTENED,
    PLACE,
    READ,
    SHOWN,
    TRAINER_ABSENT,
    TRAINER_LEFT_OUT,
    Rules,
    clipping,
    short_hash,
)
from sae_lightning.runs.record import versions
from sae_lightning.runs.run import CFG, LOCK, RESULT, is_finished
from sae_lightning.runs.state import is_a_try
from sae_lightning.saes.codes import SparseCodes
from sae_lightning.training.checkpoints import names_full_disk, remove_checkpoints, repair_checkpoint
from sae_lightning.training.failed import begin_anew, in_part, worth_keeping
from sae_lightning.training.fit import (
    begin,
    build_trainer,
    check,
    finish,
    goes_on,
    run_trainer,
    trainer_settings,
)
from sae_lightning.training.loggers import write_sweep_options

ROWS = 4096  # images whose positive activations are listed at once


class Predictions(NamedTuple):
    """Of n images: ``logits`` [n, n_classes], ``activations`` [n, M], both float32, and ``labels`` [n] int64."""

    logits: Tensor
    activations: Tensor
    labels: Tensor


@torch.inference_mode()
def predict(
    classifier: Classifier, images: ImageData, transform: Transform, batch_size: int = 256, num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Predictions:  # fmt: skip
    """Run ``classifier`` in float32 and evaluation mode over all ``images``; the results are on the CPU."""
    classifier = classifier.to(device).eval()
    batch_bytes = batch_size * transform(images[0]).nbytes if num_workers else 0
    loader = PictureLoader(Pictures(images, transform), batch_bytes, num_workers, batch_size=batch_size)
    parts = []
    for pixels, labels, _ in loader:
        logits, activations = classifier(pixels.to(device, non_blocking=True))
        parts.append((logits.float().cpu(), activations.float().cpu(), labels))
    return Predictions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def scores(found: Predictions, embeddings: Tensor) -> dict[str, float]:
    """Top-1 ``accuracy`` and ``cross_entropy``, and of the layer's units, given the images' ``embeddings`` [n, d]:

    ``monoscore``, the mean over all units, 0 for one without a score (min–max scaled over these images); ``purity`` and
    ``weighted_purity`` of positive activations [MonoLoss §4.1], means over the units that are ever positive;
    ``positive_images``, on how many of the ``images`` a unit is positive, the mean over all units; ``units`` and
    ``positive_units``, how many there are and how many of them are ever positive.
    """
    logits, activations, labels = found
    purity = Purity(activations.shape[1], logits.shape[1])
    for rows, truth in zip(activations.split(ROWS), labels.split(ROWS), strict=True):
        purity.update(SparseCodes.select(rows, rows > 0), truth)
    images = purity.per_latent().images
    return {
        "accuracy": float(correct(logits, labels).double().mean()),
        "cross_entropy": float(F.cross_entropy(logits.double(), labels)),
        "monoscore": float(monoscore(activations, embeddings).mean()),
        **{name: float(value) for name, value in purity.compute().items()},
        "positive_images": float(images.double().mean()),
        "positive_units": int((images > 0).sum()),
        "units": activations.shape[1],
        "images": len(labels),
    }


SCHEMA = 1  # of what ``identity`` says, as in runs/identity.py

LEFT_OUT = {
    "data.*": "counted by the fingerprints of the images",
    **dict.fromkeys(
        (
            "model.library", "model.model", "model.image_size", "model.pretrained", "model.weights",
            "model.architecture*",
        ),
        "counted by the model's own fingerprint",
    ),
    **dict.fromkeys(
        ("model.lr.*", "model.weight_decay", "model.schedule", "model.warmup_epochs.*"),
        "counted where it is used: in optimizer and schedule",
    ),
    "model.name": "what the model is called",
    "similarity.*": "counted by the encoder's own fingerprint, with the layer that it means",
    "similarity_store.*": "counted by the stores' fingerprints",
    "recipe": "counted where it is used: optimizer.lr and schedule.warmup_epochs",
    "num_workers": READ, "checkpoint.*": SHOWN, "logger.*": SHOWN, "logger": SHOWN, "paths.*": PLACE,
    **{f"extract.{name}": reason for name, reason in EXTRACT_LEFT_OUT.items()}, **TRAINER_LEFT_OUT,
}  # fmt: skip

ABSENT = {
    "extract.precision": "32", "extract.dtype": "float16", "extract.unreadable": "refuse", "features": "embedding",
    "optimizer.momentum": 0.9, "model.lora.dropout": 0, **TRAINER_ABSENT,
    "trainer.sync_batchnorm": None,  # with several GPUs
}  # fmt: skip


def idle(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Patterns of leaves that nothing reads beside the others, with reasons."""
    found = (
        {}
        if leaves.get("model.lora.r") is not None
        else dict.fromkeys(("model.lora.alpha", "model.lora.targets", "model.lora.dropout"), "all weights are trained")
    )
    held_out = leaves.get("held_out")
    if all(leaves.get(f"similarity_store.{split}") is not None for split in ("train", held_out)):
        found |= dict.fromkeys(("extract.*", "features"), "the stores are there")
    return found | clipping(leaves)


RULES = Rules(LEFT_OUT, LISTENED | {"validate": "what is scored on the way, which no callback hears"}, ABSENT, idle)


def identity(cfg: DictConfig, seen: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What determines the classifier and its scores, by leaf: the settings that count, and what ``look`` finds.

    Raises DataError, BackboneError, StoreError or FinetuneError where data, encoder or model cannot be found.
    """
    return {"schema": SCHEMA} | RULES.counted(plain(cfg)) | dict(look(cfg) if seen is None else seen)


def look(cfg: DictConfig) -> dict[str, Any]:
    """The fingerprints of the images, the model as it starts, and of what says which images are alike."""
    splits = list(dict.fromkeys(("train", str(cfg.held_out))))
    source = Source.of(cfg, "similarity")
    found: dict[str, Any] = {f"data.{split}": source.images_fingerprint(split) for split in splits}
    found["model"] = model_identity(plain(cfg.model))
    for split in splits:
        given = cfg.similarity_store.get(split)
        if given is not None:
            found[f"similarity.{split}"] = FeatureStore.open(given).fingerprint
        else:
            found[f"similarity.{split}"] = [backbone_identity(source.backbone), source.tap.layer]
    return found


def run_name(cfg: DictConfig, seen: Mapping[str, Any] | None = None) -> str:
    """For example ``deit-tiny-mono0.1-s42-1a2b3c4d``."""
    return f"{cfg.model.name}-mono{float(cfg.mono_weight):g}-s{cfg.seed}-{short_hash(identity(cfg, seen))}"


TRAINED = "trained.json"

PRODUCTS = (RESULT, WEIGHTS, CFG)  # without which a run is not finished

VERSIONS = ("torch", "torchvision", "lightning", "timm", "transformers", "peft", "numpy")


def finetune(cfg: DictConfig) -> Path:
    """Fine-tune and score one classifier unless its run is finished; returns the run folder.

    Extracts missing similarity stores first, resumes from the run's checkpoint, and spreads over processes when
    ``trainer.devices`` asks for it. Stops at a checkpoint when a signal asks for it (``preempt.py``). Raises ValueError
    for impossible settings, before any work.
    """
    check(cfg, "finetune")
    lend_cache(Path(cfg.paths.runs))
    folder = Path(cfg.paths.runs) / run_name(cfg)
    own = worth_keeping(folder, not is_a_try(cfg))
    with own, stop_on_signals(folder.name), held(folder / LOCK, f"fine-tuning {folder.name}"):
        if is_finished(folder, PRODUCTS):
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
            repair_checkpoint(folder)
            write_sweep_options(cfg)
            launch_ranks(cfg, folder, fit) if wants_ranks(cfg) else fit(cfg, folder)
        if not is_a_try(cfg):
            score(cfg, folder, held_out)
    return folder


def load_split(cfg: DictConfig, split: str) -> ImageData:
    """The pictures of ``split``; FinetuneError for a stream, which has no order to shuffle."""
    images = Source.of(cfg, "similarity").images(split)
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
    begin(cfg.seed)
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
    trainer = build_trainer(cfg, folder, finetuning_settings(cfg), clock)
    goes_on(folder)
    run_trainer(trainer, module, data, folder)

    def write() -> dict[str, Any]:
        part = in_part(trainer, plain(cfg.trainer))
        save(classifier, preprocess, folder, rebuilding(model), train.class_names, record(cfg, store.backbone))
        done = {
            **({"in_part": part} if part else {}),
            "seconds": clock.seconds, "seconds_an_epoch": clock.seconds_an_epoch, "epochs": trainer.current_epoch,
            "steps": trainer.global_step, "devices": trainer.world_size,
            "trained_parameters": sum(p.numel() for p in classifier.parameters() if p.requires_grad),
        }  # fmt: skip
        write_json(folder / TRAINED, done)
        return done

    finish(cfg, folder, trainer, write)
    trainer.strategy.barrier()


def finetuning_settings(cfg: DictConfig) -> dict[str, Any]:
    """The Trainer's arguments: batch statistics over all ranks on GPUs, no validation without a split for it."""
    settings = trainer_settings(cfg)
    if not cfg.validate:
        settings["limit_val_batches"] = 0
    if settings.get("sync_batchnorm") is None:
        settings["sync_batchnorm"] = on_gpu(cfg) and wants_ranks(cfg)
    return settings


def score(cfg: DictConfig, folder: Path, held_out: ImageData) -> None:
    """Score what ``fit`` saved on the held-out images, and write ``result.json``."""
    classifier, preprocess, _ = load(folder)
    found = predict(
        classifier, held_out, preprocess.evaluation(cfg.augment), max(1, min(256, cfg.batch_size)),
        workers(preprocess.image_size, cfg.num_workers), "cuda" if on_gpu(cfg) else "cpu",
    )  # fmt: skip
    embeddings = align(similarity_store(cfg, held_out.split), held_out)
    result = {"status": "finished", **read_json(folder / TRAINED, "delete it")}
    write_json(folder / RESULT, result | {held_out.split: scores(found, embeddings)})
    (folder / TRAINED).unlink()
    remove_checkpoints(folder)


def record(cfg: DictConfig, encoder: str) -> dict[str, Any]:
    """What ``cfg.json`` says beside the classifier itself; ``encoder`` tells which images are alike."""
    return {
        "name": run_name(cfg), "mono_weight": float(cfg.mono_weight), "seed": cfg.seed, "data": cfg.data.name,
        "similarity": encoder, "features": cfg.features,
        "versions": versions(*VERSIONS),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }  # fmt: skip
