"""Cards of latents, by their images: chosen ones of a run, those of equal rank in two, and those by Moran's I."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sae_lightning.backbones.seen import seen_by
from sae_lightning.data import ImageData
from sae_lightning.evaluation.by_latent import BANDS, ENOUGH
from sae_lightning.features.manifest import StoreError
from sae_lightning.features.source import Source
from sae_lightning.rendering.page import Block, Card, Cards, Fold, Heading, Note, Section, Strip
from sae_lightning.rendering.pictures import heat, overlay, strip, thumbnail
from sae_lightning.rendering.table import NOTHING, number
from sae_lightning.report.benchmark import Scored, by_backbone
from sae_lightning.runs.run import BAND_IMAGES, LATENTS, TOP_IMAGES
from sae_lightning.saes.artefact import read_tensors


def common_ranks(without: Mapping[str, Tensor], with_loss: Mapping[str, Tensor], n: int = 6) -> list[int]:
    """``n`` ranks kept for both runs at which both latents fire, spread evenly over all of these, ascending.

    Nothing but the ranks and whether a latent fires at all decides; ranks below are dead in one run.
    """
    fires = [set(t["ranks"][(t["images"] >= 0).flatten(1).any(1)].tolist()) for t in (without, with_loss)]
    both = sorted(fires[0] & fires[1])
    return [both[i] for i in np.unique(np.linspace(0, len(both) - 1, n).round().astype(int))] if both else []


def band_grid(
    runs: tuple[Mapping[str, Any], Mapping[str, Any]], images: tuple[ImageData, ImageData], n: int = 6
) -> list[Heading | Cards]:
    """For each rank a card of the latent without MonoLoss and one of that with it, of three strips each."""
    read = [read_tensors(run["folder"] / BAND_IMAGES) for run in runs]
    blocks: list[Heading | Cards] = []
    for rank in common_ranks(read[0][0], read[1][0], n):
        sides = zip(("without", "with"), read, images, strict=True)
        cards = [_bands(t, metadata, pictures, rank, side) for side, (t, metadata), pictures in sides]
        blocks += [Heading(f"Rank {rank}"), Cards(cards, columns=2)]
    return blocks


def _bands(t: dict[str, Tensor], metadata: dict[str, str], images: ImageData, rank: int, side: str) -> Card:
    """The card of the latent at ``rank`` of one run: its strongest, middle and weakest images."""
    i = int((t["ranks"] == rank).nonzero()[0])
    ids, strips = json.loads(metadata["image_ids"]), []
    for name, row, values in zip(BANDS, t["images"][i], t["values"][i], strict=True):
        own = row[row >= 0]
        if len(own):
            places = images.index_of([ids[str(int(x))] for x in own]).tolist()
            classes = ", ".join(images.class_names[images.labels[x]] for x in places)
            strips.append(Strip(
                strip([thumbnail(images[x]) for x in places], BAND_ROW), f"{name} images: {classes}",
                min(len(own) / min(len(row), BAND_ROW), 1.0), name,
                f"{float(values[0]):.2f} – {float(values[len(own) - 1]):.2f}",
            ))  # fmt: skip
    return Card(f"latent {int(t['latents'][i])}", strips, side, f"MonoScore {number(float(t['monoscore'][i]))}")


BAND_ROW = 4  # pictures a line of a band

ROW, CARD = 3, 320  # pictures a line of a card, and its least width in pixels

GROUPS = {  # in the order of the page
    "purest": f"Selected: the highest top-9 class purity among latents that fire on at least {ENOUGH} images.",
    "random": f"Drawn at random among latents that fire on at least {ENOUGH} images, or if none do, among all.",
    "most used": "The latents that fire on the most patches.",
    "high Moran": "Drawn from the top 5 % of Moran's I among the latents that have one: connected regions.",
    "mean Moran": "The latents whose Moran's I is nearest to the mean.",
    "low Moran": "Drawn from the lowest 5 % of Moran's I: scattered patches.",
}

MORAN = " Moran"  # how the names of those groups end

PAIRED = 6  # pictures of a latent that are shown twice, plain and tinted

AUDITED = 8  # backbones whose latents of high, mean and low Moran's I are set side by side


def latent_groups(
    run: Mapping[str, Any], images: ImageData, ends: str = "", n_cards: int | None = None, n_images: int | None = None
) -> list[dict[str, Any]]:
    """The cards of a run's chosen latents, grouped, those worth seeing first; sheets are drawn from the images' own
    pixels, of what the encoder saw of them.

    Only groups whose name ``ends`` so, with the first ``n_cards`` latents and ``n_images`` images of each.
    """
    t, metadata = read_tensors(run["folder"] / TOP_IMAGES)
    moran = read_tensors(run["folder"] / LATENTS)[0].get("moran")
    names, ids = metadata["groups"].split("|"), json.loads(metadata["image_ids"])
    height, width = map(int, metadata["grid"].split("x"))
    seen = seen_by(run["cfg"]["config"]["backbone"]) if height * width > 1 else None

    @cache
    def drawn(place: int) -> Image.Image:
        return thumbnail(images[place] if seen is None else seen(images[place]))

    place = dict(zip(ids, images.index_of(list(ids.values())).tolist(), strict=True))  # rows of the store
    groups = []
    for g, name in sorted(enumerate(names), key=lambda named: [*GROUPS, named[1]].index(named[1])):
        cards: list[dict[str, Any]] = []
        members = (t["group"] == g).nonzero().squeeze(1).tolist()
        if name == "random":  # of an earlier evaluation, which drew them among all
            members = [i for i in members if t["images_fired"][i] >= ENOUGH] or members
        if not name.endswith(ends) or not members:
            continue
        for i in members[:n_cards]:
            most = n_images or (PAIRED if name.endswith(MORAN) else None)
            chosen = [place[str(int(x))] for x in t["images"][i] if x >= 0][:most]
            if not chosen:
                continue
            pictures = [drawn(x) for x in chosen]
            maps = t["maps"][i].float().numpy().reshape(-1, height, width)
            peak = float(t["peak"][i])
            marked = heat if name.endswith(MORAN) else overlay if seen else lambda picture, _: picture
            lit = [marked(p, m) for p, m in zip(pictures, maps, strict=False)]
            label, count = int(t["label"][i]), int((t["images"][i] >= 0).sum())
            cards.append({
                "latent": int(t["latents"][i]), "plain": strip(pictures, ROW), "lit": strip(lit, ROW),
                "share": float(t["firing_share"][i]), "peak": peak,
                "fired": int(t["images_fired"][i]), "shown": len(chosen),
                "makeup": f"{round(float(t['purity'][i]) * count)}/{count} {images.class_names[label]}",
                "purity": float(t["purity"][i]),
                "moran": NOTHING if moran is None else number(float(moran[int(t["latents"][i])])),
                "alt": ", ".join(images.class_names[images.labels[x]] for x in chosen),
            })  # fmt: skip
        groups.append({
            "name": name, "title": name[0].upper() + name[1:], "about": GROUPS.get(name, ""), "cards": cards,
            "heat": name.endswith(MORAN),
        })  # fmt: skip
    return groups


def pictures(run: Mapping[str, Any]) -> ImageData | None:
    """The pictures that a run was scored on; None where the config names only a store, or a stream of images.

    StoreError when they, or the backbone, have changed since.
    """
    source = Source.of(run["cfg"]["config"])
    if source.given:
        return None
    images = source.images(run["split"])
    if source.fingerprint(images) != run["store"]:
        raise StoreError(
            f"The images or the backbone of {run['name']} are not those it was scored on; evaluate it again."
        )
    return images if isinstance(images, ImageData) else None


def cards_of(group: Mapping[str, Any]) -> list[Card]:
    """The cards of a group of latents: their top images with where they fire; of heat also the plain ones."""
    cards = []
    for c in group["cards"]:
        share, how = min(c["shown"] / ROW, 1.0), "tinted" if group["heat"] else "outlined"
        plain = [Strip(c["plain"], f"top images: {c['alt']}", share)] if group["heat"] else []
        what = "the same" if plain else f"top images: {c['alt']}"
        lit = Strip(c["lit"], f"{what}, {how} where the latent fires", share)
        footer = f"fires on {100 * c['share']:.2f} % of patches, in {c['fired']} images · peak {c['peak']:.2f}"
        moran = f" · Moran's I {c['moran']}" if c["moran"] != NOTHING else ""
        cards.append(Card(f"latent {c['latent']}", [*plain, lit], right=c["makeup"], footer=footer + moran))
    return cards


def audit(saes: Sequence[Scored]) -> list[Heading | Cards]:
    """A latent each of high, mean and low Moran's I of one SAE a backbone, the first that has them [App. H, Fig. 5]."""
    blocks: list[Heading | Cards] = []
    for title, members in list(by_backbone(saes).items())[:AUDITED]:
        for sae in members:
            found = pictures(sae.run)
            groups = [] if found is None else latent_groups(sae.run, found, MORAN, n_cards=1)
            cards = [
                Card(f"{group['name'].removesuffix(MORAN)}: latent {c['latent']}", [
                    Strip(c["plain"], f"top images: {c['alt']}", min(c["shown"] / ROW, 1.0)),
                    Strip(c["lit"], "the same, tinted where the latent fires", min(c["shown"] / ROW, 1.0)),
                ], right=f"I = {c['moran']}") for group in groups for c in group["cards"]
            ]  # fmt: skip
            if cards:
                blocks += [Heading(title, sae.label), Cards(cards, columns=3)]
                break
    return blocks


def latents(runs: Sequence[Mapping[str, Any]], shown: int) -> Section:
    """Cards of the latents that ``evaluate.py`` chose, of each run that has ``groups`` of them."""
    few = (f"Of {shown} of the {len(runs)} runs: of those that differ only by seed the first. `detailed` and "
           "`detailed_seeds` of report.py show more.")  # fmt: skip
    folds: list[Fold] = []
    for run in (run for run in runs if run["groups"]):
        variance, l0 = run["metrics"]["explained_variance"], run["metrics"]["l0"]
        scores = f"explained variance {number(variance)}, L0 {number(l0, '.1f')}"
        blocks: list[Block] = []
        for group in run["groups"]:
            tint = " Violet to yellow from the weakest to the strongest patch of an image; silent patches are darker."
            blocks += [
                Heading(group["title"], group["about"] + (tint if group["heat"] else "")),
                Cards(cards_of(group), least=CARD),
            ]
        folds.append(Fold(run["label"], blocks, scores, run["colour"], open=len(folds) < 2))
    about = (f"Of each latent the nine {runs[0]['split']} images on which it is strongest, as the encoder sees them: "
             "the patches where it fires are outlined, the others a little darker.")  # fmt: skip
    return Section("Latents", shown < len(runs) and Note(few), about, folds)
