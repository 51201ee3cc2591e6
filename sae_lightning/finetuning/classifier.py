"""The classifier: an encoder, the added linear layer and the head, with one layer's output as activations."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sae_lightning.backbones.backbone import BackboneError, block_outputs
from sae_lightning.backbones.registry import identity, load_backbone
from sae_lightning.backbones.settings import fixed_seed, published
from sae_lightning.backbones.transformers import architecture
from sae_lightning.files import read_json, write_json, write_tensors
from sae_lightning.finetuning.data import FinetuneError, Preprocess
from sae_lightning.registry import one_of
from sae_lightning.saes.artefact import unwrapped

SHOWN = 40  # names of layers in an error


class Output(NamedTuple):
    """``logits`` [B, n_classes] and the chosen layer's ``activations`` [B, M], of any sign."""

    logits: Tensor
    activations: Tensor


class Classifier(nn.Module):
    """images [B, 3, H, W] → encoder → ``embedding`` [B, d] → ``added`` [B, d] → ``head`` [B, n_classes].

    ``pool`` runs ``encoder`` on images and gives its pooled output [B, d]. ``added`` is the linear layer of §4.2, as
    wide as the embedding, or nothing with ``added_layer=False``. ``layer`` names the module whose output is read as
    activations: ``added``, ``embedding``, ``head``, or one of the encoder's (``encoder.…``); positions of feature
    maps and tokens are averaged. FinetuneError for a name that is no module, or whose output is no features.
    """

    def __init__(
        self,
        encoder: nn.Module,
        pool: Callable[[Tensor], Tensor],
        n_classes: int,
        image_size: int,
        layer: str = "added",
        added_layer: bool = True,
    ) -> None:
        super().__init__()
        self.encoder, self.layer, self.image_size = encoder, layer, image_size
        self._pool = pool
        width = self._width()
        self.embedding = nn.Identity()
        self.added: nn.Module = nn.Linear(width, width) if added_layer else nn.Identity()
        self.head = nn.Linear(width, n_classes)
        self.check_layer()
        self.n_units = self._try_out()

    def forward(self, images: Tensor) -> Output:
        tapped = self.get_submodule(self.layer)
        seen, logits = block_outputs(lambda: self._classify(images), [tapped], [0], finish=True)
        if 0 not in seen:
            raise FinetuneError(f"layer={self.layer} takes no part in the forward pass; name another layer.")
        return Output(logits, self._pooled(seen[0]))

    def _classify(self, images: Tensor) -> Tensor:
        return self.head(self.added(self.embedding(self._pool(images))))

    def _pooled(self, output: Tensor) -> Tensor:
        """[B, M] from [B, M], tokens [B, T, M], or maps [B, M, H, W] ([B, H, W, M] where the encoder says so)."""
        if isinstance(output, Tensor) and output.ndim == 2:
            return output
        if isinstance(output, Tensor) and output.ndim == 3:
            return output.mean(1)
        if isinstance(output, Tensor) and output.ndim == 4:
            return output.mean((1, 2) if getattr(self.encoder, "output_fmt", "NCHW") == "NHWC" else (2, 3))
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise FinetuneError(
            f"layer={self.layer} gives {shape}, not one vector, tokens or feature maps an image; name another layer."
        )

    def check_layer(self) -> None:
        """FinetuneError that lists layers unless ``layer`` is one."""
        modules = [name for name, _ in self.named_modules() if name]
        if self.layer in modules:
            return
        near = difflib.get_close_matches(self.layer, modules, n=8)
        top = [name for name in modules if name.count(".") <= 1 and name not in near]
        names = list(dict.fromkeys([*near, "added", "embedding", "head", *top]))[:SHOWN]
        raise FinetuneError(f"There is no layer={self.layer}; choose one of {', '.join(names)}, or a module in them.")

    @torch.no_grad()
    def _width(self) -> int:
        return int(self._pool(self._black()).shape[1])

    @torch.no_grad()
    def _try_out(self) -> int:
        """Units of the layer, as one black image shows them."""
        training = self.training
        self.eval()
        units = self(self._black()).activations.shape[1]
        self.train(training)
        return int(units)

    def _black(self) -> Tensor:
        return torch.zeros(1, 3, self.image_size, self.image_size)


def add_lora(encoder: nn.Module, lora: Mapping[str, Any]) -> None:
    """Freeze ``encoder`` and put adapters into its linear layers named ``targets``, in place.

    ``lora`` holds ``r``, ``alpha``, ``targets`` (the last part of the layers' names) and ``dropout``. FinetuneError
    when the encoder has no such layers or a number is impossible.
    """
    import peft

    if not (type(lora["r"]) is int and lora["r"] >= 1 and lora["alpha"] > 0 and 0 <= lora["dropout"] < 1):
        raise FinetuneError(
            f"model.lora.r={lora['r']}, alpha={lora['alpha']} and dropout={lora['dropout']} do not fit: r is a whole "
            "number of at least 1 (or null for none), alpha is positive, dropout from 0 to below 1."
        )
    linear = {name.rsplit(".", 1)[-1] for name, part in encoder.named_modules() if isinstance(part, nn.Linear)}
    targets = list(lora["targets"])
    missing = [name for name in targets if name not in linear]
    if missing or not targets:
        raise FinetuneError(
            f"model.lora.targets={targets}: the encoder has no linear layer called "
            f"{missing[0] if missing else 'anything there'}; it has {', '.join(sorted(linear)) or 'none'}."
        )
    settings = peft.LoraConfig(
        r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=targets, bias="none"
    )
    encoder.requires_grad_(False)
    peft.inject_adapter_in_model(settings, encoder)


Model = Mapping[str, Any]

LIBRARIES = ("timm", "transformers", "tiny")


def build(
    model: Model, n_classes: int, layer: str = "added", added_layer: bool = True, seed: int = 0
) -> tuple[Classifier, Preprocess]:
    """The classifier of ``model`` in training mode, on the CPU, and its preprocessing; all of it is trainable, or
    with ``model.lora.r`` the adapters, the added layer and the head.

    New weights are drawn from ``seed``. FinetuneError for settings that contradict each other, weights that cannot be
    had, encoders without a pooled output, and a layer that does not exist.
    """
    try:
        backbone = load_backbone(backbone_node(model))
    except BackboneError as error:
        raise _in_our_words(error) from error
    if "pooled" not in backbone.kinds:
        raise FinetuneError(f"model.model={model['model']} has no pooled output to classify; choose another model.")
    encoder, read = backbone.model, backbone._read

    def pool(images: Tensor) -> Tensor:
        pooled = read(images, (), True).pooled
        assert pooled is not None  # its kinds say so
        return pooled

    with fixed_seed(seed):
        if model["lora"]["r"] is None:
            encoder.requires_grad_(True)
        else:
            add_lora(encoder, model["lora"])
        classifier = Classifier(encoder, pool, n_classes, backbone.image_size, layer, added_layer)
    return classifier.train(), Preprocess.of(backbone.transform, backbone.image_size)


def backbone_node(model: Model) -> dict[str, Any]:
    """``model`` as a config node of the backbones; FinetuneError for an unknown library, or files for a tiny one."""
    library = model["library"]
    one_of(library, LIBRARIES, "model.library", FinetuneError)
    if library == "tiny":
        if model["weights"] is not None or model["image_size"] is not None:
            raise FinetuneError("The bundled tiny models take neither model.weights nor model.image_size.")
        return {"name": model["model"], "size": "tiny", "layer": None, "tiny": {"pretrained": model["pretrained"]}}
    section = {key: model[key] for key in ("library", "model", "image_size", "pretrained", "weights", "architecture")}
    return {"name": model["name"], "size": "published", "layer": None, "published": section | {"title": None}}


def model_identity(model: Model) -> str:
    """What determines the encoder at the start: its id, or its weights' digest. Raises FinetuneError."""
    try:
        return identity(backbone_node(model))
    except BackboneError as error:
        raise _in_our_words(error) from error


def rebuilding(model: Model) -> dict[str, Any]:
    """``model`` so that ``build`` makes the same architecture without any weights, hub or file."""
    node = dict(model) | {"pretrained": False, "weights": None}
    if model["library"] == "transformers":
        node["architecture"] = json.loads(architecture(published(backbone_node(model))).to_json_string(use_diff=False))
    return node


def _in_our_words(error: BackboneError) -> FinetuneError:
    """The backbone's sentence with the names that this config has for its settings."""
    text = str(error).replace("backbone.published.", "model.").replace("backbone=timm", "model.library=timm")
    return FinetuneError(text.replace("data=demo works offline", "finetune_model=tiny works offline"))


SCHEMA = 1

WEIGHTS = "model.safetensors"


class Loaded(NamedTuple):
    """A classifier in evaluation mode on the CPU, how pictures go into it, and its ``cfg.json``."""

    classifier: Classifier
    preprocess: Preprocess
    cfg: dict[str, Any]


def save(
    classifier: Classifier, preprocess: Preprocess, folder: Path, model: dict[str, Any], class_names: list[str],
    record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``cfg.json`` with ``record`` and with what rebuilds the classifier (``build.rebuilding``), then weights."""
    made = {
        "schema": SCHEMA, "model": model, "layer": classifier.layer, "n_units": classifier.n_units,
        "added_layer": "added.weight" in classifier.state_dict(), "class_names": class_names,
        "preprocess": preprocess.to_dict(),
    }  # fmt: skip
    write_json(folder / "cfg.json", made | record)
    write_tensors(folder / WEIGHTS, dict(classifier.state_dict()))


def load(folder: Path) -> Loaded:
    """What ``save`` wrote in ``folder``; FinetuneError when it is not there, is broken or does not fit."""
    try:
        cfg = read_json(folder / "cfg.json", "run finetune.py again", FinetuneError)
        tensors = unwrapped(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise FinetuneError(f"{folder} holds no whole fine-tuned model ({error}); run finetune.py again.") from error
    if cfg.get("schema") != SCHEMA:
        raise FinetuneError(f"{folder}/cfg.json has schema {cfg.get('schema')}; this version reads {SCHEMA}.")
    classifier, _ = build(cfg["model"], len(cfg["class_names"]), cfg["layer"], cfg["added_layer"])
    try:
        classifier.load_state_dict(tensors)
    except RuntimeError as error:
        raise FinetuneError(f"{folder}/{WEIGHTS} does not fit its cfg.json: {error}") from error
    return Loaded(classifier.eval(), Preprocess.from_dict(cfg["preprocess"]), cfg)
