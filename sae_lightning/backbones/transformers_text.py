"""The text halves of CLIP and SigLIP in transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sae_lightning.backbones.errors import BackboneError, reason
from sae_lightning.backbones.settings import Published
from sae_lightning.backbones.transformers_build import build, silent

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
