"""SAEs as vision projects release them, read into ours with equal codes: one entry of ``FORMATS`` a format.

The entries are facts about files: by which tensors and entries a format is known, its names for our weights, and what
becomes of a pre-activation. ``open_release`` also takes our own folders and the layouts that are written too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lightning.interop import dictionary_learning, overcomplete, saelens
from sae_lightning.interop.checkpoint import Checkpoint, read_checkpoint
from sae_lightning.interop.layout import Found, Weights, made, restore
from sae_lightning.saes import SAE, Normalizer
from sae_lightning.saes.artefact import LAYOUTS, foreign


class Reading(NamedTuple):
    """Our variant with its settings, and what it takes beside the weights.

    ``threshold`` is what a pre-activation exceeds; ``uncentred`` encoders do not subtract the offset. ``norm`` is that
    of each sample: "none", "rms", or "layer" with n - 1 in the deviation. ``offset`` and ``scale`` come before it.
    """

    variant: str
    settings: Mapping[str, Any] = MappingProxyType({})
    threshold: Tensor | float | None = None
    uncentred: bool = False
    norm: str = "none"
    offset: Tensor | None = None
    scale: float = 1.0


class Format(NamedTuple):
    """How a format is known, its names for our weights (those after ``|`` need not be there), and what it computes.

    ``place`` says what the file tells of the encoder: model, layer, features, site. The input has to be ``standard``
    where the SAE was trained on features that were centred and scaled by statistics which the file lacks.
    """

    known: Callable[[Checkpoint], bool]
    names: Callable[[Checkpoint], Mapping[str, str]]
    reading: Callable[[Checkpoint], Reading]
    place: Callable[[Checkpoint], dict[str, Any]] = lambda c: {}
    standard: bool = False


class Release(NamedTuple):
    """An SAE with the name of its ``format``, what its files say of the ``place`` in an encoder where it reads, and
    whether its inputs are to be ``standard``: centred and scaled by statistics that the files lack.
    """

    sae: SAE
    format: str
    place: dict[str, Any]
    standard: bool

    @property
    def uncut(self) -> bool:
        """Whether a threshold is to be found, since the files have none."""
        cuts = self.sae.cuts()
        return cuts is not None and not bool(cuts.isfinite().all())


PLAIN = saelens.PLAIN
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}


def _always(names: Mapping[str, str]) -> Callable[[Checkpoint], Mapping[str, str]]:
    return lambda c: names


# --- saev --------------------------------------------------------------------------------------------
def _saev(c: Checkpoint) -> Reading:
    """Schemas 1 to 5 and the one before. BatchTopK without a threshold counts each sample's k."""
    said = c.config.get("activation")
    kind, params = (
        (said["cls"], said.get("params") or {}) if isinstance(said, dict) else (c.config.get("cls"), c.config)
    )
    if kind == "BatchTopK" and c.has("activation.threshold"):
        cut = c.tensors["activation.threshold"].double().clamp_min(0)
        return Reading("batchtopk", {"k": params.get("top_k", 32)}, cut, uncentred=True)
    if kind in ("TopK", "BatchTopK"):
        return Reading("topk", {"k": params.get("top_k", 32)}, uncentred=True)
    if kind not in (None, "Relu", "SparseAutoencoderConfig"):
        raise ValueError(f"{c.path} has the activation {kind}; known ones: Relu, TopK, BatchTopK.")
    return Reading("relu", uncentred=True)


# --- ViSAEBench ----------------------------------------------------------------------------------------
def _visaebench_names(c: Checkpoint) -> Mapping[str, str]:
    if c.has("encoder.weight"):
        return LINEAR | {"decoder.weight": "W_dec", "decoder.bias": "|b_dec"}
    return overcomplete.ENCODER | {"dictionary._weights": "W_dec", "dictionary.multiplier": "|multiplier"}


def _visaebench(c: Checkpoint) -> Reading:
    kind = str(c.config.get("activation") or c.entry("sae_type", "architecture")).lower()
    if kind == "topk":
        return Reading("topk", {"k": c.entry("k")}, uncentred=True)
    if kind == "batchtopk":
        cut = c.config.get("threshold", c.tensors.get("_running_threshold", 0.0))
        below = math.nextafter(float(torch.as_tensor(cut, dtype=torch.float32)), -math.inf)  # what equals it stays
        return Reading("batchtopk", {"k": c.entry("k")}, max(below, 0.0), uncentred=True)
    if kind == "jumprelu":
        cuts = c.tensors.get("jump_thresholds", c.tensors.get("thresholds"))
        return Reading("jumprelu", {}, 0.01 if cuts is None else cuts, uncentred=True)
    raise ValueError(f"{c.path} has the activation {kind}; known ones: topk, batchtopk, jumprelu.")


# --- MSAE --------------------------------------------------------------------------------------------
MSAE_NAME = re.compile(r"\d+_\d+_(?P<act>[A-Za-z]+)(?:_(?P<k>[\d.]+))?(?:_(?P<level>[UR]W))?_(?P<tied>True|False)_"
                       r"(?P<norm>True|False)_(?P<cap>[\d.]+)")  # fmt: skip


def _msae(c: Checkpoint) -> Reading:
    """What the file's name says, as its own loader reads it; a nested one evaluates with every positive latent."""
    said = MSAE_NAME.match(c.path.name)
    if said is None:
        raise ValueError(
            f"{c.path.name} is not named as MSAE names its files (6144_768_TopKReLU_64_RW_False_False_0.0_….pth), "
            "which say what the SAE is; give the file its name back."
        )
    act, cap, settings = said["act"], float(said["cap"]), dict[str, Any]()
    mean, cut = c.config.get("mean_center", 0.0), None
    if "abs" in act or act in ("TopK", "BatchTopK", "Identity") or isinstance(mean, bool):
        raise ValueError(f"{c.path} has the activation {act} and mean_center={mean}, which no SAE here can do.")
    if said["level"]:
        variant, settings = "msae", {"weighting": {"U": "uniform", "R": "reverse"}[said["level"][0]]}
        settings["soft_cap"] = cap or None
    else:
        variant = {"TopKReLU": "topk", "BatchTopKReLU": "batchtopk", "JumpReLU": "jumprelu"}.get(act, "relu")
        if cap:
            raise ValueError(f"{c.path} caps its codes at {cap:g}, which only a nested SAE can do here.")
    if variant == "jumprelu":
        cut = c.tensors["activation.log_threshold"].exp()
    elif variant != "relu":
        settings["k"] = int(said["k"])
    offset = mean if isinstance(mean, Tensor) and mean.ndim else None
    scale = float(c.config.get("scaling_factor", 1.0))
    return Reading(variant, settings, cut, False, "layer" if said["norm"] == "True" else "none", offset, scale)


def _msae_place(c: Checkpoint) -> dict[str, Any]:
    said = re.search(r"(ViT-[BL])~(\d\d)_", c.path.name)
    sizes = {"ViT-L14": "openai/clip-vit-large-patch14", "ViT-B16": "openai/clip-vit-base-patch16"}
    model = sizes.get("".join(said.groups())) if said else None
    return {"model": model, "features": "embedding"}


# --- MonoLoss ----------------------------------------------------------------------------------------
def _monoloss_names(c: Checkpoint) -> Mapping[str, str]:
    if c.has("W_enc"):
        names = {"W_enc": "W_enc.T", "W_dec": "W_dec", "b_dec": "b_dec"}
        return names if c.config.get("model_type") == "batch_topk" else names | {"b_enc": "b_enc"}
    return {"encoder.weight": "W_enc", "decoder.weight": "|W_dec.T", "latent_bias": "b_enc", "pre_bias": "b_dec"}


def _monoloss(c: Checkpoint) -> Reading:
    """Its BatchTopK takes the k largest of the batch in evaluation too, and has no bias before the activation."""
    kind, norm = c.config.get("model_type", "topk"), "layer" if c.config.get("normalize") else "none"
    if kind == "batch_topk":
        return Reading("batchtopk", {"k": c.entry("topk_k")}, norm=norm)
    if kind == "jumprelu":
        return Reading("jumprelu", {}, c.tensors["jumprelu.log_threshold"].exp(), uncentred=True, norm=norm)
    if kind == "vanilla" or c.config.get("activation") in ("ReLU", "relu"):
        return Reading("relu", norm=norm)
    return Reading("topk", {"k": c.entry("topk_k")}, norm=norm)


# --- ViT-Prisma and PatchSAE, of one descent ----------------------------------------------------------
def _prisma_names(c: Checkpoint) -> Mapping[str, str]:
    return saelens.GATED if c.config.get("architecture") == "gated" else PLAIN


def _prisma(c: Checkpoint) -> Reading:
    how, act = c.config.get("normalize_activations"), c.config.get("activation_fn_str", "relu")
    norm = {"layer_norm": "layer", "constant_norm_rescale": "rms"}.get(str(how), "none")
    act = "gated_sae" if c.config.get("gated_sae") else act
    if act not in ("relu", "topk"):
        raise ValueError(f"{c.path} has the activation {act}; known ones: relu, topk.")
    if c.config.get("architecture") == "gated":
        return Reading("gated", norm=norm)
    settings = {"k": c.config["activation_fn_kwargs"]["k"]} if act == "topk" else {}
    return Reading(act, settings, norm=norm)


HOOKS = {"hook_resid_post": "block", "hook_mlp_out": "mlp_out", "hook_attn_out": "attn_out"}


def _prisma_place(c: Checkpoint) -> dict[str, Any]:
    model = str(c.config.get("model_name") or "").removeprefix("open-clip:")
    features = "cls" if c.config.get("cls_token_only") else "patch" if c.config.get("use_patches_only") else "tokens"
    layer = c.config.get("hook_point_layer")
    site = HOOKS.get(str(c.config.get("layer_subtype", "hook_resid_post")))
    return {"model": model or None, "layer": layer, "features": features, "site": site}


def _patchsae_place(c: Checkpoint) -> dict[str, Any]:
    features = "cls" if c.config.get("class_token") else "tokens"
    return {"model": c.config.get("model_name"), "layer": c.config.get("block_layer"), "features": features}


# --- the rest ----------------------------------------------------------------------------------------
def _for_vlm_names(c: Checkpoint) -> Mapping[str, str]:
    return PLAIN if c.has("W_enc") else LINEAR | {"decoder.weight": "W_dec.T", "b_dec": "b_dec"}


def _for_vlm(c: Checkpoint) -> Reading:
    k, cut = int(c.tensors["k"]), c.tensors["threshold"].clamp_min(0)
    if not c.has("group_sizes"):
        return Reading("batchtopk", {"k": k}, cut)
    ends = c.tensors["group_sizes"].cumsum(0)
    return Reading("matryoshka", {"k": k, "fractions": (ends / ends[-1]).tolist()}, cut)


VLM_NAME = re.compile(r"activations_(?P<model>[\w.-]+?)_(?P<layer>-?\d+)_(?P<point>post_mlp_residual|post_projection)_")


def _for_vlm_place(c: Checkpoint) -> dict[str, Any]:
    said = VLM_NAME.search(str(c.path))
    if said is None:
        return {}
    model = f"{'openai' if said['model'].startswith('clip') else 'google'}/{said['model']}"
    if said["point"] == "post_projection":
        return {"model": model, "features": "embedding"}
    return {"model": model, "layer": int(said["layer"]), "features": "cls"}


def _sparsify(c: Checkpoint) -> Reading:
    if c.config.get("activation", "topk") != "topk" or c.config.get("transcode"):
        raise ValueError(f"{c.path} is a transcoder or has the activation {c.config['activation']}; known: topk.")
    return Reading("topk", {"k": c.entry("k")})


FORMATS: dict[str, Format] = {  # the first that knows a checkpoint reads it
    "saev": Format(lambda c: c.headed, _always(PLAIN), _saev),
    "sae-for-vlm": Format(
        lambda c: c.has("threshold", "k", "b_dec"), _for_vlm_names, _for_vlm, _for_vlm_place
    ),
    "sparsify": Format(
        lambda c: c.has("encoder.weight", "W_dec", "b_dec"),
        _always(LINEAR | {"W_dec": "W_dec", "b_dec": "b_dec"}), _sparsify,
    ),
    "visaebench": Format(
        lambda c: c.has("encoder.weight", "encoder.bias", "decoder.weight") or c.has("encoder.final_block.0.weight"),
        _visaebench_names, _visaebench, standard=True,
    ),
    "msae": Format(
        lambda c: c.has("encoder", "latent_bias", "pre_bias"),
        _always({"encoder": "W_enc.T", "decoder": "|W_dec", "latent_bias": "b_enc", "pre_bias": "b_dec"}), _msae,
        _msae_place,
    ),
    "monoloss": Format(
        lambda c: c.has("encoder.weight", "latent_bias") or "model_type" in c.config, _monoloss_names, _monoloss
    ),
    "clip-scope": Format(
        lambda c: c.has("enc", "dec", "pre_b") and c.tensors["enc"].ndim == 2,
        _always({"enc": "W_enc.T", "dec": "W_dec", "pre_b": "b_dec"}),
        lambda c: Reading("topk", {"k": c.config["k"]}) if "k" in c.config else Reading("relu"),
    ),
    "patchsae": Format(lambda c: "block_layer" in c.config, _always(PLAIN), _prisma, _patchsae_place),
    "prisma": Format(lambda c: "hook_point_layer" in c.config, _prisma_names, _prisma, _prisma_place),
}  # fmt: skip
BOTH_WAYS = {module.LAYOUT.package: module for module in (saelens, overcomplete, dictionary_learning)}


def open_release(path: Path) -> Release:
    """The SAE at ``path``, a file or a folder; FileNotFoundError or ValueError says what is missing or not known."""
    if path.is_dir():
        if not foreign(path):
            return Release(SAE.load(path), "sae-lightning", {}, False)
        for name, module in BOTH_WAYS.items():
            layout = module.LAYOUT
            if (path / layout.weights).is_file() and (path / layout.config).is_file():
                return Release(module.load(path), name, {}, False)
    checkpoint = read_checkpoint(path)
    name = next((name for name, format_ in FORMATS.items() if format_.known(checkpoint)), None)
    if name is None:
        raise ValueError(
            f"{checkpoint.path} is of no known format; it has the tensors {', '.join(sorted(checkpoint.tensors)[:8])}. "
            f"Known formats: {', '.join([*BOTH_WAYS, *FORMATS])}."
        )
    chosen = FORMATS[name]
    sae = made(_found(checkpoint, chosen), checkpoint.path)
    place = {key: value for key, value in chosen.place(checkpoint).items() if value is not None}
    return Release(sae, name, place, chosen.standard)


LAYOUTS.add("release", lambda path: open_release(path).sae)


def _found(c: Checkpoint, format_: Format) -> Found:
    """What ``c`` says, in our words: names, zero biases where there are none, one matrix where weights are tied."""
    names = {theirs: ours.lstrip("|") for theirs, ours in format_.names(c).items()}
    names = {theirs: ours for theirs, ours in names.items() if c.has(theirs) or not _optional(format_, c, theirs)}
    weights, reading = restore(c.tensors, names, c.path), format_.reading(c)
    d_sae, d_in = weights["W_enc"].shape
    rows = weights.setdefault("W_dec", weights["W_enc"])
    weights["W_dec"] = rows * weights.pop("multiplier", torch.zeros(())).exp()
    weights.setdefault("b_dec", torch.zeros(d_in, dtype=torch.float64))
    weights.setdefault("b_enc", torch.zeros(d_sae, dtype=torch.float64))
    settings = dict(reading.settings)
    if reading.norm != "none":
        settings["input_norm"] = reading.norm
    if reading.norm == "layer":
        weights = _unbiased(weights)
    if reading.threshold is not None:
        cut = torch.as_tensor(reading.threshold).double()
        weights["threshold"] = cut.expand(d_sae) if not cut.ndim else cut
    normalizer = None
    if reading.offset is not None or reading.scale != 1:
        normalizer = Normalizer(d_in, reading.offset, 1 / reading.scale)
    return Found(reading.variant, weights, d_in, d_sae, settings, not reading.uncentred, normalizer)


def _optional(format_: Format, c: Checkpoint, theirs: str) -> bool:
    return format_.names(c)[theirs].startswith("|")


def _unbiased(weights: Weights) -> Weights:
    """Weights for samples normed with n in the deviation, of those for samples normed with n - 1."""
    factor = math.sqrt(1 - 1 / weights["W_enc"].shape[1])
    scaled = {
        "W_enc": weights["W_enc"] * factor,
        "W_dec": weights["W_dec"] / factor,
        "b_dec": weights["b_dec"] / factor,
    }
    return weights | scaled
