"""What the search page shows: neighbours with the latents that explain them, turned queries, two figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from omegaconf import DictConfig
from scipy.sparse import csr_matrix

from sae_lightning.apps.edits import edited, whole_images
from sae_lightning.apps.names import called
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
from sae_lightning.rendering.page import Heading, Picture, Section, pictured
from sae_lightning.rendering.pictures import data_uri, thumbnail
from sae_lightning.rendering.table import Head, Table
from sae_lightning.saes import SAE

GREEN, ORANGE = "#2e8b57", "#e08e1b"  # frames: of the query's class, and new among its neighbours


def shown_neighbours(
    query: Query, features: np.ndarray, codes: csr_matrix, images: ImageData, names: Sequence[str], k: int, n: int
) -> tuple[Table, list[dict[str, Any]]]:
    """One query's ``k`` neighbours by each method with up to ``n`` latents each as the page shows them, and table rows.

    Neighbours by features are explained by the cosine of the codes.
    """
    own = np.array([query.index])
    cells, rows = [], []
    for method, (of_query, gallery, by) in {
        FEATURES: (query.pooled, features, "cosine"),
        MANHATTAN: (query.codes, codes, "manhattan"),
        COSINE: (query.codes, codes, "cosine"),
    }.items():
        found = neighbours(of_query, gallery, k, by, own)
        there = found.images[0][found.images[0] >= 0]
        pairs = csr_matrix(query.codes[np.zeros(len(there), dtype=np.int64)])
        explained = top_shared(contributions(pairs, codes[there], codes, by), n)
        lines = [[f"{value:.2g} · {called(latent, names)}" for latent, value in shared] for shared in explained]
        cells.append([method, *_neighbours(found, images, query.label, lines)])
        for index, distance, shared in zip(there.tolist(), found.distances[0].tolist(), explained, strict=False):
            rows.append({
                "query": query.title, "method": method, "image": images.image_ids[index],
                "class": images.class_names[images.labels[index]], "distance": distance,
                "shared": [latent for latent, _ in shared], "names": [names[latent] for latent, _ in shared],
                "contributions": [value for _, value in shared],
            })  # fmt: skip
    return _table("searched by", cells), rows


def shown_turned(
    sae: SAE, query: Query, latent: int, to: Sequence[float], units: Sequence[str], features: np.ndarray,
    images: ImageData, k: int, keep_error: bool,
) -> Table:  # fmt: skip
    """The neighbours of ``query`` by features before and after ``latent`` is turned to each of ``to`` [MSAE Fig. 7].

    ``units`` says of each magnitude what is printed beside it.
    """
    own = np.array([query.index])
    first = neighbours(query.pooled, features, k, "cosine", own)
    before = f"as it is (code {float(query.codes[0, latent]):.3g})"
    rows = [[before, *_neighbours(first, images, query.label)]]
    decoded = whole_images(sae, [query.features])
    for value, unit, moved in zip(to, units, edited(sae, decoded, latent, to, keep_error=keep_error), strict=True):
        found = neighbours(moved, features, k, "cosine", own)
        known = set(first.images[0].tolist())
        title = f"{value:.3g} ({unit})" if unit else f"{value:.3g}"
        rows.append([title, *_neighbours(found, images, query.label, known=known)])
    return _table("turned to", rows)


def picture(images: ImageData, index: int) -> str:
    """One image of the data set as a data URI."""
    return data_uri(thumbnail(images[index]))


def _neighbours(
    found: Found, images: ImageData, label: int, lines: Sequence[Sequence[str]] = (), known: set[int] | None = None
) -> list[Markup]:
    """A cell for each image found, with ``lines`` below; images that are not ``known`` before are framed as new."""
    cells = []
    for i, (index, distance) in enumerate(zip(found.images[0].tolist(), found.distances[0].tolist(), strict=True)):
        if index >= 0:
            of = int(images.labels[index])
            name, new = images.class_names[of], known is not None and index not in known
            frame = ORANGE if new else GREEN if of == label else ""
            said = [f"{name} {distance:.3g}", *(["new"] if new else []), *(lines[i] if lines else ())]
            cells.append(pictured(picture(images, index), f"{name}, {images.image_ids[index]}", *said, frame=frame))
    return cells


def _table(first: str, rows: Sequence[Sequence[str]]) -> Table:
    """Rows of neighbours, the nearest first; those that find fewer end in empty cells."""
    most = max(map(len, rows))
    heads = [Head(first), *(Head(str(i)) for i in range(1, most))]
    return Table("neighbours", "", heads, [[*row, *[""] * (most - len(row))] for row in rows])


LEAD = """Nearest images by the encoder's features and by the dictionary's codes, the latents that explain each
neighbour, and what becomes of the neighbours when a latent is turned."""


def scores(
    table: pd.DataFrame, doses: pd.DataFrame, means: pd.DataFrame, scored: int, gallery: int, tokens: bool,
    options: DictConfig,
) -> list[Section]:  # fmt: skip
    """How precise each search is, and what turning latents does to it."""
    heads = [Head("searched by"), Head("k", ".0f"), Head("precision"), Head("95 % interval"),
             Head("gain over features", sign=True), Head("95 % interval")]  # fmt: skip
    rows = [
        [row.method, row.k, row.precision, f"{row.low:.3f} to {row.high:.3f}", row.gain,
         f"{row.gain_low:+.3f} to {row.gain_high:+.3f}"]
        for row in table.itertuples()
    ]  # fmt: skip
    shown = [
        Section(
            "Class precision",
            f"The share of images of the query's class among its nearest, over {scored} queries against {gallery} "
            "images, the query itself left out; 95 % bootstrap intervals over queries, those of the gain paired. A "
            "random projection has as many dimensions as there are latents; shuffled codes keep each latent's "
            "activations and lose what they are of.",
            Picture(precision_figure(table), wide=True),
            Table("precision", "", heads, rows),
        )
    ]
    if len(doses):
        where = "on all tokens " if tokens else ""
        shown.append(Section(
            "Turning a latent",
            f"{doses['latent'].nunique()} latents, of those that a class dominates the ones it activates most on the "
            f"training images, turned {where}on up to {options.dose.images} images each; the result is decoded and "
            "searched for among the features. A magnitude of one spread moves an image as far as images lie from their "
            "mean; the other arms move it by the same length. Bands: 95 % bootstrap intervals over latents.",
            Picture(dose_figure(means, options.dose.neighbours), wide=True),
        ))  # fmt: skip
    return shown


def queries_section(shown: Sequence[Any], keep_error: bool) -> Section:
    """The queries ``shown``: of each the query, its neighbours, and of latents that are turned a name and a table."""
    blocks: list[Any] = []
    turned_note = "Orange: not among the neighbours of the unturned picture."
    if not keep_error:
        turned_note += " Turned pictures are what the dictionary decodes, without its error."
    for query, table, turns in shown:
        uri = data_uri(thumbnail(query.image))
        blocks += [Heading(query.title), pictured(uri, query.title, width=120), table]
        for latent, turned in turns:
            title = f"Latent {latent} turned, then searched by features"
            blocks.append(replace(turned, title=title, note=turned_note))
    return Section(
        "Queries",
        "Green frames: the query's class. Below each neighbour its distance and the latents that bring it nearer than "
        "the average image, with their part of the nearness (neighbours by features are explained by the cosine of the "
        "codes). In brackets, where a latent has no name: the class that most of its activation is of.",
        blocks,
    )


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
