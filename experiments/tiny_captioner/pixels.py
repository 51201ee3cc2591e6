"""What can be read off the pixels of a small picture [H, W, 3] (uint8): colours, light, background, size and place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.colors import rgb_to_hsv

from experiments.demo_data.captions import background_colour, tone

COLOURS = ("black", "white", "grey", "red", "orange", "brown", "yellow", "green", "blue", "purple")
APART = 60.0  # RGB distance from the background at which a pixel belongs to the object
SHARE = 0.28  # of the object's pixels that a colour must have to be named


@dataclass(frozen=True)
class Measured:
    """``tone`` is dark, bright or empty; ``colours`` of the object, most frequent first, at most two.

    ``background``, ``above`` and ``below`` are colours of the border; ``busy`` its mean gradient, ``contrast`` the
    deviation of the picture's luminance, ``vivid`` its mean saturation (0 to 1); ``size`` the share of pixels
    unlike the background and ``side`` their mean column (-1 left, 1 right), both None on a busy background.
    """

    tone: str
    colours: tuple[str, ...]
    background: str
    above: str
    below: str
    busy: float
    contrast: float
    vivid: float
    size: float | None
    side: float | None


def colours_of(pixels: np.ndarray) -> np.ndarray:
    """Index into ``COLOURS`` of each pixel, of RGB values [..., 3] from 0 to 255."""
    hue, saturation, value = np.moveaxis(rgb_to_hsv(np.asarray(pixels, dtype=np.float64) / 255), -1, 0)
    degrees, chroma = 360 * hue, saturation * value
    by_hue = np.select(
        [degrees < 15, degrees < 48, degrees < 70, degrees < 165, degrees < 260, degrees < 330],
        [3, 4, 6, 7, 8, 9],
        3,
    )
    warm = (degrees < 48) | (degrees >= 330)
    muted = warm & ((value < 0.62) | (saturation < 0.5)) & ~((saturation > 0.65) & (value > 0.45))
    found = np.where(muted, 5, by_hue)
    pale = np.select([value < 0.32, value > 0.7], [0, 1], 2)
    return np.where((chroma < 0.11) | (value < 0.18), pale, found)


def measure(image: np.ndarray) -> Measured:
    """Everything above of one picture."""
    pixels = image.astype(np.float64)
    luminance = pixels @ (0.299, 0.587, 0.114)
    height, width = luminance.shape
    margin = max(1, round(0.1 * min(height, width)))
    border = np.ones((height, width), dtype=bool)
    border[margin:-margin, margin:-margin] = False
    down, across = np.abs(np.diff(luminance, axis=0))[:, :-1], np.abs(np.diff(luminance, axis=1))[:-1]
    busy = float((down + across)[border[:-1, :-1]].mean() / 2)
    unlike = np.linalg.norm(pixels - np.median(pixels[border], axis=0), axis=-1) > APART
    middle = np.zeros_like(border)
    middle[height // 5 : -(height // 5), width // 5 : -(width // 5)] = True
    object_pixels = unlike & middle
    if object_pixels.sum() < 0.2 * middle.sum():
        object_pixels = np.zeros_like(border)
        object_pixels[height // 3 : -(height // 3), width // 3 : -(width // 3)] = True
    plain = busy < 11 and unlike.any()
    return Measured(
        tone=tone(image),
        colours=_named(colours_of(pixels[object_pixels])),
        background=_background(image),
        above=_background(image[: 2 * margin]) if margin else "",
        below=_background(image[-2 * margin :]),
        busy=busy,
        contrast=float(luminance.std()),
        vivid=float(rgb_to_hsv(pixels / 255)[..., 1].mean()),
        size=float(unlike.mean()) if plain else None,
        side=float(2 * np.nonzero(unlike)[1].mean() / (width - 1) - 1) if plain else None,
    )


def _background(image: np.ndarray) -> str:
    """``background_colour``, whose grey is told apart into white, grey and black."""
    found = background_colour(image)
    if found != "grey":
        return found
    luminance = float(np.median(image.reshape(-1, 3).mean(1)))
    return "white" if luminance > 205 else "black" if luminance < 55 else "grey"


def _named(indices: np.ndarray) -> tuple[str, ...]:
    counts = np.bincount(indices, minlength=len(COLOURS))
    order = np.argsort(-counts, kind="stable")[:2]
    return tuple(COLOURS[i] for i in order if counts[i] >= SHARE * len(indices))
