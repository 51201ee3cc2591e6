"""Pictures as the page shows them: squares as WebP, plain or with a latent's patches lit."""

from __future__ import annotations

import io

from PIL import Image

SMALL, LARGE = 96, 288  # pixels at most: in lists, and alone
SIZES = (SMALL, LARGE)


def webp(picture: Image.Image) -> bytes:
    """The picture as WebP."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88, method=4)
    return buffer.getvalue()
