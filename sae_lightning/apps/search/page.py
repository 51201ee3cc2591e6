"""The pictures of the search page: neighbours with the latents that explain them, turned queries, two figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from sae_lightning.apps.edits import edited, whole_images
from sae_lightning.apps.search.dose import ARMS
from sae_lightning.apps.search.neighbours import (
    COSINE,
    FEATURES,
    MANHATTAN,
    Found,
    Query,
    contributions,
    neighbours,
    top_shared,
)
from sae_lightning.data import ImageData
from sae_lightning.rendering.figures import COLOURS, figure
from sae_lightning.rendering.pictures import data_uri, thumbnail
from sae_lightning.saes import SAE


def caption(latent: int, names: Sequence[str]) -> str:
    """``12 ship``: the latent and what it is called."""
    return f"{latent} {names[latent]}".strip()


def shown_neighbours(
    query: Query, features: np.ndarray, codes: csr_matrix, images: ImageData, names: Sequence[str], k: int, n: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the page shows of one query's ``k`` neighbours by each method with up to ``n`` latents each, and table rows.

    Neighbours by features are explained by the cosine of the codes.
    """
    own = np.array([query.index])
    methods, rows = [], []
    for method, (of_query, gallery, by) in {
        FEATURES: (query.pooled, features, "cosine"),
        MANHATTAN: (query.codes, codes, "manhattan"),
        COSINE: (query.codes, codes, "cosine"),
    }.items():
        found = neighbours(of_query, gallery, k, by, own)
        there = found.images[0][found.images[0] >= 0]
        pairs = csr_matrix(query.codes[np.zeros(len(there), dtype=np.int64)])
        explained = top_shared(contributions(pairs, codes[there], codes, by), n)
        cards = _cards(found, images, query.label)
        for card, shared in zip(cards, explained, strict=True):
            card["shared"] = [(caption(latent, names), value) for latent, value in shared]
            rows.append({
                "query": query.title, "method": method, "image": card["id"], "class": card["label"],
                "distance": card["distance"], "shared": [latent for latent, _ in shared],
                "names": [names[latent] for latent, _ in shared], "contributions": [value for _, value in shared],
            })  # fmt: skip
        methods.append({"name": method, "found": cards})
    return methods, rows


def shown_turned(
    sae: SAE, query: Query, latent: int, to: Sequence[float], units: Sequence[str], features: np.ndarray,
    images: ImageData, names: Sequence[str], k: int, keep_error: bool,
) -> dict[str, Any]:  # fmt: skip
    """The neighbours of ``query`` by features before and after ``latent`` is turned to each of ``to`` [MSAE Fig. 7].

    ``units`` says of each magnitude what is printed beside it.
    """
    own = np.array([query.index])
    first = neighbours(query.pooled, features, k, "cosine", own)
    now = float(query.codes[0, latent])
    rows = [{"to": "as it is", "unit": f"code {now:.3g}", "found": _cards(first, images, query.label)}]
    decoded = whole_images(sae, [query.features])
    for value, unit, moved in zip(to, units, edited(sae, decoded, latent, to, keep_error=keep_error), strict=True):
        found = neighbours(moved, features, k, "cosine", own)
        cards = _cards(found, images, query.label)
        for card in cards:
            card["new"] = card["image_index"] not in first.images[0]
        rows.append({"to": f"{value:.3g}", "unit": unit, "found": cards})
    return {"latent": caption(latent, names), "rows": rows}


def picture(images: ImageData, index: int) -> str:
    """One image of the data set as a data URI."""
    return data_uri(thumbnail(images[index]))


def _cards(found: Found, images: ImageData, label: int) -> list[dict[str, Any]]:
    cards = []
    for index, distance in zip(found.images[0].tolist(), found.distances[0].tolist(), strict=True):
        if index >= 0:
            of = int(images.labels[index])
            cards.append({
                "image": picture(images, index), "image_index": index, "id": images.image_ids[index],
                "label": images.class_names[of], "same": of == label, "distance": distance, "new": False,
            })  # fmt: skip
    return cards


def precision_figure(table: pd.DataFrame) -> str:
    """Precision at each k by method with 95 % intervals, SVG."""
    methods = list(dict.fromkeys(table["method"]))
    ks = sorted(table["k"].unique())
    with figure(8.6, 3.0) as drawing:
        axis = drawing.axis
        width = 0.8 / len(methods)
        for i, method in enumerate(methods):
            part = table[table["method"] == method].sort_values("k")
            at = np.arange(len(ks)) + (i - (len(methods) - 1) / 2) * width
            error = np.abs(part[["low", "high"]].to_numpy() - part[["precision"]].to_numpy()).T
            axis.bar(at, part["precision"], 0.9 * width, yerr=error, color=COLOURS[i], label=method, ecolor="#444",
                     error_kw={"lw": 1})  # fmt: skip
        axis.set_xticks(range(len(ks)), [f"precision@{k}" for k in ks])
        axis.grid(axis="x", visible=False)
        axis.set_ylabel("share of the query's class")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return drawing.svg


def dose_figure(means: pd.DataFrame, k: int) -> str:
    """Dose curves with 95 % bands: latents turned down on images of their class, and up on all others; SVG."""
    titles = {"own": "turned down, on images of the class", "others": "turned up, on images of other classes"}
    with figure(11, 3.2, 1, 2) as drawing:
        axes = drawing.axes[0]
        for axis, (of, title) in zip(axes, titles.items(), strict=True):
            part = means[means["of"] == of]
            for colour, arm in zip(COLOURS[1:], ARMS, strict=False):
                curve = part[part["arm"] == arm].sort_values("dose")
                axis.plot(curve["dose"], curve["share"], "o-", ms=3.5, lw=1.4, color=colour, label=arm)
                axis.fill_between(curve["dose"], curve["low"], curve["high"], color=colour, alpha=0.15, lw=0)
            if len(part):
                axis.axhline(part["before"].iloc[0], color="#555", lw=1, ls="--", label="decoded as it is")
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_xlabel("magnitude (spreads of the images' features)")
            axis.set_ylabel(f"share of the class in the {k} nearest")
        axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return drawing.svg
