"""What the page of steering shows: dose–response figures, pictures with captions, and a table of all latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from sae_lightning.apps.steering.latents import SteeredLatent
from sae_lightning.apps.steering.trials import interval
from sae_lightning.data import ImageData
from sae_lightning.rendering.figures import COLOURS, figure
from sae_lightning.rendering.pictures import data_uri, strip, thumbnail
from sae_lightning.vlms.words import words_for

TITLES = {"sae": "SAE latent", "diffmean": "DiffMean", "random": "random latent"}
STRIP = 10  # of a latent's images
Best = Mapping[tuple[str, str], Sequence[float]]


def page_context(
    turned: Sequence[SteeredLatent], names: Sequence[str], train: ImageData, curves: pd.DataFrame, table: pd.DataFrame,
    best: Best, cost: Mapping[str, float], options: DictConfig, examples: Sequence[Mapping[str, Any]], vlm: str,
    judge: str, pictures: ImageData,
) -> dict[str, Any]:  # fmt: skip
    """Everything that ``apps/steering.html`` needs beside title and headlines."""
    cards = [
        card(t, name, train, pictures, one, options) for t, name, one in zip(turned, names, examples, strict=False)
    ]
    return {
        "vlm": vlm, "judge": judge, "cost": cost, "cards": cards, "n_latents": len(turned), "options": options,
        "doses": dose_figure(curves), "nearness": nearness_figure(curves, list(options.top_k)),
        "rows": table_rows(turned, names, table, max(options.top_k)), "titles": TITLES,
        "best": {f"{goal}_{method}": alpha[0] for (goal, method), alpha in best.items()},
    }  # fmt: skip


def card(
    t: SteeredLatent, name: str, train: ImageData, pictures: ImageData, examples: Mapping[str, Any], options: DictConfig
) -> dict[str, Any]:
    """One latent: its top images, and pictures with captions before and at every α."""
    concept = train.class_names[t.label]
    top = strip([thumbnail(train[i]) for i in t.top[:STRIP] if i >= 0])
    goals = []
    for goal, title in (("insert", "turned up"), ("suppress", "turned down")):
        rows = [
            {
                "picture": data_uri(thumbnail(pictures[i])), "alt": pictures.class_names[pictures.labels[i]],
                "captions": [marked(text, concept) for text in (before, *said)],
            }
            for i, before, said in examples[goal]
        ]  # fmt: skip
        goals.append({"title": title, "alphas": [f"{a:g}" for a in options[goal]], "rows": rows})
    return {
        "latent": t.latent, "concept": concept, "name": name, "top": top, "purity": t.purity, "peak": t.peak,
        "goals": goals,
    }  # fmt: skip


def marked(caption: str, concept: str) -> list[tuple[str, bool]]:
    """The words of ``caption``, each with whether it is one of the names of ``concept``."""
    names = {word for phrase in words_for(concept) for word in (phrase, phrase + "s") for word in word.split()}
    return [(word, word.lower().strip(".,;:!?") in names) for word in caption.split()]


def table_rows(
    turned: Sequence[SteeredLatent], names: Sequence[str], table: pd.DataFrame, k: int
) -> list[dict[str, Any]]:
    """One row a latent: shares and passes of all methods for both goals, and the gain in cosine."""
    cells = {(r.latent, r.goal, r.method): r for r in table.itertuples()}
    rows = []
    for t, name in zip(turned, names, strict=True):
        row: dict[str, Any] = {"latent": t.latent, "name": name, "purity": t.purity, "images": t.images}
        for goal in ("insert", "suppress"):
            for method in TITLES:
                found = cells.get((t.latent, goal, method))
                row[f"{goal}_{method}"] = None if found is None else (found.share, found.passed)
                row["concept"] = found.concept if found is not None else row.get("concept", "")
                if goal == "insert":
                    row[f"gain_{method}"] = None if found is None else getattr(found, f"gain_{k}")
        rows.append(row)
    return rows


def dose_figure(curves: pd.DataFrame) -> str:
    """Share that reaches the goal, share that passes both criteria, and words kept, against α; bands of 95 %; SVG."""
    figures = (("share", "goal reached"), ("passed", "both criteria"), ("kept", "other words kept"))
    goals = (("insert", "turned up: concept named"), ("suppress", "turned down: concept gone"))
    with figure(10.5, 5.2, 2, 3, sharey=True) as drawing:
        axes = drawing.axes
        for row, (goal, title) in enumerate(goals):
            part = curves[curves.goal == goal]
            for axis, (column, what) in zip(axes[row], figures, strict=True):
                for i, (method, label) in enumerate(TITLES.items()):
                    _curve(axis, part[part.method == method], column, COLOURS[i], label)
                axis.set_title(f"{title}" if column == "share" else what, loc="left", fontsize=9)
                axis.set_ylim(0, 1.03)
                axis.set_xlabel("α, peaks of the latent")
            axes[row][0].set_ylabel("share of captions")
        axes[0][0].legend(frameon=False, fontsize=8)
    return drawing.svg


def nearness_figure(curves: pd.DataFrame, top_k: Sequence[int]) -> str:
    """Rise of the text's cosine with the mean of a latent's top K images against α, one panel a K, SVG."""
    part = curves[curves.goal == "insert"]
    with figure(10.5, 2.7, 1, len(top_k), sharey=True) as drawing:
        axes = drawing.axes[0]
        for axis, k in zip(axes, top_k, strict=True):
            for i, (method, label) in enumerate(TITLES.items()):
                _curve(axis, part[part.method == method], f"gain_{k}", COLOURS[i], label)
            axis.axhline(0, color="#888", lw=0.8)
            axis.set_title(f"K = {k}", loc="left", fontsize=9)
            axis.set_xlabel("α, peaks of the latent")
        axes[0].set_ylabel("rise of the cosine")
        axes[0].legend(frameon=False, fontsize=8)
    return drawing.svg


def _curve(axis: Any, part: pd.DataFrame, column: str, colour: str, label: str) -> None:
    groups = list(part.groupby("alpha"))
    if not groups:
        return
    alphas = [alpha for alpha, _ in groups]
    means = [each[column].mean() for _, each in groups]
    bands = [interval(each[column]) or (np.nan, np.nan) for _, each in groups]
    axis.plot(alphas, means, color=colour, lw=1.6, marker="o", ms=3.5, label=label)
    axis.fill_between(alphas, *zip(*bands, strict=True), color=colour, alpha=0.14, lw=0)
