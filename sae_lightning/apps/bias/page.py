"""Figures of the application bias: dose and response, magnitudes by prediction, the planted check."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from sae_lightning.apps.bias.dose import Dose
from sae_lightning.apps.bias.planted import Check
from sae_lightning.apps.bias.study import Study
from sae_lightning.rendering.figures import COLOURS, figure

POSITIVE, NEGATIVE, GREY = COLOURS[1], COLOURS[0], "#8a8f99"

BINS = 24


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
