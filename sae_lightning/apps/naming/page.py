"""What the page of the naming application shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig

from sae_lightning.apps.naming.match import (
    COLUMNS,
    CONDITIONS,
    PAPER,
    Agreement,
    Measured,
    named_at,
    of_concepts,
    of_latents,
)
from sae_lightning.apps.naming.vocabulary import RANDOM_LATENTS, RANDOM_WORDS, TextNames
from sae_lightning.evaluation.by_latent import top_images
from sae_lightning.evaluation.core import activation_maps
from sae_lightning.rendering.figures import COLOURS, figure
from sae_lightning.rendering.pictures import overlay, strip, thumbnail
from sae_lightning.runs.run import Run

RATIOS = (1.0, 1.25, 1.5, 2.0, 3.0)
STEPS = (-0.2, -0.12, -0.06, 0.0, 0.06, 0.12, 0.2)  # of the grid of thresholds, around the one in use
FEW = 6  # latents of each kind that fails


def page_context(
    opened: Run, table: pd.DataFrame, text: TextNames | None, checks: Mapping[str, Measured | Agreement],
    cfg: DictConfig,
) -> dict[str, Any]:  # fmt: skip
    """Everything the template ``apps/naming.html`` takes beside what every page has."""
    options = cfg.app
    context: dict[str, Any] = {
        "text": None, "options": options, "n_latents": len(table), "alive": int(table["alive"].sum()),
        "named": sum(map(bool, table["shown"])), "split": cfg.split, "groups": groups(opened, table, text, cfg),
        "agreement": checks.get("agreement"),
    }  # fmt: skip
    if text is None:
        return context
    ratio = options.thresholds.ratio
    thresholds = sorted({round(text.threshold + step, 4) for step in STEPS if text.threshold + step > 0})
    return context | {
        "text": text, "thresholds": thresholds, "ratios": RATIOS, "grid": named_at(text.match, thresholds, RATIOS),
        "grid_best": named_at(text.match, thresholds, RATIOS, best=True), "counts": counts(text, ratio),
        "paper": PAPER, "figure": similarities(text, options.b_pre == "keep"), "scatter": uniqueness(text, ratio),
        "beyond_chance": all(of["above"]["high"] < int(of_latents(text.match, text.threshold, ratio)["above"].sum())
                             for of in text.chance.values()),
        "same_best": None if text.other is None
        else float((text.match.concepts.index == text.other.concepts.index).mean()),
    }  # fmt: skip


def counts(text: TextNames, ratio: float) -> list[dict[str, Any]]:
    """The rows of the table of counts: each with a ``title`` and the text of each of ``CONDITIONS``."""
    met = of_latents(text.match, text.threshold, ratio)
    concepts = of_concepts(text.match, text.threshold, ratio)
    return [
        {"title": f"latents, of {len(text.latents)}", **{name: str(int(met[name].sum())) for name in CONDITIONS}},
        *(
            {"title": f"– {kind}"} | {n: f"{c['mean']:.1f} ({c['low']:.0f}–{c['high']:.0f})" for n, c in found.items()}
            for kind, found in ((kind, text.chance[kind]) for kind in (RANDOM_WORDS, RANDOM_LATENTS))
        ),
        {"title": f"words, of {len(text.words)}", **{name: str(concepts[name]) for name in CONDITIONS}},
    ]  # fmt: skip


# --- figures -------------------------------------------------------------------------------------
def similarities(text: TextNames, kept: bool) -> str:
    """Histograms of the largest similarity of each latent and each word, with and without b_pre [MSAE Fig. 9]; SVG."""
    titles = ("b_pre kept", "b_pre removed") if kept else ("b_pre removed", "b_pre kept")
    with figure(11, 2.9, 1, 2) as drawing:
        axes = drawing.axes[0]
        for axis, of, what in zip(axes, ("latents", "concepts"), ("latent", "word"), strict=True):
            both = zip(titles, (text.match, text.other), strict=True)
            shown = [(title, getattr(found, of).score) for title, found in both if found is not None]
            together = np.concatenate([scores for _, scores in shown])
            bins = np.linspace(together.min(), together.max() + 1e-6, 41)
            for colour, (title, scores) in zip(COLOURS, shown, strict=False):
                axis.hist(scores, bins, color=colour, alpha=0.55, label=title if text.other is not None else None)
            axis.axvline(text.threshold, color="#444", lw=1, ls="--")
            axis.set_title(f"largest {text.measure} of each {what}", loc="left", fontsize=9)
            axis.set_xlabel(text.measure)
            axis.set_ylabel(f"{what}s")
        if text.other is not None:
            axes[1].legend(frameon=False)
    return drawing.svg


def uniqueness(text: TextNames, ratio: float) -> str:
    """The nearest word's similarity against the second one's, one mark a latent, with both thresholds; SVG."""
    near = text.match.latents
    met = of_latents(text.match, text.threshold, ratio)
    kinds = {
        "no word": ~met["above"], "beyond the first threshold": met["above"] & ~met["ratio"],
        "beyond both": met["above"] & met["ratio"],
    }  # fmt: skip
    with figure(5.4, 3.6) as drawing:
        axis = drawing.axis
        for colour, (title, of) in zip(("#b9bec8", COLOURS[0], COLOURS[1]), kinds.items(), strict=True):
            axis.scatter(near.score[of], near.second[of], s=11, color=colour, label=f"{title} ({of.sum()})", lw=0)
        right = max(float(near.score.max()), text.threshold) * 1.05
        axis.axvline(text.threshold, color="#444", lw=1, ls="--")
        axis.plot([0, right], [0, right / ratio], color="#444", lw=1, ls=":")
        axis.set_xlim(min(0.0, float(near.score.min())), right)
        axis.set_xlabel(f"{text.measure} with the nearest word")
        axis.set_ylabel("with the second")
        axis.legend(frameon=False, loc="upper left", fontsize=8)
    return drawing.svg


# --- latents with their images ------------------------------------------------------------------
def groups(opened: Run, table: pd.DataFrame, text: TextNames | None, cfg: DictConfig) -> list[dict[str, Any]]:
    """Latents to look at, by what becomes of them: a title and cards."""
    options = cfg.app
    if text is None:
        chosen = [("Latents of one class", _first_of(table[table["shown"] != ""], "shown", "purity", options.cards))]
        mixed = table[(table["shown"] == "") & (table["images"] >= options.labels.images)]
        chosen.append(("Latents of no one class", mixed.sort_values("purity").head(FEW)["latent"]))
    else:
        met = table[table[COLUMNS[options.named]]]
        several = table[table["above"] & ~table["ratio_above"]]
        of = np.array([*opened.images(cfg.split).class_names, ""], dtype=object)[table["label"]]
        other = met[(met["purity"] >= options.labels.purity) & (met["name"] != of[met.index])]
        fires = table[table["alive"] & ~table["above"]]
        chosen = [
            ("Named", _first_of(met, "name", "score", options.cards)),
            ("More than one word fits", several.sort_values("ratio").head(FEW)["latent"]),
            ("No word fits", fires.sort_values("images", ascending=False).head(FEW)["latent"]),
            ("The label says something else", other.sort_values("purity", ascending=False).head(FEW)["latent"]),
        ]
    made = [{"title": title, "cards": cards(opened, table, latents.to_numpy(), cfg)} for title, latents in chosen]
    return [group for group in made if group["cards"]]


def _first_of(table: pd.DataFrame, name: str, by: str, n: int) -> pd.Series:
    """The strongest latent of each name, then the others, strongest first; up to ``n``."""
    ordered = table.sort_values(by, ascending=False, kind="stable")
    again = ordered.groupby(name, sort=False).cumcount()
    return ordered.assign(again=again).sort_values("again", kind="stable").head(n)["latent"]


def cards(opened: Run, table: pd.DataFrame, latents: np.ndarray, cfg: DictConfig) -> list[dict[str, Any]]:
    """What is shown of each of ``latents``: its row, the class of its label, and strips of its top images."""
    images = opened.images(cfg.split)
    top = top_images(opened.codes(cfg.split), cfg.app.top, latents)
    maps = None
    if opened.cfg["features"] == "patch":
        with torch.no_grad():
            where = torch.tensor(latents), torch.from_numpy(top)
            maps = activation_maps(opened.sae, opened.store(cfg.split), *where)
    shown = []
    for row, latent in enumerate(latents.tolist()):
        there = np.flatnonzero(top[row] >= 0)
        pictures = [thumbnail(images[int(top[row, i])]) for i in there]
        card = {"row": table.iloc[latent].to_dict(), "strips": [strip(pictures)] if pictures else []}
        card["share"] = len(there) / top.shape[1]  # of the strip's width
        label = int(card["row"]["label"])
        card["label"] = images.class_names[label] if label >= 0 else ""
        card["classes"] = ", ".join(images.class_names[c] for c in images.labels[top[row, there]].tolist())
        if maps is not None and pictures:
            rows, columns = opened.store(cfg.split).grid
            grids = maps[row].reshape(-1, rows, columns).numpy()
            lit = [overlay(picture, grids[i], float(grids.max())) for i, picture in zip(there, pictures, strict=True)]
            card["strips"].append(strip(lit))
        shown.append(card)
    return shown
