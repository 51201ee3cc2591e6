"""From samples of any depth and number of channels to pictures of 8 bits in RGB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sae_lightning.data.errors import DataError, tell

DEPTHS = (1, 8, 10, 12, 14, 16)  # bits that sensors and files have, whatever they are stored in
CONTAINERS = (16, 32, 64)  # bits that may hold samples of fewer
FULL = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # what white is in pictures of floats
OWN_RANGE = "by the picture's own range"
OVERSHOOT = 0.1  # of floats beyond black and white, as filters leave it
DARKEST = 1 / 16  # floats that stay below are not meant to reach 1
CLIPPED = 0.9  # share of samples beyond black and white from which that is said


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file does not say: which three ``channels`` are red, green and blue, and which value is ``white``."""

    channels: tuple[int, int, int] | None = None
    white: float | None = None

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> Reading:
        """From ``data.channels`` and ``data.white``; DataError for what they cannot be."""
        channels, white = cfg.get("channels"), cfg.get("white")
        if channels is not None:
            channels = tuple(channels) if isinstance(channels, Sequence) else (channels,)
            if len(channels) != 3 or any(type(c) is not int or c < 0 for c in channels):
                raise DataError(f"data.channels={list(channels)} must be three numbers of channels, counted from 0.")
        if white is not None and not (isinstance(white, int | float) and white > 0):
            raise DataError(f"data.white={white} must be a number above 0, or null.")
        return cls(channels, None if white is None else float(white))


AS_FILED = Reading()


@dataclass(frozen=True)
class Samples:
    """``values`` [H, W, C] as they are in a file, of ``bits`` each.

    ``colours``: how many of the first channels are a picture, 1 (grey) or 3, or None where the file does not say.
    ``inverted``: the lowest value is white. ``exact``: the bits are those of the samples, no container's.
    """

    values: np.ndarray
    bits: int
    colours: int | None = 1
    inverted: bool = False
    exact: bool = False


class Span(NamedTuple):
    """The values that are black and white, and where this is known from."""

    black: float
    white: float
    why: str


def picture_of(samples: Samples, reading: Reading, image_id: str) -> Image.Image:
    """The samples as an RGB picture of 8 bits; says once a kind what was made of them.

    DataError when the channels of red, green and blue are not known or do not exist.
    """
    values = _coloured(samples, reading, image_id)
    if values.dtype == np.uint8 and samples.bits == 8:
        levels = 255 - values if samples.inverted else values
    else:
        span = span_of(values, samples.bits, samples.exact, reading.white)
        levels = _levels(values, span, samples.inverted, image_id)
        kind = f"{samples.bits}-bit {'floats' if values.dtype.kind == 'f' else 'integers'}"
        tell(
            f"Pictures of {kind} (first: '{image_id}') are read with {span.black:g} as black and {span.white:g} as "
            f"white, {span.why}; set data.white to change that.",
            f"{kind} {OWN_RANGE if span.why == OWN_RANGE else span}",
        )
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(levels, (*levels.shape[:2], 3))))


def _coloured(samples: Samples, reading: Reading, image_id: str) -> np.ndarray:
    """The channels that are red, green and blue, [H, W, 3], or the one that is all of them, [H, W, 1]."""
    values = samples.values
    count = values.shape[2]
    if reading.channels is not None:
        if max(reading.channels) >= count:
            raise DataError(
                f"Image '{image_id}' has {count} channel{'s' * (count > 1)}, counted from 0; "
                f"data.channels={list(reading.channels)} asks for others."
            )
        return values[..., list(reading.channels)]
    colours = samples.colours if samples.colours is not None else {1: 1, 2: 1, 3: 3, 4: 3}.get(count)
    if colours is None:
        raise DataError(
            f"Image '{image_id}' has {count} channels; choose those of red, green and blue, counted from 0, for "
            "example with data.channels=[2,1,0]."
        )
    if count != 3 or colours != 3:
        say_channels(count, colours, image_id)
    return values[..., :colours]


def say_channels(count: int, colours: int, image_id: str) -> None:
    """Say once what is made of pictures with ``count`` channels, of which the first ``colours`` are looked at."""
    made = "grey, given as three equal channels" if colours == 1 else "red, green and blue"
    left = f", and {count - colours} more (transparency, say) left out" if count > colours else ""
    tell(
        f"Pictures with {count} channel{'s' * (count > 1)} (first: '{image_id}') are read as {made}{left}; choose "
        "three with data.channels.",
        f"{count} channels {colours}",
    )


def span_of(values: np.ndarray, bits: int, exact: bool = False, white: float | None = None) -> Span:
    """Black and white of ``values``: as ``white`` says, as the depth says, or by the picture's range.

    A container may hold fewer bits than it could: then they are the fewest usual ones that hold the picture's. Of
    32 bits and more, and of floats, what has no usual end ends where the picture does. ValueError without a number.
    """
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError("it holds no finite number")
    low, high = values.min().item(), values.max().item()
    if white is not None:
        return Span(-white if low < 0 and values.dtype.kind == "i" else 0.0, white, "as data.white says")
    if values.dtype.kind == "f":
        return _span_of_floats(low, high)
    signed = values.dtype.kind == "i"
    most = bits if low < 0 or not signed else bits - 1
    depths = [most] if exact or bits not in CONTAINERS else [*(d for d in DEPTHS if d < most), most]
    depth = next(d for d in depths if high < 2 ** (d - (low < 0)) and (low >= 0 or low >= -(2 ** (d - 1))))
    if depth == most > 16 and max(high, -low) < 2 ** (most - 4):
        return Span(low, high if high > low else low + 1, OWN_RANGE)
    why = "as its depth says" if depth == most else f"as {depth} bits hold the picture's values"
    return Span(-(2 ** (depth - 1)), 2 ** (depth - 1) - 1, why) if low < 0 else Span(0, 2**depth - 1, why)


def _span_of_floats(low: float, high: float) -> Span:
    reach = max(high, -low)
    white = next((full for full in FULL if reach <= full * (1 + OVERSHOOT)), None)
    if white is None or reach < DARKEST:
        return Span(low, high if high > low else low + 1, OWN_RANGE)
    return Span(-white if low < -OVERSHOOT * white else 0.0, white, "the usual end above the picture's values")


def _levels(values: np.ndarray, span: Span, inverted: bool, image_id: str) -> np.ndarray:
    """``values`` as uint8, black as 0 and white as 255."""
    levels: np.ndarray = values.astype(np.float32 if values.itemsize < 4 else np.float64)
    levels = (levels - span.black) / (span.white - span.black)
    levels = np.nan_to_num(levels, nan=0.0, posinf=2.0, neginf=-1.0)
    beyond = np.mean((levels < 0) | (levels > 1))
    if beyond > CLIPPED:
        tell(
            f"{beyond:.0%} of the values of image '{image_id}' lie beyond black ({span.black:g}) or white "
            f"({span.white:g}), {span.why}, and are clipped; set data.white.",
            "clipped",
        )
    levels = levels.clip(0, 1) * 255
    return ((255 - levels if inverted else levels) + 0.5).astype(np.uint8)
