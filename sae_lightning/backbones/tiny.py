"""The architecture of the five bundled tiny ViTs: width 128, depth 6, 8 x 8 patches of 4 x 4 pixels.

They are honest stand-ins for the published ViT-B backbones, trained on CIFAR-10 with the same five
paradigms by ``experiments/tiny_backbones``; every table names them with the suffix ``(tiny)``.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

TINY_NAMES = ("dinov2", "clip", "siglip", "mae", "deit")
IMAGE_SIZE, PATCH_SIZE, WIDTH, DEPTH, HEADS = 32, 4, 128, 6, 4
PIXEL_MEAN, PIXEL_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def tiny_vit(name: str) -> VisionTransformer:
    """A randomly initialised tiny ViT for the paradigm ``name`` (one of ``TINY_NAMES``).

    Input [B, 3, 32, 32] normalised by ``PIXEL_MEAN`` and ``PIXEL_STD``. As in the published models,
    SigLIP has no class token and pools by attention; the other four have a class token.
    """
    if name not in TINY_NAMES:
        raise ValueError(f"There is no tiny backbone '{name}'; choose one of {', '.join(TINY_NAMES)}.")
    attention_pool = name == "siglip"
    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=0,
        class_token=not attention_pool,
        global_pool="map" if attention_pool else "token",
        dynamic_img_size=True,
    )


class TinyTextTower(nn.Module):
    """A two-layer transformer over caption words; the text half of the tiny ``clip`` and ``siglip``.

    ``forward`` takes captions (list of B str) and returns embeddings [B, 128], not normalised.
    Words outside the vocabulary share one ``<unk>`` embedding.
    """

    def __init__(self, vocabulary: list[str], max_words: int = 20) -> None:
        super().__init__()
        self.vocabulary = list(vocabulary)
        self.max_words = max_words
        self._index = {word: i + 2 for i, word in enumerate(self.vocabulary)}  # 0 pads, 1 is unknown
        self.embed = nn.Embedding(len(self.vocabulary) + 2, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(max_words, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Word indices [B, max_words] (int64), padded with 0."""
        tokens = torch.zeros(len(captions), self.max_words, dtype=torch.long)
        for row, caption in enumerate(captions):
            words = caption.lower().replace(",", " ").replace(".", " ").split()[: self.max_words]
            if not words:
                raise ValueError("A caption is empty; the text tower needs at least one word.")
            tokens[row, : len(words)] = torch.tensor([self._index.get(w, 1) for w in words])
        return tokens

    def forward(self, captions: list[str]) -> Tensor:
        tokens = self.tokenize(captions).to(self.position.device)
        return self.encode_tokens(tokens)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, 128] of word indices [B, max_words]."""
        padding = tokens == 0
        x = self.encoder(self.embed(tokens) + self.position, src_key_padding_mask=padding)
        kept = (~padding).to(x.dtype).unsqueeze(-1)
        return self.project(self.norm((x * kept).sum(1) / kept.sum(1)))
