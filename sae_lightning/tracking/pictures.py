"""Strips of latents' top images as pictures, for loggers that show images."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from sae_lightning.report.page import latent_groups, load_run, pictures


def latent_cards(run: Path, count: int) -> list[dict[str, Any]]:
    """About ``count`` of the latents that ``evaluate.py`` chose to show, equally many of each group, a dict each.

    ``plain`` and ``lit`` are strips of the top images, without and with the patches' activation. Empty where the run's
    images cannot be read again: a bare store, or a stream. StoreError or DataError when they have changed or are gone.
    """
    about = load_run(run)
    images = pictures(about)
    if images is None or count < 1:
        return []
    groups = latent_groups(about, images, n_cards=-(-count // 6))
    return [
        {"group": group["name"], **card, "plain": _picture(card["plain"]), "lit": _picture(card["lit"])}
        for group in groups for card in group["cards"]
    ]  # fmt: skip


def sheet(strips: list[Image.Image], gap: int = 4) -> Image.Image:
    """Strips below each other, on white."""
    size = (max(s.width for s in strips), sum(s.height + gap for s in strips) - gap)
    whole, at = Image.new("RGB", size, "white"), 0
    for strip in strips:
        whole.paste(strip, (0, at), strip if strip.mode == "RGBA" else None)
        at += strip.height + gap
    return whole


def _picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGBA")
