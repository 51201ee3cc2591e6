"""How features lie in a shard: as float16, bfloat16, or int8 with a scale a token.

int8 keeps x = shift + spread · scale · q: ``shift`` and ``spread`` [d] are mean and deviation of each dimension in
the shard, so that dimensions far off zero or of large deviation do not use up the 255 steps; ``scale``
lets each token's largest standardised entry be 127.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lightning.features.manifest import Moments, StoreError
from sae_lightning.registry import one_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
DELIVERED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.float16}
NAMES = {"float16": "F16", "bfloat16": "BF16", "int8": "I8"}
ALIGN = 4096  # bytes that a header is padded to


@dataclass(frozen=True)
class Frame:
    """``shift`` and ``spread`` [d] float32 of an int8 shard."""

    shift: Tensor
    spread: Tensor

    @classmethod
    def of(cls, moments: Moments, device: torch.device) -> Frame:
        """From the moments of all tokens of the shard; on ``device``."""
        spread = (moments.m2 / moments.count).sqrt()
        floor = max(float(spread.mean()) * 1e-3, 1e-8)
        return cls(moments.mean.float().to(device), spread.clamp_min(floor).float().to(device))


def check_dtype(dtype: str) -> str:
    """``dtype`` itself; StoreError unless it is one that stores can have."""
    one_of(dtype, DTYPES, "extract.dtype", StoreError)
    return dtype


def encode(x: Tensor, dtype: str, frame: Frame | None = None) -> dict[str, Tensor]:
    """The tensors to store of ``x`` [n, P, d]: ``features`` and, for int8, ``scale`` [n, P] float32."""
    if dtype != "int8":
        return {"features": x.to(DTYPES[dtype])}
    assert frame is not None
    standard = (x.float() - frame.shift) / frame.spread
    scale = standard.abs().amax(-1).clamp_min(1e-12) / 127
    return {"features": (standard / scale[..., None]).round().to(torch.int8), "scale": scale}


def decode(features: Tensor, scale: Tensor | None = None, frame: Frame | None = None) -> Tensor:
    """Features as they are delivered: what was stored, or float16 from int8 ``features`` [..., d], ``scale`` [...]."""
    if features.dtype != torch.int8:
        return features
    assert scale is not None
    assert frame is not None
    x = features.float().mul_(scale[..., None]).mul_(frame.spread).add_(frame.shift)
    return x.clamp_(-65504, 65504).to(torch.float16)


def layout(images: int, n_patches: int, d_in: int, dtype: str) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Of each tensor of a shard: its safetensors type, its shape, and its first byte after the header."""
    kinds: list[tuple[str, str, tuple[int, ...], int]] = [
        ("features", NAMES[dtype], (images, n_patches, d_in), 1 if dtype == "int8" else 2)
    ]
    if dtype == "int8":
        kinds += [("scale", "F32", (images, n_patches), 4), ("shift", "F32", (d_in,), 4), ("spread", "F32", (d_in,), 4)]
    out, at = {}, 0
    for name, kind, shape, size in kinds:
        out[name] = (kind, shape, at)
        at += size * torch.Size(shape).numel()
    return out | {"end": ("", (), at)}


def header(images: int, n_patches: int, d_in: int, dtype: str) -> bytes:
    """The safetensors header of a shard, length included, padded to a multiple of 4096 bytes."""
    places = layout(images, n_patches, d_in, dtype)
    ends = [at for _, _, at in places.values()][1:]
    content = {
        name: {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        for (name, (kind, shape, at)), end in zip(list(places.items())[:-1], ends, strict=True)
    }
    text = json.dumps(content).encode()
    padded = -(-(8 + len(text)) // ALIGN) * ALIGN - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)
