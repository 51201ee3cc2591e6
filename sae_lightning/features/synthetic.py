"""Stores of features whose latents are known, with the truth beside the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from sae_lightning.data.splits import UNLABELLED
from sae_lightning.data.synthetic import World
from sae_lightning.features.store import FeatureStore
from sae_lightning.features.writer import StoreWriter
from sae_lightning.files import write_tensors
from sae_lightning.saes.artefact import read_tensors
from sae_lightning.saes.codes import SparseCodes

FORMAT = 1  # of what a world makes, for the fingerprint

TRUTH = "truth.safetensors"

KIND = "pooled"  # one token an image

SHARD = 8192  # tokens


class Truth(NamedTuple):
    """``directions`` [n_true, d_in] of unit norm, the ``parents`` [n_true] (-1: none), and codes [n, n_true]."""

    directions: Tensor
    parents: Tensor
    codes: csr_matrix


def fingerprint_of(data: Mapping[str, Any], split: str, dtype: str) -> str:
    """What determines the store of a split; DataError for a world that cannot be."""
    what = [FORMAT, asdict(World.of(data)), split, data["sizes"][split], dtype]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def write_synthetic(folder: Path, data: Mapping[str, Any], split: str, dtype: str) -> None:
    """Write and seal the store of a split, of one token an image, or what is missing of it."""
    world, n = World.of(data), data["sizes"][split]
    about = {
        "data": data["name"], "split": split, "backbone": "synthetic", "kind": KIND, "layer": None, "grid": (1, 1),
        "class_names": [UNLABELLED],
    }  # fmt: skip
    writer = StoreWriter(folder, fingerprint_of(data, split, dtype), about, SHARD, dtype, beside=(TRUTH,))
    starts, parts = range(0, n, SHARD), []
    for index, start in enumerate(starts):
        tokens = min(SHARD, n - start)
        x, codes = world.tokens(split, index, tokens)
        parts.append(codes)
        if not writer.has(index):
            ids = [f"{split}-{start + i}" for i in range(tokens)]
            shard = writer.begin(index)
            shard.append(torch.from_numpy(x)[:, None], ids)
            writer.finish(index, shard, ids, [0] * tokens)
    codes = SparseCodes.of_csr(vstack(parts, format="csr"))
    write_tensors(folder / TRUTH, {
        "directions": torch.from_numpy(world.directions).float(), "parents": torch.from_numpy(world.parents),
        "latents": codes.latents, "values": codes.values, "offsets": codes.offsets,
    })  # fmt: skip
    writer.seal(len(starts))


def truth_of(store: FeatureStore) -> Truth | None:
    """The truth of a store's tokens; None for one whose latents are not known."""
    if TRUTH not in store.manifest.files:
        return None
    t = read_tensors(store.folder / TRUTH)[0]
    codes = SparseCodes(t["latents"], t["values"], t["offsets"], len(t["directions"])).csr()
    return Truth(t["directions"], t["parents"], codes if len(store) == codes.shape[0] else codes[store.places])
