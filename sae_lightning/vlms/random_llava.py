"""A LLaVA of any shape with random weights and a vocabulary of words: the code path without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lightning.backbones.errors import reason
from sae_lightning.vlms.errors import VLMError
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
