"""Small SAEs, features and a classifier for tests of edits."""

import numpy as np
import torch

from sae_lightning.apps.bias.study import Classifier
from sae_lightning.saes import MSAE, BatchTopK
from sae_lightning.saes.sae import Normalizer

D_IN, D_SAE = 6, 16
MAKES = {
    "batchtopk": lambda **o: BatchTopK(D_IN, D_SAE, k=3, seed=0, **o),
    "dense": lambda **o: MSAE(D_IN, D_SAE, k=4, seed=0, **o),
    "layer": lambda **o: BatchTopK(D_IN, D_SAE, k=3, seed=0, input_norm="layer", **o),
}


def an_sae(kind: str):
    sae = MAKES[kind](normalizer=Normalizer(D_IN, torch.linspace(-1, 1, D_IN), 1.7)).eval()
    with torch.no_grad():
        sae.b_pre.normal_(generator=torch.Generator().manual_seed(1))
    return sae


def features(n: int, tokens: int) -> torch.Tensor:
    return 2 * torch.randn(n, tokens, D_IN, generator=torch.Generator().manual_seed(2))


def a_classifier() -> Classifier:
    return Classifier(np.random.default_rng(0).normal(size=D_IN), 0.3)
