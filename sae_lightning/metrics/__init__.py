"""Scores of SAEs: torchmetrics whose states add over batches and ranks."""

from sae_lightning.metrics.base import SumMetric
from sae_lightning.metrics.cosine import Cosine
from sae_lightning.metrics.decoder import decoder_cosine
from sae_lightning.metrics.firing import Firing
from sae_lightning.metrics.fvu import FVU
from sae_lightning.metrics.l0 import L0
from sae_lightning.metrics.monoscore import MonoScore, MSScore
from sae_lightning.metrics.moran import Moran
from sae_lightning.metrics.purity import Purity
from sae_lightning.metrics.r2 import R2

__all__ = [
    "FVU", "L0", "R2", "Cosine", "Firing", "MSScore", "MonoScore", "Moran", "Purity", "SumMetric", "decoder_cosine",
]  # fmt: skip
