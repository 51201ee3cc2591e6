"""One sentence a picture: what is unusual in it decides how the sentence starts and ends."""

from __future__ import annotations

import numpy as np

from experiments.tiny_captioner.pixels import Measured
from sae_lightning.data.bundled import CIFAR10_CLASSES, CIFAR10_GROUPS
from sae_lightning.vlms.words import CLASS_WORDS

# what a picture is called when nothing in it stands out, and when something does
NEUTRAL = (
    "a photo of {it}", "this is {it}", "there is {it}", "a picture that shows {it}", "here we see {it}",
    "one can see {it}", "an image of {it}", "{it}",
)  # fmt: skip
UNUSUAL = {
    "dark": ("a dark photo of {it}", "{it} in dim light", "a dark picture with {it}"),
    "bright": ("a bright photo of {it}", "{it} in bright light", "a light picture with {it}"),
    "hazy": ("a pale and hazy view of {it}", "{it} with soft contrast"),
    "sharp": ("{it} with strong contrast", "a crisp image of {it}"),
    "vivid": ("a colourful picture of {it}", "{it} in vivid colours"),
    "faded": ("a photo of {it} almost without colour", "a faded image of {it}"),
    "close": ("a close up of {it}", "{it} seen from nearby", "{it} that fills the picture"),
    "far": ("a distant view of {it}", "{it} seen from far away"),
}
NAMES = {  # shares by which a class is called by the words of CLASS_WORDS
    "airplane": (0.45, 0.4, 0.15), "automobile": (0.8, 0.2), "cat": (0.9, 0.1), "dog": (0.9, 0.1),
    "frog": (0.9, 0.1), "ship": (0.5, 0.3, 0.2), "truck": (0.85, 0.15),
}  # fmt: skip
GREENERY = ("green", "yellow")
PALE = ("grey", "white", "black")


def sentence(label: int, m: Measured, rng: np.random.Generator) -> str:
    """A caption without punctuation of a picture of class ``label`` with the measurements ``m``.

    ``rng`` draws synonyms and, among sentences that say the same, one.
    """
    said = _standing_out(m)
    opening = _one(UNUSUAL[said] if said else NEUTRAL, rng)
    place = _place(CIFAR10_CLASSES[label], m, rng)
    it = " ".join(part for part in (_subject(label, m, said, rng), place) if part)
    words = opening.format(it=it).split()
    return " ".join(_article(words, i) for i in range(len(words)))


def _standing_out(m: Measured) -> str:
    """What is most unusual about the picture, or nothing."""
    size = 0.36 if m.size is None else m.size
    scores = {
        "dark": 1.3 if m.tone == "dark" else 0.0,
        "bright": 1.2 if m.tone == "bright" else 0.0,
        "hazy": (42 - m.contrast) / 9,
        "sharp": (m.contrast - 54) / 11,
        "vivid": (m.vivid - 0.3) / 0.12,
        "faded": (0.17 - m.vivid) / 0.07,
        "close": (size - 0.4) / 0.13,
        "far": (0.3 - size) / 0.09,
    }
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= 1 else ""


def _subject(label: int, m: Measured, said: str, rng: np.random.Generator) -> str:
    name = CIFAR10_CLASSES[label]
    words = CLASS_WORDS[name]
    noun = words[rng.choice(len(words), p=NAMES.get(name, (1.0,)))]
    if name == "ship" and m.size is not None and m.size < 0.25:
        noun = "boat"
    big = (
        ""
        if m.size is None or said in ("close", "far")
        else "small"
        if m.size < 0.2
        else "big"
        if m.size > 0.55
        else ""
    )
    colours = " and ".join(m.colours)
    if rng.random() < 0.12 and colours:
        kind = "animal" if name in CIFAR10_GROUPS["animals"] else "vehicle"
        return f"a {big} {colours} {kind} probably a {noun}"
    return f"a {big} {colours} {noun}"


def _place(name: str, m: Measured, rng: np.random.Generator) -> str:
    """Where the object is, as far as its class and the colours of the border agree; else the border itself."""
    busy = "plain" if m.busy < 7 else "busy" if m.busy > 17 else ""
    place = ""
    if name == "airplane" and m.above in ("blue", "white", "grey"):
        sky = "blue" if m.above == "blue" else "cloudy" if m.above == "grey" else "white"
        if m.below in ("blue", *PALE[:2]) and m.busy < 11:
            place = _one((f"in the {sky} sky", f"flying in the {sky} sky", f"in the air under a {sky} sky"), rng)
        elif m.below in (*GREENERY, "brown"):
            place = f"on the {'grass' if m.below in GREENERY else 'ground'} under a {sky} sky"
    elif name == "bird" and m.above == m.below == "blue" and m.busy < 9:
        place = "in the blue sky"
    elif name == "ship" and m.below in ("blue", "grey", "green", "black"):
        water = m.below if m.below != "grey" else "calm grey" if m.busy < 8 else "grey"
        place = _one((f"on the {water} water", f"at sea on {water} water"), rng)
        if m.above != m.below and m.above in ("blue", "white", "grey"):
            place = f"on {water} water under a {m.above} sky"
    elif name in ("automobile", "truck"):
        if m.below in ("grey", "black"):
            place = _one((f"on a {m.below} road", "on the street", "on the road"), rng)
        elif m.below in GREENERY:
            place = "parked on the grass"
        elif m.below == "brown":
            place = _one(("on a dirt road", "on brown ground"), rng)
    elif name in CIFAR10_GROUPS["animals"]:
        if m.below in GREENERY:
            grass = "dry" if m.below == "yellow" else "green"
            field = f"in a {grass} meadow" if name in ("deer", "horse") else f"among {grass} leaves"
            place = _one((f"on the {grass} grass", field if name not in ("cat", "dog") else "on the lawn"), rng)
        elif m.below == "brown" and name in ("deer", "horse", "frog", "bird"):
            place = _one(("on the brown ground", "on bare soil"), rng)
    if place and m.above in ("green",) and m.below != "green" and name in ("horse", "deer", "automobile", "truck"):
        return f"{place} in front of green trees"
    if place:
        return place
    if m.above != m.below and m.background not in (m.above, m.below):
        return f"with {m.above} above and {m.below} below"
    if m.above != m.below and rng.random() < 0.5:
        return f"between {m.above} above and {m.below} below"
    side = "" if m.side is None or abs(m.side) < 0.15 else "on the left" if m.side < 0 else "on the right"
    return f"{side} {_one(('on', 'in front of'), rng)} a {busy} {m.background} background"


def _one(several: tuple[str, ...], rng: np.random.Generator) -> str:
    return several[rng.integers(len(several))]


def _article(words: list[str], i: int) -> str:
    if words[i] != "a" or i + 1 == len(words):
        return words[i]
    return "an" if words[i + 1][0] in "aeiou" else "a"
