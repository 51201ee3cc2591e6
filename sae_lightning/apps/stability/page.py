"""What the page on stability shows: a map of all runs, partners beside their nulls, universal latents' pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from sae_lightning.apps.names import names_of
from sae_lightning.apps.opened import Opened
from sae_lightning.apps.stability.figures import beyond_class, distributions, frequency, run_map
from sae_lightning.apps.stability.pairs import ACTIVATION
from sae_lightning.apps.stability.universal import set_name
from sae_lightning.apps.stability.views import SAME_START, View
from sae_lightning.data import DataError, ImageData
from sae_lightning.report.strips import strip, thumbnail

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
                images = picture_row(pictures, places[top_images(view, latent, n_images)])
            members.append({"title": titles[i], "latent": latent, "name": names[i][latent], "images": images})
        cards.append({**row, "members": members, "pictured": members[0]["images"] is not None,
                      "title": common_name([member["name"] for member in members])})  # fmt: skip
    return {"title": set_name(views), "backbones": titles, "cards": cards, **numbers}


def top_images(view: View, latent: int, n: int) -> np.ndarray:
    """The held-out images that ``latent`` fires on most, at most ``n``, the strongest first."""
    row = view.held_out.codes[[int(np.searchsorted(view.latents, latent))]]
    fired = row.data > 0
    return row.indices[fired][np.argsort(-row.data[fired], kind="stable")[:n]]


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


def latent_names(opened: Opened) -> list[str]:
    """``names_of``; all "" where the run has no pictures to name them by."""
    try:
        return names_of(opened)
    except DataError:
        return [""] * opened.sae.d_sae


def image_data(opened: Opened, split: str) -> ImageData | None:
    """The run's pictures; None where it was trained on a store or a stream."""
    try:
        return opened.images(split)
    except DataError:
        return None
