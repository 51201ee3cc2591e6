"""Configs and weights of transformers models: from the hub, from a folder, or random."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from sae_lightning.backbones.errors import BackboneError, reason
from sae_lightning.backbones.settings import Published
from sae_lightning.backbones.weights import fixed_seed

# for key_mapping: takes off what torch.compile and data parallelism put before the names of weights
UNWRAPPED = {r"^(?:(?:module|_orig_mod)\.)+": "", r"\._orig_mod\.": "."}


def architecture(wanted: Published) -> Any:
    """transformers' config of the whole model: spelled out, or as it lies beside the weights."""
    spelled_out = None if wanted.architecture is None or wanted.pretrained else json.dumps(dict(wanted.architecture))
    return _architecture(str(wanted.weights or wanted.model), spelled_out)


NOT_SUPPORTED = "Such a model is not supported; choose another, or try backbone=timm."


@lru_cache(maxsize=64)
def _architecture(source: str, spelled_out: str | None) -> Any:
    import transformers

    try:
        with silent():
            if spelled_out is not None:
                return transformers.AutoConfig.for_model(**json.loads(spelled_out))
            return transformers.AutoConfig.from_pretrained(source)
    except Exception as error:
        advice = "Check backbone.published.architecture."
        if spelled_out is None:
            advice = NOT_SUPPORTED
        if _of_the_hub(error):
            advice = (
                "Check backbone.published.model and the connection to the model hub; without one, give a model folder "
                "as backbone.published.weights, or for pretrained=false a backbone.published.architecture."
            )
        raise BackboneError(f"The config of '{source}' cannot be loaded: {reason(error)}. {advice}") from error


def build(wanted: Published, kind: str, config: Any) -> Any:
    """The transformers class ``kind`` in float32, with the weights that ``wanted`` names or with random ones.

    BackboneError if the weights cannot be had, or lack more than a pooler, which is left out then.
    """
    import transformers

    cls = getattr(transformers, kind)
    source = wanted.weights or wanted.model
    try:
        with fixed_seed(), silent():
            if not wanted.pretrained:
                return (cls.from_config(config) if kind == "AutoModel" else cls(config)).float()
            model, report = cls.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                use_safetensors=True if wanted.weights else None,
                key_mapping=UNWRAPPED,
            )
    except Exception as error:
        advice = NOT_SUPPORTED
        if _of_the_hub(error):
            advice = (
                "Check the model's id and the connection to the model hub, or give a model folder as "
                "backbone.published.weights; data=demo works offline."
            )
        what = "weights" if wanted.pretrained else "architecture"
        raise BackboneError(f"The {what} of '{source}' cannot be loaded: {reason(error)}. {advice}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.endswith("mask_token"))
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None
    elif missing:
        raise BackboneError(
            f"The weights of '{source}' lack {len(missing)} tensors of {type(model).__name__}, '{missing[0]}' among "
            "them; choose a checkpoint of the whole model."
        )
    return model


def _of_the_hub(error: Exception) -> bool:
    """Whether it is about files that are not there or cannot be fetched, rather than about the model in them."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in (
        "huggingface_hub",
        "httpx",
        "requests",
    )


@contextmanager
def silent() -> Iterator[None]:
    """Without transformers' warnings, such as its table of tensors that belong to other parts of a checkpoint, and
    without its bars; those of downloads stay."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
