"""Every setting of every command: what it may be. Defaults and what a setting means stand in ``conf/``.

A new setting in ``conf/`` needs its line here; ``tests/settings/test_table.py`` names those that have none.
"""

from __future__ import annotations

from typing import Any

from sae_lightning.settings.kinds import (
    ANYTHING,
    FLAG,
    NAME,
    PATH,
    SHARE,
    TEXT,
    Callbacks,
    Chosen,
    Kind,
    Maybe,
    Named,
    Plus,
    Rule,
    Section,
    choice,
    either,
    list_of,
    matching,
    number,
    whole,
)  # fmt: skip

SPLIT = choice("train", "val", "test")
FEATURES = choice("patch", "cls", "registers", "tokens", "pooled", "embedding", "text")
SITE = matching(r"\w+(\.\w+)*", "block, attn_out, mlp_in, mlp_out, norm or a module's path such as blocks.5.attn.proj")
LAYER = whole(-1000, 1000)
DEVICE = either(choice("auto", "cpu", "cuda"), matching(r"cuda:\d+", "cuda:N"))
SEED = whole(0, 2**32 - 1)
PATTERNS = either(TEXT, list_of(TEXT))
FOLDER: Section = {"runs": PATH, "stores": PATH, "reports": PATH}
SECTION = Kind("a section", lambda value: isinstance(value, dict))

# --- data, backbones and extraction ---------------------------------------------------------------
SOURCES = ("demo", "cifar10", "digits", "mosaic", "folder", "imagenet", "hf", "webdataset", "store", "synthetic")
SHARES: Section = {"train": SHARE, "val": SHARE, "test": SHARE}
NAMES_OF_SPLITS: Section = {"train": Maybe(TEXT), "val": Maybe(TEXT), "test": Maybe(TEXT)}
SOURCE = choice(*SOURCES, registry="sae_lightning.data:data_source")
DATA_SETTINGS: Section = {
    "name": NAME, "source": SOURCE, "backbones": choice("tiny", "published"), "k": number(above=0),
    "batch_size": whole(1), "max_epochs": whole(1), "seed": SEED, "shuffle": FLAG, "limit": Maybe(whole(1)),
    "siblings": Maybe(PATH), "channels": Maybe(list_of(whole(0), 3)), "white": Maybe(number(above=0)),
    # folders of pictures
    "path": Maybe(PATH), "shares": SHARES, "val_share": number(0, below=1), "folders": NAMES_OF_SPLITS,
    # Hugging Face and WebDataset
    "id": TEXT, "config": Maybe(TEXT), "revision": Maybe(TEXT), "streaming": FLAG, "image_column": Maybe(TEXT),
    "label_column": Maybe(TEXT), "caption_column": Maybe(TEXT), "splits": NAMES_OF_SPLITS,
    "held_out": number(0, below=1), "classes": Maybe(either(PATH, list_of(TEXT))), "label_key": TEXT,
    "label_suffix": Maybe(TEXT), "unreadable": choice("refuse", "skip"), "caption_key": TEXT,
    # feature stores
    "train": PATH, "val": Maybe(PATH), "test": Maybe(PATH),
    # masks
    "sizes": {"train": whole(1), "val": whole(1), "test": whole(1)}, "mask_column": Maybe(TEXT), "image_folder": TEXT,
    "mask_folder": TEXT, "mask_first": whole(0), "mask_classes": either(whole(1), list_of(TEXT)),
    # synthetic features
    "d_in": whole(1), "n_true": whole(1), "active": number(above=0), "power": number(0),
    "magnitudes": list_of(number(above=0), 2), "noise": number(0), "correlation": number(0, below=1),
    "group": whole(1), "children": whole(0),
}  # fmt: skip
DATA: Rule = Chosen("source", dict.fromkeys(SOURCES, DATA_SETTINGS), SOURCE)
LIBRARY = choice("timm", "transformers", registry="sae_lightning.backbones.backbone:backbone_library")
PUBLISHED: Section = {
    "library": LIBRARY, "model": TEXT, "title": Maybe(TEXT), "image_size": Maybe(whole(1)),
    "layer": Maybe(LAYER), "pretrained": FLAG, "weights": Maybe(PATH), "architecture": Maybe(SECTION),
    "resize": Maybe(whole(1)),
}  # fmt: skip
BACKBONE: Section = {  # size null: as the run's own encoder
    "name": NAME, "size": Maybe(choice("tiny", "published")), "layer": Maybe(LAYER),
    "tiny": {"layer": LAYER, "pretrained": FLAG}, "published": PUBLISHED,
}  # fmt: skip
EXTRACT: Section = {
    "batch_size": whole(1), "num_workers": Maybe(whole(0)), "images_per_shard": Maybe(whole(1)), "device": DEVICE,
    "devices": whole(1), "part": Maybe(matching(r"\d+/[1-9]\d*", "a part such as 0/4, 1/4, 2/4 or 3/4")),
    "precision": choice("32", "bf16", "16"), "dtype": choice("float16", "bfloat16", "int8"),
    "unreadable": choice("refuse", "skip"),
}  # fmt: skip

# --- training ---------------------------------------------------------------------------------------
SAE: Section = {"tied": FLAG, "input_norm": choice("none", "layer", "rms", "unit"), "encoder_norm": number(above=0)}
K = number(above=0)
WHOLE = Kind("a whole number of at least 1; sae=batchtopk takes fractions", whole(1).fits)
TOPK: Section = {**SAE, "k": WHOLE, "inference": choice("topk", "relu")}
BATCHTOPK: Section = {**SAE, "k": K, "k_per": choice("sample", "batch")}
PREFIXES: Section = {"fractions": list_of(number(above=0, high=1)), "sampled": whole(0)}
VARIANTS: dict[str, Rule] = {
    "relu": SAE, "topk": TOPK, "batchtopk": BATCHTOPK,
    "jumprelu": {
        **SAE, "bandwidth": either(number(above=0), choice("silverman")),
        "kernel_name": choice("rectangle", "gaussian", "silverman"), "threshold": number(above=0),
    },
    "gated": SAE, "matryoshka": {**BATCHTOPK, **PREFIXES}, "matryoshka_topk": {**TOPK, **PREFIXES},
    "msae": {
        **SAE, "k": WHOLE, "ks": Maybe(list_of(whole(1))), "weighting": choice("uniform", "reverse"),
        "soft_cap": Maybe(number(above=0)),
    },
    **dict.fromkeys(("frozen_decoder", "soft_frozen_decoder", "frozen_encoder"), BATCHTOPK),
    **dict.fromkeys(("random", "neurons", "pca", "nmf"), BATCHTOPK), "kmeans": TOPK,
}  # fmt: skip
MONOLOSS: Section = {
    "_target_": TEXT, "weight": number(0), "warmup": SHARE, "memory": number(0, below=1), "every": whole(1),
    "center": FLAG, "pool": choice("max", "mean"),
}  # fmt: skip
CALLBACKS = Callbacks({"sae_lightning.training.monoloss.MonoLoss": MONOLOSS})
COMMON = ("reconstruction", "absolute", "cosine", "sparsity", "aux", "orthogonality", "unselected", "hoyer")
LOSSES = (*COMMON, "nested", "gate")  # the last two are of single variants
LOSS: Rule = Plus(dict.fromkeys(LOSSES, number(0)), "sae_lightning.saes.losses:TERMS")
LOSS_OPTIONS: Rule = Plus({
    **dict.fromkeys(LOSSES, Maybe({})), "reconstruction": Maybe({"relative": FLAG}),
    "nested": Maybe({"relative": FLAG}),
    "sparsity": Maybe({"decoder_norms": FLAG, "per_dimension": FLAG}),
    "aux": Maybe({"k_aux": Maybe(whole(1)), "dead_after": whole(1), "relative": FLAG}),
}, "sae_lightning.saes.losses:TERMS")  # fmt: skip
LOGGER: Rule = Maybe({
    "csv": Maybe({}), "tensorboard": Maybe({}),
    "wandb": {
        "project": Maybe(TEXT), "entity": Maybe(TEXT), "group": Maybe(TEXT), "tags": list_of(TEXT, 0),
        "offline": either(FLAG, choice("auto")), "patience": Maybe(number(0)), "finish": Maybe(number(0)),
        "folder": Maybe(PATH), "artefact": FLAG, "latents": whole(0),
        "suffix": Kind("a text", lambda value: isinstance(value, str | int)),
    },
})  # fmt: skip


def _duration(value: Any) -> bool:
    units = ("weeks", "days", "hours", "minutes", "seconds")
    if isinstance(value, dict):
        return bool(value) and set(value) <= set(units) and all(number(0).fits(v) for v in value.values())
    return DAYS.fits(value)


def _batches(value: Any) -> bool:
    return not isinstance(value, bool) and number(above=0).fits(value) and (isinstance(value, int) or value <= 1)


DAYS = matching(r"\d+:\d\d:\d\d:\d\d", "a time")
BATCHES = Kind("a number of batches (of at least 1), or a share of them (above 0 and up to 1.0)", _batches)
PRECISIONS = (
    "64", "64-true", "32", "32-true", "16", "16-mixed", "16-true", "bf16", "bf16-mixed", "bf16-true",
    "transformer-engine", "transformer-engine-float16",
)  # fmt: skip
TRAINER: Section = {  # what lightning.Trainer takes, but for what is ours to give: loggers, callbacks, folders, plugins
    "accelerator": choice("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "strategy": matching(r"auto|single_device|(ddp|fsdp|deepspeed|xla)\w*", "auto, ddp or another of Lightning's"),
    "devices": either(whole(1), matching(r"-1|auto|\d+(,\d+)+", "auto, -1 (all GPUs)"), list_of(whole(0))),
    "num_nodes": whole(1), "precision": choice(*PRECISIONS), "fast_dev_run": either(FLAG, whole(0)),
    "max_epochs": Maybe(either(whole(1), matching("-1", "-1 (no end)"))), "min_epochs": Maybe(whole(0)),
    "max_steps": either(whole(1), matching("-1", "-1 (no limit)")), "min_steps": Maybe(whole(0)),
    "max_time": Maybe(Kind("a time such as 00:12:00:00 (days, hours, minutes, seconds) or {hours: 12}", _duration)),
    "limit_train_batches": Maybe(BATCHES), "limit_val_batches": Maybe(BATCHES), "limit_test_batches": Maybe(BATCHES),
    "limit_predict_batches": Maybe(BATCHES), "overfit_batches": number(0), "val_check_interval": Maybe(BATCHES),
    "check_val_every_n_epoch": Maybe(whole(1)), "num_sanity_val_steps": Maybe(whole(-1)),
    "log_every_n_steps": Maybe(whole(1)),
    "enable_checkpointing": Maybe(Kind("true: trainings resume from checkpoints", lambda value: value is True)),
    "enable_progress_bar": Maybe(FLAG), "enable_model_summary": Maybe(FLAG), "accumulate_grad_batches": whole(1),
    "gradient_clip_val": Maybe(number(0)), "gradient_clip_algorithm": Maybe(choice("norm", "value")),
    "deterministic": Maybe(either(FLAG, choice("warn"))), "benchmark": Maybe(FLAG), "inference_mode": FLAG,
    "profiler": Maybe(choice("simple", "advanced", "pytorch", "xla")), "detect_anomaly": FLAG,
    "barebones": Kind("false: trainings are logged and resume from checkpoints", lambda value: value is False),
    "sync_batchnorm": Maybe(FLAG), "reload_dataloaders_every_n_epochs": whole(0), "enable_autolog_hparams": FLAG,
    "model_registry": Maybe(TEXT),
}  # fmt: skip
CHECKPOINT: Section = {"every_minutes": Maybe(number(above=0)), "every_steps": Maybe(whole(1))}
TRAIN: Section = {
    "data": DATA, "backbone": BACKBONE, "extract": EXTRACT,
    "sae": {
        "name": choice(*VARIANTS, registry="sae_lightning.saes:VARIANTS"), "settings": Chosen("name", VARIANTS),
        "target_l0": Maybe(number(above=0)), "threshold": choice("calibrated", "running_minimum", "running_average"),
    },
    "trainer": TRAINER, "logger": LOGGER, "callbacks": CALLBACKS, "expansion": whole(1, 65536),
    "d_sae": Maybe(whole(1, 2**31 - 1)), "k": Maybe(K), "seed": SEED, "batch_size": whole(1),
    "optimizer": {
        "name": choice("adam", "adamw"), "lr": number(above=0), "eps": number(above=0),
        "betas": list_of(number(0, below=1), 2), "weight_decay": number(0), "fused": Maybe(FLAG),
        "foreach": Maybe(FLAG), "project": FLAG,
    },
    "schedule": {
        "warmup": SHARE, "decay": SHARE, "shape": choice("linear", "cosine"), "sparsity_warmup": SHARE,
        "k_from": Maybe(number(above=0)), "k_share": SHARE,
    },
    "loss": LOSS, "loss_options": LOSS_OPTIONS, "dead_after": whole(1),
    "resample": {"every": whole(0), "until": number(above=0, high=1)}, "normalize": choice("standard", "none"),
    "init": {"b_pre": choice("mean", "geometric_median", "zero")}, "features": FEATURES, "site": SITE,
    "subset": {"images": Maybe(whole(1)), "per_class": Maybe(whole(1)), "classes": Maybe(list_of(TEXT))},
    "stream": {
        "unit": choice("tokens", "images"), "buffer_mb": number(above=0), "block_mb": number(above=0),
        "lanes": whole(1), "readers": whole(1), "damaged": choice("refuse", "skip"), "verify": FLAG,
    },
    "pack": {
        "when": choice("auto", "always", "never"), "members": Maybe(whole(1)), "workers": Maybe(whole(1)),
        "memory_gb": Maybe(number(above=0)), "file": Maybe(PATH),
    },
    "checkpoint": CHECKPOINT, "paths": FOLDER,
}  # fmt: skip

# --- the other commands -----------------------------------------------------------------------------
EXTRACTION: Section = {
    "data": DATA, "backbone": BACKBONE, "extract": EXTRACT, "splits": list_of(SPLIT),
    "features": either(FEATURES, list_of(FEATURES)), "site": either(SITE, list_of(SITE)),
    "layers": Maybe(either(LAYER, list_of(LAYER))), "paths": FOLDER,
}  # fmt: skip
PROBE: Section = {"test_share": number(above=0, below=1), "seed": SEED, "C": number(above=0), "max_iter": whole(1)}
SOLVER = Maybe(choice("adam", "adamw"))
MORAN: Section = {
    "contiguity": choice("queen", "rook"), "row_standardized": FLAG, "min_active": whole(1), "min_variance": number(0),
    "min_images": whole(1),
}  # fmt: skip
AT = {"at": list_of(whole(1))}
PARTS: dict[str, Section] = {
    "core": {"above": list_of(number()), "bands": {"ranks": whole(1), "images": whole(1)}}, "moran": MORAN,
    "raw_moran": MORAN, "preservation": {**PROBE, "codes": FLAG, "retrain": FLAG, "solver": SOLVER},
    "sparse_probing": {**PROBE, "budgets": list_of(whole(1)), "ranking": choice("joint", "per_class")},
    "monosemanticity": {
        "images": whole(2), "latents": whole(1), "groups": whole(1), "seed": SEED, "features": Maybe(FEATURES),
        "pairing": Named(TEXT), "other": TEXT, "store": Maybe(PATH), "judges": Named(Maybe(BACKBONE)),
    },
    "ms_score": {"judge": Maybe(BACKBONE), "features": Maybe(FEATURES), "store": Maybe(PATH)},
    "cross_domain": {
        "codes": FLAG, "k": whole(1), "C": number(above=0), "max_iter": whole(1), "solver": SOLVER, "sets": Named(DATA),
    },
    "absorption": {**PROBE, "alphas": list_of(SHARE), "betas": list_of(SHARE), "min_group": whole(2)}, "retrieval": AT,
    "image_text": AT,
    "segmentation": {
        "epochs": whole(1), "lr": number(above=0), "weight_decay": number(0), "batch_tokens": whole(1), "seed": SEED,
        "resolution": choice("pixel", "patch"), "sets": Named(DATA),
    },
    "cknna": {"k": whole(1), "samples": whole(2), "seed": SEED},
    "recovery": {"budgets": list_of(whole(1)), "images": whole(1), "samples": whole(1), "seed": SEED},
    "causal": {
        "images": whole(2), "train": whole(2), "classes": whole(2), "readout": choice("probe", "zero_shot"),
        "template": TEXT, "output": choice("auto", "patch"), "by": choice("mean", "resample", "zero"),
        "choose": choice("purest", "used"), "latents": whole(1), "top": whole(1), "budgets": list_of(whole(1)),
        "unnatural": SHARE, "fvu": number(0), "rows": whole(1), "draws": whole(1), "seed": SEED,
        "C": number(above=0), "max_iter": whole(1),
    },
    "histograms": {"low": number(), "high": number(), "per_decade": whole(1)}, "stability": {},
    "truth": {"above": SHARE},
}  # fmt: skip
PROTOCOL = choice("paper", "released")
METRICS = Plus({name: Maybe(part, flags=True) for name, part in PARTS.items()}
               | {"protocol": either(PROTOCOL, list_of(PROTOCOL))}, "sae_lightning.metrics.part:PARTS")  # fmt: skip
EVALUATE: Section = {
    "metrics": METRICS, "data": Maybe(DATA), "features": Maybe(FEATURES), "inference": Maybe(choice("relu")),
    "similarity": Maybe(BACKBONE), "logger": LOGGER, "runs": PATTERNS, "split": SPLIT,
    "batch_tokens": whole(1), "memory_gb": number(above=0), "checkpoint_minutes": number(above=0), "device": DEVICE,
    "devices": whole(1), "latents_shown": whole(1),
    "similarity_features": Maybe(choice("patch", "cls", "pooled", "embedding")), "similarity_store": Maybe(PATH),
    "again": FLAG, "paths": {"runs": PATH, "stores": Maybe(PATH)},
}  # fmt: skip
REPORT: Section = {
    "runs": PATTERNS, "grid": Maybe(PATTERNS), "out": Maybe(PATH), "detailed": whole(0), "detailed_seeds": whole(0),
    "grids": whole(0), "paths": FOLDER,
}  # fmt: skip
VLM: Section = {
    "name": NAME, "title": Maybe(TEXT), "model": TEXT, "weights": Maybe(PATH),
    "dtype": choice("float32", "bfloat16", "float16", "auto"), "device_map": Maybe(ANYTHING), "prompt": TEXT,
    "max_new_tokens": whole(1), "batch_size": whole(1), "tower": Maybe(TEXT), "blocks": Maybe(TEXT),
    "special_tokens": Maybe(whole(0)), "architecture": Maybe(SECTION),
}  # fmt: skip
LATENTS = list_of(either(whole(0), TEXT))
APPS: dict[str, Rule] = {
    "naming": {
        "name": NAME, "method": choice("auto", "decoder", "activation", "labels"), "vocabulary": PATTERNS,
        "templates": list_of(TEXT), "centre": choice("auto", "captions", "vocabulary", "images"),
        "b_pre": choice("keep", "remove"),
        "thresholds": {"cosine": number(), "correlation": number(), "ratio": number(0)},
        "named": choice("above", "best", "above_best", "ratio", "all"),
        "labels": {"purity": SHARE, "images": whole(0)}, "alive": FLAG, "baseline": {"draws": whole(1)},
        "top": whole(1), "cards": whole(0),
    },
    "search": {
        "name": NAME, "queries": Maybe(either(TEXT, list_of(TEXT))), "shown": whole(1), "neighbours": whole(1),
        "shared": whole(0),
        "turn": {
            "latents": Maybe(either(TEXT, LATENTS)), "to": list_of(number()), "unit": choice("spread", "code"),
            "keep_error": FLAG,
        },
        "scored": whole(1),
        "dose": {"latents": whole(0), "images": whole(1), "to": list_of(number()), "neighbours": whole(1)},
    },
    "bias": {
        "name": NAME, "positive": Maybe(either(TEXT, list_of(TEXT))), "negative": Maybe(either(TEXT, list_of(TEXT))),
        "attribute": Maybe(TEXT), "strength": number(above=0), "latents": Maybe(list_of(whole(0))), "each": whole(1),
        "reach": number(above=0), "keep_error": FLAG, "rows": whole(0),
        "plant": {
            "attribute": Maybe(choice("tint", "frame", "corner", "dark")), "strength": number(above=0, high=1),
            "correlation": number(-1, 1), "images": whole(2), "most": whole(1),
        },
    },
    "stability": {
        "name": NAME, "fit": SPLIT, "images": whole(1), "min_images": whole(1), "latents": Maybe(whole(1)),
        "candidates": whole(1), "pairs": whole(1),
        "universal": {"latents": whole(1), "shuffles": whole(1), "shown": whole(0), "images": whole(1)},
    },
    "steering": {
        "name": NAME, "vlm": VLM, "judge": BACKBONE, "latents": whole(1), "top": whole(1), "purity": SHARE,
        "insert": list_of(number()), "suppress": list_of(number()), "images": whole(1), "tested": whole(1),
        "tokens": choice("all", "patch"), "keep_error": FLAG, "top_k": list_of(whole(1)), "shown": whole(0),
    },
    "agreement": {
        "name": NAME, "judge": Maybe(BACKBONE), "judgements": Maybe(either(PATH, list_of(PATH))),
        "simulated": whole(0), "pairs": whole(1), "strata": whole(1), "images": whole(1),
        "bins": list_of(number(0), 2),
    },
    "explorer": {
        "name": NAME, "vlm": Maybe(VLM), "host": TEXT, "hosts": list_of(TEXT, 0), "port": whole(0, 65535),
        "browser": FLAG, "images_per_band": whole(1), "latents": whole(1), "neighbours": whole(1),
        "upload_mb": number(above=0),
    },
}  # fmt: skip
EXPLORE: Section = {
    "app": Chosen("name", APPS, choice(*APPS, registry="sae_lightning.apps.app:APPS")), "run": PATTERNS,
    "split": SPLIT, "seed": SEED, "device": DEVICE, "paths": FOLDER,
}  # fmt: skip
FINETUNE: Section = {
    "data": DATA,
    "model": {
        "name": NAME, "library": choice("timm", "transformers", "tiny"), "model": TEXT, "image_size": Maybe(whole(1)),
        "pretrained": FLAG, "weights": Maybe(PATH), "architecture": Maybe(SECTION),
        "lora": {
            "r": Maybe(whole(1)), "alpha": number(above=0), "targets": list_of(TEXT, 0), "dropout": number(0, below=1),
        },
        "lr": {"imagenet": number(above=0), "cifar": number(above=0)}, "weight_decay": number(0),
        "schedule": choice("cosine", "constant"), "warmup_epochs": {"imagenet": number(0), "cifar": number(0)},
    },
    "similarity": BACKBONE, "extract": EXTRACT, "trainer": TRAINER, "logger": LOGGER, "callbacks": CALLBACKS,
    "mono_weight": number(0), "layer": NAME, "added_layer": FLAG, "features": choice("embedding", "pooled", "cls"),
    "similarity_store": {"train": Maybe(PATH), "val": Maybe(PATH), "test": Maybe(PATH)},
    "recipe": choice("cifar", "imagenet"), "epochs": whole(1), "batch_size": whole(1),
    "optimizer": {
        "lr": number(above=0), "momentum": number(0, below=1), "weight_decay": number(0), "dampening": number(0),
        "nesterov": FLAG,
    },
    "schedule": {"shape": choice("cosine", "constant"), "warmup_epochs": number(0)},
    "augment": choice("crop", "resized_crop", "none"), "seed": SEED, "held_out": SPLIT, "validate": Maybe(SPLIT),
    "num_workers": Maybe(whole(0)), "checkpoint": CHECKPOINT, "paths": FOLDER,
}  # fmt: skip

COMMANDS: dict[str, Section] = {
    "train": TRAIN, "extract": EXTRACTION, "evaluate": EVALUATE, "report": REPORT, "explore": EXPLORE,
    "finetune": FINETUNE,
}  # fmt: skip
