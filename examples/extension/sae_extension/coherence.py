"""Mutual coherence of a dictionary: how alike each latent's direction is to the one nearest to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sae_lightning.metrics.base import Score
from sae_lightning.metrics.part import Column, Part, ScoredRun, register

ROWS = 4096  # of the decoder that are compared with all others at a time


def coherence(directions: torch.Tensor) -> torch.Tensor:
    """[d_sae] largest absolute cosine of each of the ``directions`` [d_sae, d_in] with any other."""
    unit = torch.nn.functional.normalize(directions.float(), dim=1)
    found = []
    for first in range(0, len(unit), ROWS):
        cosines = (unit[first : first + ROWS] @ unit.T).abs()
        cosines[torch.arange(len(cosines)), torch.arange(first, first + len(cosines))] = 0
        found.append(cosines.amax(1))
    return torch.cat(found)


def scores(run: ScoredRun, options: Mapping[str, Any]) -> list[Score]:
    """The mean over latents, and the share of latents that nearly have a twin."""
    each = coherence(run.sae.W_dec.detach())
    twins = (each > options["twin"]).double().mean()
    return [Score("coherence", float(each.mean())), Score("twins", float(twins), f"cosine={options['twin']:g}")]


PART = register(
    Part(
        "coherence", scores, title="Mutual coherence", about="Of the decoder's rows; 0 would be orthogonal.",
        columns=(
            Column("M8 coherence", "coherence", better=False, headline="M8", about="mean largest cosine to another"),
            Column("twins above {cosine}", "twins", "cosine={cosine}", better=False, form=".1%"),
        ),
    )
)  # fmt: skip
