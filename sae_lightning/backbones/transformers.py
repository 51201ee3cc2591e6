"""Any plain vision transformer of transformers, alone or as the image half of CLIP and SigLIP."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sae_lightning.backbones.backbone import (
    Backbone,
    BackboneError,
    LayerTokens,
    Reading,
    backbone_library,
    block_outputs,
    list_of_blocks,
    reason,
)
from sae_lightning.backbones.settings import Published, asked_layer, fixed_seed, published
from sae_lightning.backbones.transformers_images import image_size_and_transform, silent

# for key_mapping: takes off what torch.compile and data parallelism put before the names of weights
UNWRAPPED = {r"^(?:(?:module|_orig_mod)\.)+": "", r"\._orig_mod\.": "."}


def architecture(wanted: Published) -> Any:
    """transformers' config of the whole model: spelled out, or as it lies beside the weights."""
    spelled_out = None if wanted.architecture is None or wanted.pretrained else json.dumps(dict(wanted.architecture))
    return _architecture(str(wanted.weights or wanted.model), spelled_out)


NOT_SUPPORTED = "Such a model is not supported; choose another, or try backbone=timm."


@lru_cache(maxsize=64)
def _architecture(source: str, spelled_out: str | None) -> Any:
    import transformers

    try:
        with silent():
            if spelled_out is not None:
                return transformers.AutoConfig.for_model(**json.loads(spelled_out))
            return transformers.AutoConfig.from_pretrained(source)
    except Exception as error:
        advice = "Check backbone.published.architecture."
        if spelled_out is None:
            advice = NOT_SUPPORTED
        if _of_the_hub(error):
            advice = (
                "Check backbone.published.model and the connection to the model hub; without one, give a model folder "
                "as backbone.published.weights, or for pretrained=false a backbone.published.architecture."
            )
        raise BackboneError(f"The config of '{source}' cannot be loaded: {reason(error)}. {advice}") from error


def build(wanted: Published, kind: str, config: Any) -> Any:
    """The transformers class ``kind`` in float32, with the weights that ``wanted`` names or with random ones.

    BackboneError if the weights cannot be had, or lack more than a pooler, which is left out then.
    """
    import transformers

    cls = getattr(transformers, kind)
    source = wanted.weights or wanted.model
    try:
        with fixed_seed(), silent():
            if not wanted.pretrained:
                return (cls.from_config(config) if kind == "AutoModel" else cls(config)).float()
            model, report = cls.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                use_safetensors=True if wanted.weights else None,
                key_mapping=UNWRAPPED,
            )
    except Exception as error:
        advice = NOT_SUPPORTED
        if _of_the_hub(error):
            advice = (
                "Check the model's id and the connection to the model hub, or give a model folder as "
                "backbone.published.weights; data=demo works offline."
            )
        what = "weights" if wanted.pretrained else "architecture"
        raise BackboneError(f"The {what} of '{source}' cannot be loaded: {reason(error)}. {advice}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.endswith("mask_token"))
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None
    elif missing:
        raise BackboneError(
            f"The weights of '{source}' lack {len(missing)} tensors of {type(model).__name__}, '{missing[0]}' among "
            "them; choose a checkpoint of the whole model."
        )
    return model


def _of_the_hub(error: Exception) -> bool:
    """Whether it is about files that are not there or cannot be fetched, rather than about the model in them."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in (
        "huggingface_hub",
        "httpx",
        "requests",
    )


def read_transformers(
    model: Any,
    blocks: Sequence[nn.Module],
    grid: tuple[int, int],
    images: Tensor,
    layers: Collection[int],
    pooled: bool,
) -> Reading:
    """One forward pass of a transformers model with hooks on the wanted ``blocks``.

    Tokens are as the blocks give them, [B, n + rows · columns, d]; the first of n > 0 in front of the patches
    is the class token. It also stands in, after the final norm, for the pooled output of models without a
    pooler. BackboneError if the blocks do not give one token a patch of every image.
    """
    outputs, result = block_outputs(lambda: model(**model_inputs(model, images)), blocks, layers, finish=pooled)
    patches = grid[0] * grid[1]
    for layer in layers:
        shape = tuple(outputs[layer].shape) if layer in outputs else ()
        if len(shape) != 3 or shape[0] != len(images) or shape[1] < patches:
            count = f"{len(images)} images" if len(images) > 1 else "an image"
            raise BackboneError(
                f"{type(model).__name__} gives {shape or 'nothing'} for {count} after layer {layer}, not one token for "
                f"each of {patches} patches; it is no plain vision transformer and not supported. timm may have it: "
                "try backbone=timm."
            )
    tokens_of = {
        layer: LayerTokens(out[:, -patches:], out[:, :-patches], int(out.shape[1] > patches), grid)
        for layer, out in outputs.items()
    }
    if result is None:
        return Reading(tokens_of, None)
    last = getattr(result, "last_hidden_state", None)
    if last is None:
        raise BackboneError(
            f"{type(model).__name__} gives no last_hidden_state; it is no plain vision transformer and not supported. "
            "timm may have it: try backbone=timm."
        )
    class_token = last[:, 0] if last.shape[1] > patches else None
    own = getattr(result, "pooler_output", None)
    return Reading(tokens_of, class_token if own is None else own)


def model_inputs(model: Any, images: Tensor) -> dict[str, Tensor | bool]:
    """The arguments with which ``model`` encodes ``images`` [B, 3, H, W] completely and in order."""
    config, (count, _, height, width) = model.config, images.shape
    rows, columns = height // config.patch_size, width // config.patch_size
    if config.model_type == "siglip2_vision_model":  # takes patches [B, P, patch_size² · 3]
        cut = images[:, :, : rows * config.patch_size, : columns * config.patch_size]
        cut = cut.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
        return {
            "pixel_values": cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
            "pixel_attention_mask": images.new_ones(count, rows * columns, dtype=torch.long),
            "spatial_shapes": torch.tensor([[rows, columns]] * count, device=images.device),
        }
    inputs: dict[str, Tensor | bool] = {"pixel_values": images}
    if config.model_type == "vit_mae":  # shuffles patches by this noise
        inputs["noise"] = torch.arange(rows * columns, device=images.device, dtype=torch.float32).expand(count, -1)
    if height != config.image_size and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        inputs["interpolate_pos_encoding"] = True
    return inputs


# by the whole model's type
TEXT_HALVES = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}


class TextTower(nn.Module):
    """Captions (list of B str) in, embeddings [B, d] in the image–text space out, not scaled to unit norm.

    Captions are cut after ``max_tokens``; with ``pad_to_full`` all are padded to that length, else to the longest.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int, pad_to_full: bool) -> None:
        super().__init__()
        self.model, self.tokenizer, self.max_tokens, self.pad_to_full = model, tokenizer, max_tokens, pad_to_full

    def forward(self, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(
            captions,
            padding="max_length" if self.pad_to_full else True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        output = self.model(**tokens.to(next(self.model.parameters()).device))
        return output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output


def load_text(wanted: Published, whole: Any) -> TextTower:
    """The text half of the model with the config ``whole``; BackboneError if tokenizer or weights cannot be had."""
    import transformers

    source, config = wanted.weights or wanted.model, whole.text_config
    if hasattr(whole, "projection_dim"):
        config.projection_dim = whole.projection_dim
    try:
        with silent():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        files = tokenizer.vocab_files_names.values()
        if wanted.weights and not any((wanted.weights / file).is_file() for file in files):
            raise FileNotFoundError(f"none of {', '.join(files)} is there")  # transformers makes one without words
    except Exception as error:
        raise BackboneError(
            f"The tokenizer of '{source}' cannot be loaded: {reason(error)}. Captions need it; check the connection to "
            "the model hub, or put the tokenizer's files into the folder backbone.published.weights."
        ) from error
    model = build(wanted, TEXT_HALVES[whole.model_type], config)
    # SigLIP was trained on captions padded to full length, and reads its embedding off the last place
    return TextTower(model, tokenizer, config.max_position_embeddings, pad_to_full=whole.model_type != "clip")


# the image halves of image–text models, by the whole model's type
IMAGE_HALVES = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel"}


def load_transformers(cfg: Mapping[str, Any]) -> Backbone:
    """The vision transformer ``cfg.published.model`` of transformers; its layers are the blocks.

    Of CLIP and SigLIP only the image half is loaded; the text half follows when captions ask for it. MAE
    sees all patches, in order. BackboneError for an architecture that is no plain vision transformer, and
    for weights, config or image processor that cannot be had.
    """
    wanted = published(cfg)
    whole = deepcopy(architecture(wanted))
    config = _image_half(wanted, whole)
    depth = config.num_hidden_layers
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    if whole is not config and hasattr(whole, "projection_dim"):
        config.projection_dim = whole.projection_dim
    model = build(wanted, IMAGE_HALVES.get(whole.model_type, "AutoModel"), config)
    tower, project = model, None
    if whole.model_type == "clip":
        tower, project = model.vision_model, model.visual_projection
    elif whole.model_type in IMAGE_HALVES:
        project = nn.Identity()  # SigLIP's pooled output is its embedding
    size, transform = image_size_and_transform(wanted, config)
    grid = (size // config.patch_size, size // config.patch_size)
    try:
        inspect.signature(tower.forward).bind(**model_inputs(tower, torch.zeros(1, 3, size, size)))
    except TypeError as error:
        raise _unsupported(wanted, config, f"it does not take pictures alone, {error}") from error
    blocks = _blocks(tower, depth)
    return Backbone(
        tower,
        partial(read_transformers, tower, blocks, grid),
        name=cfg["name"],
        title=wanted.title,
        depth=depth,
        layer=asked_layer(cfg, "published"),
        image_size=size,
        transform=transform,
        project=project,
        load_text=partial(load_text, wanted, whole) if whole.model_type in TEXT_HALVES else None,
        module_at=blocks.__getitem__,
    )


def _image_half(wanted: Published, whole: Any) -> Any:
    """The config of the model's image half, or of all of it; BackboneError if it is no plain vision transformer."""
    from transformers import MODEL_MAPPING, PreTrainedConfig

    config = getattr(whole, "vision_config", None)
    config = config if isinstance(config, PreTrainedConfig) else whole
    if not all(isinstance(getattr(config, name, None), int) for name in ("num_hidden_layers", "patch_size")):
        raise _unsupported(wanted, config, "it has no blocks over square patches")
    if any(hasattr(config, name) for name in ("tubelet_size", "num_frames")):
        raise _unsupported(wanted, config, "it takes videos")
    if not (isinstance(getattr(config, "image_size", None), int) or hasattr(config, "num_patches")):
        raise _unsupported(wanted, config, f"its image_size is {getattr(config, 'image_size', None)}")
    if whole.model_type not in IMAGE_HALVES and type(config) not in MODEL_MAPPING:
        raise _unsupported(wanted, config, "transformers' AutoModel cannot load its image half alone")
    return config


def _unsupported(wanted: Published, config: Any, why: str) -> BackboneError:
    return BackboneError(
        f"'{wanted.model}' ({config.model_type}) is no plain vision transformer and not supported: {why}. timm may "
        "have it: try backbone=timm."
    )


def _blocks(model: nn.Module, depth: int) -> list[nn.Module]:
    blocks = list_of_blocks(model, depth)
    if blocks is None:
        raise BackboneError(
            f"{type(model).__name__} has no list of {depth} blocks and is not supported; timm may have it: try "
            "backbone=timm."
        )
    return blocks


@backbone_library("transformers")
class Transformers:
    """transformers as a library of backbones."""

    load = staticmethod(load_transformers)

    @staticmethod
    def depth(wanted: Published) -> int:
        """Number of blocks, from the model's config alone; BackboneError if it is no vision transformer."""
        return _image_half(wanted, architecture(wanted)).num_hidden_layers
