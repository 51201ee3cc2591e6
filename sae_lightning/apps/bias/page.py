"""What the page on bias shows: dose and response of single latents, the table of latents, the planted check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from omegaconf import DictConfig
from PIL import Image

from sae_lightning.apps.bias.dose import Dose, dose, typical
from sae_lightning.apps.bias.planted import Check, Mitigation, mark
from sae_lightning.apps.bias.study import LEVEL, Study, Task
from sae_lightning.apps.edits import WholeImages
from sae_lightning.apps.names import called
from sae_lightning.data import DataError, ImageData
from sae_lightning.evaluation.by_latent import top_images
from sae_lightning.rendering.figures import COLOURS, figure
from sae_lightning.rendering.page import Beside, Card, Cards, Heading, Key, Note, Picture, Section, Strip, pictured
from sae_lightning.rendering.pictures import strip, thumbnail
from sae_lightning.rendering.table import Head, Table
from sae_lightning.runs.run import Run

Change = Callable[[Image.Image], Image.Image]

TOP = 8  # images in a latent's strip

POSITIVE, NEGATIVE, GREY = COLOURS[1], COLOURS[0], "#8a8f99"

BINS = 24


@dataclass(frozen=True)
class Pictures:
    """The pictures of the task's images, by their number in the task; None where the run has none."""

    data: ImageData | None
    places: np.ndarray

    @staticmethod
    def of(opened: Run, split: str, rows: np.ndarray) -> Pictures:
        """Those of ``rows`` [n] of the store of ``split``."""
        try:
            data = opened.images(split)
        except DataError:
            return Pictures(None, rows)
        ids = opened.store(split).image_ids
        return Pictures(data, data.index_of([ids[i] for i in rows]))

    def strip(self, images: Sequence[int] | np.ndarray, change: Change = lambda image: image) -> str:
        """The ``images`` side by side, each after a ``change``; "" without pictures."""
        there = [int(self.places[i]) for i in images if i >= 0]
        return strip([thumbnail(change(self.data[i])) for i in there]) if self.data is not None and there else ""


def lead(n_train: int, n: int, split: str, task: Task) -> str:
    """What is explained."""
    return (
        f"A logistic regression on the encoder's features, fitted to {n_train} training images and explained on {n} "
        f"held-out ones ({split}). It calls {task.title[0]} positive. Intervals are 95 %; q is the false discovery "
        "rate over latents (Benjamini–Hochberg)."
    )


def doses(
    found: Study, images: WholeImages, base: np.ndarray, chosen: np.ndarray, reach: float, task: Task,
    names: Sequence[str], pictures: Pictures,
) -> Section:  # fmt: skip
    """The ``chosen`` latents with their curves."""
    if not len(chosen):
        nothing = "No latent's magnitude goes with the prediction at a false discovery rate of 5 %."
        return Section("Dose and response", nothing)
    examples = typical(base, found.truth)
    key = Key(list(zip(task.title, (POSITIVE, NEGATIVE), strict=True)))
    shown = [pictured(uri, side, width=40) for side, i in zip(task.title, examples, strict=True)
             if (uri := pictures.strip([i]))]  # fmt: skip
    columns = []
    for latent in chosen.tolist():
        row, own = found.table.iloc[latent], images.magnitudes[:, [latent]].toarray().ravel()
        curve = dose(latent, float(found.effects[latent]), base, found.truth, images, examples, reach)
        level = "not level within reach" if curve.plateau is None else f"level from {curve.plateau:.3g} on"
        footer = (
            f"AUC of the predicted classes {_interval(*row[['auc', 'auc_lo', 'auc_hi']])}; direct effect "
            f"{row['effect']:+.3f}; {level}"
        )
        uri = pictures.strip(top_images(images.magnitudes, TOP, np.array([latent]))[0])
        card = Card(called(latent, names), [Strip(uri, "its top images")] if uri else [], footer=footer)
        figures = [Picture(response(curve)), Picture(spread(own, found.predicted, task.title))]
        columns.append([Cards([card], columns=1), *figures])
    return Section(
        "Dose and response",
        "The latents whose magnitudes go most with the prediction, each forced to a magnitude on every image. Lines "
        "are means over a class with their interval; dashed lines are one example of each class, whose own magnitude "
        "is the ring. Grey: magnitudes that are usual. Dotted upright: from here the curves are level.",
        key, shown, Beside(columns, "repeat(auto-fill, minmax(min(100%, 380px), 1fr))"),
        Note("Below each: magnitudes by predicted class, where the latent fires, with the share of images on which it "
             "does."),
    )  # fmt: skip


def latents(found: Study, images: WholeImages, names: Sequence[str], pictures: Pictures, n: int) -> Section:
    """A table of ``n`` latents: found ones first, then by association with the prediction."""
    value = np.abs(found.table["auc"].to_numpy() - 0.5)
    order = found.tested[np.argsort(-value[found.tested], kind="stable")]
    chosen = np.array(list(dict.fromkeys([*found.found.tolist(), *order.tolist()]))[:n], dtype=np.int64)
    rows = []
    for latent, top in zip(chosen.tolist(), top_images(images.magnitudes, TOP, chosen), strict=True):
        row, uri = found.table.iloc[latent], pictures.strip(top)
        image = pictured(uri, f"top images of latent {latent}", width=36 * TOP) if uri else ""
        rows.append([called(latent, names), image, row["images"], row["effect"],
                     *(_tested(row, name) for name in ("auc", "truth", "errors", "excess"))])  # fmt: skip
    heads = [Head("latent"), Head("top images"), Head("fires on", ".0f"), Head("effect", sign=True),
             *map(Head, ("predicted", "true", "errors", "excess"))]  # fmt: skip
    return Section(
        "Latents",
        "“Predicted” is the AUC of a latent's magnitude between images called positive and negative, “true” that "
        "between the true classes, “errors” that of the prediction within each true class: it tells what the "
        "classifier uses, rightly or not. “Excess” is bias beyond the task: the log-odds per deviation of the "
        "magnitude that the classifier gives the latent beyond what the held-out images bear out; 0 for a latent that "
        "deserves its weight. Bold: q below 0.05. The excess can only be seen on images in which a shortcut no longer "
        "goes with the class.",
        Table("latents", "", heads, rows),
        Note(f"{len(rows)} of {len(found.tested)} latents that fire on 10 images or more; {len(found.found)} with an "
             "excess. All are in bias.parquet."),
    )  # fmt: skip


def known_bias(
    found: Check | None, why_not: str, names: Sequence[str], pictures: Pictures, plant: DictConfig, task: Task
) -> Section:
    """The planted check, or ``why_not``."""
    title, what = "A bias that is known", plant.attribute
    if found is None:
        return Section(title, why_not)
    few = range(min(TOP, len(pictures.places)))
    strips = [
        pictured(pictures.strip(few, change), alt, width=44 * TOP)
        for alt, change in (("pictures", lambda image: image),
                            (f"with the {what}", lambda image: mark(image, what, plant.strength)))
    ]  # fmt: skip
    rows = []
    for latent in found.biased.ranked[:TOP].tolist():
        row, control = found.biased.table.iloc[latent], found.control.table.iloc[latent]
        rows.append([called(latent, names), _interval(*found.detection(latent)), row["effect"],
                     _tested(row, "excess"), _tested(control, "excess")])  # fmt: skip
    heads = [Head("latent"), Head(f"tells the {what} (AUC)"), Head("effect", sign=True), Head("excess"),
             Head("in the control")]  # fmt: skip
    return Section(
        title,
        f"Into the classifier's training pictures a {what} was put so that it correlates with {task.title[0]} by "
        f"{plant.correlation}; in the control by 0. The SAE has never seen it. On held-out pictures it is independent "
        "of the class, so what the classifier makes of it there is bias. Found are latents that it overrates, and with "
        "the opposite sign those that it neglects for them.",
        strips,
        Heading(f"Excess against what tells the {what}", "filled: found; red: the latent that tells it best"),
        Picture(detections(found), wide=True),
        Table("surest", "The surest latents", heads, rows),
        Heading("Taking it out", "accuracy on pictures of another split"),
        mitigation(found.mitigation, what),
    )


def mitigation(m: Mitigation | None, what: str) -> list[Any]:
    """What neutralising the found latents does."""
    if m is None:
        return [
            "No latent was found whose effect is in the direction of its excess, so there is nothing to neutralise."
        ]
    heads = [Head(f"the {what} speaks"), Head("biased classifier"),
             Head(f"{len(m.latents)} found latents neutralised"), Head("as many random ones")]  # fmt: skip
    rows = [
        [words, *(_interval(*part[kind], digits=3) for part in (m.before, m.found, m.random))]
        for kind, words in (("conflicting", "against the class"), ("aligned", "for the class"))
    ]
    return [
        Table("mitigation", "", heads, rows),
        "A latent is neutralised by giving it its mean amount in every picture: "
        f"{', '.join(map(str, m.latents.tolist()))}. Where the {what} speaks against the class that gains "
        f"{_interval(*m.gain, digits=3)}, and {_interval(*m.over_random, digits=3)} more than random latents do.",
    ]


def _interval(value: float, lo: float, hi: float, digits: int = 2) -> str:
    """An estimate with its interval; "" where it is not defined."""
    return f"{value:.{digits}f} ({lo:.{digits}f} to {hi:.{digits}f})" if np.isfinite(value) else ""


def _tested(row: pd.Series, name: str) -> str:
    """An estimate of a latent with its interval, bold where q is below 0.05."""
    text = _interval(*row[[name, f"{name}_lo", f"{name}_hi"]])
    return Markup("<b>{}</b>").format(text) if row[f"{name}_q"] < LEVEL else text


def response(found: Dose) -> str:
    """Probability of the positive class over a latent's forced magnitude [MSAE Figs. 6 and 23], SVG.

    Lines with bands are means of a class's images with their 95 % interval, dashed ones an example each; a mark is an
    example's own magnitude, the grey area what is usual, the dotted line where the curves level off.
    """
    with figure(3.7, 2.3) as drawing:
        axis = drawing.axis
        axis.axvspan(0, found.usual, color="#000", alpha=0.05, lw=0)
        axis.axhline(0.5, color=GREY, lw=0.8, ls=":")
        for i, (colour, mean) in enumerate(((POSITIVE, found.positive), (NEGATIVE, found.negative))):
            axis.fill_between(found.magnitudes, mean.lo, mean.hi, color=colour, alpha=0.2, lw=0)
            axis.plot(found.magnitudes, mean.mean, color=colour, lw=1.6)
            axis.plot(found.magnitudes, found.examples[i], color=colour, lw=1, ls=(0, (4, 2)))
            axis.plot(found.original[i], found.before[i], "o", color="#fff", mec=colour, mew=1.4, ms=5, clip_on=False)
        if found.plateau is not None:
            axis.axvline(found.plateau, color="#444", lw=0.9, ls=":")
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlim(0, found.magnitudes[-1])
        axis.set_xlabel("forced magnitude")
        axis.set_ylabel("probability")
    return drawing.svg


def spread(magnitudes: np.ndarray, predicted: np.ndarray, sides: tuple[str, str]) -> str:
    """Densities and box plots of a latent's ``magnitudes`` [n] by ``predicted`` class [n] [MSAE Fig. 24], SVG.

    Only magnitudes above zero are drawn; each density has the area of the share of images on which the latent fires.
    """
    groups = [(POSITIVE, sides[0], magnitudes[predicted]), (NEGATIVE, sides[1], magnitudes[~predicted])]
    edges = np.linspace(0, max(float(magnitudes.max()), 1e-9), BINS + 1)
    with figure(3.7, 2.3, 2, 1, sharex=True, height_ratios=(2, 1)) as drawing:
        above, below = drawing.axes[:, 0]
        for colour, _, values in groups:
            heights = np.histogram(values[values > 0], edges)[0] / max(1, len(values)) / np.diff(edges)
            above.stairs(heights, edges, color=colour, lw=1.2)
            above.stairs(heights, edges, color=colour, alpha=0.2, fill=True)
        fires = [values[values > 0] for _, _, values in groups]
        boxes = below.boxplot(
            fires, orientation="horizontal", widths=0.6, showfliers=False, patch_artist=True,
            medianprops={"color": "#222"},
        )  # fmt: skip
        for box, (colour, _, _) in zip(boxes["boxes"], groups, strict=True):
            box.set(facecolor=colour, alpha=0.45)
        labels = [f"{name} {100 * (values > 0).mean() if len(values) else 0:.0f} %" for _, name, values in groups]
        below.set_yticks([1, 2], labels)
        below.invert_yaxis()
        below.grid(False, axis="y")
        below.set_xlabel("magnitude where it fires")
        above.set_ylabel("density")
    return drawing.svg


def detections(found: Check) -> str:
    """Excess of every latent against how well it tells the planted attribute, with the bias planted and without, SVG.

    Filled: found at a false discovery rate of 5 %; the bars of the latent that tells the attribute best are its
    95 % interval.
    """
    with figure(8.4, 3.0, 1, 2, sharex=True, sharey=True) as drawing:
        axes = drawing.axes[0]
        for axis, each, title in zip(axes, (found.biased, found.control), ("bias planted", "control"), strict=True):
            _detection(axis, found, each)
            axis.set_title(f"{title}: {len(each.found)} of {len(each.tested)} latents found", loc="left", fontsize=9)
        axes[0].set_ylabel("excess, log-odds per deviation")
    return drawing.svg


def _detection(axis: Axes, found: Check, each: Study) -> None:
    table, tells = each.table, found.detects.value
    sure = np.zeros(len(table), dtype=bool)
    sure[each.found] = True
    axis.axhline(0, color=GREY, lw=0.8)
    axis.axvline(0.5, color=GREY, lw=0.8, ls=":")
    for chosen, alpha in ((~sure, 0.25), (sure, 0.85)):
        axis.scatter(tells[chosen], table["excess"][chosen], s=12, color=NEGATIVE, alpha=alpha, lw=0)
    best = table.iloc[found.best]
    error = [[best["excess"] - best["excess_lo"]], [best["excess_hi"] - best["excess"]]]
    axis.errorbar(tells[found.best], best["excess"], error, fmt="o", ms=5, color=POSITIVE, capsize=3, lw=1.4)
    axis.set_xlabel("tells the planted attribute (AUC)")
