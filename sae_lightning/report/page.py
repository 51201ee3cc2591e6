"""Building the page: what ``evaluate.py`` stored, joined with the pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from omegaconf import OmegaConf
from safetensors import safe_open
from tqdm.auto import tqdm

from sae_lightning import __version__
from sae_lightning.benchmark.evaluate import SCORES, TOP_IMAGES
from sae_lightning.data import ImageData, load_images
from sae_lightning.features.ensure import fingerprint, tap_of
from sae_lightning.features.store import StoreError
from sae_lightning.report.figures import COLOURS, tradeoff, training_curves
from sae_lightning.report.strips import overlay, strip, thumbnail
from sae_lightning.saes.artefact import read_cfg

GROUPS = {
    "most used": "The latents that fire on the most patches.",
    "random": "Drawn at random from all latents that fire.",
    "purest": "Selected: the highest top-9 class purity among latents active on at least 10 images.",
}


def load_run(folder: Path) -> dict[str, Any]:
    """What the page shows of one evaluated run."""
    cfg = read_cfg(folder)
    scores = json.loads((folder / SCORES).read_text())
    result = json.loads((folder / "result.json").read_text())
    k = "–" if cfg["k"] is None else f"{cfg['k']:g} of {cfg['d_in']}"
    kind = "" if cfg["features"] == "patch" else cfg["features"]
    features = " ".join(filter(None, (kind, "" if cfg["layer"] is None else f"L{cfg['layer']}")))
    label = f"{cfg['backbone']} {kind}".strip() + f" · {cfg['variant']} ×{cfg['expansion']}"
    label += "" if cfg["k"] is None else f" k {cfg['k']:g}"
    return {
        "folder": folder, "name": folder.name, "cfg": cfg, "k": k, "label": label,
        "features": features, "seconds": result["seconds"],
        "metrics": scores["metrics"], "split": scores["split"], "n_images": scores["n_images"],
        "n_tokens": scores["n_tokens"], "store": scores["store"],
    }  # fmt: skip


def latent_groups(run: dict[str, Any], images: ImageData) -> list[dict[str, Any]]:
    """The cards of a run's chosen latents, grouped; strips are drawn from the images' own pixels."""
    with safe_open(run["folder"] / TOP_IMAGES, "pt") as file:
        names = file.metadata()["groups"].split("|")
        shown = json.loads(file.metadata()["image_ids"])
        rows, columns = map(int, file.metadata()["grid"].split("x"))
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    place = dict(zip(shown, images.index_of(list(shown.values())).tolist(), strict=True))  # rows of the store
    groups = []
    for g, name in enumerate(names):
        cards = []
        for i in (t["group"] == g).nonzero().squeeze(1).tolist():
            chosen = [place[str(int(x))] for x in t["images"][i] if x >= 0]
            if not chosen:
                continue
            pictures = [thumbnail(images[x]) for x in chosen]
            maps = t["maps"][i].float().numpy().reshape(-1, rows, columns)
            lit = [overlay(p, np.asarray(m), float(t["peak"][i])) for p, m in zip(pictures, maps, strict=False)]
            label, count = int(t["label"][i]), len(chosen)
            cards.append({
                "latent": int(t["latents"][i]), "plain": strip(pictures), "lit": strip(lit),
                "share": float(t["firing_share"][i]), "peak": float(t["peak"][i]),
                "fired": int(t["images_fired"][i]), "shown": count,
                "makeup": f"{round(float(t['purity'][i]) * count)}/{count} {images.class_names[label]}",
                "purity": float(t["purity"][i]),
                "alt": ", ".join(images.class_names[images.labels[x]] for x in chosen),
            })  # fmt: skip
        groups.append({"name": name, "about": GROUPS.get(name, ""), "cards": cards})
    return groups


def pictures(run: dict[str, Any]) -> ImageData | None:
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


def build(folders: list[Path], out: Path) -> Path:
    """Write the page over evaluated runs to ``out``; StoreError when a run's pictures have changed since."""
    missing = [f.name for f in folders if not ((f / SCORES).is_file() and (f / TOP_IMAGES).is_file())]
    if missing:
        raise FileNotFoundError(f"These runs have no scores yet: {', '.join(missing)}. Run evaluate.py first.")
    runs = [load_run(folder) for folder in folders]
    for i, run in enumerate(tqdm(runs, desc="Drawing", unit="run", leave=False)):
        run["colour"] = COLOURS[i % len(COLOURS)]
        images = pictures(run)
        run["groups"] = latent_groups(run, images) if images is not None else []
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("sae_lightning.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")
    tiny = any("(tiny)" in run["cfg"]["backbone"] for run in runs)
    html = template.render(
        runs=runs, curves=training_curves(runs), tradeoff=tradeoff(runs), tiny=tiny, version=__version__
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(html)
    os.replace(partial, out)
    return out
