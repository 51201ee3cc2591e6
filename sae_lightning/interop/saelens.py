"""The layout of SAELens 6: ``cfg.json`` and ``sae_weights.safetensors`` in one folder.

Its ``SAE.load_from_disk`` reads what ``save`` writes. As SAELens does itself, a BatchTopK or Matryoshka SAE is written
as ``jumprelu`` with one threshold for all latents, and the metadata say how it was trained; ``load`` reads that back.
``load`` also takes the checkpoints of an unfinished training and files from before SAELens 6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sae_lightning.files import read_json
from sae_lightning.interop.layout import Found, Layout, Weights, check_shapes, entry, rename, restore
from sae_lightning.saes import SAE, Normalizer
from sae_lightning.saes.matryoshka import prefix_ends

FORMAT = "6.54.0"  # the version of SAELens whose layout this is
PLAIN = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
JUMPRELU = PLAIN | {"threshold": "threshold"}
GATED = {"W_enc": "W_enc.T", "W_dec": "W_dec", "b_dec": "b_dec", "b_gate": "b_gate", "b_mag": "b_enc", "r_mag": "r_mag"}
# our variant: their architecture for inference
ARCHITECTURES = {
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "matryoshka": "jumprelu",
}
NAMES = {"standard": PLAIN, "topk": PLAIN, "jumprelu": JUMPRELU, "gated": GATED}
# architectures that only a training checkpoint has, and the variants they are here
TRAINING = {"batchtopk": "batchtopk", "matryoshka_batchtopk": "matryoshka"}


class SAELens(Layout):
    """Its constant_norm_rescale is our ``input_norm`` "rms"; other ways to prepare inputs have no counterpart here."""

    package, config, weights = "SAELens", "cfg.json", "sae_weights.safetensors"
    forms, unit_norm = ARCHITECTURES, True

    def written(self, sae: SAE, variant: str, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
        architecture = ARCHITECTURES[variant]
        cfg = {"architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu"}
        norm = "none" if sae.input_norm == "none" else "constant_norm_rescale"
        cfg |= {"apply_b_dec_to_input": True, "normalize_activations": norm, "reshape_activations": "none"}
        if architecture == "topk":
            cfg |= {"k": sae.settings()["k"], "rescale_acts_by_decoder_norm": False}
        metadata = {"sae_lens_version": FORMAT} | _training(sae, variant)
        return rename(weights, NAMES[architecture]), cfg | {"metadata": metadata}

    def checked(self, config: dict[str, Any], path: Path) -> dict[str, Any]:
        return _modern(config, path)

    def read(self, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Found:
        path, weights_path = folder / self.config, folder / self.weights
        d_in, d_sae = entry(config, "d_in", path), entry(config, "d_sae", path)
        normalizer = _normalizer(config, folder, d_in)
        tensors = _inference_tensors(config, tensors, weights_path)
        architecture = "jumprelu" if config["architecture"] in TRAINING else config["architecture"]
        weights = restore(tensors, NAMES[architecture], weights_path)
        check_shapes(weights, weights_path, d_in, d_sae)
        if _rescales(config):
            weights = _unit_decoder(weights)
        variant, settings = _variant(config, weights, path)
        if config.get("normalize_activations") == "constant_norm_rescale":
            settings["input_norm"] = "rms"
        return Found(variant, weights, d_in, d_sae, settings, config["apply_b_dec_to_input"], normalizer)


LAYOUT = SAELens()
save, load = LAYOUT.save, LAYOUT.load


def _training(sae: SAE, variant: str) -> dict[str, Any]:
    """Metadata in SAELens' words for the variants whose inference architecture is another."""
    if variant not in TRAINING.values():
        return {}
    settings: dict[str, Any] = sae.settings()
    details = {"k": settings["k"]}
    if variant == "matryoshka":
        details["matryoshka_widths"] = prefix_ends(sae.d_sae, settings["fractions"])
    name = next(name for name, ours in TRAINING.items() if ours == variant)
    return {"training_architecture": name, "training_architecture_details": details}


def _modern(cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """``cfg`` in the words of SAELens 6. Raises ValueError for what no SAE here can do."""
    defaults: dict[str, Any] = {"architecture": "standard", "apply_b_dec_to_input": True}
    cfg = defaults | cfg
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    if activation == "topk":
        cfg |= {"architecture": "topk", "k": entry(cfg.get("activation_fn_kwargs") or {}, "k", path)}
    elif activation != "relu":
        raise ValueError(f"{path} asks for the activation '{activation}'; this package reads relu and topk.")
    known = [*NAMES, *TRAINING]
    if cfg["architecture"] not in known:
        raise ValueError(f"{path} is of the architecture '{cfg['architecture']}'; known ones: {', '.join(known)}.")
    if cfg.get("reshape_activations") not in (None, "none"):
        raise ValueError(
            f"{path} has reshape_activations='{cfg['reshape_activations']}'; SAEs here take features that are one "
            "vector each. Set it to 'none' and flatten the features before encoding."
        )
    return cfg


def _normalizer(cfg: dict[str, Any], folder: Path, d_in: int) -> Normalizer:
    """What SAELens does to the input. Its one fixed factor can be represented, if it is on disk."""
    how = cfg.get("normalize_activations")
    if how in (None, False, "none", "constant_norm_rescale"):
        return Normalizer(d_in)
    if how not in (True, "expected_average_only_in"):
        raise ValueError(
            f"{folder / 'cfg.json'} has normalize_activations='{how}', which SAEs here cannot do; they can do 'none', "
            "'expected_average_only_in' and 'constant_norm_rescale'. SAELens folds a whitening into the weights when "
            "its training ends."
        )
    scaler = folder / "activation_scaler.json"
    factor = read_json(scaler, "save the SAE again").get("scaling_factor") if scaler.is_file() else None
    if not factor:
        raise ValueError(
            f"{folder / 'cfg.json'} has normalize_activations='{how}', but no activation_scaler.json with the factor "
            "lies beside it. Fold the factor in first: sae.fold_activation_norm_scaling_factor(factor) in SAELens."
        )
    return Normalizer(d_in, std=1 / factor)


def _inference_tensors(cfg: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors with the names they have after training."""
    scale = tensors.get("scaling_factor")
    if scale is not None and not bool((scale == 1).all()):
        raise ValueError(f"{path} has a finetuned scaling_factor, which SAEs here lack; fold it into W_dec first.")
    if "log_threshold" in tensors:
        return tensors | {"threshold": tensors["log_threshold"].float().exp()}
    if cfg["architecture"] in TRAINING:
        return tensors | {"threshold": entry(tensors, "topk_threshold", path).float().repeat(cfg["d_sae"])}
    return tensors


def _rescales(cfg: dict[str, Any]) -> bool:
    """Whether codes are counted in units of the decoder's norms; SAELens' default depends on the class."""
    default = cfg["architecture"] in TRAINING
    return cfg["architecture"] in ("topk", *TRAINING) and cfg.get("rescale_acts_by_decoder_norm", default)


def _unit_decoder(weights: Weights) -> Weights:
    """Decoder rows of unit norm, the encoder scaled instead, as SAELens does when it saves for inference."""
    norms = weights["W_dec"].norm(dim=1, keepdim=True).clamp_min(1e-8)
    scaled = {"W_enc": weights["W_enc"] * norms, "b_enc": weights["b_enc"] * norms.squeeze(1)}
    return weights | scaled | {"W_dec": weights["W_dec"] / norms}


def _variant(cfg: dict[str, Any], weights: Weights, path: Path) -> tuple[str, dict[str, Any]]:
    """Our variant and its settings."""
    architecture = cfg["architecture"]
    if architecture == "topk":
        return "topk", {"k": entry(cfg, "k", path)}
    metadata = cfg.get("metadata") or {}
    trained, details = architecture, cfg
    if architecture == "jumprelu":
        trained, details = metadata.get("training_architecture"), metadata.get("training_architecture_details") or {}
    if trained in TRAINING and "k" in details and bool((weights["threshold"] == weights["threshold"][0]).all()):
        if trained == "batchtopk":
            return "batchtopk", {"k": details["k"]}
        if details.get("matryoshka_widths"):
            fractions = [end / cfg["d_sae"] for end in details["matryoshka_widths"]]
            return "matryoshka", {"k": details["k"], "fractions": fractions}
    return {"standard": "relu", "gated": "gated"}.get(architecture, "jumprelu"), {}
