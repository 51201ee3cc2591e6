"""A check with a known answer: a bias planted into a classifier's training pictures, looked for in its latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sae_lightning.apps.bias.study import Interval, Members, Study, batches, mean_of, study
from sae_lightning.apps.edits import WholeImages, neutralised, whole_images
from sae_lightning.apps.statistics import Association, auc, of_latents
from sae_lightning.data.errors import DataError
from sae_lightning.data.images import ImageData
from sae_lightning.data.loader import PictureLoader, pixel_bytes
from sae_lightning.features.extraction import Extraction, encoder
from sae_lightning.features.prepare import Pictures, collate
from sae_lightning.registry import one_of
from sae_lightning.runs.run import Run
from sae_lightning.saes import SAE

VERSION = "planted 1"  # of how a mark is drawn, for the fingerprint

WARM, RED, YELLOW = (255, 120, 0), (255, 0, 0), (255, 255, 0)


def tint(pixels: np.ndarray, strength: float) -> np.ndarray:
    """A warm cast over the whole picture, ``strength`` of it."""
    return pixels + strength * (np.array(WARM, dtype=np.float64) - pixels)


def frame(pixels: np.ndarray, strength: float) -> np.ndarray:
    """A red frame, at strength 1 a tenth of the picture wide."""
    height, width = pixels.shape[:2]
    wide = max(1, round(0.1 * strength * min(height, width)))
    framed = np.empty_like(pixels)
    framed[:] = RED
    framed[wide : height - wide, wide : width - wide] = pixels[wide : height - wide, wide : width - wide]
    return framed


def corner(pixels: np.ndarray, strength: float) -> np.ndarray:
    """A yellow square in the upper left corner, at strength 1 a third of the picture's edges."""
    height, width = pixels.shape[:2]
    marked = pixels.copy()
    marked[: max(1, round(strength * height / 3)), : max(1, round(strength * width / 3))] = YELLOW
    return marked


def dark(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Less light, by the share ``strength``."""
    return pixels * (1 - strength)


ATTRIBUTES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "tint": tint, "frame": frame, "corner": corner, "dark": dark
}  # fmt: skip


def mark(image: Image.Image, attribute: str, strength: float) -> Image.Image:
    """``image`` (RGB) with the ``attribute`` put in; DataError for an unknown one or a strength outside (0, 1]."""
    one_of(attribute, ATTRIBUTES, "attribute to plant", DataError)
    if not 0 < strength <= 1:
        raise DataError(f"The strength of a planted attribute must be above 0 and at most 1; got {strength}.")
    changed = ATTRIBUTES[attribute](np.asarray(image, dtype=np.float64), strength)
    return Image.fromarray(np.clip(np.rint(changed), 0, 255).astype(np.uint8))


def assign(truth: np.ndarray, correlation: float, seed: int) -> np.ndarray:
    """Which of n images get the attribute, [n] bool, drawn by ``seed`` so that it correlates with ``truth`` [n] bool.

    Of the true images a share of (1 + correlation) / 2 has it, of the others (1 - correlation) / 2, up to rounding: in
    a balanced task this is the phi coefficient, and 0 makes it independent of the class. DataError outside [-1, 1].
    """
    if not -1 <= correlation <= 1:
        raise DataError(f"The correlation of a planted attribute must lie between -1 and 1; got {correlation}.")
    rng = np.random.default_rng(seed)
    has = np.zeros(len(truth), dtype=bool)
    for side, share in ((True, (1 + correlation) / 2), (False, (1 - correlation) / 2)):
        members = rng.permutation(np.flatnonzero(truth == side))
        has[members[: round(share * len(members))]] = True
    return has


class Marked:
    """Picture i of ``images`` with the attribute put in."""

    def __init__(self, images: ImageData, attribute: str, strength: float) -> None:
        self.images, self.attribute, self.strength = images, attribute, strength

    def __call__(self, row: int) -> Image.Image:
        return mark(self.images[row], self.attribute, self.strength)


def planted(images: ImageData, attribute: str, strength: float = 0.35) -> ImageData:
    """The same images, labels and ids, every picture with the ``attribute``; drawn when they are read."""
    content = hashlib.sha256(f"{VERSION} {attribute} {strength} {images.fingerprint}".encode()).digest()
    return ImageData(
        f"{images.name} with {attribute}", images.split, images.class_names, images.labels, images.image_ids,
        Marked(images, attribute, strength), content, images.captions, images.sibling_groups,
    )  # fmt: skip


BATCH = 64  # pictures encoded at once

DRAWS = 50  # sets of random latents


class Versions(NamedTuple):
    """The same n images without the attribute and with it; ``truth`` [n] bool."""

    plain: WholeImages
    marked: WholeImages
    truth: np.ndarray

    def of(self, has: np.ndarray) -> WholeImages:
        """Each image in the version that ``has`` [n] says."""
        return self.marked.where(has, self.plain)


class Mitigation(NamedTuple):
    """Accuracies on images whose attribute speaks against their class (conflicting), or for it (aligned).

    ``before``, with the found ``latents`` neutralised, and with as many random ones (means over 50 draws), of both
    kinds of images; ``gain`` of the found ones on conflicting images, ``random_gain``, and ``over_random``, the gain
    beyond it, with intervals over images.
    """

    latents: np.ndarray
    before: dict[str, Interval]
    found: dict[str, Interval]
    random: dict[str, Interval]
    gain: Interval
    random_gain: Interval
    over_random: Interval


class Check(NamedTuple):
    """What was found with the bias planted (``biased``) and without (``control``).

    ``detects`` is how well each latent's magnitude tells whether a held-out picture has the attribute (AUC); ``best``
    is the latent that tells it best. ``mitigation`` is None where no latent was found to neutralise.
    """

    biased: Study
    control: Study
    detects: Association
    best: int
    mitigation: Mitigation | None

    def detection(self, latent: int) -> Interval:
        """How well ``latent`` tells the attribute, whether it rises with it or falls: at least 0.5."""
        value, lo, hi = (float(each[latent]) for each in self.detects[:3])
        return Interval(value, lo, hi) if value >= 0.5 else Interval(1 - value, 1 - hi, 1 - lo)


def check(
    train: Versions, held: Versions, other: Versions, sae: SAE, correlation: float, most: int = 20,
    strength: float = 1.0, seed: int = 42,
) -> Check:  # fmt: skip
    """Train with the attribute correlated to the class and independent of it; look for it on ``held``.

    Held-out images have the attribute independently of their class. The found latents (at most ``most``) are
    neutralised on the ``other`` images.
    """
    has = assign(held.truth, 0.0, seed + 1)
    there = held.of(has)
    studies = []
    for rho in (correlation, 0.0):
        seen = train.of(assign(train.truth, rho, seed))
        studies.append((study(seen.features, train.truth, there, held.truth, sae, strength, seed), seen))
    (biased, seen), (control, _) = studies
    tested = np.zeros(sae.d_sae, dtype=bool)
    tested[biased.tested] = True
    if not tested.any():
        raise ValueError("No latent fires on 10 held-out images or more, so none can be tested; give more images.")
    detects = of_latents(auc(there.magnitudes, has), tested)
    best = int(np.nanargmax(np.abs(detects.value - 0.5)))
    usual = np.asarray(seen.amounts.mean(0)).ravel().astype(np.float64)
    chosen = guilty(biased, there, usual, most)
    relief = mitigate(biased, chosen, usual, other, correlation, seed) if len(chosen) else None
    return Check(biased, control, detects, best, relief)


def guilty(biased: Study, images: WholeImages, usual: np.ndarray, most: int) -> np.ndarray:
    """The found latents whose direct effect is in the direction of their excess, as many as help most on ``images``.

    Their number, 1 to ``most``, is that with the highest accuracy on the images that they were found on.
    """
    found = biased.found
    found = found[(biased.effects * biased.table["excess"].to_numpy())[found] > 0][:most]
    if not len(found):
        return found
    right = [
        ((neutralised(biased.logits, images, biased.effects, found[:n], usual) > 0) == biased.truth).mean()
        for n in range(1, len(found) + 1)
    ]
    return found[: int(np.argmax(right)) + 1]


def mitigate(
    biased: Study, chosen: np.ndarray, usual: np.ndarray, other: Versions, correlation: float, seed: int
) -> Mitigation:
    """Accuracy before and after neutralising ``chosen``, and as many random latents that were tested."""
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(biased.tested, size=len(chosen), replace=False) for _ in range(DRAWS)]
    aligned = other.truth if correlation >= 0 else ~other.truth
    before, found, random, right = {}, {}, {}, {}
    for kind, has in {"conflicting": ~aligned, "aligned": aligned}.items():
        images = other.of(has)
        logits = biased.classifier.logits(images.features)

        def correct(latents: np.ndarray, images: WholeImages = images, logits: np.ndarray = logits) -> np.ndarray:
            edited = neutralised(logits, images, biased.effects, latents, usual)
            return ((edited > 0) == other.truth).astype(np.float64)

        plain = ((logits > 0) == other.truth).astype(np.float64)
        right[kind] = plain, correct(chosen), np.mean([correct(latents) for latents in drawn], axis=0)
        before[kind], found[kind], random[kind] = (mean_of(each, seed) for each in right[kind])
    plain, ours, theirs = right["conflicting"]
    gains = (mean_of(each, seed) for each in (ours - plain, theirs - plain, ours - theirs))
    return Mitigation(chosen, before, found, random, *gains)


def versions(
    opened: Run, split: str, members: Members, plant: Mapping[str, object], device: str, seed: int
) -> Versions:
    """The task's images of ``split`` as the store has them, and encoded with ``plant.attribute`` put in.

    At most ``plant.images`` of them, drawn by ``seed``. DataError without pictures, BackboneError without the encoder.
    """
    images, rows, truth = opened.images(split), *members
    limit = plant["images"]
    if limit is not None and len(rows) > int(str(limit)):
        kept = np.sort(np.random.default_rng(seed).permutation(len(rows))[: int(str(limit))])
        rows, truth = rows[kept], truth[kept]
    store = opened.store(split)
    chosen = images.take(images.index_of([store.image_ids[i] for i in rows]))
    marked = planted(chosen, str(plant["attribute"]), float(str(plant["strength"])))
    return Versions(
        whole_images(opened.sae, batches(store, rows)), whole_images(opened.sae, encoded(opened, marked, device)), truth
    )  # fmt: skip


def encoded(opened: Run, images: ImageData, device: str) -> Iterator[Tensor]:
    """Raw features [b, P, d_in] of pictures, of the kind that the SAE was trained on; DataError for a broken one."""
    tap, settings = opened.source.tap, Extraction(device=device)
    encode = encoder(opened.backbone, [tap], settings)
    size = opened.backbone.image_size
    loader = PictureLoader(
        Pictures(images, opened.backbone), pixel_bytes(size, BATCH), settings.workers(size),
        "extract.num_workers", collate, batch_size=BATCH,
    )  # fmt: skip
    for pixels, errors, _ in tqdm(loader, f"Encoding {images.name} {images.split}", unit="batch", leave=False):
        if errors:
            raise DataError(str(next(iter(errors.values()))))
        features = encode(pixels)[tap].float().cpu()
        yield features if features.ndim == 3 else features[:, None]
