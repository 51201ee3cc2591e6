"""What the page is told of a run, a latent and a picture, as plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np

from sae_lightning.apps.edits import edited, whole_images
from sae_lightning.apps.explorer.run_view import PictureRef, RunView
from sae_lightning.apps.explorer.uploads import RefusedError
from sae_lightning.apps.search.neighbours import neighbours
from sae_lightning.vlms import VLM, VLMError, load_vlm
from sae_lightning.vlms.steering import check_fit, steered_captions

LISTED = 4  # pictures beside a latent in the list

SIMILAR = 8  # latents of similar direction

CLASSES = 6


def run_view(run: RunView) -> dict[str, Any]:
    """The run as a whole: what can be sorted and filtered by, and over what."""
    figures = run.figures
    return {
        "title": run.opened.label, "name": run.opened.name, "version": run.version, "split": run.split,
        "n_images": len(run.store), "d_sae": run.d_sae, "alive": int((figures.images_fired > 0).sum()),
        "sort": next((n for n in ("purity", "monoscore") if n in figures.columns), next(iter(figures.columns))),
        "least": run.least,
        "patches": list(run.store.grid) if run.has_patches else None, "evaluated": figures.evaluated,
        "columns": [{"name": c.name, "title": c.title, "about": c.about} for c in figures.columns.values()],
        "classes": run.class_names if len(run.class_names) > 1 else [],
        "named": sum(map(bool, run.names)),
    }  # fmt: skip


def latent_row(run: RunView, latent: int) -> dict[str, Any]:
    """One line of the list."""
    columns = run.figures.columns
    return {
        "latent": latent, "name": run.names[latent], "label": _label(run, latent),
        "images_fired": int(run.figures.images_fired[latent]),
        "values": {name: number(column.values[latent]) for name, column in columns.items()},
        "percentiles": {name: number(shares[latent]) for name, shares in run.percentiles.items()},
        "images": [i for i in run.top[latent, :LISTED].tolist() if i >= 0],
    }  # fmt: skip


def latent_view(run: RunView, latent: int, per_band: int) -> dict[str, Any]:
    """All of one latent: its line, bands of ``per_band`` images, histogram, classes and similar latents."""
    row = latent_row(run, latent)
    bands = [
        {
            "name": name,
            "images": [{"image": i, "value": number(value), "label": run.label(i)} for i, value in shown],
        }
        for name, shown in run.by_latent.bands(latent, per_band)
    ]
    return row | {
        "bands": bands,
        "histogram": run.by_latent.histogram(latent),
        "classes": _classes(run, latent),
        "similar": similar(run, latent),
    }


def picture_view(run: RunView, picked: PictureRef, n_latents: int, also: int | None = None) -> dict[str, Any]:
    """A picture and the ``n_latents`` that fire most strongly on it, and the latent ``also``."""
    latents, activations = run.pooled(picked)
    value_of = dict(zip(latents.tolist(), activations.tolist(), strict=True))
    shown = latents[:n_latents].tolist()
    if also is not None and also not in shown:
        shown.append(run.check_latent(also))
    return {
        "kind": picked.kind, "number": picked.number, "active": len(latents),
        "label": run.label(picked.number) if picked.kind == "images" else "",
        "caption": run.caption(picked.number) if picked.kind == "images" else "",
        "latents": [
            {
                "latent": latent, "name": run.names[latent], "label": _label(run, latent),
                "value": number(value_of.get(latent, 0.0)), "peak": number(run.peak(latent)),
                "images": [i for i in run.top[latent, :1].tolist() if i >= 0],
            }
            for latent in shown
        ],
    }  # fmt: skip


def similar(run: RunView, latent: int) -> list[dict[str, Any]]:
    """The latents whose decoder rows are most alike to that of ``latent`` among those that fire, with the cosine."""
    cosines = (run.directions @ run.directions[latent]).numpy().copy()
    cosines[latent] = -np.inf
    cosines[run.figures.images_fired == 0] = -np.inf
    order = np.argsort(-cosines, kind="stable")[:SIMILAR]
    return [
        {"latent": i, "name": run.names[i], "label": _label(run, i), "cosine": number(cosines[i]),
         "images": [int(run.top[i, 0])]}
        for i in order.tolist() if np.isfinite(cosines[i])
    ]  # fmt: skip


def number(value: float) -> float | None:
    """``value`` as JSON can hold it: no figure is None."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _classes(run: RunView, latent: int) -> list[dict[str, Any]]:
    """The most frequent classes of the images on which a latent fires, with their share of them."""
    own = slice(run.by_latent.offsets[latent], run.by_latent.offsets[latent + 1])
    if len(run.class_names) < 2 or own.stop == own.start:
        return []
    counts = np.bincount(run.labels.numpy()[run.by_latent.images[own]], minlength=len(run.class_names))
    order = np.argsort(-counts, kind="stable")[:CLASSES]
    return [{"label": run.class_names[c], "share": number(counts[c] / counts.sum())} for c in order if counts[c]]


def _label(run: RunView, latent: int) -> str:
    label = int(run.figures.label[latent])
    return run.class_names[label] if label >= 0 and len(run.class_names) > 1 else ""


TRIED = 4  # pictures that decide whether a model sees as the run's encoder does


def turned_view(run: RunView, picked: PictureRef, latent: int, value: float, n: int) -> dict[str, Any]:
    """The ``n`` nearest pictures by features before and after ``latent`` is at ``value`` on all tokens of a picture.

    What the SAE does not reconstruct of the picture is kept, so that only the latent differs.
    """
    features = run.features(picked)
    decoded = whole_images(run.opened.sae, [features])
    after = edited(run.opened.sae, decoded, run.check_latent(latent), [value], keep_error=True)[0]
    gallery, own = run.opened.features(run.split), picked.number if picked.kind == "images" else -1
    queries = np.concatenate([features.mean(1).numpy(), after])
    found = neighbours(queries, gallery, n, own=np.array([own, own]))

    def side(at: int) -> list[dict[str, Any]]:
        pairs = zip(found.images[at].tolist(), found.distances[at].tolist(), strict=True)
        return [{"image": i, "label": run.label(i), "cosine": number(1 - far)} for i, far in pairs if i >= 0]

    return {"latent": latent, "value": value, "before": side(0), "after": side(1)}


class Captioner:
    """The vision-language model of the config node ``node``, loaded to ``device`` when first asked; None: none."""

    def __init__(
        self, node: Mapping[str, Any] | None, device: str = "cpu", load: Callable[..., VLM] = load_vlm
    ) -> None:
        self._node, self._device, self._load, self._lock = node, device, load, Lock()
        self._vlm: VLM | None = None
        self._why: dict[str, str] = {}  # by run, why it does not fit; "" where it does

    def why_not(self, run: RunView) -> str:
        """Why the SAE of ``run`` cannot steer the model; "" where it can."""
        with self._lock:
            if run.version not in self._why:
                try:
                    self._check(run)
                except (ValueError, ImportError) as error:
                    self._why[run.version] = str(error)
                else:
                    self._why[run.version] = ""
            return self._why[run.version]

    def view(self, run: RunView, picked: PictureRef, latent: int, value: float) -> dict[str, Any]:
        """The caption of a picture before and after ``latent`` is at ``value`` on all of its tokens.

        What the SAE does not reconstruct is kept. RefusedError with 409 where ``why_not`` says so.
        """
        if why := self.why_not(run):
            raise RefusedError(409, why)
        picture, sae = run.picture(picked), run.opened.sae
        run.check_latent(latent)
        with self._lock:
            assert self._vlm is not None  # or why_not had said so
            before = self._vlm.captions([picture])[0]
            after = steered_captions(
                self._vlm, sae, [picture], latent, [value], layer=run.store.layer, keep_error=True
            )[0][0]
        return {"latent": latent, "value": value, "before": before, "after": after, "model": self._vlm.title}

    def _check(self, run: RunView) -> None:
        if self._node is None:
            raise VLMError("No vision-language model was chosen.")
        if run.store.kind != "patch":
            raise VLMError("Captions need a run on patch tokens of the encoder that the captioner sees through.")
        if self._vlm is None:
            self._vlm = self._load(self._node, self._device)
        few = [run.picture(PictureRef("images", i)) for i in range(min(TRIED, len(run.store)))]
        check_fit(self._vlm, run.store, few)


def choose(
    values: np.ndarray, names: Sequence[str], label: np.ndarray, images_fired: np.ndarray, *,
    text: str = "", of_class: int | None = None, at_least: int = 0, descending: bool = True,
) -> np.ndarray:  # fmt: skip
    """The latents [m] int64 that fit, sorted by ``values`` [d_sae]; of equals the lower first, NaN last either way.

    ``text``: a latent's number, or words that all occur in its name, in any case. ``of_class``: its most frequent
    class. ``at_least``: pictures on which it fires.
    """
    fits = images_fired >= at_least
    if of_class is not None:
        fits &= label == of_class
    if text.strip():
        fits &= named(names, text)
    latents = np.flatnonzero(fits)
    keys = values[latents]
    return latents[np.argsort(-keys if descending else keys, kind="stable")]  # NaN sorts last in both


def named(names: Sequence[str], text: str) -> np.ndarray:
    """Which latents [d_sae] bool have the number ``text`` (``12`` or ``#12``) or a name with all its words."""
    words = text.casefold().split()
    found = np.array([all(word in name.casefold() for word in words) for name in names], dtype=bool)
    number = text.strip().removeprefix("#")
    if number.isascii() and number.isdigit() and len(number) < 10 and int(number) < len(names):
        found[int(number)] = True
    return found
