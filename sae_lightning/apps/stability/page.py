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
from sae_lightning.rendering.pictures import strip, thumbnail
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


def context(
    views: Sequence[View], pairs: pd.DataFrame, matches: pd.DataFrame, found: Sequence[Found],
    ids: Mapping[str, Sequence[str]], options: DictConfig, split: str, in_all: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the template takes."""
    order = sorted(range(len(views)), key=lambda i: (views[i].space, views[i].opened.sae.d_sae))
    placed = [views[i] for i in order]
    return {
        "runs": [{"label": v.label, "name": v.name, "d_sae": v.opened.sae.d_sae, "alive": int((v.fired > 0).sum()),
                  "matched": len(v.latents)} for v in placed],
        "map": run_map([v.name for v in placed], [v.label for v in placed], pairs),
        "directions": direction_rows(pairs), "backbones": backbone_rows(pairs),
        "same_start": bool(pairs["relation"].str.endswith(SAME_START).any()),
        "distributions": distributions(matches), "frequency": frequency(matches),
        "sets": [shown_set(*each, split, ids[split], options.universal.shown, options.universal.images)
                 for each in found],
        "beyond": beyond_class({set_name(of): table for of, table, _ in found if len(table)}),
        "fit": options.fit, "split": split, "n_fit": len(ids[options.fit]), "n_split": len(ids[split]),
        "min_images": options.min_images, "shuffles": options.universal.shuffles,
        "n_pairs": len(pairs[["run_a", "run_b"]].drop_duplicates()), "in_all": in_all,
    }  # fmt: skip


def direction_rows(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """One row a pair of runs on the same features: decoder, encoder and activation side by side."""
    rows = []
    for _, of in pairs[pairs["kind"] == "decoder"].iterrows():
        same = pairs[(pairs["run_a"] == of["run_a"]) & (pairs["run_b"] == of["run_b"])].set_index("kind")
        rows.append({
            "relation": of["relation"], "a": of["label_a"], "b": of["label_b"], "decoder": of, "agree": of["agree"],
            "encoder": same.loc["encoder"], "activation": same.loc[ACTIVATION],
        })  # fmt: skip
    return rows


def backbone_rows(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """One row a pair of runs of different backbones, the most alike first."""
    of = pairs[(pairs["relation"] == "backbone") & (pairs["kind"] == ACTIVATION)]
    return of.sort_values("held_out_mean", ascending=False).to_dict("records")


def shown_set(
    views: Sequence[View], table: pd.DataFrame, numbers: Mapping[str, Any], split: str, image_ids: Sequence[str],
    shown: int, n_images: int,
) -> dict[str, Any]:  # fmt: skip
    """A set's universal latents: numbers of all, and pictures of the first ``shown``."""
    names = [latent_names(view.opened) for view in views]
    titles = backbone_titles(views)
    pictures = image_data(views[0].opened, split)
    places = None if pictures is None else pictures.index_of(image_ids)
    cards: list[dict[str, Any]] = []
    for row in table.to_dict("records"):
        members: list[dict[str, Any]] = []
        for i, view in enumerate(views):
            latent = int(row[f"latent_{i}"])
            images = None
            if pictures is not None and places is not None and len(cards) < shown:
                images = picture_row(pictures, places[strongest(view, latent, n_images)])
            members.append({"title": titles[i], "latent": latent, "name": names[i][latent], "images": images})
        cards.append({**row, "members": members, "pictured": members[0]["images"] is not None,
                      "title": common_name([member["name"] for member in members])})  # fmt: skip
    return {"title": set_name(views), "backbones": titles, "cards": cards, **numbers}


def strongest(view: View, latent: int, n: int) -> np.ndarray:
    """The held-out images that ``latent`` fires on most, at most ``n``, the strongest first."""
    images = top_images(view.held_out.codes[np.searchsorted(view.latents, [latent])].T, n)[0]
    return images[images >= 0]


def picture_row(pictures: ImageData, images: np.ndarray) -> str | None:
    """The images side by side as a data URI; None without any."""
    return strip([thumbnail(pictures[i]) for i in images.tolist()]) if len(images) else None


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


def latent_names(opened: Run) -> list[str]:
    """``names_of``; all "" where the run has no pictures to name them by."""
    try:
        return names_of(opened)
    except DataError:
        return [""] * opened.sae.d_sae


def image_data(opened: Run, split: str) -> ImageData | None:
    """The run's pictures; None where it was trained on a store or a stream."""
    try:
        return opened.images(split)
    except DataError:
        return None
