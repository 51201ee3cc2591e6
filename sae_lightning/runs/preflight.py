"""Is an SAE used as it was trained? Its figures on a few pictures, against what is stated of it, and what fits better.

Where explained variance or L0 is off, the neighbouring places, inputs, thresholds and pixels are tried, one change at a
time and then one more, and the best is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sae_lightning.backbones.backbone import Backbone
from sae_lightning.backbones.taps import IN_LAYERS, LAYER_KINDS, BackboneError, Tap
from sae_lightning.data import DataError, ImageData, load_images
from sae_lightning.metrics.reconstruction import Reconstruction
from sae_lightning.runs.record import FIGURES
from sae_lightning.saes import SAE, BatchTopK, Normalizer

PICTURES, SEARCHED = 64, 16  # encoded, and of these for what may fit better
OFF = 0.1  # explained variance that may be missing or too much
TIMES = 1.5  # too many or too few active latents
FLOOR = 0.5  # explained variance below which an SAE of which none is stated is not trusted
BETTER = 0.7  # of the distance that a change leaves, at most, to count
BATCH = 16  # pictures encoded at once

DEMO = {"source": "demo", "name": "demo"}
STATISTICS = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "0.5 as": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
OWN = "own"
INPUTS = ("raw", "standard", "layer", "rms", "unit")


@dataclass(frozen=True)
class Use:
    """A way to use an SAE: where it reads, how its ``inputs`` are normed, its ``threshold``, and the ``pixels``."""

    tap: Tap
    inputs: str = OWN
    threshold: str = OWN
    pixels: str = OWN

    def unlike(self, other: Use) -> str:
        """What is changed from ``other``, for a sentence."""
        said = []
        if self.tap.layer != other.tap.layer:
            said.append(f"layer {self.tap.layer}")
        if self.tap.site != other.tap.site:
            said.append(f"site={self.tap.site}")
        if self.tap.kind != other.tap.kind:
            said.append(f"features={self.tap.kind}")
        if self.inputs != other.inputs:
            ways = {"raw": "inputs as they are", "standard": "inputs centred and scaled"}
            said.append(ways.get(self.inputs, f"input_norm={self.inputs}"))
        said += ["a threshold for its k"] if self.threshold != other.threshold else []
        said += [f"pixels {self.pixels}"] if self.pixels != other.pixels else []
        return " and ".join(said)


@dataclass(frozen=True)
class Verdict:
    """An SAE's ``figures`` on ``pictures``, what is ``stated`` of it, whether it ``fits``, and what fits ``better``."""

    figures: dict[str, float]
    stated: dict[str, float]
    pictures: str
    fits: bool
    better: str | None = None
    there: dict[str, float] | None = None

    @property
    def sentence(self) -> str:
        """All of it."""
        said = f"On {self.pictures} it explains {_words(self.figures)}"
        stated = _words(self.stated) if self.stated else "nothing"
        if self.fits:
            return f"{said}; stated: {stated}."
        if self.better is None:
            return f"{said}; stated: {stated}. Nothing near fits better, so the pictures may be unlike its own."
        assert self.there is not None
        return f"{said}; stated: {stated}. It fits best with {self.better}: {_words(self.there)}."


def _words(figures: Mapping[str, float]) -> str:
    said = {"explained_variance": "{:.1%} of the variance", "l0": "{:.4g} latents a token", "dead_share": "{:.1%} dead"}
    return ", ".join(said[name].format(figures[name]) for name in FIGURES if name in figures)


@torch.no_grad()
def figures_of(sae: SAE, features: Tensor) -> dict[str, float]:
    """Explained variance, L0 and the share of latents that never fire, on features [N, d_in]."""
    sums, fired, active = Reconstruction(sae.d_in, features.mean(0)), torch.zeros(sae.d_sae, dtype=torch.bool), 0
    for part in features.split(4096):
        codes = sae.encode(part)
        sums.update(part, sae.decode(codes))
        fired |= codes.fired().cpu()
        active += codes.nnz
    dead = 1 - float(fired.float().mean())
    found = (float(sums.compute()["explained_variance"]), active / len(features), dead)
    return dict(zip(FIGURES, found, strict=True))


def some_pictures(data: Mapping[str, Any] | None, split: str, n: int = PICTURES) -> tuple[ImageData, str]:
    """``n`` pictures of a data set, evenly spaced, and what they are called; bundled ones where it has none."""
    try:
        images = load_images(data or DEMO, split)
    except DataError:
        images = load_images(DEMO, "test")
    if not isinstance(images, ImageData):
        images = load_images(DEMO, "test")
        assert isinstance(images, ImageData)  # bundled
    chosen = np.unique(np.linspace(0, len(images) - 1, min(n, len(images))).round().astype(int))
    return images.take(chosen), f"{len(chosen)} pictures of {images.name}"


class Reader:
    """Features of pictures at any tap of a backbone, from one forward pass for all taps."""

    def __init__(self, backbone: Backbone, images: Sequence[Image.Image] | ImageData) -> None:
        self.backbone, self.images = backbone, images
        self._read: dict[tuple[Tap, str, int], Tensor] = {}

    def features(self, tap: Tap, pixels: str = OWN, n: int | None = None, others: Sequence[Tap] = ()) -> Tensor:
        """Tokens [N, d] of the first ``n`` pictures; ``others`` are read with them."""
        n = len(self.images) if n is None else min(n, len(self.images))
        if (tap, pixels, n) not in self._read:
            taps = list(dict.fromkeys([tap, *others]))
            parts: dict[Tap, list[Tensor]] = {each: [] for each in taps}
            transform = self.backbone.transform if pixels == OWN else transforms(self.backbone.image_size)[pixels]
            device = next(self.backbone.model.parameters()).device
            for start in range(0, n, BATCH):
                batch = torch.stack([transform(self.images[i]) for i in range(start, min(n, start + BATCH))])
                for each, found in self.backbone.forward_features(batch.to(device), taps).items():
                    parts[each].append(found.float().cpu().reshape(-1, found.shape[-1]))
            self._read |= {(each, pixels, n): torch.cat(part) for each, part in parts.items()}
        return self._read[tap, pixels, n]


def transforms(size: int) -> dict[str, Callable[[Image.Image], Tensor]]:
    """Usual ways from a picture to [3, size, size], by what they are called."""
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor
    from torchvision.transforms.functional import InterpolationMode

    cubic = InterpolationMode.BICUBIC
    shapes = {
        "cropped": [Resize(size, cubic), CenterCrop(size)],
        "cropped from 8/7": [Resize(size * 8 // 7, cubic), CenterCrop(size)],
        "squeezed": [Resize((size, size), cubic)],
    }
    return {
        f"{shape}, by {name} mean and deviation": Compose([*steps, ToTensor(), Normalize(*numbers)])
        for shape, steps in shapes.items() for name, numbers in STATISTICS.items()
    }  # fmt: skip


@dataclass
class Preflight:
    """Uses of ``sae`` on what ``reader`` reads, compared with what is ``stated`` of it."""

    sae: SAE
    reader: Reader
    tap: Tap
    stated: Mapping[str, float]
    pictures: str

    def verdict(self) -> Verdict:
        """How it stands, and what fits better where it does not fit."""
        self.tap = self.reader.backbone.check(self.tap)
        now = Use(self.tap)
        figures = figures_of(self.sae, self.reader.features(self.tap))
        stated = dict(self.stated)
        if self._fits(figures):
            return Verdict(figures, stated, self.pictures, True)
        best, found = now, self._measured(now)
        for _ in range(2):  # changes, of which each must make up for being one more
            tried = [(use, self._measured(use)) for use in self._near(best)]
            closest, there = min(tried, key=lambda pair: self._distance(pair[1]))
            if self._distance(there) > BETTER * self._distance(found):
                break
            best, found = closest, there
            if self._fits(found):
                break
        if best == now:
            return Verdict(figures, stated, self.pictures, False)
        return Verdict(figures, stated, self.pictures, False, best.unlike(now), found)

    def _fits(self, figures: Mapping[str, float]) -> bool:
        told = self.stated.get("explained_variance")
        explained = figures["explained_variance"]
        near = explained >= FLOOR if told is None else abs(explained - told) <= OFF
        return near and abs(self._off_l0(figures)) <= log(TIMES)

    def _off_l0(self, figures: Mapping[str, float]) -> float:
        told = self.stated.get("l0")
        return 0.0 if told is None else log(max(figures["l0"], 1e-3) / told)

    def _distance(self, figures: Mapping[str, float]) -> float:
        off = figures["explained_variance"] - self.stated.get("explained_variance", 1.0)
        return abs(off) / OFF + abs(self._off_l0(figures)) / log(TIMES)

    def _near(self, use: Use) -> Iterator[Use]:
        """Uses with one change."""
        yield from (replace(use, tap=tap) for tap in self._taps(use.tap) if tap != use.tap)
        yield from (replace(use, inputs=how) for how in INPUTS if how != use.inputs)
        if isinstance(self.sae, BatchTopK) and use.threshold == OWN:
            yield replace(use, threshold="calibrated")
        if use.pixels == OWN:
            yield from (replace(use, pixels=name) for name in transforms(self.reader.backbone.image_size))

    def _taps(self, tap: Tap) -> list[Tap]:
        """The places next to ``tap`` that give features of the SAE's width."""
        if tap.layer is None:
            return [tap]
        layers = [tap.layer + step for step in (-2, -1, 0, 1, 2) if 0 <= tap.layer + step < self.reader.backbone.depth]
        near = [replace(tap, layer=layer) for layer in layers]
        near += [replace(tap, site=site) for site in IN_LAYERS]
        near += [replace(tap, kind=kind) for kind in LAYER_KINDS]
        return [each for each in dict.fromkeys(near) if self._there(each)]

    def _there(self, tap: Tap) -> bool:
        try:
            return self.reader.backbone.shape_at(self.reader.backbone.check(tap)).width == self.sae.d_in
        except BackboneError:
            return False

    @cached_property
    def _all_taps(self) -> list[Tap]:
        return self._taps(self.tap)

    def _measured(self, use: Use) -> dict[str, float]:
        features = self.reader.features(use.tap, use.pixels, SEARCHED, self._all_taps if use.pixels == OWN else ())
        return figures_of(used(self.sae, use, features), features)


def used(sae: SAE, use: Use, features: Tensor) -> SAE:
    """``sae`` with the inputs and the threshold of ``use``, which are found on ``features`` [N, d_in]; or itself."""
    if use.inputs == use.threshold == OWN:
        return sae
    other = deepcopy(sae)
    if use.inputs != OWN:
        statistics = use.inputs == "standard"
        other.normalizer = standard(features) if statistics else Normalizer(sae.d_in)
        other.input_norm = "none" if use.inputs in ("raw", "standard") else use.inputs
    if use.threshold != OWN and isinstance(other, BatchTopK):
        other.calibrate([features], len(features))
    return other


def standard(features: Tensor) -> Normalizer:
    """Centres by the mean of ``features`` [N, d_in] and scales by their one deviation."""
    mean = features.mean(0)
    return Normalizer(features.shape[1], mean, float((features - mean).square().mean().sqrt()))
