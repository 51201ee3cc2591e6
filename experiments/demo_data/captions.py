"""Captions for images that have only a label: the class name plus what can be measured in the pixels.

The tone and the colour around the object are read off the picture, so two images of one class differ
in their captions wherever they differ in light or background.
"""

from __future__ import annotations

import colorsys

import numpy as np

COLOURS = ("grey", "red", "brown", "yellow", "green", "blue", "purple")

TONES = ("dark", "bright")

TEMPLATES = (
    "a {tone} photo of {name}",
    "{name} in a {tone} photo",
    "a {tone} photo of {name} on a {colour} background",
    "{name} on a {colour} background",
    "a {tone} picture of {name} , {colour} around it",
)


def background_colour(image: np.ndarray) -> str:
    """The colour word for the outer tenth of an RGB image [H, W, 3] (uint8)."""
    margin = max(1, round(0.1 * min(image.shape[:2])))
    inside = np.zeros(image.shape[:2], dtype=bool)
    inside[margin:-margin, margin:-margin] = True
    red, green, blue = np.median(image[~inside], axis=0) / 255.0
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    if saturation < 0.15:
        return "grey"
    degrees = 360 * hue
    if degrees < 50 or degrees >= 330:
        return "brown" if value < 0.75 or 20 <= degrees < 50 else "red"
    return "yellow" if degrees < 70 else "green" if degrees < 165 else "blue" if degrees < 265 else "purple"


def tone(image: np.ndarray) -> str:
    """``dark``, ``bright`` or an empty string, from the mean luminance of an RGB image (uint8)."""
    luminance = float((image.reshape(-1, 3).mean(0) * (0.299, 0.587, 0.114)).sum())
    return "dark" if luminance < 95 else "bright" if luminance > 150 else ""


def caption(image: np.ndarray, name: str, rng: np.random.Generator) -> str:
    """One caption of an image [H, W, 3] (uint8) of class ``name``, its template drawn by ``rng``."""
    article = "an" if name[0] in "aeiou" else "a"
    text = TEMPLATES[rng.integers(len(TEMPLATES))].format(
        name=f"{article} {name}", tone=tone(image), colour=background_colour(image)
    )
    return " ".join(text.split()).replace(" ,", ",")


def vocabulary(class_names: list[str]) -> list[str]:
    """Every word that ``caption`` can produce for these classes, sorted."""
    words = {"an", *COLOURS, *TONES}
    for template in TEMPLATES:
        words.update(w for w in template.replace(",", " ").split() if "{" not in w)
    for name in class_names:
        words.update(name.lower().split())
    return sorted(words)
