"""What other packages' layouts have in common: the skeleton of saving and loading, and the checks.

``Weights`` are float64 tensors under our names, with b_dec for the offset: codes = activation((features - b_dec) ·
W_encᵀ + b_enc), reconstruction = codes · W_dec + b_dec, both matrices [d_sae, d_in]; gated SAEs add ``b_gate`` and
``r_mag``, SAEs with a threshold ``threshold`` [d_sae].
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sae_lightning.files import read_json, write_json, write_tensors
from sae_lightning.interop.checkpoint import contents
from sae_lightning.saes import SAE, VARIANTS, Normalizer
from sae_lightning.saes.artefact import unwrapped

Weights = dict[str, Tensor]


class Found(NamedTuple):
    """What a package's files say, in our words; ``centred`` where its encoder subtracts b_dec from its input."""

    variant: str
    weights: Weights
    d_in: int
    d_sae: int
    settings: dict[str, Any]
    centred: bool = True
    normalizer: Normalizer | None = None


class Layout:
    """A package's layout: its files, and our variants that it has classes for (``forms``).

    ``batch_k`` where it can count k a batch, ``unit_norm`` where it can norm each sample. A subclass says with
    ``written`` what is written of an SAE and with ``read`` what was read.
    """

    package: ClassVar[str]
    config: ClassVar[str]
    weights: ClassVar[str]
    forms: ClassVar[Collection[str]]
    batch_k: ClassVar[bool] = False
    unit_norm: ClassVar[bool] = False

    def written(self, sae: SAE, variant: str, weights: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the config of ``sae``, which infers as ``variant`` with these ``weights``."""
        raise NotImplementedError

    def checked(self, config: dict[str, Any], path: Path) -> dict[str, Any]:
        """``config`` in the words of the layout's newest version; ValueError for what no SAE here can do."""
        return config

    def read(self, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Found:
        """The inverse of ``written``; ValueError for what is missing or cannot be represented."""
        raise NotImplementedError

    def inference_variant(self, sae: SAE) -> str:
        """The variant whose inference this SAE's is, often its own (``SAE.inference_forms``).

        One with k a batch infers as a ``jumprelu`` of one threshold, unless the package counts so too.
        """
        forms = sae.inference_forms()
        if sae.settings().get("k_per") == "batch" and not self.batch_k:
            forms = forms[1:]
        variant = next((form for form in forms if form in self.forms), None)
        if variant is None:
            what = f"a '{forms[0]}' SAE" if forms else f"the codes of this '{sae.variant}' SAE ({sae.settings()})"
            raise ValueError(
                f"{self.package} has no layout for {what}; it can take these variants: {', '.join(self.forms)}."
            )
        return variant

    def save(self, sae: SAE, folder: str | Path) -> None:
        """Write both files. ValueError for a variant or an ``input_norm`` that the package has nothing for."""
        variant = self.inference_variant(sae)
        tensors, config = self.written(sae, variant, fold(sae, self.unit_norm))
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.weights.endswith(".safetensors"):
            write_tensors(folder / self.weights, tensors)
        else:
            torch.save(tensors, folder / self.weights)
        write_json(folder / self.config, config)

    def load(self, folder: str | Path) -> SAE:
        """The SAE in ``folder``, in evaluation mode.

        FileNotFoundError or ValueError says which file is missing, what is unknown or what does not fit.
        """
        folder = Path(folder)
        config, path = present(folder / self.config), folder / self.weights
        content = self.checked(read_json(config, "save the SAE again"), config)
        return made(self.read(content, read_tensors(present(path)), folder), path)


def made(found: Found, path: Path) -> SAE:
    """The SAE of what the file ``path`` and its config say, in evaluation mode; ValueError where shapes do not fit."""
    check_shapes(found.weights, path, found.d_in, found.d_sae)
    weights = found.weights if found.centred else move_offset(found.weights, +1)
    return build(found.variant, weights, found.normalizer, **found.settings)


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


def present(path: Path) -> Path:
    """``path`` itself; FileNotFoundError where there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}; expected the folder of a saved SAE.")
    return path


def entry(content: dict[str, Any], key: str, path: Path) -> Any:
    """``content[key]``, or a ValueError that names the file."""
    if key not in content:
        raise ValueError(f"{path} has no entry '{key}'; it has {', '.join(sorted(content)) or 'none'}.")
    return content[key]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a saved state dict, prefixes of wrappers off; nothing pickled is run."""
    content = contents(path)[1]
    if not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path} does not hold a state dict; save sae.state_dict() there.")
    return unwrapped(content)
