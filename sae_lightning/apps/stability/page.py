"""What the page on stability shows: a map of all runs, partners beside their nulls, universal latents' pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from omegaconf import DictConfig

from sae_lightning.apps.names import names_of
from sae_lightning.apps.stability.activations import SAME_START, View
from sae_lightning.apps.stability.pairs import ACTIVATION, RELATIONS
from sae_lightning.apps.stability.universal import set_name
from sae_lightning.data import DataError, ImageData
from sae_lightning.evaluation.by_latent import top_images
from sae_lightning.rendering.figures import COLOURS, figure
from sae_lightning.rendering.page import Card, Cards, Fold, Heading, Picture, Section, Strip, plural
from sae_lightning.rendering.pictures import strip, thumbnail
from sae_lightning.rendering.table import Head, Table, number
from sae_lightning.runs.run import Run

NULL, CLASSES = "#9aa0ac", "#e08e1b"

TITLES = {
    "seed": "other seed", "expansion": "larger dictionary", "settings": "other settings",
    "expansion, same start": "larger, same start", "settings, same start": "other settings, same start",
    "backbone": "other backbone",
}  # fmt: skip

COLOUR = dict(zip(RELATIONS, COLOURS, strict=False))

PANELS = 3  # of the distributions beside each other

NUMBERED = 16  # runs up to which a cell of the map has its number


LEAD = """Which latents recur when a dictionary is trained again: with another seed, larger, with other settings, or on
another backbone. Latents are matched one to one so that the sum of similarities is largest."""


def run_map(names: Sequence[str], labels: Sequence[str], pairs: pd.DataFrame) -> str:
    """Runs × runs: held-out correlation of matched latents above the diagonal, what class means give below."""
    n = len(names)
    at = {name: i for i, name in enumerate(names)}
    values = np.full((n, n), np.nan)
    for row in pairs[pairs["kind"] == ACTIVATION].to_dict("records"):
        i, j = sorted((at[row["run_a"]], at[row["run_b"]]))
        values[i, j], values[j, i] = row["held_out_mean"], row.get("classes_mean", np.nan)
    size = (max(7.5, 2.6 + 0.52 * n), 0.9 + 0.36 * n) if n <= NUMBERED else (11, 8)
    with figure(*size) as drawing:
        axis = drawing.axis
        top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
        image = axis.imshow(values, cmap="YlGnBu", vmin=0, vmax=max(top, 1e-3), aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if n <= NUMBERED and np.isfinite(value):
                ink = "#fff" if value > 0.6 * top else "#1d2129"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
        axis.set_xticks(range(n), [str(i + 1) for i in range(n)])
        axis.set_yticks(range(n), [f"{i + 1}  {label}" for i, label in enumerate(labels)])
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.figure.colorbar(image, ax=axis, shrink=0.8, label="mean correlation")
    return drawing.svg


def distributions(matches: pd.DataFrame) -> str:
    """How alike partners are: cosines by relation beside a random dictionary's, correlations beside their nulls."""
    decoder, activation = (matches[matches["kind"] == kind] for kind in ("decoder", ACTIVATION))
    panels: list[tuple[str, dict[str, tuple[np.ndarray, str]], str]] = []
    for how, of in decoder.groupby("relation", sort=False):
        drawn = {"partners": (of["similarity"].to_numpy(), COLOUR[str(how)]),
                 "random dictionary": (of["null"].dropna().to_numpy(), NULL)}  # fmt: skip
        if "start" in of and of["start"].notna().any():
            drawn["untrained start"] = (of["start"].dropna().to_numpy(), CLASSES)
        panels.append((TITLES[str(how)], drawn, "decoder cosine"))
    of = activation[activation["relation"] == "backbone"]
    if len(of):
        drawn = {"partners": (of["similarity"].to_numpy(), COLOUR["backbone"]),
                 "on shuffled images": (of["null"].dropna().to_numpy(), NULL)}  # fmt: skip
        panels.append((f"{TITLES['backbone']}: as matched", drawn, "correlation"))
        drawn = {"partners": (of["held_out"].to_numpy(), COLOUR["backbone"])}
        if "classes" in of and of["classes"].notna().any():
            drawn["class means alone"] = (of["classes"].dropna().to_numpy(), CLASSES)
        panels.append((f"{TITLES['backbone']}: held out", drawn, "correlation"))
    rows = -(-len(panels) // PANELS)
    with figure(11, 2.6 * rows, rows, min(PANELS, max(2, len(panels)))) as drawing:
        axes = drawing.axes.ravel()
        for axis, (title, drawn, label) in zip(axes, panels, strict=False):
            _histogram(axis, drawn)
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_xlabel(label)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
    return drawing.svg


def _histogram(axis: Axes, drawn: Mapping[str, tuple[np.ndarray, str]]) -> None:
    lowest = min((float(values.min()) for values, _ in drawn.values() if len(values)), default=0.0)
    bins = np.linspace(min(0.0, lowest), 1, 41).tolist()
    for name, (values, colour) in drawn.items():
        if len(values):
            weights = np.full(len(values), 1 / len(values))
            axis.hist(values, bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.22)
            axis.hist(values, bins, weights=weights, histtype="step", color=colour, lw=1.3, label=name)
    axis.set_ylabel("share of latents")
    axis.legend(frameon=False, fontsize=8)


def frequency(matches: pd.DataFrame) -> str:
    """Mean similarity of partners over how often a latent fires, each relation with its null dashed."""
    with figure(11, 2.9, 1, 2) as drawing:
        left, right = drawing.axes[0]
        decoder = matches[(matches["kind"] == "decoder") & (matches["firing_a"] > 0)]
        activation = matches[(matches["kind"] == ACTIVATION) & (matches["firing_a"] > 0)]
        for axis, table, column, null in (
            (left, decoder, "similarity", "null"), (right, activation, "held_out", "classes"),
        ):  # fmt: skip
            for how, of in table.groupby("relation", sort=False):
                _curve(axis, of, column, COLOUR[str(how)], TITLES[str(how)], "-")
                if null in of:
                    _curve(axis, of, null, COLOUR[str(how)], None, "--")
            axis.set_xscale("log")
            axis.set_xlabel("share of images that the latent fires on")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=8)
        left.set_title("decoder cosine (dashed: random dictionary)", loc="left", fontsize=9)
        right.set_title("held-out correlation (dashed: class means alone)", loc="left", fontsize=9)
        left.set_visible(len(decoder) > 0)
    return drawing.svg


def _curve(axis: Axes, of: pd.DataFrame, column: str, colour: str, label: str | None, line: str) -> None:
    """Means over ten groups of latents of rising firing rate."""
    known = of.dropna(subset=[column])
    if len(known) < 20:
        return
    group = pd.qcut(known["firing_a"], 10, duplicates="drop")
    means = known.groupby(group, observed=True)[["firing_a", column]].mean()
    axis.plot(means["firing_a"], means[column], line, marker="o" if line == "-" else None, ms=3, lw=1.3, color=colour,
              label=label)  # fmt: skip


def beyond_class(tables: Mapping[str, pd.DataFrame]) -> str:
    """Universal latents' held-out correlations against what class means alone give; "" where there are no classes."""
    drawn: dict[str, Any] = {name: table for name, table in tables.items() if table["classes"].notna().all()}
    if not drawn:
        return ""
    with figure(5.2, 3.6) as drawing:
        axis = drawing.axis
        for colour, (name, table) in zip(COLOURS, drawn.items(), strict=False):
            axis.scatter(table["classes"], table["held_out"], s=22, color=colour, alpha=0.8, label=name)
        top = 1.05 * max(float(table[["classes", "held_out"]].max().max()) for table in drawn.values())
        axis.plot([0, top], [0, top], color=NULL, lw=1, ls="--")
        axis.set_xlabel("class means alone")
        axis.set_ylabel("held-out correlation, lowest pair")
        axis.legend(frameon=False, fontsize=8)
    return drawing.svg


Found = tuple[Sequence[View], pd.DataFrame, Mapping[str, Any]]  # a set of runs, its universal latents, and numbers


def sections(
    views: Sequence[View], pairs: pd.DataFrame, matches: pd.DataFrame, found: Sequence[Found],
    ids: Mapping[str, Sequence[str]], options: DictConfig, split: str,
) -> list[Section]:  # fmt: skip
    """All that the page shows below the headline figures."""
    placed = sorted(views, key=lambda view: (view.space, view.opened.sae.d_sae))
    same_start = bool(pairs["relation"].str.endswith(SAME_START).any())
    heads = [Head("run"), *(Head(title, ".0f") for title in ("latents", "alive", "matched by activation"))]
    rows = [[v.label, v.opened.sae.d_sae, int((v.fired > 0).sum()), len(v.latents)] for v in placed]
    shown = [
        Section(
            "All runs by what their latents fire on",
            f"Mean correlation of matched latents' activations: matched on {len(ids[options.fit])} images of "
            f"{options.fit}, measured on {len(ids[split])} of {split}, above the diagonal. Below it, what is left when "
            "each latent is known only by its class means: the baseline of backbones that merely know the classes. "
            f"Latents that fire on {options.min_images} images or more are matched."
            + (" Runs of one backbone and seed also share their start (below)." if same_start else ""),
            Picture(run_map([v.name for v in placed], [v.label for v in placed], pairs)),
            Fold("The runs", [Table("runs", "", heads, rows)], str(len(rows))),
        ),
        Section(
            "How alike partners are",
            "Assignment picks what chance makes large, so each null is matched in the same way: to a random dictionary "
            "with the second's mean and covariance, or on shuffled images.",
            Picture(distributions(matches), wide=True),
            Picture(frequency(matches), "By how often a latent fires", wide=True),
        ),
    ]
    if (pairs["kind"] == "decoder").any():
        shown.append(Section("Runs on the same features", *same_features(pairs, same_start)))
    rows = backbone_rows(pairs)
    if rows:
        titles = ("correlation, as matched", "on shuffled images", "held out", "class means alone")
        heads = [Head("runs"), Head("latents"), Head("matched", ".0f"), *map(Head, titles), Head("above 0.5", ".2f")]
        fold = Fold("All pairs", [Table("backbones", "", heads, rows)], plural(len(rows), "pair"))
        shown.append(Section("Runs of different backbones", fold))
    if found:
        about = (
            f"One latent of each backbone, all correlated with all others above what the best of "
            f"{options.universal.shuffles} shufflings of the images reached (a level of 5 % for the whole search). The "
            f"score is the lowest correlation of any two members; held out, it is measured on {len(ids[split])} images "
            f"of {split} that played no part in the search. Below the diagonal of the figure, classes explain it."
        )
        beyond = beyond_class({set_name(of): table for of, table, _ in found if len(table)})
        sets = [shown_set(*each, split, ids[split], options.universal) for each in found]
        shown.append(Section("Universal latents", about, Picture(beyond) if beyond else "", sets))
    return shown


def same_features(pairs: pd.DataFrame, same_start: bool) -> list[Any]:
    """Runs on the same features: decoder, encoder and activation side by side, one row a pair."""
    heads = [Head("runs"), Head("differ in"), Head("decoder"), *([Head("untrained start")] if same_start else []),
             Head("above 0.7"), Head("first's nearest", ".2f"), Head("second's nearest", ".2f"), Head("encoder"),
             Head("agree", ".2f"), Head("correlation, held out")]  # fmt: skip
    rows = []
    for _, of in pairs[pairs["kind"] == "decoder"].iterrows():
        same = pairs[(pairs["run_a"] == of["run_a"]) & (pairs["run_b"] == of["run_b"])].set_index("kind")
        rows.append([
            f"{of['label_a']} – {of['label_b']}", of["relation"], _beside(of, "mean"),
            *([of["start_mean"]] if same_start else []), _beside(of, "above_0.7", ".2f"), of["nearest_a_above_0.7"],
            of["nearest_b_above_0.7"], _beside(same.loc["encoder"], "mean"), of["agree"],
            same.loc[ACTIVATION, "held_out_mean"],
        ])  # fmt: skip
    about = (
        "Cosines of matched decoder rows, and apart from that of encoder rows, over alive latents; in brackets a "
        "random dictionary's. “Above 0.7” is the share of the smaller dictionary that recurs, “nearest” the share of "
        "each run's latents with any of the other's that near: of a larger second run, how much of it is new. “Agree”: "
        "the same partner by decoder and by encoder."
    )
    start = (
        "Runs of one seed start from the same directions (the smaller dictionary's are the first of the larger one's), "
        "so that what stays near its start looks stable. “Untrained start” is the cosine that the first run's "
        "directions have with the second's before training: only what is above it was learnt alike. Train with other "
        "seeds to tell nesting from this."
    )
    return [about, start if same_start else "", Table("directions", "", heads, rows)]


def _beside(of: pd.Series, name: str, form: str = ".3f") -> str:
    """A figure of a pair with its null in brackets."""
    return f"{number(of[name], form)} ({number(of[f'null_{name}'], form)})"


def backbone_rows(pairs: pd.DataFrame) -> list[list[Any]]:
    """One row a pair of runs of different backbones, the most alike first."""
    of = pairs[(pairs["relation"] == "backbone") & (pairs["kind"] == ACTIVATION)]
    return [
        [f"{row['label_a']} – {row['label_b']}", f"{row['latents_a']}, {row['latents_b']}", row["matched"],
         row["mean"], row["null_mean"], row["held_out_mean"], row.get("classes_mean"), row["above_0.5"]]
        for row in of.sort_values("held_out_mean", ascending=False).to_dict("records")
    ]  # fmt: skip


def shown_set(
    views: Sequence[View], table: pd.DataFrame, numbers: Mapping[str, Any], split: str, image_ids: Sequence[str],
    options: DictConfig,
) -> list[Any]:  # fmt: skip
    """A set's universal latents: numbers of all, and pictures of the first ``options.shown``."""
    names, titles = [names_of(view.opened) for view in views], backbone_titles(views)
    pictures = image_data(views[0].opened, split)
    places = None if pictures is None else pictures.index_of(image_ids)
    cards: list[Card] = []
    rows: list[list[Any]] = []
    for row in table.to_dict("records"):
        members = [int(row[f"latent_{i}"]) for i in range(len(views))]
        called = [of[latent] for of, latent in zip(names, members, strict=True)]
        rows.append([row["rank"], row["score"], row["held_out"], row["classes"],
                     *(f"{latent} {name}".strip() for latent, name in zip(members, called, strict=True))])  # fmt: skip
        if pictures is None or places is None or len(cards) == options.shown:
            continue
        strips = []
        for view, title, latent, name in zip(views, titles, members, called, strict=True):
            images = places[strongest(view, latent, options.images)].tolist()
            if images:
                uri, alt = strip([thumbnail(pictures[i]) for i in images]), f"top images of latent {latent} of {title}"
                strips.append(Strip(uri, alt, left=title, right=f"{latent} {name}".strip()))
        right = f"held out {number(row['held_out'], '.2f')} · class means {number(row['classes'], '.2f')}"
        name = common_name(called)
        cards.append(Card(f"{row['rank']} · {name}" if name else str(row["rank"]), strips, right=right))
    heads = [Head("rank", ".0f"), *map(Head, ("as found", "held out", "class means", *titles))]
    found, held_out = numbers["found"], numbers["held_out"]
    return [
        Heading(set_name(views), ", ".join(titles)),
        f"{plural(found, 'universal latent')} above {numbers['threshold']:.3f}; {numbers['by_chance']} by the same "
        f"search on shuffled images. Held out, {held_out} {'is' if held_out == 1 else 'are'} still above.",
        Cards(cards) if cards else "",
        Fold("All of them", [Table("universal", "", heads, rows)], str(len(rows))) if rows else "",
    ]


def strongest(view: View, latent: int, n: int) -> np.ndarray:
    """The held-out images that ``latent`` fires on most, at most ``n``, the strongest first."""
    images = top_images(view.held_out.codes[np.searchsorted(view.latents, [latent])].T, n)[0]
    return images[images >= 0]


def common_name(names: Sequence[str]) -> str:
    """The name that most members have, "" where none has one."""
    told = [name for name in names if name]
    return max(dict.fromkeys(told), key=told.count) if told else ""


def backbone_titles(views: Sequence[View]) -> list[str]:
    """Backbones, with layer and kind of features where one backbone is there twice."""
    backbones = [str(view.space[0]) for view in views]
    return [
        backbone if backbones.count(backbone) == 1 else f"{backbone} {view.space[2]} layer {view.space[1]}"
        for backbone, view in zip(backbones, views, strict=True)
    ]


def image_data(opened: Run, split: str) -> ImageData | None:
    """The run's pictures; None where it was trained on a store or a stream."""
    try:
        return opened.images(split)
    except DataError:
        return None
