"""What the page of steering shows: dose–response figures, pictures with captions, and a table of all latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from omegaconf import DictConfig

from sae_lightning.apps.steering.latents import SteeredLatent
from sae_lightning.apps.steering.trials import interval
from sae_lightning.data import ImageData
from sae_lightning.rendering.figures import COLOURS, figure
from sae_lightning.rendering.page import Block, Card, Cards, Heading, Note, Picture, Section, Strip, pictured
from sae_lightning.rendering.pictures import data_uri, strip, thumbnail
from sae_lightning.rendering.table import Head, Table
from sae_lightning.vlms.words import words_for

TITLES = {"sae": "SAE latent", "diffmean": "DiffMean", "random": "random latent"}
STRIP = 10  # of a latent's images
Best = Mapping[tuple[str, str], Sequence[float]]


def lead(n: int, vlm: str, options: DictConfig) -> list[Block]:
    """What is done."""
    error = (
        "" if options.keep_error
        else "; the SAE replaces what it does not reconstruct, DiffMean keeps the picture"
    )  # fmt: skip
    return [
        f"The SAE sits behind its layer in the vision tower of {vlm}. All tokens of a picture are encoded, one latent "
        "is set to a value α, and the codes are decoded back; the language model is as it was. Below, "
        f"{n} latents, the purest of each class by their {options.top} strongest train pictures, are turned up on "
        "pictures without their concept and down on pictures with it. α counts peaks: a latent's largest activation on "
        "train.",
        Note(
            "Random latents fire as often and are set to the same values. DiffMean adds the mean token of a class "
            "minus that of the others, to each token by the norm of the SAE's change to it. Each method is shown at "
            f"the strength that was best for it on the val split{error}. A caption is well formed if it is as long as "
            "an unsteered one and says no word or pair of words twice in a row. Intervals are bootstrapped over "
            "latents."
        ),
    ]


def cost_note(cost: Mapping[str, float], keep_error: bool) -> Note:
    """What encoding and decoding alone costs."""
    kept = (
        "Here what the SAE does not reconstruct is kept, so that none of it is lost."
        if keep_error
        else "`app.keep_error=true` keeps what the SAE does not reconstruct, and loses none."
    )
    return Note(
        f"Encoding and decoding alone, with no latent turned: {100 * cost['reconstructed']:.0f} % of captions name "
        f"their picture's class, against {100 * cost['plain']:.0f} % of plain ones ({cost['n']} pictures). {kept}"
    )


def captions_section(
    turned: Sequence[SteeredLatent], names: Sequence[str], train: ImageData, pictures: ImageData,
    examples: Sequence[Mapping[str, Any]], options: DictConfig,
) -> Section:  # fmt: skip
    """The first latents with their top images, and pictures with captions before and at every α."""
    blocks: list[Block] = []
    for t, name, said in zip(turned, names, examples, strict=False):
        concept = train.class_names[t.label]
        called = f"named “{name}” · " if name and name != concept else ""
        top = strip([thumbnail(train[i]) for i in t.top[:STRIP] if i >= 0])
        right = f"{called}{100 * t.purity:.0f} % of its {options.top} strongest pictures · peak {t.peak:.2g}"
        alt = f"strongest pictures of latent {t.latent}"
        blocks.append(Cards([Card(f"latent {t.latent} · {concept}", [Strip(top, alt)], right=right)]))
        for goal, title in (("insert", "turned up"), ("suppress", "turned down")):
            heads = [Head(title), Head("unsteered"), *(Head(f"α = {a:g}") for a in options[goal])]
            rows = [
                [pictured(data_uri(thumbnail(pictures[i])), pictures.class_names[pictures.labels[i]], width=58),
                 *(marked(text, concept) for text in (before, *after))]
                for i, before, after in said[goal]
            ]  # fmt: skip
            blocks.append(Table("captions", "", heads, rows) if rows else "")
    about = Note(
        f"Pictures of the {options.shown} first latents, not selected by outcome; names of the concept are marked."
    )
    return Section("Captions while a latent is turned", about, blocks)


def marked(caption: str, concept: str) -> Markup:
    """The words of ``caption``, those marked that are one of the names of ``concept``."""
    names = {word for phrase in words_for(concept) for word in (phrase, phrase + "s") for word in word.split()}
    words = caption.split()
    return Markup(" ").join(
        Markup("<mark>{}</mark>").format(word) if word.lower().strip(".,;:!?") in names else word for word in words
    )


def doses(curves: pd.DataFrame, top_k: Sequence[int], judge: str) -> Section:
    """Figures over α."""
    return Section(
        "Dose and response",
        Note("Means over latents on the val split, with 95 % intervals; the strengths of the tables are chosen here."),
        Picture(dose_figure(curves), wide=True),
        Heading("Text and the latent's pictures", f"{judge}: cosine of the caption with the mean embedding of the "
                "latent's top K pictures, minus that of the unsteered caption"),
        Picture(nearness_figure(curves, top_k), wide=True),
    )  # fmt: skip


def latents(
    turned: Sequence[SteeredLatent], names: Sequence[str], table: pd.DataFrame, best: Best, options: DictConfig
) -> Section:
    """One row a latent: shares and passes of all methods for both goals, and the gain in cosine."""
    cells = {(r.latent, r.goal, r.method): r for r in table.itertuples()}
    methods = [(goal, method) for goal in ("insert", "suppress") for method in TITLES]
    heads = [Head("concept"), Head("latent"), Head("purity", ".2f"), Head("fires on", ".0f")]
    for goal, method in methods:
        alpha = f", α = {best[goal, method][0]:g}" if (goal, method) in best else ""
        heads.append(Head(f"{TITLES[method]}{alpha}", over={"insert": "named", "suppress": "gone"}[goal]))
    heads += [Head(title, over="rise of cosine", sign=True) for title in TITLES.values()]
    rows = []
    for t, name in zip(turned, names, strict=True):
        found = [cells.get((t.latent, goal, method)) for goal, method in methods]
        concept = next((of.concept for of in found if of is not None), "")
        gains = [None if of is None else getattr(of, f"gain_{max(options.top_k)}") for of in found[: len(TITLES)]]
        rows.append([
            concept, f"{t.latent} {name}".strip() if name != concept else str(t.latent), t.purity, t.images,
            *("" if of is None else f"{of.share:.2f} ({of.passed:.2f})" for of in found), *gains,
        ])  # fmt: skip
    about = (
        "Share of captions that reach the goal, and in brackets the share that meets both criteria; "
        f"{options.tested} pictures a latent and goal at most."
    )
    return Section("All latents", Note(about), Table("latents", "", heads, rows))


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
