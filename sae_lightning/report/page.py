"""Building the page: what ``evaluate.py`` stored, joined with the pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sae_lightning.files import write_text
from sae_lightning.rendering.figures import COLOURS
from sae_lightning.rendering.page import render
from sae_lightning.report import figures
from sae_lightning.report.benchmark import (
    MAIN,
    Scored,
    by_backbone,
    raw_note,
    scored_runs,
    scores_csv,
    scores_markdown,
    table,
    topics,
)
from sae_lightning.report.figures import encoding, tradeoff, training_curves
from sae_lightning.report.latents import audit, band_grid, latent_groups, pictures
from sae_lightning.report.monoloss import (
    Group,
    as_csv,
    as_markdown,
    first_of_settings,
    group_profile,
    groups_of,
    profiles,
    rows,
    shown,
)
from sae_lightning.runs.identity import monoloss_of
from sae_lightning.runs.results import PAGE, RECORD, read_result
from sae_lightning.runs.run import FILES, SCORES, TOP_IMAGES
from sae_lightning.saes.artefact import ArtefactError, read_cfg, read_json, tensor_names


def applications(folders: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """The applications of the runs ``folders``, and those over several runs of the same parent folder.

    Each has a ``title``, the ``runs`` it speaks of, its ``headlines`` and ``href``: its page, copied into a folder of
    ``<out>-pages`` beside the report ``out``. Results older than their run's SAE are left out.
    """
    found: list[tuple[str, Path | None, Path]] = []
    found += [(run.name, run / "sae.safetensors", run / "apps") for run in folders]
    found += [("several runs", None, parent / "apps") for parent in dict.fromkeys(run.parent for run in folders)]
    gathered = []
    for name, weights, folder in found:
        for record in sorted(folder.glob(f"*/{RECORD}")):
            old = weights is not None and record.stat().st_mtime < weights.stat().st_mtime
            if old or not (record.parent / PAGE).is_file():
                continue
            result = read_result(record.parent)
            pages = out.with_name(f"{out.stem}-pages") / f"{name.replace(' ', '-')}-{result.app}"
            pages.mkdir(parents=True, exist_ok=True)
            for page in record.parent.glob("*.html"):  # its page may link to others
                shutil.copyfile(page, pages / page.name)
            gathered.append({
                "title": result.title, "runs": name, "headlines": result.headlines,
                "href": f"{pages.parent.name}/{pages.name}/{PAGE}",
            })  # fmt: skip
    return gathered


def section(saes: Sequence[Scored]) -> dict[str, Any] | None:
    """What the page shows of M1–M7 but for pictures; None without SAEs. Figures without rows are empty."""
    if not saes:
        return None
    of = encoding(saes)
    return {
        "saes": saes, "legend": of.legend(), "main": table(saes, MAIN, of.of_backbones()),
        "notes": {title: raw_note(members) for title, members in by_backbone(saes).items()},
        "topics": [
            {"title": t.title, "about": t.about, "table": table(saes, t.columns, of.of_backbones())}
            for t in topics(saes)
        ],
        "moran": figures.moran(saes, of), "monosemanticity": figures.monosemanticity(saes, of),
        "dissociation": figures.dissociation(saes, of), "probing": figures.probing(saes, of),
        "recovery": figures.recovery(saes, of), "histograms": figures.histograms(saes, of),
    }  # fmt: skip


def files(saes: Sequence[Scored]) -> dict[str, str]:
    """The texts of visaebench.csv and visaebench.md; none without SAEs."""
    return {"visaebench.csv": scores_csv(saes), "visaebench.md": scores_markdown(saes)} if saes else {}


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
    html = render("report.html", {
        "runs": runs, "curves": training_curves(runs), "tradeoff": tradeoff(runs), "profiles": profiles(runs),
        "tiny": any("(tiny)" in run["cfg"]["backbone"] for run in runs), "shown": len(in_detail),
        "judges": {run["similarity"]["title"]: run["similarity"]["baseline"] for run in runs},
        "comparisons": [comparison(group, i < grids) for i, group in enumerate(groups)],
        "visaebench": section(saes), "audit": audit(saes) if detailed else [],
        "applications": applications(folders, out),
    })  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    if groups:
        write_text(out.parent / "monoloss.csv", as_csv(groups))
        write_text(out.parent / "monoloss.md", as_markdown(groups))
    for name, text in files(saes).items():
        write_text(out.parent / name, text)
    write_text(out, html)
    return out
