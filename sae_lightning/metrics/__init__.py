"""Scores of SAEs: torchmetrics whose states add over batches and ranks."""

from sae_lightning.metrics.base import SumMetric
from sae_lightning.metrics.dictionary import Matching, decoder_cosine, match_latents, nearest_cosine
from sae_lightning.metrics.monoscore import MonoScore, MSScore
from sae_lightning.metrics.monosemanticity import Monosemanticity, choose_live
from sae_lightning.metrics.moran import ChannelMoran, Moran
from sae_lightning.metrics.purity import Purity
from sae_lightning.metrics.reconstruction import Reconstruction
from sae_lightning.metrics.recovery import Recovery
from sae_lightning.metrics.sparsity import L0, ActivationHistogram, Firing, Histogram

__all__ = [
    "L0", "ActivationHistogram", "ChannelMoran", "Firing", "Histogram", "MSScore", "Matching",
    "MonoScore", "Monosemanticity", "Moran", "Purity", "Reconstruction", "Recovery", "SumMetric", "choose_live",
    "decoder_cosine", "match_latents", "nearest_cosine",
]  # fmt: skip
