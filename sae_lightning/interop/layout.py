"""SAEs in other packages' layouts on disk, written and read without importing those packages.

One module a package (``saelens``, ``overcomplete``, ``dictionary_learning``), each with ``save(sae, folder)`` and
``load(folder)``. None of the packages keeps a normaliser beside its weights, so ``save`` folds ours into them: codes
stay equal and the reconstruction is in raw space. ``load`` gives an SAE whose normaliser is the identity and whose
decoder rows keep the norm they have on disk.

What the three modules share stands here. ``Weights`` are float64 tensors under our names, with b_dec for the offset:
codes = activation((features - b_dec) · W_encᵀ + b_enc), reconstruction = codes · W_dec + b_dec, both matrices
[d_sae, d_in]; gated SAEs add ``b_gate`` and ``r_mag``, SAEs with a threshold ``threshold`` [d_sae].
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_lightning.saes import SAE, VARIANTS, Normalizer
from sae_lightning.saes.artefact import unwrapped
from sae_lightning.saes.matryoshka import prefix_ends

Weights = dict[str, Tensor]


def inference_variant(sae: SAE, supported: Collection[str], package: str, batch_k: bool = False) -> str:
    """The variant whose inference this SAE's is, often its own (``SAE.inference_forms``).

    One with k a batch infers as a ``jumprelu`` of one threshold, unless the package counts so too (``batch_k``).
    Raises ValueError when the package has no layout for the variant.
    """
    forms = sae.inference_forms()
    if sae.settings().get("k_per") == "batch" and not batch_k:
        forms = forms[1:]
    if not forms:
        raise ValueError(f"{package} has no layout for the codes of this '{sae.variant}' SAE ({sae.settings()}).")
    variant = next((form for form in forms if form in supported), None)
    if variant is None:
        raise ValueError(
            f"{package} has no layout for a '{forms[0]}' SAE; it can take these variants: {', '.join(supported)}."
        )
    return variant


def fold(sae: SAE, unit_norm: bool = False) -> Weights:
    """The SAE's weights over raw features, its normaliser folded in.

    Norming each sample by itself cannot be folded: ValueError unless ``input_norm`` is "none", or is "rms" without a
    mean before it and the package can do that itself (``unit_norm``).
    """
    state = {name: tensor.detach().cpu().double() for name, tensor in sae.state_dict().items()}
    mean, std = state["normalizer.mean"], state["normalizer.std"]
    if sae.input_norm != "none":
        if not (unit_norm and sae.input_norm == "rms" and not bool(mean.any())):
            raise ValueError(
                f"This SAE norms each sample before the encoder (input_norm={sae.input_norm}), which that layout "
                "cannot hold. What can be exported is input_norm=none, to SAELens also rms without a mean before it."
            )
        std = torch.ones_like(std)  # the sample's norm takes it out again
    weights = {"W_enc": state["W_enc"] / std, "b_enc": state["b_enc"]}
    weights |= {"W_dec": state["W_dec"] * std, "b_dec": mean + std * state["b_pre"]}
    weights |= {name: state[name] for name in ("b_gate", "r_mag") if name in state}
    cuts = sae.cuts()
    if cuts is not None:
        weights["threshold"] = cuts.detach().cpu().double()
        if not bool(weights["threshold"].isfinite().all()):
            raise ValueError("This SAE has no threshold for inference yet; train it or call calibrate first.")
    return weights


def move_offset(weights: Weights, sign: int) -> Weights:
    """Biases for an encoder that does not subtract b_dec from its input (sign -1), or back from such biases (+1)."""
    shift = sign * (weights["W_enc"] @ weights["b_dec"])
    if "b_gate" not in weights:
        return weights | {"b_enc": weights["b_enc"] + shift}
    magnitude = weights["b_enc"] + weights["r_mag"].exp() * shift
    return weights | {"b_enc": magnitude, "b_gate": weights["b_gate"] + shift}


def rename(weights: Weights, names: dict[str, str]) -> dict[str, Tensor]:
    """Float32 tensors under a package's names; ``names`` maps theirs to ours, 'W_enc.T' meaning transposed."""
    return {theirs: _turn(weights[_ours(ours)], ours).float().contiguous() for theirs, ours in names.items()}


def restore(tensors: dict[str, Tensor], names: dict[str, str], path: Path) -> Weights:
    """The inverse of ``rename``. Raises ValueError when ``path`` lacked a tensor."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(tensors))}.")
    return {_ours(ours): _turn(tensors[theirs], ours).double() for theirs, ours in names.items()}


def _ours(name: str) -> str:
    return name.removesuffix(".T")


def _turn(tensor: Tensor, name: str) -> Tensor:
    return tensor.mT if name.endswith(".T") and tensor.ndim == 2 else tensor


def check_shapes(weights: Weights, path: Path, d_in: int, d_sae: int) -> None:
    """ValueError when a tensor has another shape than the config beside ``path`` asks for."""
    shapes = {"W_enc": (d_sae, d_in), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in weights.items():
        expected = shapes.get(name, (d_sae,))
        if tensor.shape != expected:
            raise ValueError(
                f"{path} gives {name} the shape {list(tensor.shape)}; its config asks for {list(expected)} "
                f"(d_in={d_in}, d_sae={d_sae}). The two files are not of one SAE."
            )


def build(variant: str, weights: Weights, normalizer: Normalizer | None = None, **settings: Any) -> SAE:
    """The SAE of these weights, their shapes checked, in evaluation mode."""
    d_sae, d_in = weights["W_dec"].shape
    sae = VARIANTS[variant](d_in, d_sae, normalizer=normalizer, **settings)
    state = sae.state_dict() | {name: weights[name] for name in ("W_enc", "b_enc", "W_dec")}
    state |= {name: weights[name] for name in ("b_gate", "r_mag") if name in weights} | {"b_pre": weights["b_dec"]}
    sae.load_state_dict(state)
    if "threshold" in weights:
        sae.set_cuts(weights["threshold"])
    return sae.eval()


def widths(sae: SAE) -> list[int]:
    """Latents in each of a Matryoshka SAE's nested dictionaries, ascending, the last with all of them."""
    settings: dict[str, Any] = sae.settings()
    return prefix_ends(sae.d_sae, settings["fractions"])


def fractions(widths: list[int], d_sae: int) -> list[float]:
    """The setting of a Matryoshka SAE with these nested dictionaries."""
    return [width / d_sae for width in widths]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. FileNotFoundError or ValueError says what is wrong with the file."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}; expected the folder of a saved SAE.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save the SAE again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def entry(content: dict[str, Any], key: str, path: Path) -> Any:
    """``content[key]``, or a ValueError that names the file."""
    if key not in content:
        raise ValueError(f"{path} has no entry '{key}'; it has {', '.join(sorted(content)) or 'none'}.")
    return content[key]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a saved state dict, prefixes of wrappers off; nothing pickled is run."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}; expected the weights of a saved SAE.")
    try:
        if path.suffix == ".safetensors":
            return unwrapped(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be read as plain tensors ({reason}); it is damaged, or holds a pickled module: save "
            "sae.state_dict() instead of the module."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path} does not hold a state dict; save sae.state_dict() there.")
    return unwrapped(content)
