"""The captioner: a transformers LLaVA whose vision tower is the tiny CLIP ViT, with a small Llama behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from sae_lightning.backbones.tiny import (
    BESIDE,
    DEPTH,
    HEADS,
    IMAGE_SIZE,
    PATCH_SIZE,
    PIXEL_MEAN,
    PIXEL_STD,
    WIDTH,
    weights_file,
)
from sae_lightning.vlms.load import llava_processor
from sae_lightning.vlms.words import IMAGE, SPECIAL, word_tokenizer

PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
TEXT_LAYERS, TEXT_HEADS, TEXT_INNER = 3, 4, 384


def captioner(words: Sequence[str]) -> tuple[LlavaForConditionalGeneration, Any]:
    """The model, its language half and projector random, and its processor; it knows ``words``."""
    tokenizer = word_tokenizer(words)
    config = LlavaConfig(
        vision_config={
            "model_type": "vit", "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
            "intermediate_size": 4 * WIDTH, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "layer_norm_eps": 1e-6,
        },
        text_config={
            "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": TEXT_HEADS, "num_key_value_heads": TEXT_HEADS, "intermediate_size": TEXT_INNER,
            "vocab_size": len(SPECIAL) + len(words), "max_position_embeddings": 256,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    missing, unexpected = model.model.vision_tower.load_state_dict(tower_tensors(), strict=False)
    assert not unexpected
    assert all(name.startswith("pooler.") for name in missing)
    for name in missing:  # no one uses the pooler; zeros take no room when compressed
        torch.nn.init.zeros_(model.model.vision_tower.get_parameter(name))
    return model, llava_processor(tokenizer, config, PIXEL_MEAN, PIXEL_STD)


def tower_tensors() -> dict[str, Tensor]:
    """The weights of the tiny CLIP ViT under the names of transformers' ViTModel, float32."""
    found = {}
    for name, tensor in load_file(weights_file("clip")).items():
        if name.startswith(BESIDE):
            continue
        if ".attn.qkv." in name:
            block, kind = name.removeprefix("blocks.").split(".attn.qkv.")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[f"layers.{block}.attention.{part}_proj.{kind}"] = rows.float().contiguous()
        else:
            found[_renamed(name)] = tensor.float()
    return found


def _renamed(name: str) -> str:
    for ours, theirs in (
        ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("blocks.", "layers."),
        (".attn.proj", ".attention.o_proj"),
        (".norm1", ".layernorm_before"),
        (".norm2", ".layernorm_after"),
    ):
        name = name.replace(ours, theirs)
    return f"layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
