"""The architecture of the five bundled tiny ViTs: width 128, depth 6, 8 x 8 patches of 4 x 4 pixels.

They are honest stand-ins for the published ViT-B backbones, trained on CIFAR-10 with the same five
paradigms by ``experiments/tiny_backbones``; every table names them with the suffix ``(tiny)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sae_lightning.backbones.backbone import Backbone, BackboneError
from sae_lightning.backbones.settings import asked_layer, fixed_seed
from sae_lightning.registry import one_of

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

TINY_NAMES = ("dinov2", "clip", "siglip", "mae", "deit")

IMAGE_SIZE, PATCH_SIZE, WIDTH, DEPTH, HEADS = 32, 4, 128, 6, 4

PIXEL_MEAN, PIXEL_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def tiny_vit(name: str) -> VisionTransformer:
    """A randomly initialised tiny ViT for the paradigm ``name`` (one of ``TINY_NAMES``).

    Input [B, 3, 32, 32] normalised by ``PIXEL_MEAN`` and ``PIXEL_STD``. As in the published models,
    SigLIP has no class token and pools by attention; the other four have a class token.
    """
    from timm.models.vision_transformer import VisionTransformer

    one_of(name, TINY_NAMES, "tiny backbone")
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


ASSETS = Path(__file__).resolve().parents[1] / "assets" / "tiny"

IMAGE_TEXT = ("clip", "siglip")

BESIDE = ("text.", "project.", "logit_")  # what an image–text file holds beside its ViT


def weights_file(name: str) -> Path:
    """The bundled safetensors of the tiny backbone ``name``; BackboneError when it is not there."""
    path = ASSETS / f"{name}.safetensors"
    if not path.is_file():
        raise BackboneError(
            f"The weights of the tiny backbone '{name}' are missing ({path.name}); reinstall the package or train "
            "them with experiments/tiny_backbones."
        )
    return path


def tiny_identity(cfg: Mapping[str, Any]) -> str:
    """The name and the digest of the bundled weights, or ``random``."""
    name = cfg["name"]
    weights = hashlib.sha256(weights_file(name).read_bytes()).hexdigest() if _trained(cfg) else "random"
    return f"tiny:{name}:{weights}"


def load_tiny(cfg: Mapping[str, Any]) -> Backbone:
    """The tiny backbone ``cfg.name``; with ``cfg.tiny.pretrained=false`` the same architecture with random weights."""
    from timm.data import create_transform  # here, as the import takes seconds, and names of runs need no encoder

    from sae_lightning.backbones.timm import read_timm, timm_module

    name, trained = cfg["name"], _trained(cfg)
    with fixed_seed():
        vit = tiny_vit(name)
        project = nn.Linear(WIDTH, WIDTH, bias=False) if name in IMAGE_TEXT else None
    if trained:
        vit.load_state_dict(_tensors(name, but=BESIDE))
        if project is not None:
            project.load_state_dict(_tensors(name, of="project."))
    return Backbone(
        vit,
        partial(read_timm, vit),
        name=name,
        title=f"{name} (tiny)" if trained else f"{name} (tiny, random weights)",
        depth=DEPTH,
        layer=asked_layer(cfg, "tiny"),
        image_size=IMAGE_SIZE,
        transform=create_transform(
            (3, IMAGE_SIZE, IMAGE_SIZE), mean=PIXEL_MEAN, std=PIXEL_STD, crop_pct=1.0, interpolation="bicubic"
        ),
        project=project,
        load_text=partial(_load_text, name, trained) if name in IMAGE_TEXT else None,
        module_at=partial(timm_module, vit),
    )


def _load_text(name: str, trained: bool) -> TinyTextTower:
    with fixed_seed():
        tower = TinyTextTower((ASSETS / "vocabulary.txt").read_text(encoding="utf-8").split())
    if trained:
        tower.load_state_dict(_tensors(name, of="text."))
    return tower


def _tensors(name: str, of: str = "", but: Collection[str] = ()) -> dict[str, Tensor]:
    """The bundled tensors in float32 whose names start with ``of`` (taken off) and with none of ``but``."""
    return {
        key.removeprefix(of): tensor.float()
        for key, tensor in load_file(weights_file(name)).items()
        if key.startswith(of) and not key.startswith(tuple(but))
    }


def _trained(cfg: Mapping[str, Any]) -> bool:
    return cfg["tiny"].get("pretrained", True)
