"""Stability: how alike the dictionaries are of runs that differ by their seed alone [MSAE App. H]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from sae_lightning.benchmark.latents import LATENTS, read_tensors
from sae_lightning.benchmark.table import Score, put_scores, scores_of
from sae_lightning.features.store import file_sha256
from sae_lightning.metrics.stability import stability
from sae_lightning.saes import SAE
from sae_lightning.saes.artefact import read_cfg
from sae_lightning.training.identity import same_but
from sae_lightning.training.leaves import short_hash

PART = "stability"
Dictionary = tuple[Tensor, Tensor, Tensor]  # decoder and encoder [d_sae, d_in], and which latents are alive


def same_but_seed(runs: Sequence[Path]) -> list[list[Path]]:
    """Those of ``runs`` that have siblings of other seeds, together."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        groups.setdefault(same_but(read_cfg(run)), []).append(run)
    return [group for group in groups.values() if len(group) > 1]


def score_stability(runs: Sequence[Path], split: str, again: bool = False) -> None:
    """Write the mean ``stability`` of each run with its siblings among ``runs``, of decoders and encoders.

    Latents that are alive on ``split`` count. Nothing is written for a run without siblings.
    """
    for group in same_but_seed(runs):
        digests = {run: file_sha256(run / "sae.safetensors") for run in group}

        @cache
        def read(run: Path) -> Dictionary:
            sae = SAE.load(run)
            return sae.W_dec.detach(), sae.W_enc.detach(), read_tensors(run / LATENTS)[0]["counts"] > 0

        for run in group:
            others = [other for other in group if other != run]
            key = short_hash({"run": digests[run], "others": sorted(digests[other] for other in others)})
            if again or scores_of(run, PART, split, key) is None:
                put_scores(run, PART, split, key, _mean_stability(run, others, read))


def _mean_stability(run: Path, others: Sequence[Path], read: Callable[[Path], Dictionary]) -> list[Score]:
    found: list[dict[str, float]] = []
    for other in others:
        (W_dec, W_enc, alive), (V_dec, V_enc, living) = read(run), read(other)
        of_encoders = stability(W_enc, V_enc, alive, living)
        found.append(stability(W_dec, V_dec, alive, living) | {name + "_encoder": v for name, v in of_encoders.items()})
    means = [Score(name, float(np.mean([each[name] for each in found]))) for name in found[0]]
    return [*means, Score("stability_siblings", len(others))]
