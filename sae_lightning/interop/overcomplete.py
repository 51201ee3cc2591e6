"""SAEs of ``overcomplete``: ``state_dict.pt`` and a small ``config.json`` in one folder.

The package has no layout of its own; its users save ``sae.state_dict()``, which tells neither the class nor its
arguments, nor the running threshold of a BatchTopKSAE. ``config.json`` does::

    config = json.loads((folder / "config.json").read_text())
    sae = getattr(overcomplete.sae, config["class"])(**config["arguments"])
    sae.load_state_dict(torch.load(folder / "state_dict.pt", weights_only=True))
    sae.running_threshold = config.get("running_threshold")  # BatchTopKSAE only
    sae.eval()

Its SAEs have no bias after the dictionary. Codes are ours; ``config["offset"]``, a list of d_in numbers, is what to
add to its reconstruction to have ours. Only the ``linear`` encoder, the default, and tied or untied weights
(``sae.tied()``, ``sae.untied()``) have a counterpart here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lightning.interop.layout import Found, Layout, Weights, entry, move_offset, rename, restore
from sae_lightning.saes import SAE

CLASSES = {
    "relu": "SAE",
    "topk": "TopKSAE",
    "batchtopk": "BatchTopKSAE",
    "matryoshka": "BatchTopKSAE",
    "jumprelu": "JumpSAE",
}
ENCODER = {"encoder.final_block.0.weight": "W_enc", "encoder.final_block.0.bias": "b_enc"}
DICTIONARY = {"dictionary._weights": "W_dec", "dictionary.multiplier": "multiplier"}
NORMALIZATIONS = ("l2", "max_l2", "l1", "max_l1", "identity")


class Overcomplete(Layout):
    """``top_k`` of a BatchTopKSAE counts a whole batch and matters in training only; of an SAE with k a sample it is
    written for a batch of one, and a BatchTopKSAE's k counts a batch unless there is our entry ``k``."""

    package, config, weights = "overcomplete", "config.json", "state_dict.pt"
    forms, batch_k = CLASSES, True

    def written(self, sae: SAE, variant: str, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
        offset = weights["b_dec"]
        weights, normalization = _split_norm(move_offset(weights, -1))
        arguments: dict[str, Any] = {"input_shape": sae.d_in, "nb_concepts": sae.d_sae}
        config: dict[str, Any] = {"class": CLASSES[variant], "offset": offset.float().tolist()}
        settings: dict[str, Any] = sae.settings()
        names = ENCODER | DICTIONARY
        if variant in ("topk", "batchtopk", "matryoshka"):
            arguments["top_k"] = max(1, round(settings["k"]))
        if variant == "jumprelu":
            names = names | {"thresholds": "thresholds"}
            weights["thresholds"] = sae.state_dict()["log_threshold"].detach().cpu()
        elif "threshold" in weights:
            # it keeps what equals the threshold, we only what exceeds it
            config["running_threshold"] = _next(weights["threshold"][0], math.inf)
            config |= {"k": settings["k"]} if settings.get("k_per", "sample") == "sample" else {}
        arguments |= {"dictionary_params": {"normalization": normalization}}
        return rename(weights, names), config | {"arguments": arguments}

    def checked(self, config: dict[str, Any], path: Path) -> dict[str, Any]:
        cls, arguments = entry(config, "class", path), entry(config, "arguments", path)
        if cls not in CLASSES.values():
            raise ValueError(
                f"{path} names the class '{cls}'; known classes: {', '.join(dict.fromkeys(CLASSES.values()))}. Another "
                "dictionary can be saved as get_dictionary() in one of these with the normalization 'identity'."
            )
        d_in, _ = entry(arguments, "input_shape", path), entry(arguments, "nb_concepts", path)
        if not isinstance(d_in, int):
            raise ValueError(
                f"{path} has input_shape {d_in}; SAEs here take single vectors, so it has to be one number."
            )
        return config

    def read(self, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Found:
        path, arguments = folder / self.weights, config["arguments"]
        d_in, d_sae = arguments["input_shape"], arguments["nb_concepts"]
        weights = restore(tensors, DICTIONARY, path)
        rows = _normalised(weights["W_dec"], arguments, folder / self.config)
        weights["W_dec"] = rows * weights.pop("multiplier").exp()
        weights |= _encoder(tensors, weights["W_dec"], path)
        weights["b_dec"] = torch.tensor(config.get("offset") or [0.0] * d_in, dtype=torch.float64)
        variant, threshold, settings = _activation(config["class"], config, tensors, folder)
        if threshold is not None:
            weights["threshold"] = threshold
        return Found(variant, weights, d_in, d_sae, settings, centred=False)


LAYOUT = Overcomplete()
save, load = LAYOUT.save, LAYOUT.load


def _split_norm(weights: Weights) -> tuple[Weights, str]:
    """Unit rows and the logarithm of their one norm, as the package's default asks; else the rows as they are."""
    norms = weights["W_dec"].norm(dim=1)
    norm = norms.mean()
    if bool((norms - norm).abs().max() <= 1e-6 * norm):
        return weights | {"W_dec": weights["W_dec"] / norm, "multiplier": norm.log()}, "l2"
    return weights | {"multiplier": torch.tensor(0.0)}, "identity"


def _next(value: Tensor, towards: float) -> float:
    """The float32 next to ``value``."""
    return float(torch.nextafter(value.float(), torch.tensor(towards)))


def _normalised(rows: Tensor, arguments: dict[str, Any], path: Path) -> Tensor:
    """The dictionary as the package normalises it before use."""
    how = (arguments.get("dictionary_params") or {}).get("normalization", "l2")
    if how not in NORMALIZATIONS:
        raise ValueError(f"{path} has the normalization '{how}'; known ones: {', '.join(NORMALIZATIONS)}.")
    if how == "identity":
        return rows
    norms = rows.norm(p=1 if how.endswith("l1") else 2, dim=1, keepdim=True)
    return rows / (norms.amax() if how.startswith("max") else norms + 1e-8)


def _encoder(tensors: dict[str, Tensor], dictionary: Tensor, path: Path) -> Weights:
    """Encoder weights and bias of a linear encoder, own or tied to the dictionary."""
    names = {name for name in tensors if name.startswith("encoder.") and not name.startswith("encoder.tied_to.")}
    if names == set(ENCODER):
        return restore(tensors, ENCODER, path)
    if not names <= {"encoder.weight", "encoder.bias"}:
        raise ValueError(
            f"{path} has an encoder that is not linear ({', '.join(sorted(names - set(ENCODER)))}); SAEs here have a "
            "linear one: the package's encoder_module 'linear', or tied or untied weights."
        )
    weight = dictionary if "encoder.tied_to._weights" in tensors else entry(tensors, "encoder.weight", path).double()
    bias = tensors.get("encoder.bias", torch.zeros(len(dictionary))).double()
    return {"W_enc": weight, "b_enc": bias}


def _activation(
    cls: str, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> tuple[str, Tensor | None, dict[str, Any]]:
    """Our variant, its thresholds [d_sae] and its settings."""
    arguments = config["arguments"]
    d_sae = arguments["nb_concepts"]
    if cls == "SAE":
        return "relu", None, {}
    if cls == "TopKSAE":
        return "topk", None, {"k": arguments.get("top_k") or max(d_sae // 10, 1)}
    if cls == "JumpSAE":
        return "jumprelu", entry(tensors, "thresholds", folder / "state_dict.pt").double().exp(), {}
    if config.get("running_threshold") is None:
        raise ValueError(
            f"{folder / 'config.json'} has no running_threshold; a BatchTopKSAE keeps it outside its state dict. "
            "Write float(sae.running_threshold) there."
        )
    threshold = torch.full((d_sae,), _next(torch.tensor(config["running_threshold"]), -math.inf)).double()
    top_k = arguments.get("top_k") or max(d_sae // 10, 1)
    return "batchtopk", threshold, {"k": config["k"]} if "k" in config else {"k": top_k, "k_per": "batch"}
