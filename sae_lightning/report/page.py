"""Building the page: what ``evaluate.py`` stored, joined with the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf
from tqdm.auto import tqdm

from sae_lightning import __version__
from sae_lightning.benchmark.evaluate import FILES, SCORES
from sae_lightning.benchmark.latents import LATENTS, TOP_IMAGES, read_tensors, tensor_names
from sae_lightning.data import ImageData, load_images
from sae_lightning.features.ensure import fingerprint, tap_of
from sae_lightning.features.store import StoreError
from sae_lightning.report import visaebench
from sae_lightning.report.applications import applications
from sae_lightning.report.bands import band_grid
from sae_lightning.report.figures import COLOURS, tradeoff, training_curves
from sae_lightning.report.pairs import (
    Group,
    as_csv,
    as_markdown,
    first_of_settings,
    groups_of,
    rows,
    shown,
)
from sae_lightning.report.profiles import group_profile, profiles
from sae_lightning.report.strips import heat, overlay, strip, thumbnail
from sae_lightning.report.visaebench_tables import NOTHING, Scored, by_backbone, number, scored_runs
from sae_lightning.saes.artefact import ArtefactError, read_cfg, read_json, write_text
from sae_lightning.training.identity import monoloss_of

GROUPS = {
    "most used": "The latents that fire on the most patches.",
    "random": "Drawn at random from all latents that fire.",
    "purest": "Selected: the highest top-9 class purity among latents active on at least 10 images.",
    "high Moran": "Drawn from the top 5 % of Moran's I among the latents that have one: connected regions.",
    "mean Moran": "The latents whose Moran's I is nearest to the mean.",
    "low Moran": "Drawn from the lowest 5 % of Moran's I: scattered patches.",
}
MORAN = " Moran"  # how the names of those groups end
AUDITED = 8  # backbones whose latents of high, mean and low Moran's I are set side by side


def load_run(folder: Path) -> dict[str, Any]:
    """What the page shows of one evaluated run."""
    cfg = read_cfg(folder)
    scores = read_json(folder / SCORES, f"make it anew: python evaluate.py runs={folder.name}")
    result = read_json(folder / "result.json", "train the run again")
    k = "–" if cfg["k"] is None else f"{cfg['k']:g} of {cfg['d_in']}"
    kind = "" if cfg["features"] == "patch" else cfg["features"]
    features = " ".join(filter(None, (kind, "" if cfg["layer"] is None else f"L{cfg['layer']}")))
    label = f"{cfg['backbone']} {kind}".strip() + f" · {cfg['variant']} ×{cfg['expansion']}"
    label += "" if cfg["k"] is None else f" k {cfg['k']:g}"
    weight, _ = monoloss_of(cfg["config"])
    return {
        "folder": folder, "name": folder.name, "cfg": cfg, "k": k, "title": label,
        "label": label + (f" + MonoLoss {weight:g}" if weight else ""),
        "features": features, "weight": weight, "seconds": result["seconds"],
        "metrics": scores["metrics"], "split": scores["split"], "n_images": scores["n_images"],
        "n_tokens": scores["n_tokens"], "store": scores["store"], "similarity": scores["similarity"],
    }  # fmt: skip


def latent_groups(
    run: Mapping[str, Any], images: ImageData, ends: str = "", n_cards: int | None = None, n_images: int | None = None
) -> list[dict[str, Any]]:
    """The cards of a run's chosen latents, grouped; strips are drawn from the images' own pixels.

    Only groups whose name ``ends`` so, with the first ``n_cards`` latents and ``n_images`` images of each.
    """
    t, metadata = read_tensors(run["folder"] / TOP_IMAGES)
    moran = read_tensors(run["folder"] / LATENTS)[0].get("moran")
    names, ids = metadata["groups"].split("|"), json.loads(metadata["image_ids"])
    height, width = map(int, metadata["grid"].split("x"))
    place = dict(zip(ids, images.index_of(list(ids.values())).tolist(), strict=True))  # rows of the store
    groups = []
    for g, name in enumerate(names):
        cards: list[dict[str, Any]] = []
        members = (t["group"] == g).nonzero().squeeze(1).tolist()
        if not name.endswith(ends) or not members:
            continue
        for i in members[:n_cards]:
            chosen = [place[str(int(x))] for x in t["images"][i] if x >= 0][:n_images]
            if not chosen:
                continue
            pictures = [thumbnail(images[x]) for x in chosen]
            maps = t["maps"][i].float().numpy().reshape(-1, height, width)
            peak = float(t["peak"][i])
            lit = [heat(p, m) if name.endswith(MORAN) else overlay(p, m, peak)
                   for p, m in zip(pictures, maps, strict=False)]  # fmt: skip
            label, count = int(t["label"][i]), len(chosen)
            cards.append({
                "latent": int(t["latents"][i]), "plain": strip(pictures), "lit": strip(lit),
                "share": float(t["firing_share"][i]), "peak": peak,
                "fired": int(t["images_fired"][i]), "shown": count,
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
    cfg = OmegaConf.create(run["cfg"]["config"])
    if cfg.data.source == "store":
        return None
    images = load_images(OmegaConf.to_container(cfg.data), run["split"])  # type: ignore[arg-type]
    if fingerprint(cfg, images, tap_of(cfg)) != run["store"]:
        raise StoreError(
            f"The images or the backbone of {run['name']} are not those it was scored on; evaluate it again."
        )
    return images if isinstance(images, ImageData) else None


def comparison(group: Group, grids: bool) -> dict[str, Any]:
    """What the page shows of one group: one table, one figure, and with ``grids`` pictures for each weight."""
    tables = [{row["title"]: row for row in rows(group, arm)} for arm in group.with_loss]
    return {
        "title": group.title, "seeds": len(group.without.runs), "figure": group_profile(group),
        "arms": [
            {"label": group.label(arm), "seeds": len(arm.runs), "grid": _grid(group.first_pair(arm)) if grids else []}
            for arm in group.with_loss
        ],
        "rows": [
            {"title": title, "without": shown(row["without"]),
             "arms": [(shown(t[title]["with"]), shown(t[title]["difference"], sign=True)) for t in tables]}
            for title, row in tables[0].items() if all(title in t for t in tables)
        ],
    }  # fmt: skip


def _grid(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The band grid of a run without and one with MonoLoss; empty where there are no pictures."""
    without, with_loss = pictures(pair[0]), pictures(pair[1])
    return [] if without is None or with_loss is None else band_grid(pair, (without, with_loss))


def audit(saes: Sequence[Scored]) -> list[dict[str, Any]]:
    """A latent each of high, mean and low Moran's I of one SAE a backbone, the first that has them [App. H, Fig. 5]."""
    rows = []
    for title, members in list(by_backbone(saes).items())[:AUDITED]:
        for sae in members:
            found = pictures(sae.run)
            cells = [] if found is None else latent_groups(sae.run, found, MORAN, n_cards=1, n_images=6)
            cells = [cell for cell in cells if cell["cards"]]
            if cells:
                rows.append({"title": title, "label": sae.label, "cells": cells})
                break
    return rows


def load_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """All runs of the page, with colours and different labels; FileNotFoundError names those that lack scores."""
    missing = [f.name for f in folders if not ((f / SCORES).is_file() and (f / TOP_IMAGES).is_file())]
    if missing:
        raise FileNotFoundError(f"These runs have no scores yet: {', '.join(missing)}. Run evaluate.py first.")
    old = [f.name for f in folders if not all((f / name).is_file() for name in FILES)]
    if old:
        raise FileNotFoundError(
            f"These runs were scored without MonoScore and purity: {', '.join(old)}. Evaluate them again: evaluate.py."
        )
    damaged = [f.name for f in folders if not all(tensor_names(f / name) for name in FILES if name != SCORES)]
    if damaged:
        raise ArtefactError(
            f"Files with latents of these runs are damaged: {', '.join(damaged)}. Evaluate them again: evaluate.py."
        )
    runs = [load_run(folder) for folder in folders]
    labels = [run["label"] for run in runs]
    for i, run in enumerate(runs):
        run["colour"] = COLOURS[i % len(COLOURS)]
        run["label"] += f", seed {run['cfg']['seed']}" if labels.count(labels[i]) > 1 else ""
    return runs


def build(folders: list[Path], out: Path, detailed: int = 8, detailed_seeds: int = 1, grids: int = 4) -> Path:
    """Write the page over evaluated runs to ``out``, and beside it the tables of M1–M7 and of MonoLoss, and the pages
    of applications, as there are.

    Latents are drawn for at most ``detailed`` runs, ``detailed_seeds`` of those that differ only by seed; band grids
    for the first ``grids`` groups. FileNotFoundError when a run has no scores, StoreError when its pictures have
    changed since, ValueError when runs that belong together were judged differently.
    """
    runs = load_runs(folders)
    in_detail = first_of_settings(runs, detailed_seeds, detailed)
    for run in tqdm(runs, desc="Drawing", unit="run", leave=False):
        images = pictures(run) if run["name"] in in_detail else None
        run["groups"] = latent_groups(run, images) if images is not None else []
    groups, saes = groups_of(runs), scored_runs(runs)
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("sae_lightning.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters["figure"] = lambda value, form=".3f": NOTHING if jinja2.is_undefined(value) else number(value, form)
    html = pages.get_template("report.html").render(
        runs=runs, curves=training_curves(runs), tradeoff=tradeoff(runs), version=__version__, profiles=profiles(runs),
        tiny=any("(tiny)" in run["cfg"]["backbone"] for run in runs), shown=len(in_detail),
        judges={run["similarity"]["title"]: run["similarity"]["baseline"] for run in runs},
        comparisons=[comparison(group, i < grids) for i, group in enumerate(groups)],
        visaebench=visaebench.section(saes), audit=audit(saes) if detailed else [],
        applications=applications(folders, out),
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    if groups:
        write_text(out.parent / "monoloss.csv", as_csv(groups))
        write_text(out.parent / "monoloss.md", as_markdown(groups))
    for name, text in visaebench.files(saes).items():
        write_text(out.parent / name, text)
    write_text(out, html)
    return out
