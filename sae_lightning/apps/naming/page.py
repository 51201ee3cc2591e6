"""What the page of the naming application shows."""

from __future__ import annotations

from collections.abc import Mapping

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
from sae_lightning.apps.naming.vocabulary import MEASURES, RANDOM_LATENTS, RANDOM_WORDS, TextNames
from sae_lightning.apps.statistics import turns
from sae_lightning.backbones.seen import seen_by
from sae_lightning.evaluation.by_latent import top_images
from sae_lightning.evaluation.core import activation_maps
from sae_lightning.rendering.figures import COLOURS, figure
from sae_lightning.rendering.page import Beside, Card, Cards, Note, Picture, Section, Strip
from sae_lightning.rendering.pictures import overlay, strip, thumbnail
from sae_lightning.rendering.table import NOTHING, Head, Table
from sae_lightning.runs.run import Run

RATIOS = (1.0, 1.25, 1.5, 2.0, 3.0)
STEPS = (-0.2, -0.12, -0.06, 0.0, 0.06, 0.12, 0.2)  # of the grid of thresholds, around the one in use
FEW = 6  # latents of each kind that fails


def lead(text: TextNames | None, table: pd.DataFrame, options: DictConfig) -> str:
    """What latents are called by."""
    if text is None:
        return (
            "Each latent is called by the class that has most of its activation over the training images, where that "
            f"is at least {100 * options.labels.purity:.0f} % of it. {sum(map(bool, table['shown']))} of {len(table)} "
            f"latents have a name; {int(table['alive'].sum())} fire."
        )
    how = (
        "by the word whose text embedding its decoder row points at [MSAE §5.1, App. A]"
        if text.method == "decoder"
        else "by the word whose fit to an image (cosine of image and text embedding) its activation follows, by "
        "Pearson's correlation over the training images; its own features have no text of their own"
    )
    same = f" ({text.same} more that the text tower cannot tell from these)" if text.same else ""
    alive = ", those that fire on a training image" if options.alive else ""
    centre = {"captions": "the mean of the training captions", "vocabulary": "the vocabulary's mean",
              "images": "the mean of the images"}[text.centre]  # fmt: skip
    return (
        f"Each latent is called {how}. {len(text.words)} words{same}, {len(text.latents)} of {len(table)} latents"
        f"{alive}. Texts are centred by {centre}."
    )


def sections(
    opened: Run, table: pd.DataFrame, text: TextNames | None, checks: Mapping[str, Measured | Agreement],
    cfg: DictConfig,
) -> list[Section]:  # fmt: skip
    """All that the page shows below the headline figures."""
    found = [] if text is None else [how_many(text, cfg.app)]
    both = checks.get("agreement")
    shown = groups(opened, table, text, cfg)
    said = (
        f"Where the word is a class and the label is pure enough ({both.latents} latents), both name the same class "
        f"for {100 * both.share:.0f} %; with names permuted {100 * both.chance:.0f} %."
        if isinstance(both, Agreement)
        else ""
    )
    about = Note(f"Top images of the {cfg.split} split, which neither words nor labels were chosen on.")
    for i, (title, cards) in enumerate(shown):
        found.append(Section(title, *([said, about] if i == 0 else []), Cards(cards)))
    return found


def how_many(text: TextNames, options: DictConfig) -> Section:
    """Latents and words that pass the thresholds, beside chance and the paper, and how that turns on the thresholds."""
    ratio, measure, decoder = options.thresholds.ratio, text.measure, text.method == "decoder"
    beyond = int(of_latents(text.match, text.threshold, ratio)["above"].sum())
    by_chance = any(of["above"]["high"] >= beyond for of in text.chance.values())
    kept = None if text.other is None else float((text.match.concepts.index == text.other.concepts.index).mean())
    heads = [Head(""), *map(Head, (f"above {text.threshold:g}", "best", "above and best", "ratio", "all"))]
    paper = [
        [f"MSAE Table 3: {title}, ×8 | ×16 | ×32", *(" | ".join(map(str, of)) for of in columns)]
        for title, columns in PAPER.items()
    ]
    thresholds = sorted({round(text.threshold + step, 4) for step in STEPS if text.threshold + step > 0})
    grids = (named_at(text.match, thresholds, RATIOS, best=best) for best in (False, True))
    grid = [
        [f"{threshold:g}", *(f"{n} ({best})" for n, best in zip(*of, strict=True))]
        for threshold, *of in zip(thresholds, *grids, strict=True)
    ]
    ratios = [Head("any ratio" if of == 1 else f"ratio > {of:g}") for of in RATIOS]
    about = (
        f"Thresholds: {measure} above {text.threshold:g}, and more than {ratio:g} times that of the second. Of "
        "latents: each with its nearest word; it is the best when no other latent is nearer to that word. Of words: "
        "each with its nearest latent; the best are the latents so reached, one word each. The chance rows are means "
        f"of {options.baseline.draws} draws with their middle 95 %."
    )
    no_target = Note(
        "The paper's rows are of CLIP ViT-L/14 on CC3M and 37,445 words, counted from words to latents, so they are an "
        "order of magnitude to compare with and no target."
    )
    as_often = (
        "Random words or random latents pass as often: the embeddings of this encoder vary in few directions, so that "
        "most of them lie near some word, and a threshold alone tells little; what the held-out images say tells more."
    )
    removed = "removed from" if options.b_pre == "keep" else "left in"
    return Section(
        "How many have a word", about, Table("counts", "", heads, [*counts(text, ratio), *(paper if decoder else [])]),
        no_target if decoder else "", as_often if by_chance else "",
        Picture(similarities(text, options.b_pre == "keep"), wide=True),
        "" if kept is None
        else Note(f"{100 * kept:.0f} % of the words keep their nearest latent when b_pre is {removed} the texts."),
        Beside([
            [Table("thresholds", "Latents beyond each pair of thresholds", [Head(f"{measure} above"), *ratios], grid,
                   "In brackets: the best latents of their word alone.")],
            [Picture(uniqueness(text, ratio))],
        ]),
    )  # fmt: skip


def counts(text: TextNames, ratio: float) -> list[list[str]]:
    """The rows of the table of counts: a title and the text of each of ``CONDITIONS``."""
    met = of_latents(text.match, text.threshold, ratio)
    concepts = of_concepts(text.match, text.threshold, ratio)
    return [
        [f"latents, of {len(text.latents)}", *(str(int(met[name].sum())) for name in CONDITIONS)],
        *([f"– {kind}", *(f"{c['mean']:.1f} ({c['low']:.0f}–{c['high']:.0f})"
                          for c in (text.chance[kind][name] for name in CONDITIONS))]
          for kind in (RANDOM_WORDS, RANDOM_LATENTS)),
        [f"words, of {len(text.words)}", *(str(concepts[name]) for name in CONDITIONS)],
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
def groups(opened: Run, table: pd.DataFrame, text: TextNames | None, cfg: DictConfig) -> list[tuple[str, list[Card]]]:
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
    return [(title, cards(opened, table, latents.to_numpy(), cfg)) for title, latents in chosen if len(latents)]


def _first_of(table: pd.DataFrame, name: str, by: str, n: int) -> pd.Series:
    """The strongest latent of each name, then the others, strongest first; up to ``n``."""
    ordered = table.sort_values(by, ascending=False, kind="stable")
    return ordered.iloc[np.argsort(turns(ordered[name].to_numpy()), kind="stable")[:n]]["latent"]


def cards(opened: Run, table: pd.DataFrame, latents: np.ndarray, cfg: DictConfig) -> list[Card]:
    """What is shown of each of ``latents``: its name and the next best, its label, and strips of its top images."""
    images = opened.images(cfg.split)
    top = top_images(opened.codes(cfg.split), cfg.app.top, latents)
    maps, seen = None, seen_by(opened.source.backbone)
    if opened.store(cfg.split).spatial:
        with torch.no_grad():
            where = torch.tensor(latents), torch.from_numpy(top)
            maps = activation_maps(opened.sae, opened.store(cfg.split), *where)
    shown = []
    for place, latent in enumerate(latents.tolist()):
        row, there = table.iloc[latent], np.flatnonzero(top[place] >= 0)
        pictures = [thumbnail(seen(images[int(top[place, i])])) for i in there]
        rows = [pictures] if pictures else []
        if maps is not None and pictures:
            grids = maps[place].reshape(-1, *opened.store(cfg.split).grid).numpy()
            rows = [[overlay(one, grids[i]) for i, one in zip(there, pictures, strict=True)]]
        classes = ", ".join(images.class_names[c] for c in images.labels[top[place, there]].tolist())
        footer = [] if pictures else [f"fires on no image of the {cfg.split} split"]
        if row["label"] >= 0:
            footer.append(f"label {images.class_names[row['label']]}, {100 * row['purity']:.0f} % of its activation")
        right = ""
        if "name" in table and np.isfinite(row["score"]):
            right = f"{MEASURES[row['method']]} {row['score']:.2f}, then {row['second_name']} {row['second']:.2f}"
        shown.append(Card(
            row["name" if "name" in table else "shown"] or NOTHING,
            [Strip(strip(one), classes, len(there) / top.shape[1]) for one in rows], f"latent {latent}", right,
            "; ".join([*footer, f"fires on {row['images']} training images"]),
        ))  # fmt: skip
    return shown
