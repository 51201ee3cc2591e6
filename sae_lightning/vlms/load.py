"""Vision-language models from the hub, from a folder, bundled, or random, as a config node says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sae_lightning.backbones.backbone import reason
from sae_lightning.backbones.settings import fixed_seed
from sae_lightning.backbones.transformers import UNWRAPPED
from sae_lightning.backbones.transformers_images import silent
from sae_lightning.registry import one_of
from sae_lightning.vlms.vlm import VLM, VLMError
from sae_lightning.vlms.words import IMAGE, SPECIAL, word_tokenizer

WORDS = Path(__file__).resolve().parents[1] / "assets" / "tiny" / "vocabulary.txt"


def random_llava(architecture: Mapping[str, Any]) -> tuple[Any, Any]:
    """A transformers LLaVA in ``architecture`` (its config, with model_type llava) and a processor that fits it.

    The words are those of the tiny text towers; vocabulary and special tokens in the architecture give way to
    theirs. VLMError for an architecture that transformers cannot build.
    """
    import transformers

    words = WORDS.read_text(encoding="utf-8").split()
    if architecture.get("model_type") != "llava":
        raise VLMError(
            f"vlm.architecture has model_type {architecture.get('model_type')}; random weights are made for llava "
            "only. Give vlm.weights for any other."
        )
    tokenizer = word_tokenizer(words)
    tokens = {"vocab_size": len(SPECIAL) + len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    try:
        text = {**architecture["text_config"], **tokens}
        image_token = {"image_token_index": tokenizer.convert_tokens_to_ids(IMAGE)}
        config = transformers.LlavaConfig(**{**architecture, "text_config": text, **image_token})
        model = transformers.LlavaForConditionalGeneration(config)
    except Exception as error:
        raise VLMError(f"transformers cannot build vlm.architecture: {reason(error)}.") from error
    return model, llava_processor(tokenizer, config)


def llava_processor(tokenizer: Any, config: Any, mean: Any = (0.5, 0.5, 0.5), std: Any = (0.5, 0.5, 0.5)) -> Any:
    """The processor of a LLaVA ``config`` whose vision tower has one class token; pixels normalised by mean and std."""
    import transformers

    size = config.vision_config.image_size
    pictures = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(mean),
        image_std=list(std),
    )
    return transformers.LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )


CAPTIONER = Path(__file__).resolve().parents[1] / "assets" / "captioner"

DTYPES = ("float32", "bfloat16", "float16", "auto")

OPTIONS = ("prompt", "max_new_tokens", "batch_size", "tower", "blocks", "special_tokens")


def load_vlm(cfg: Mapping[str, Any], device: str = "cpu") -> VLM:
    """The model that the node ``cfg`` describes (``conf/vlm``), frozen, on ``device`` (cpu, cuda or auto).

    ``cfg.weights`` is a model folder instead of the hub's ``cfg.model``, or ``bundled`` for the captioner that
    ships with the package; ``cfg.architecture`` (a LLaVA config) is built with random weights instead. Only
    safetensors are loaded, and no code from the hub. VLMError when anything of it cannot be had.
    """
    node: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else dict(cfg)  # type: ignore[assignment]
    place = _device(device)
    if not node.get("prompt"):
        raise VLMError("vlm.prompt is missing; set it to what the model is asked of a picture, for example <image>.")
    if node.get("architecture") is not None:
        with fixed_seed():
            model, processor = random_llava(node["architecture"])
        model = model.to(place)
    else:
        model, processor = _pretrained(node, place)
    options = {name: node[name] for name in OPTIONS if node.get(name) is not None}
    return VLM(model, processor, title=node.get("title") or str(node["model"]), **options)


def _pretrained(node: Mapping[str, Any], device: torch.device) -> tuple[Any, Any]:
    import transformers

    source = _source(node)
    dtype = node.get("dtype") or "auto"
    one_of(dtype, DTYPES, "vlm.dtype", VLMError)
    spread = node.get("device_map")
    try:
        with silent():
            processor = transformers.AutoProcessor.from_pretrained(source, backend="pil")
            auto: Any = transformers.AutoModelForImageTextToText
            model, report = auto.from_pretrained(
                source,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                device_map=spread,
                use_safetensors=True,
                output_loading_info=True,
                key_mapping=UNWRAPPED,
            )
    except Exception as error:
        raise VLMError(
            f"The vision-language model '{source}' cannot be loaded: {reason(error)}. Check vlm.model and the "
            "connection to the model hub, or give a folder with safetensors as vlm.weights; vlm=tiny works offline."
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise VLMError(
            f"The weights of '{source}' lack {len(missing)} tensors of {type(model).__name__}, '{missing[0]}' among "
            "them; choose a checkpoint of the whole model."
        )
    return (model if spread else model.to(device)), processor


def _source(node: Mapping[str, Any]) -> str:
    weights, model = node.get("weights"), node.get("model")
    if weights == "bundled":
        weights = CAPTIONER
        if not (CAPTIONER / "model.safetensors").is_file():
            raise VLMError(
                "The weights of the bundled captioner are missing (captioner/model.safetensors); reinstall the "
                "package or train them with experiments/tiny_captioner."
            )
    if weights is not None:
        if not Path(weights).is_dir():
            raise VLMError(f"vlm.weights={weights} is no folder; give a model's folder with config and safetensors.")
        return str(weights)
    if model in (None, "", "???"):
        raise VLMError("vlm.model is missing; set it to the id of a vision-language model, or choose vlm=tiny.")
    return str(model)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise VLMError("device=cuda, but this machine has no CUDA device; set it to cpu or auto.")
    return device
