"""The layout of ``dictionary_learning``'s trainers: ``ae.pt`` (a state dict) and ``config.json`` in one folder.

Its ``load_dictionary`` reads what ``save`` writes. Of an AutoEncoder (our ``relu``) it rescales the decoder to unit
norm, so that its codes are ours times the normaliser's deviation; ``AutoEncoder.from_pretrained(path,
normalize_decoder=False)`` leaves them equal. All other classes give our codes in either way.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lightning.interop.layout import Found, Layout, Weights, entry, move_offset, rename, restore
from sae_lightning.saes import SAE
from sae_lightning.saes.matryoshka import prefix_ends

LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
PLAIN = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
GATED = {"encoder.weight": "W_enc", "gate_bias": "b_gate", "mag_bias": "b_enc", "r_mag": "r_mag"}
NAMES = {
    "AutoEncoder": LINEAR | {"bias": "b_dec"},
    "AutoEncoderNew": LINEAR | {"decoder.bias": "b_dec"},
    "AutoEncoderTopK": LINEAR | {"b_dec": "b_dec"},
    "BatchTopKSAE": LINEAR | {"b_dec": "b_dec"},
    "MatryoshkaBatchTopKSAE": PLAIN,
    "JumpReluAutoEncoder": PLAIN | {"threshold": "threshold"},
    "GatedAutoEncoder": GATED | {"decoder.weight": "W_dec.T", "decoder_bias": "b_dec"},
}
# our variant: their class and the trainer that makes it
CLASSES = {
    "relu": ("AutoEncoder", "StandardTrainer"),
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "matryoshka": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
    "gated": ("GatedAutoEncoder", "GatedSAETrainer"),
}
VARIANT_OF = {dict_class: variant for variant, (dict_class, _) in CLASSES.items()} | {"AutoEncoderNew": "relu"}
UNCENTRED = ("JumpReluAutoEncoder", "AutoEncoderNew")  # their encoders do not subtract the decoder's bias


class DictionaryLearning(Layout):
    """A fractional k is rounded, since the package wants a whole one."""

    package, config, weights = "dictionary_learning", "config.json", "ae.pt"
    forms = CLASSES

    def written(self, sae: SAE, variant: str, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
        dict_class, trainer_class = CLASSES[variant]
        centred = move_offset(weights, -1) if dict_class in UNCENTRED else weights
        extra, described = _extra(sae, variant, weights)
        trainer: dict[str, Any] = {"trainer_class": trainer_class, "dict_class": dict_class, "device": "cpu"}
        trainer |= {"activation_dim": sae.d_in, "dict_size": sae.d_sae, "layer": None, "lm_name": None}
        return rename(centred, NAMES[dict_class]) | extra, {"trainer": trainer | described}

    def checked(self, config: dict[str, Any], path: Path) -> dict[str, Any]:
        trainer = entry(config, "trainer", path)
        trainer = trainer | {"dict_class": entry(trainer, "dict_class", path).replace("Matroyshka", "Matryoshka")}
        if trainer["dict_class"] not in NAMES:
            raise ValueError(f"{path} names the class '{trainer['dict_class']}'; known classes: {', '.join(NAMES)}.")
        return trainer

    def read(self, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Found:
        dict_class, path, settings = config["dict_class"], folder / self.weights, dict[str, Any]()
        weights = restore(tensors, NAMES[dict_class], path)
        d_in, d_sae = (entry(config, name, folder / self.config) for name in ("activation_dim", "dict_size"))
        if dict_class in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            settings["k"] = int(tensors["k"]) if "k" in tensors else entry(config, "k", folder / self.config)
        if dict_class in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            weights["threshold"] = entry(tensors, "threshold", path).double().repeat(d_sae)
        if dict_class == "MatryoshkaBatchTopKSAE":
            settings["fractions"] = [end / d_sae for end in entry(tensors, "group_sizes", path).cumsum(0).tolist()]
        return Found(VARIANT_OF[dict_class], weights, d_in, d_sae, settings, dict_class not in UNCENTRED)


LAYOUT = DictionaryLearning()
save, load = LAYOUT.save, LAYOUT.load


def _extra(sae: SAE, variant: str, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Buffers and config entries of the classes that keep a number of active latents."""
    if variant not in ("topk", "batchtopk", "matryoshka"):
        return {}, {}
    settings: dict[str, Any] = sae.settings()
    k = max(1, round(settings["k"]))
    threshold = weights["threshold"][0].float() if "threshold" in weights else torch.tensor(-1.0)
    buffers = {"k": torch.tensor(k, dtype=torch.int), "threshold": threshold}
    if variant != "matryoshka":
        return buffers, {"k": k}
    sizes = [end - start for start, end in pairwise([0, *prefix_ends(sae.d_sae, settings["fractions"])])]
    described = {"k": k, "group_sizes": sizes, "group_fractions": [size / sae.d_sae for size in sizes]}
    return buffers | {"group_sizes": torch.tensor(sizes)}, described
