"""What tells runs apart as one flat dict: columns and axes in W&B, hyper-parameters in TensorBoard, hparams.yaml."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sae_lightning.training.identity import callbacks_on, monoloss_of

LEFT_OUT = ("logger", "paths", "name", "pack", "checkpoint")  # do not change the result
FIRST = ("data", "features", "layer", "variant", "expansion", "k", "seed", "d_in", "d_sae", "hash")


def columns(made: Mapping[str, Any]) -> dict[str, Any]:
    """``cfg.json`` of a run, ``made``, as scalars: run, backbone, layer, variant, expansion, k, … then the config.

    ``backbone`` is its short name and ``title`` says its size; ``monoloss`` is the weight, 0 without. Settings below a
    section are joined by slashes, lists are JSON, and what is not set, or of a callback that is not on, is left out.
    """
    entries = made["config"].get("callbacks") or {}
    config = {**made["config"], "callbacks": {name: entries[name] for name in callbacks_on(made["config"])}}
    found = {
        "run": made["name"], "backbone": config["backbone"]["name"], "title": made["backbone"],
        "monoloss": monoloss_of(config)[0],
        **{name: made.get(name) for name in FIRST},
    }  # fmt: skip
    found |= {name: value for name, value in flat(config) if name not in found}
    return {name: value for name, value in found.items() if value is not None}


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings by their slashed names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/") if prefix or name not in LEFT_OUT else ()
        elif prefix or name not in LEFT_OUT:
            yield f"{prefix}{name}", json.dumps(list(value)) if isinstance(value, list | tuple) else value
