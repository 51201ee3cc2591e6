"""What the page is told of a run, a latent and a picture, as plain JSON values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sae_lightning.apps.explorer.book import Book, Picked

LISTED = 4  # pictures beside a latent in the list
SIMILAR = 8  # latents of similar direction
CLASSES = 6


def run_view(book: Book) -> dict[str, Any]:
    """The run as a whole: what can be sorted and filtered by, and over what."""
    known = book.known
    return {
        "title": book.opened.label, "name": book.opened.name, "version": book.version, "split": book.split,
        "n_images": len(book.store), "d_sae": book.d_sae, "alive": int((known.images_fired > 0).sum()),
        "patches": list(book.store.grid) if book.has_patches else None, "evaluated": known.evaluated,
        "columns": [{"name": c.name, "title": c.title, "about": c.about} for c in known.columns.values()],
        "classes": book.class_names if len(book.class_names) > 1 else [],
        "named": sum(map(bool, book.names)),
    }  # fmt: skip


def latent_row(book: Book, latent: int) -> dict[str, Any]:
    """One line of the list."""
    columns = book.known.columns
    return {
        "latent": latent, "name": book.names[latent], "label": _label(book, latent),
        "images_fired": int(book.known.images_fired[latent]),
        "values": {name: number(column.values[latent]) for name, column in columns.items()},
        "percentiles": {name: number(shares[latent]) for name, shares in book.percentiles.items()},
        "images": [i for i in book.top[latent, :LISTED].tolist() if i >= 0],
    }  # fmt: skip


def latent_view(book: Book, latent: int, per_band: int) -> dict[str, Any]:
    """All of one latent: its line, bands of ``per_band`` images, histogram, classes and similar latents."""
    row = latent_row(book, latent)
    bands = [
        {
            "name": name,
            "images": [{"image": i, "value": number(value), "label": book.label(i)} for i, value in shown],
        }
        for name, shown in book.by_latent.bands(latent, per_band)
    ]
    return row | {
        "bands": bands,
        "histogram": book.by_latent.histogram(latent),
        "classes": _classes(book, latent),
        "similar": similar(book, latent),
    }


def picture_view(book: Book, picked: Picked, n_latents: int, also: int | None = None) -> dict[str, Any]:
    """A picture and the ``n_latents`` that fire most strongly on it, and the latent ``also``."""
    latents, activations = book.pooled(picked)
    value_of = dict(zip(latents.tolist(), activations.tolist(), strict=True))
    shown = latents[:n_latents].tolist()
    if also is not None and also not in shown:
        shown.append(book.check_latent(also))
    return {
        "kind": picked.kind, "number": picked.number, "active": len(latents),
        "label": book.label(picked.number) if picked.kind == "images" else "",
        "caption": book.caption(picked.number) if picked.kind == "images" else "",
        "latents": [
            {
                "latent": latent, "name": book.names[latent], "label": _label(book, latent),
                "value": number(value_of.get(latent, 0.0)), "peak": number(book.peak(latent)),
                "images": [i for i in book.top[latent, :1].tolist() if i >= 0],
            }
            for latent in shown
        ],
    }  # fmt: skip


def similar(book: Book, latent: int) -> list[dict[str, Any]]:
    """The latents whose decoder rows are most alike to that of ``latent`` among those that fire, with the cosine."""
    cosines = (book.directions @ book.directions[latent]).numpy().copy()
    cosines[latent] = -np.inf
    cosines[book.known.images_fired == 0] = -np.inf
    order = np.argsort(-cosines, kind="stable")[:SIMILAR]
    return [
        {"latent": i, "name": book.names[i], "label": _label(book, i), "cosine": number(cosines[i]),
         "images": [int(book.top[i, 0])]}
        for i in order.tolist() if np.isfinite(cosines[i])
    ]  # fmt: skip


def number(value: float) -> float | None:
    """``value`` as JSON can hold it: no figure is None."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _classes(book: Book, latent: int) -> list[dict[str, Any]]:
    """The most frequent classes of the images on which a latent fires, with their share of them."""
    own = slice(book.by_latent.offsets[latent], book.by_latent.offsets[latent + 1])
    if len(book.class_names) < 2 or own.stop == own.start:
        return []
    counts = np.bincount(book.labels.numpy()[book.by_latent.images[own]], minlength=len(book.class_names))
    order = np.argsort(-counts, kind="stable")[:CLASSES]
    return [{"label": book.class_names[c], "share": number(counts[c] / counts.sum())} for c in order if counts[c]]


def _label(book: Book, latent: int) -> str:
    label = int(book.known.label[latent])
    return book.class_names[label] if label >= 0 and len(book.class_names) > 1 else ""
