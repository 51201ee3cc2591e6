"""What Pillow does not do with PNGs: passing over metadata that it finds too large, and 16 bits in colour."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sae_lightning.data.levels import Samples

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def without_metadata(data: bytes) -> bytes:
    """A PNG with nothing but its pixels: profiles, texts and whatever else need not be understood are left out."""
    kept = [SIGNATURE]
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind[:1].isupper() or kind == b"tRNS":
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def is_deep(picture: Image.Image) -> bool:
    """Whether this is a PNG of 16 bits in several channels, of which Pillow would keep the upper 8."""
    if picture.format != "PNG" or picture.mode == "I;16":
        return False
    return str(picture.tile[0][3]).endswith(";16B")  # type: ignore[attr-defined]


def png_samples(data: bytes) -> Samples:
    """All bits of all channels of a PNG; RuntimeError when it is damaged."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    values = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    channels = values.permute(1, 2, 0).numpy()
    return Samples(np.ascontiguousarray(channels), 16, 1 if channels.shape[2] < 3 else 3)
