"""What a fine-tuned classifier and the units of its layer are worth on held-out images."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_lightning.data import ImageData
from sae_lightning.data.loader import PictureLoader
from sae_lightning.finetuning.classifier import Classifier
from sae_lightning.finetuning.module import correct
from sae_lightning.finetuning.pictures import Pictures, Transform
from sae_lightning.metrics.monoscore import monoscore
from sae_lightning.metrics.purity import Purity
from sae_lightning.saes.codes import SparseCodes

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
