"""Scores of SAEs: torchmetrics whose states add over batches and ranks."""

from sae_lightning.metrics.base import SumMetric
from sae_lightning.metrics.channel_moran import ChannelMoran
from sae_lightning.metrics.cosine import Cosine
from sae_lightning.metrics.decoder import decoder_cosine
from sae_lightning.metrics.firing import Firing
from sae_lightning.metrics.fvu import FVU
from sae_lightning.metrics.histograms import ActivationHistogram, Histogram
from sae_lightning.metrics.l0 import L0
from sae_lightning.metrics.monoscore import MonoScore, MSScore
from sae_lightning.metrics.monosemanticity import Monosemanticity, choose_live
from sae_lightning.metrics.moran import Moran
from sae_lightning.metrics.purity import Purity
from sae_lightning.metrics.r2 import R2
from sae_lightning.metrics.reconstruction import Reconstruction
from sae_lightning.metrics.recovery import Recovery
from sae_lightning.metrics.stability import Matching, match_latents, nearest_cosine

__all__ = [
    "FVU", "L0", "R2", "ActivationHistogram", "ChannelMoran", "Cosine", "Firing", "Histogram", "MSScore", "Matching",
    "MonoScore", "Monosemanticity", "Moran", "Purity", "Reconstruction", "Recovery", "SumMetric", "choose_live",
    "decoder_cosine", "match_latents", "nearest_cosine",
]  # fmt: skip
